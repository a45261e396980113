# SPDX-License-Identifier: Apache-2.0
"""Index, configs and auxiliary files of an output directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.emit.configs import declare, with_quantization
from verifier.checkpoint import INDEX, Checkpoint, open_checkpoint
from verifier.manifest import MANIFEST
from verifier.schemes import Engine

AUXILIARY_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
WRITTEN_HERE = {INDEX, "config.json", "hf_quant_config.json", MANIFEST}
MAX_AUXILIARY_BYTES = 200_000_000


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file, two-space indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_index(folder: Path, files: Iterable[str]) -> None:
    """Write ``model.safetensors.index.json`` from the shards on disk."""
    ckpt = open_checkpoint(folder)
    shards = set(files)
    weight_map = {t.name: t.file for t in ckpt.tensors.values() if t.file in shards}
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": ckpt.nbytes}, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_configs(
    folder: Path,
    config: Mapping[str, Any],
    *,
    kv_cache: bool = False,
    engines: Iterable[Engine] = (),
) -> list[str]:
    """Write config.json and hf_quant_config.json, for these engines, from the tensors on disk and
    the config that is kept; return their names.

    An old hf_quant_config.json is removed where the format has none.
    """
    ckpt = replace(open_checkpoint(folder), config=config)
    inline, nested = declare(ckpt, kv_cache=kv_cache, engines=engines)
    write_json(folder / "config.json", with_quantization(config, inline))
    if nested is None:
        (folder / "hf_quant_config.json").unlink(missing_ok=True)
        return ["config.json"]
    write_json(folder / "hf_quant_config.json", nested)
    return ["config.json", "hf_quant_config.json"]


def copy_auxiliary_files(folder: Path, origins: Iterable[Checkpoint]) -> list[str]:
    """Copy tokenizer, generation config, templates, processor files and Python files; return their
    names. The first origin that has a file provides it.
    """
    copied: list[str] = []
    for ckpt in origins:
        for name, size in ckpt.files.items():
            if not _is_auxiliary(name) or name in copied or size > MAX_AUXILIARY_BYTES:
                continue
            (folder / name).write_bytes(ckpt.source.read(name, 0, size).tobytes())
            copied.append(name)
    return copied


def _is_auxiliary(name: str) -> bool:
    """Whether a file fits any weights; an index of another name lists shards that are not here."""
    if name in WRITTEN_HERE or name.startswith(".") or name.endswith(".index.json"):
        return False
    return name.endswith(AUXILIARY_SUFFIXES) or name.upper().startswith("LICENSE")
