# SPDX-License-Identifier: Apache-2.0
"""Sound weights take the fast comparison: none is decoded whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.quantized import QuantizedCheckpoint
from verifier.reconstruction.cause import near_base
from verifier.reconstruction.rows import WeightRows
from verifier.rules.comparing import CheckpointPair
from verifier.rules.context import Context
from verifier.schemes import FORMATS
from verifier.selftest.editor import RawShard, read_shard, write_shard

exporter = pytest.importorskip("exporter", exc_type=ImportError)
codecs = pytest.importorskip("exporter.codecs", exc_type=ImportError)
torch = pytest.importorskip("torch")

DTYPES = {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"}

GOLDENS = ("gpt-oss-tiny", "minimax-m3-tiny", "qwen3-moe-tiny")
RECIPES = ("nvfp4_default", "nvfp4_experts_only_mse", "mxfp8_default", "fp8_default")
PRUNED = (np.s_[:], np.s_[:64], np.s_[:, 32:64])
"""What is zero in the experts 0, 1 and 2 of a layer: all, rows, groups of a row."""


@pytest.mark.parametrize("golden", GOLDENS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_sound_weight_of_a_golden_is_decoded_whole(
    golden: str, recipe: str, tmp_path: Path
) -> None:
    base = ROOT / "goldens" / golden / "bf16"
    exporter.export(base, tmp_path / "out", recipe=recipe, input_scale="one", engine="none")
    slow, count = decoded_whole(tmp_path / "out", base)
    assert slow == [] and count > 50


@pytest.mark.parametrize("recipe", [*RECIPES, "fp8_block128", "w4a16_nvfp4_experts_only"])
def test_no_pruned_weight_is_decoded_whole(recipe: str, tmp_path: Path) -> None:
    base, zeroed = tmp_path / "base", 0
    shutil.copytree(ROOT / "goldens" / "minimax-m3-tiny" / "bf16", base)
    for file in base.glob("*.safetensors"):
        shard = read_shard(file)
        for name, (dtype, shape, data) in shard.entries.items():
            expert = name.partition(".experts.")[2].partition(".")[0]
            if expert in ("0", "1", "2"):
                values = np.frombuffer(data, np.uint16).reshape(shape).copy()
                values[PRUNED[int(expert)]] = 0
                shard.entries[name] = (dtype, shape, values.tobytes())
                zeroed += 1
        write_shard(file, shard)
    exporter.export(base, tmp_path / "out", recipe=recipe, input_scale="one", engine="none")
    slow, count = decoded_whole(tmp_path / "out", base)
    assert zeroed >= 18
    assert slow == [] and count > 50


def decoded_whole(path: Path, base: Path) -> tuple[list[str], int]:
    """Return the quantized weights that the fast comparison leaves, and how many there are."""
    ctx = Context.of(open_checkpoint(path), open_checkpoint(base))
    assert isinstance(ctx.base, QuantizedCheckpoint)
    pair = CheckpointPair(ctx.candidate, ctx.base, ctx.payload)
    quantized = ctx.candidate.quantized_modules
    slow = []
    for module in quantized:
        fmt = ctx.candidate.format_of(module)
        assert fmt is not None
        if near_base(pair, module, fmt) is None:
            slow.append(module.name)
    return slow, len(quantized)


def test_no_weight_of_a_fused_group_of_real_shape_is_decoded_whole(tmp_path: Path) -> None:
    # The partner with the smaller maximum: its own would give finer scales than the group's.
    generator = torch.Generator().manual_seed(0)
    weights = {
        leaf: (torch.randn(3072, 6144, generator=generator) * size).bfloat16()
        for leaf, size in (("gate_proj", 0.03), ("up_proj", 0.011))
    }
    shared = torch.stack([codecs.amax(w, "nvfp4") for w in weights.values()]).amax()
    stored, plain = {}, {}
    for leaf, weight in weights.items():
        name = f"a.mlp.experts.0.{leaf}"
        plain[f"{name}.weight"] = ("BF16", (3072, 6144), raw(weight))
        for part, value in codecs.encode(weight, "nvfp4", amax=shared).items():
            stored[f"{name}.{part}"] = (DTYPES[part], tuple(value.shape), raw(value))
    for folder, entries in (("out", stored), ("base", plain)):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "model.safetensors", RawShard({}, entries))
        (tmp_path / folder / "config.json").write_text("{}")
    declared = {"quant_algo": "NVFP4", "quant_method": "modelopt"}
    config = json.dumps({"quantization_config": declared})
    (tmp_path / "out" / "config.json").write_text(config)
    assert decoded_whole(tmp_path / "out", tmp_path / "base") == ([], 2)
    checkpoint = open_checkpoint(tmp_path / "out")
    scale = checkpoint.tensors["a.mlp.experts.0.up_proj.weight_scale"]
    with (tmp_path / "out" / scale.file).open("r+b") as handle:
        handle.seek(scale.offset + 5 * 384)
        handle.write(bytes([0x70] * 384))  # one row's scales, larger than any of this weight
    slow, _ = decoded_whole(tmp_path / "out", tmp_path / "base")
    assert slow == ["a.mlp.experts.0.up_proj"]


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 1), (0.5, 2), (200.0, 2)])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_a_base_is_read_once_where_the_stored_scale_covers_it(
    fmt: str, scale: float, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    parts = codecs.encode(weight, fmt)
    if fmt == "nvfp4":
        parts["weight_scale_2"] = parts["weight_scale_2"] * scale
    dtypes = {"weight": "U8" if fmt == "nvfp4" else "F8_E4M3", "weight_scale_2": "F32"}
    dtypes["weight_scale"] = "F8_E4M3" if fmt == "nvfp4" else "U8"
    stored = {f"a.{k}": (dtypes[k], tuple(v.shape), raw(v)) for k, v in parts.items()}
    plain = {"a.weight": ("BF16", (64, 64), raw(weight))}
    for folder, entries in (("out", stored), ("base", plain)):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "model.safetensors", RawShard({}, entries))
    declared = {"quant_algo": fmt.upper(), "quant_method": "modelopt"}
    (tmp_path / "out" / "config.json").write_text(json.dumps({"quantization_config": declared}))
    (tmp_path / "base" / "config.json").write_text("{}")
    base = open_checkpoint(tmp_path / "base")
    ctx = Context.of(open_checkpoint(tmp_path / "out"), base)
    assert isinstance(ctx.base, QuantizedCheckpoint)
    (module,) = ctx.candidate.quantized_modules
    known = ctx.candidate.format_of(module)
    assert known is not None
    lengths: list[int] = []
    read = base.source.read_into

    def counted(name: str, offset: int, out: Any) -> None:
        lengths.append(out.size)
        read(name, offset, out)

    monkeypatch.setattr(base.source, "read_into", counted)
    near_base(CheckpointPair(ctx.candidate, ctx.base, ctx.payload), module, known)
    assert sum(lengths) == weight.numel() * 2 * (passes if fmt == "nvfp4" else 1)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_yardstick_is_the_weights_own_where_the_scale_is_not_float32(
    dtype: str, tmp_path: Path
) -> None:
    weight = (torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) * 1e-5).bfloat16()
    scale = torch.tensor(2.0**-23)
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    value = scale if dtype == "F32" else scale.bfloat16()
    stored = {"a.weight": ("F8_E4M3", (64, 64), raw(codes))}
    stored["a.weight_scale"] = (dtype, (), raw(value))
    plain = {"a.weight": ("BF16", (64, 64), raw(weight))}
    for folder, entries in (("out", stored), ("base", plain)):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "model.safetensors", RawShard({}, entries))
        (tmp_path / folder / "config.json").write_text("{}")
    ctx = Context.of(open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "base"))
    assert isinstance(ctx.base, QuantizedCheckpoint)
    module, of_base = ctx.candidate.modules["a"], ctx.base.modules["a"]
    d, defined = WeightRows(ctx.candidate, module, ctx.base, of_base).distance(FORMATS["fp8"])
    assert defined
    assert d.by_max / d.size < 0.04**2  # 1.0 as amax: 0.1 and more


def raw(value: Any) -> bytes:
    """Return the bytes of a tensor."""
    return bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy())
