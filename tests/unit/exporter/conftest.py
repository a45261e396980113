# SPDX-License-Identifier: Apache-2.0
"""Shared exports of the small checkpoints, and safetensors read and written by hand: no code of
ours in between.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

import exporter
from tests.paths import TESTS
from verifier.manifest import Manifest

MODELOPT = TESTS / "data" / "modelopt"
NUMPY = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "U8": np.uint8,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


class Raw(NamedTuple):
    """One tensor as it stands in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, NUMPY[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Made:
    """An exported folder and the manifest that the export returned."""

    path: Path
    manifest: Manifest


class Kit:
    """Safetensors folders by hand."""

    data = MODELOPT
    qwen = MODELOPT / "src_qwen3moe"
    llama = MODELOPT / "src_llama"
    qwen_nvfp4 = MODELOPT / "qwen3moe_nvfp4_experts_max"
    llama_mxfp8 = MODELOPT / "llama_mxfp8"

    @staticmethod
    def raw(values: np.ndarray) -> Raw:
        names = {np.dtype(v): k for k, v in NUMPY.items()}
        return Raw(names[values.dtype], values.shape, values.tobytes())

    @staticmethod
    def bf16(*shape: int, seed: int = 0) -> Raw:
        values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.02
        return Kit.raw(values.astype(ml_dtypes.bfloat16))

    @staticmethod
    def header(file: Path) -> dict[str, object]:
        with file.open("rb") as handle:
            return json.loads(handle.read(int.from_bytes(handle.read(8), "little")))

    @staticmethod
    def read(folder: Path) -> dict[str, Raw]:
        """Return every tensor of a folder; a name that two files hold fails."""
        found: dict[str, Raw] = {}
        for file in sorted(folder.glob("*.safetensors")):
            blob = file.read_bytes()
            start = 8 + int.from_bytes(blob[:8], "little")
            for name, entry in json.loads(blob[8:start]).items():
                if name != "__metadata__":
                    low, high = entry["data_offsets"]
                    assert name not in found, f"{name} stands twice in {folder}"
                    found[name] = Raw(
                        entry["dtype"], tuple(entry["shape"]), blob[start + low : start + high]
                    )
        return found

    @staticmethod
    def write(file: Path, tensors: Mapping[str, Raw]) -> Path:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, raw in tensors.items():
            header[name] = {
                "dtype": raw.dtype,
                "shape": list(raw.shape),
                "data_offsets": [offset, offset + len(raw.data)],
            }
            offset += len(raw.data)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for raw in tensors.values():
                handle.write(raw.data)
        return file

    @staticmethod
    def folder(path: Path, tensors: Mapping[str, Raw], config: Mapping[str, object]) -> Path:
        """Write a one-shard checkpoint."""
        path.mkdir(parents=True)
        Kit.write(path / "model.safetensors", tensors)
        (path / "config.json").write_text(json.dumps(config))
        return path

    @staticmethod
    def edit(source: Path, path: Path, change: Callable[[dict[str, Raw]], object]) -> Path:
        """Copy a checkpoint to one shard without an index, its tensors changed."""
        tensors = Kit.read(source)
        change(tensors)
        path.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix != ".safetensors" and file.name not in (
                "model.safetensors.index.json",
                "ckptgate_manifest.json",
            ):
                shutil.copy(file, path)
        Kit.write(path / "model.safetensors", tensors)
        return path

    @staticmethod
    def config(folder: Path, name: str = "config.json") -> dict[str, object]:
        return json.loads((folder / name).read_text())

    @staticmethod
    def stats(file: Path, maxima: Mapping[str, float]) -> Path:
        """Write a stats file with one float32 scalar for each module."""
        return Kit.write(
            file, {f"{m}.input_amax": Kit.raw(np.array(v, np.float32)) for m, v in maxima.items()}
        )


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


def _export(out: Path, source: Path, **options: object) -> Made:
    return Made(out, exporter.export(source, out, **options))


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="session")
def nvfp4(exports: Path) -> Made:
    """Export the Qwen3-MoE source with its experts in NVFP4, everything else BF16."""
    return _export(exports / "qwen-nvfp4", Kit.qwen, recipe="nvfp4_experts_only", input_scale="one")


@pytest.fixture(scope="session")
def llama_mxfp8(exports: Path) -> Made:
    """Export the Llama source in MXFP8."""
    return _export(exports / "llama-mxfp8", Kit.llama, recipe="mxfp8_default")


@pytest.fixture(scope="session")
def vendor(exports: Path) -> Made:
    """Export the Qwen3-MoE source in MXFP8: what a vendor would publish."""
    return _export(exports / "qwen-mxfp8", Kit.qwen, recipe="mxfp8_default")


@pytest.fixture(scope="session")
def mixed(exports: Path, vendor: Made) -> Made:
    """Export the source's experts in NVFP4 onto the vendor's MXFP8 checkpoint."""
    return _export(exports / "qwen-mixed", Kit.qwen, recipe="nvfp4_experts_only", onto=vendor.path)


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Qwen3-MoE source of 51 MB: 2 layers, 64 experts of 3 x 256 x 256."""
    hidden, experts, layers, vocab = 256, 64, 2, 512
    values = np.random.default_rng(7).standard_normal(hidden * hidden * 5).astype(np.float32) * 0.02
    pool = values.astype(ml_dtypes.bfloat16)
    tensors: dict[str, Raw] = {}

    def add(name: str, *shape: int) -> None:
        start = 131 * len(tensors) % (hidden * hidden * 3)
        tensors[f"{name}.weight"] = Kit.raw(
            pool[start : start + int(np.prod(shape))].reshape(shape)
        )

    add("model.embed_tokens", vocab, hidden)
    for i in range(layers):
        head = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{head}.{norm}", hidden)
        for leaf, out in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)):
            add(f"{head}.self_attn.{leaf}", out, hidden)
        add(f"{head}.self_attn.o_proj", hidden, 128)
        for leaf in ("q_norm", "k_norm"):
            add(f"{head}.self_attn.{leaf}", 32)
        add(f"{head}.mlp.gate", experts, hidden)
        for e in range(experts):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                add(f"{head}.mlp.experts.{e}.{leaf}", hidden, hidden)
    add("model.norm", hidden)
    add("lm_head", vocab, hidden)
    config = Kit.config(Kit.qwen) | {
        "hidden_size": hidden,
        "num_local_experts": experts,
        "num_experts": experts,
        "moe_intermediate_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
    }
    return Kit.folder(tmp_path_factory.mktemp("big") / "source", tensors, config)
