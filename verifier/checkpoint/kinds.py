# SPDX-License-Identifier: Apache-2.0
"""Names a directory that holds something other than a safetensors checkpoint, and what to do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from verifier.checkpoint.header import is_lfs_pointer, read_json
from verifier.checkpoint.index import INDEX
from verifier.checkpoint.source import Source
from verifier.errors import NotACheckpointError
from verifier.text import counted, listed, printable

SAFETENSORS = ".safetensors"
ADAPTER = "adapter_config.json"
PIPELINE = "model_index.json"


@dataclass(frozen=True, slots=True)
class OtherKind:
    """A kind of weights that is not read: its file name endings, what it is, and what to do."""

    endings: tuple[str, ...]
    description: str
    advice: str


OTHER_KINDS = (
    OtherKind(
        (".gguf",),
        "a GGUF model of llama.cpp",
        "give the safetensors checkpoint that it was converted from",
    ),
    OtherKind(
        (".distcp", "zero_to_fp32.py"),
        "a distributed training checkpoint",
        "convert it to safetensors with the framework that wrote it",
    ),
    OtherKind(
        (".bin", ".pt", ".pth", ".ckpt"),
        "PyTorch weights, not safetensors",
        "load the model with transformers and call save_pretrained(OUT), which writes safetensors",
    ),
    OtherKind(
        (".h5", ".msgpack", ".onnx", ".engine", ".tflite", ".nemo"),
        "weights in a format other than safetensors",
        "give the safetensors checkpoint that they were made from",
    ),
)
"""In the order in which they are looked for: the first one with a file names the directory."""


def require_checkpoint(source: Source, files: Mapping[str, int]) -> None:
    """Raise `NotACheckpointError` where a directory holds no safetensors checkpoint.

    Args:
        source: the directory.
        files: the size of each of its files, as ``source.files()`` returns them.
    """
    shards = sorted(name for name in files if name.endswith(SAFETENSORS))
    linked = any(name.endswith(SAFETENSORS) for name in source.escaping)
    if shards:
        reason = _not_a_model(source, files) or _pointers(source, files, shards)
    elif INDEX in files or linked:
        reason = ""  # an index without its shards is a broken checkpoint; rules report it
    else:
        reason = _without_shards(source, files)
    if reason:
        raise NotACheckpointError(f"{source.uri}: {reason}", source.uri)


def _not_a_model(source: Source, files: Mapping[str, int]) -> str:
    """Return why the safetensors files of a directory are not a language model, or ''."""
    shards = [name for name in files if name.endswith(SAFETENSORS)]
    if ADAPTER in files and all(name.startswith("adapter") for name in shards):
        return _adapter(source, files)
    return _pipeline(source) if PIPELINE in files and "config.json" not in files else ""


def _adapter(source: Source, files: Mapping[str, int]) -> str:
    config, _ = read_json(source, ADAPTER, files[ADAPTER])
    base = config.get("base_model_name_or_path") if config else None
    of_base = f" of {printable(base, 100)}" if isinstance(base, str) and base else ""
    return (
        f"a LoRA adapter{of_base}, not a model; merge it into its base model "
        "(peft: merge_and_unload, then save_pretrained) and give the result"
    )


def _pipeline(source: Source) -> str:
    parts = source.checkpoint_directories()
    advice = f": {listed(parts, 4)}" if parts else ""
    return f"a diffusers pipeline; give the directory of one of its models{advice}"


def _pointers(source: Source, files: Mapping[str, int], shards: Sequence[str]) -> str:
    """Return that every shard is a Git LFS pointer, or ''."""
    if source.remote or not all(is_lfs_pointer(source, name, files[name]) for name in shards):
        return ""
    only = "its only shard is a Git LFS pointer"
    count = only if len(shards) == 1 else f"all {len(shards):,} shards are Git LFS pointers"
    return f"{count}, not tensors; `git lfs pull` downloads them"


def _without_shards(source: Source, files: Mapping[str, int]) -> str:
    """Return what a directory without any *.safetensors is."""
    if ADAPTER in files:
        return _adapter(source, files)
    if PIPELINE in files:
        return _pipeline(source)
    for kind in OTHER_KINDS:
        names = sorted(name for name in files if name.lower().endswith(kind.endings))
        names = [name for name in names if name not in _NOT_WEIGHTS]
        if names:
            return f"{kind.description} ({_first(names)}); {kind.advice}"
    below = source.checkpoint_directories()
    if below:
        return _parent(below)
    if not files:
        return "the directory is empty; give the one that holds config.json and *.safetensors"
    count = counted(len(files), "file")
    if "config.json" in files:
        return (
            f"a config without weights: no *.safetensors among its {count}; download the weights, "
            "or give the directory that holds them"
        )
    return (
        f"no *.safetensors among its {count} ({_first(sorted(files))}); give the directory that "
        "holds config.json and *.safetensors"
    )


_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def _first(names: Collection[str]) -> str:
    return listed((printable(name, 80) for name in names), 1)


def _parent(below: Sequence[str]) -> str:
    if len(below) == 1:
        return f"no checkpoint itself, but its directory {printable(below[0])} is one; give that"
    names = listed((printable(name, 100) for name in below), 4)
    return f"a directory of {counted(len(below), 'checkpoint')}, not one itself; give one: {names}"
