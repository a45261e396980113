# SPDX-License-Identifier: Apache-2.0
"""Defects of shards, index and auxiliary files: QC101 to QC111."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from verifier.findings import Where
from verifier.selftest.changes import edit_config, remove_files
from verifier.selftest.corruptor import MIXED, MXFP8, Change, add, defect, on
from verifier.selftest.editor import INDEX, CheckpointEditor, read_shard, write_shard
from verifier.selftest.pick import embedding, expert_of, norm, part, target

_LOST = "205 207 404"
"""Rules that report what is missing when a shard cannot be read."""


def _weight_map(ckpt: CheckpointEditor) -> dict[str, str]:
    weight_map: dict[str, str] = ckpt.json(INDEX)["weight_map"]
    return weight_map


def _set_entry(ckpt: CheckpointEditor, name: str, file: str) -> None:
    ckpt.edit_json(INDEX, lambda value: value["weight_map"].update({name: file}))


# QC101


@defect("QC101", on(traits="index shards"), also="205 207")
def shard_lost(ckpt: CheckpointEditor) -> Where:
    """Lose the last shard, which the index still names."""
    file = ckpt.shards[-1]
    ckpt.remove(file)
    return Where(next(n for n, f in _weight_map(ckpt).items() if f == file), file)


@defect("QC101", on(traits="index shards"), severity="warning")
def index_lost(ckpt: CheckpointEditor) -> Where:
    """Lose the index of several shards."""
    ckpt.remove(INDEX)
    return Where()


@defect("QC101", on(traits="index"))
def index_is_a_list(ckpt: CheckpointEditor) -> Where:
    """Write an index that is JSON, but not an object."""
    (ckpt.path / INDEX).write_text("[]")
    return Where(None, INDEX)


def _index_path(prefix: str) -> Change:
    """Name a shard by a path instead of its file name."""

    def change(ckpt: CheckpointEditor) -> Where:
        name = norm(ckpt)
        _set_entry(ckpt, name, f"{prefix}{_weight_map(ckpt)[name]}")
        return Where(name, INDEX)

    return change


add("QC101", "index-climbs-out", _index_path("../"), on(traits="index"), also="103")
add("QC101", "index-absolute-path", _index_path("/mnt/export/"), on(traits="index"), also="103")


# QC102


@defect("QC102", on(traits="index"))
def index_of_the_source(ckpt: CheckpointEditor) -> Where:
    """List a tensor of the source model that no shard contains."""
    name, file = "model.layers.0.mlp.experts.gate_up_proj", ckpt.shards[0]
    _set_entry(ckpt, name, file)
    return Where(name, file)


@defect("QC102", on(traits="index shards"))
def index_names_wrong_shard(ckpt: CheckpointEditor) -> Where:
    """Map a tensor to a shard that does not contain it."""
    name = norm(ckpt)
    wrong = next(f for f in ckpt.shards if f != _weight_map(ckpt)[name])
    _set_entry(ckpt, name, wrong)
    return Where(name, wrong)


@defect("QC102", on(traits="index"), also="103 201 205")
def renamed_in_shard_only(ckpt: CheckpointEditor) -> Where:
    """Rename a tensor in its shard, but not in the index."""
    name = norm(ckpt)
    file = ckpt.tensors()[name].file
    ckpt.rename({name: name.replace("layernorm", "norm")}, index=False)
    return Where(name, file)


# QC103


@defect("QC103")
def stray_copy_of_a_tensor(ckpt: CheckpointEditor) -> Where:
    """Leave a file of an older export that repeats a name with different values."""
    name = norm(ckpt)
    ckpt.add(name, ckpt.array(name) * 2, file="old-model.safetensors", index=False)
    return Where(name, max(ckpt.shards[-1], ckpt.tensors()[name].file))


@defect("QC103")
def overlay_of_a_shard(ckpt: CheckpointEditor) -> Where:
    """Leave a second copy of a shard in the directory."""
    file, overlay = ckpt.shards[0], "z-overlay.safetensors"
    (ckpt.path / overlay).write_bytes((ckpt.path / file).read_bytes())
    return Where(next(iter(read_shard(ckpt.path / file).entries)), overlay)


@defect("QC103", on(traits="index"))
def tensor_not_in_index(ckpt: CheckpointEditor) -> Where:
    """Drop one tensor from the index only."""
    name = norm(ckpt)
    ckpt.edit_json(INDEX, lambda value: value["weight_map"].pop(name))
    return Where(name, ckpt.tensors()[name].file)


@defect("QC103", on(traits="index"))
def stray_amax_file(ckpt: CheckpointEditor) -> Where:
    """Save the calibration's amax file next to the shards."""
    name = f"{norm(ckpt).removesuffix('.weight')}.input_quantizer._amax"
    ckpt.add(name, np.ones((), np.float32), file="amax.safetensors", index=False)
    return Where(name, "amax.safetensors")


# QC104


def _truncate(ckpt: CheckpointEditor, file: str, size: int) -> None:
    with (ckpt.path / file).open("r+b") as handle:
        handle.truncate(size)


@defect("QC104", also="207 302")
def truncated(ckpt: CheckpointEditor) -> Where:
    """End the upload of the last shard 100 bytes early."""
    tensors = [t for t in ckpt.tensors().values() if t.file == ckpt.shards[-1]]
    last = max(tensors, key=lambda t: t.offset)
    _truncate(ckpt, last.file, last.offset + last.nbytes - 100)
    return Where(last.name, last.file)


@defect("QC104", also=_LOST)
def cut_in_the_header(ckpt: CheckpointEditor) -> Where:
    """Keep only the first bytes of the last shard."""
    file = ckpt.shards[-1]
    _truncate(ckpt, file, 200)
    return Where(None, file)


@defect("QC104", also=_LOST)
def file_of_zeros(ckpt: CheckpointEditor) -> Where:
    """Fill the last shard with zeros: it was allocated, but never written."""
    file = ckpt.path / ckpt.shards[-1]
    file.write_bytes(bytes(file.stat().st_size))
    return Where(None, file.name)


@defect("QC104", also=f"{_LOST} 101")
def link_out_of_the_directory(ckpt: CheckpointEditor) -> Where:
    """Replace the first shard by a link to a file outside the directory."""
    file = ckpt.shards[0]
    outside = ckpt.path.parent / f"{ckpt.path.name}-{file}"
    (ckpt.path / file).rename(outside)
    (ckpt.path / file).symlink_to(Path("..") / outside.name)
    return Where(None, file)


# QC105 to QC109


@defect("QC105", severity="warning")
def trailing_bytes(ckpt: CheckpointEditor) -> Where:
    """Pad a shard at its end."""
    file = ckpt.shards[0]
    with (ckpt.path / file).open("ab") as handle:
        handle.write(bytes(16))
    return Where(None, file)


def _set_total_size(ckpt: CheckpointEditor, total: int) -> Where:
    ckpt.edit_json(INDEX, lambda value: value["metadata"].update({"total_size": total}))
    return Where(None, INDEX)


@defect("QC106", on(traits="index"), severity="warning")
def total_size_of_files(ckpt: CheckpointEditor) -> Where:
    """Sum the file sizes, headers included."""
    return _set_total_size(ckpt, sum((ckpt.path / f).stat().st_size for f in ckpt.shards))


@defect("QC106", on(traits="index"), severity="warning")
def total_size_of_source(ckpt: CheckpointEditor) -> Where:
    """Keep the ``total_size`` of a larger source model."""
    return _set_total_size(ckpt, 1000 * ckpt.tensors()[embedding(ckpt)].nbytes)


def _header_length(length: int) -> Change:
    """Pad the header of the first shard with spaces to a length."""

    def change(ckpt: CheckpointEditor) -> Where:
        file = ckpt.shards[0]
        raw = (ckpt.path / file).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = raw[8:end].rstrip().ljust(length)
        if len(header) != length:
            raise ValueError(f"{file}: its header takes {len(header)} bytes without padding")
        (ckpt.path / file).write_bytes(length.to_bytes(8, "little") + header + raw[end:])
        return Where(None, file)

    return change


add("QC107", "header-that-clients-truncate", _header_length(99_997), severity="warning")
add("QC107", "header-of-26-mb", _header_length(26_000_000), on(MXFP8), severity="warning")
add("QC107", "header-of-91-mb", _header_length(91_000_000), on(MIXED), severity="warning")


def _metadata(metadata: dict[str, str]) -> Change:
    """Replace the metadata of the first shard."""

    def change(ckpt: CheckpointEditor) -> Where:
        file = ckpt.shards[0]
        shard = read_shard(ckpt.path / file)
        shard.metadata = metadata
        write_shard(ckpt.path / file, shard)
        return Where(None, file)

    return change


add("QC109", "metadata-of-a-training-run", _metadata({"step": "4000"}), severity="warning")
add("QC109", "format-of-other-framework", _metadata({"format": "np"}), severity="warning")


# QC110

_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
add("QC110", "generation-config-lost", remove_files("generation_config.json"), on(needs="base"))
add("QC110", "vocabulary-lost", remove_files("tokenizer.json"), on(traits="tokenizer"))
add("QC110", "tokenizer-lost", remove_files(*_TOKENIZER), on(traits="tokenizer", needs="base"))
add(
    "QC110",
    "template-lost",
    remove_files("chat_template.jinja"),
    on(traits="tokenizer", needs="base"),
)


@defect("QC110")
def pointer_of_git_lfs(ckpt: CheckpointEditor) -> Where:
    """Leave a Git LFS pointer in place of a JSON file."""
    file = "generation_config.json"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4221\n"
    (ckpt.path / file).write_text(pointer)
    return Where(None, file)


@defect("QC110")
def code_not_uploaded(ckpt: CheckpointEditor) -> Where:
    """Name code in config.json that was not uploaded."""
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    edit_config(lambda config: config.update({"auto_map": auto_map}))(ckpt)
    return Where(None, "configuration_own.py")


@defect("QC110")
def import_not_uploaded(ckpt: CheckpointEditor) -> Where:
    """Upload the code that config.json names, but not what it imports."""
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    edit_config(lambda config: config.update({"auto_map": auto_map}))(ckpt)
    (ckpt.path / "configuration_own.py").write_text("from .rope_own import scaling\n")
    return Where(None, "rope_own.py")


# QC111


def _add_buffer(leaf: str) -> Change:
    """Save a calibration buffer with the weights."""
    name = part(leaf)
    return lambda ckpt: ckpt.add(name(ckpt), np.ones((), np.float32))


add("QC111", "amax-of-a-quantizer", _add_buffer("weight_quantizer._amax"))
add("QC111", "scale-of-a-quantizer", _add_buffer("weight_quantizer._double_scale"))


@defect("QC111", on(traits="experts"))
def amax_of_fused_experts(ckpt: CheckpointEditor) -> Where:
    """Save the quantizers of a layer's fused experts with the weights."""
    prefix = f"{expert_of(target(ckpt))[0]}.down_proj_weight_quantizers"
    first, *_ = [ckpt.add(f"{prefix}.{i}._amax", np.ones((), np.float32)) for i in range(3)]
    return first
