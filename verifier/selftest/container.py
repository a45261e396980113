# SPDX-License-Identifier: Apache-2.0
"""Defects of files and index: QC101 to QC111."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from verifier.selftest.corruptor import MIXED, MXFP8, Corruptor, edit, embedding, ids, norm
from verifier.selftest.edit import CONFIG, INDEX, Folder, Place, read_shard, write_shard

_INDEXED = frozenset({"index"})
_SHARDED = frozenset({"index", "shards"})


def _weight_map(folder: Folder) -> dict[str, str]:
    found: dict[str, str] = folder.json(INDEX)["weight_map"]
    return found


def _point(folder: Folder, name: str, file: Any) -> None:
    folder.edit_json(INDEX, lambda value: value["weight_map"].update({name: file}))


def shard_lost(folder: Folder) -> Place:
    """Lose the last shard, which the index still names."""
    file = folder.shards[-1]
    folder.remove(file)
    return Place(next(n for n, f in _weight_map(folder).items() if f == file), file)


def index_lost(folder: Folder) -> Place:
    """Lose the index of several shards: transformers finds none of them."""
    folder.remove(INDEX)
    return Place()


def index_is_list(folder: Folder) -> Place:
    """Write an index that is JSON, and no object."""
    (folder.path / INDEX).write_text("[]")
    return Place(None, INDEX)


def index_climbs(folder: Folder) -> Place:
    """Name a shard by a path with '..' in the index."""
    name = norm(folder)
    _point(folder, name, f"../{_weight_map(folder)[name]}")
    return Place(name, INDEX)


def index_absolute(folder: Folder) -> Place:
    """Name a shard by its path on the exporter's machine in the index."""
    name = norm(folder)
    _point(folder, name, f"/mnt/export/{_weight_map(folder)[name]}")
    return Place(name, INDEX)


def index_key_extra(folder: Folder) -> Place:
    """List a tensor of the source model that no shard holds."""
    name, file = "model.layers.0.mlp.experts.gate_up_proj", folder.shards[0]
    _point(folder, name, file)
    return Place(name, file)


def index_key_elsewhere(folder: Folder) -> Place:
    """Name another shard than the one that holds the tensor."""
    name = norm(folder)
    wrong = next(f for f in folder.shards if f != _weight_map(folder)[name])
    _point(folder, name, wrong)
    return Place(name, wrong)


def renamed_in_shard_only(folder: Folder) -> Place:
    """Rename a tensor in its shard and not in the index."""
    name = norm(folder)
    file = folder.tensors()[name].file
    folder.rename({name: name.replace("layernorm", "norm")}, index=False)
    return Place(name, file)


def stray_copy(folder: Folder) -> Place:
    """Leave a file of an older export that repeats a name, with other values."""
    name = norm(folder)
    folder.add(name, folder.array(name) * 2, file="old-model.safetensors", index=False)
    return Place(name, max(folder.shards[-1], folder.tensors()[name].file))


def stray_overlay(folder: Folder) -> Place:
    """Leave a shard in the folder twice, the second time as an overlay."""
    file = folder.shards[0]
    (folder.path / "z-overlay.safetensors").write_bytes((folder.path / file).read_bytes())
    return Place(next(iter(read_shard(folder.path / file).entries)), "z-overlay.safetensors")


def not_in_index(folder: Folder) -> Place:
    """Drop one tensor from the index only."""
    name = norm(folder)
    folder.edit_json(INDEX, lambda value: value["weight_map"].pop(name))
    return Place(name, folder.tensors()[name].file)


def stray_amax(folder: Folder) -> Place:
    """Save the calibration's amax file beside the shards, as safetensors."""
    name = f"{norm(folder).removesuffix('.weight')}.input_quantizer._amax"
    folder.add(name, np.ones((), np.float32), file="amax.safetensors", index=False)
    return Place(name, "amax.safetensors")


def _cut(folder: Folder, file: str, size: int) -> None:
    with (folder.path / file).open("r+b") as handle:
        handle.truncate(size)


def truncated(folder: Folder) -> Place:
    """End the upload of the last shard 100 bytes early."""
    last = max(
        (t for t in folder.tensors().values() if t.file == folder.shards[-1]),
        key=lambda t: t.offset,
    )
    _cut(folder, last.file, last.offset + last.nbytes - 100)
    return Place(last.name, last.file)


def cut_in_header(folder: Folder) -> Place:
    """Keep only the first bytes of the last shard."""
    file = folder.shards[-1]
    _cut(folder, file, 200)
    return Place(None, file)


def zeros(folder: Folder) -> Place:
    """Fill the last shard with zeros: it was allocated and never written."""
    file = folder.shards[-1]
    size = (folder.path / file).stat().st_size
    (folder.path / file).write_bytes(bytes(size))
    return Place(None, file)


def link_outside(folder: Folder) -> Place:
    """Replace the first shard by a link to a file outside the folder."""
    file = folder.shards[0]
    elsewhere = folder.path.parent / f"{folder.path.name}-{file}"
    (folder.path / file).rename(elsewhere)
    (folder.path / file).symlink_to(Path("..") / elsewhere.name)
    return Place(None, file)


def trailing(folder: Folder) -> Place:
    """Pad a shard at its end."""
    file = folder.shards[0]
    with (folder.path / file).open("ab") as handle:
        handle.write(bytes(16))
    return Place(None, file)


def size_of_files(folder: Folder) -> Place:
    """Sum file sizes, headers included, as ``total_size``."""
    total = sum((folder.path / f).stat().st_size for f in folder.shards)
    folder.edit_json(INDEX, lambda value: value["metadata"].update({"total_size": total}))
    return Place(None, INDEX)


def size_of_source(folder: Folder) -> Place:
    """Keep the ``total_size`` of a larger source model."""
    name = embedding(folder)
    total = 1000 * folder.tensors()[name].nbytes
    folder.edit_json(INDEX, lambda value: value["metadata"].update({"total_size": total}))
    return Place(None, INDEX)


def _header_of(length: int) -> Callable[[Folder], Place]:
    """Return a change that pads the header of the first shard with spaces to a length."""

    def apply(folder: Folder) -> Place:
        file = folder.shards[0]
        raw = (folder.path / file).read_bytes()
        old = int.from_bytes(raw[:8], "little")
        text = raw[8 : 8 + old].rstrip().ljust(length)
        if len(text) != length:
            raise ValueError(f"{file}: its header takes {len(text)} bytes without padding")
        (folder.path / file).write_bytes(length.to_bytes(8, "little") + text + raw[8 + old :])
        return Place(None, file)

    return apply


def _metadata(found: dict[str, str]) -> Callable[[Folder], Place]:
    """Return a change of the first shard's metadata."""

    def apply(folder: Folder) -> Place:
        file = folder.shards[0]
        shard = read_shard(folder.path / file)
        shard.metadata = found
        write_shard(folder.path / file, shard)
        return Place(None, file)

    return apply


def _without(*files: str) -> Callable[[Folder], Place]:
    """Return the loss of side files; the place is the first of them."""

    def apply(folder: Folder) -> Place:
        for file in files:
            folder.remove(file)
        return Place(None, files[0])

    return apply


def lfs_pointer(folder: Folder) -> Place:
    """Leave the pointer of Git LFS in place of a JSON file."""
    file = "generation_config.json"
    (folder.path / file).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4221\n"
    )
    return Place(None, file)


def code_not_uploaded(folder: Folder) -> Place:
    """Name code in config.json that nobody uploaded."""
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    folder.edit_json(CONFIG, lambda value: value.update({"auto_map": auto_map}))
    return Place(None, "configuration_own.py")


def import_not_uploaded(folder: Folder) -> Place:
    """Upload the code that config.json names, and not what it imports."""
    folder.edit_json(
        CONFIG,
        lambda value: value.update({"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}),
    )
    (folder.path / "configuration_own.py").write_text("from .rope_own import scaling\n")
    return Place(None, "rope_own.py")


_LOST = ids(
    "205 207 404"
)  # what a checkpoint misses whose only shard, or whose shard of a norm, cannot be read
CONTAINER: tuple[Corruptor, ...] = (
    Corruptor("QC101", "shard-lost", edit(shard_lost), traits=_SHARDED, also=ids("205 207")),
    Corruptor("QC101", "index-lost", edit(index_lost), traits=_SHARDED, severity="warning"),
    Corruptor("QC101", "index-is-a-list", edit(index_is_list), traits=_INDEXED),
    Corruptor("QC101", "index-climbs-out", edit(index_climbs), traits=_INDEXED, also=ids("103")),
    Corruptor(
        "QC101", "index-absolute-path", edit(index_absolute), traits=_INDEXED, also=ids("103")
    ),
    Corruptor("QC102", "index-of-the-source", edit(index_key_extra), traits=_INDEXED),
    Corruptor("QC102", "index-names-another-shard", edit(index_key_elsewhere), traits=_SHARDED),
    Corruptor(
        "QC102",
        "renamed-in-shard-only",
        edit(renamed_in_shard_only),
        traits=_INDEXED,
        also=ids("103 201 205"),
    ),
    Corruptor("QC103", "stray-copy-of-a-tensor", edit(stray_copy)),
    Corruptor("QC103", "overlay-of-a-shard", edit(stray_overlay)),
    Corruptor("QC103", "tensor-not-in-index", edit(not_in_index), traits=_INDEXED),
    Corruptor("QC103", "stray-amax-file", edit(stray_amax), traits=_INDEXED),
    Corruptor("QC104", "truncated", edit(truncated), also=ids("207 302")),
    Corruptor("QC104", "cut-in-the-header", edit(cut_in_header), also=_LOST),
    Corruptor("QC104", "file-of-zeros", edit(zeros), also=_LOST),
    Corruptor("QC104", "link-out-of-the-folder", edit(link_outside), also=_LOST | ids("101")),
    Corruptor("QC105", "bytes-after-the-last-tensor", edit(trailing), severity="warning"),
    Corruptor(
        "QC106", "total-size-of-files", edit(size_of_files), traits=_INDEXED, severity="warning"
    ),
    Corruptor(
        "QC106", "total-size-of-source", edit(size_of_source), traits=_INDEXED, severity="warning"
    ),
    Corruptor("QC107", "header-that-hub-clients-cut", edit(_header_of(99_997)), severity="warning"),
    Corruptor(
        "QC107", "header-of-26-MB", edit(_header_of(26_000_000)), formats=MXFP8, severity="warning"
    ),
    Corruptor(
        "QC107", "header-of-91-MB", edit(_header_of(91_000_000)), formats=MIXED, severity="warning"
    ),
    Corruptor(
        "QC109", "metadata-of-a-training-run", edit(_metadata({"step": "4000"})), severity="warning"
    ),
    Corruptor(
        "QC109",
        "format-of-another-framework",
        edit(_metadata({"format": "np"})),
        severity="warning",
    ),
    Corruptor(
        "QC110", "generation-config-lost", edit(_without("generation_config.json")), needs=("base",)
    ),
    Corruptor("QC110", "pointer-of-git-lfs", edit(lfs_pointer)),
    Corruptor("QC110", "code-not-uploaded", edit(code_not_uploaded)),
    Corruptor("QC110", "import-not-uploaded", edit(import_not_uploaded)),
    Corruptor(
        "QC110",
        "vocabulary-lost",
        edit(_without("tokenizer.json")),
        traits=frozenset({"tokenizer"}),
    ),
    Corruptor(
        "QC110",
        "tokenizer-lost",
        edit(_without("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")),
        needs=("base",),
        traits=frozenset({"tokenizer"}),
    ),
    Corruptor(
        "QC110",
        "template-lost",
        edit(_without("chat_template.jinja")),
        needs=("base",),
        traits=frozenset({"tokenizer"}),
    ),
)
