# SPDX-License-Identifier: Apache-2.0
"""Sources that are quantized already: decoded by numpy here, without any codec of the package, and
exported again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import exporter
import verifier
from exporter.recipes import Recipe
from verifier.cli.main import run
from verifier.errors import EncodeError, PlanError, UsageError

E4M3 = ml_dtypes.float8_e4m3fn
LINEAR = "_proj.weight"
Encoder = Callable[[np.ndarray], tuple[dict[str, np.ndarray], np.ndarray]]


def block_fp8(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Encode as DeepSeek-V3 does: one float32 scale a tile of 128x128. Return the tensors and what
    they mean.
    """
    out, in_ = w.shape
    scale = np.ones((-(-out // 128), -(-in_ // 128)), np.float32)
    wide = np.empty_like(w)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            tile = w[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            scale[i, j] = np.abs(tile).max() / np.float32(448)
            wide[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128] = scale[i, j]
    code = (w / wide).astype(E4M3)
    return {"weight": code, "weight_scale_inv": scale}, code.astype(np.float32) * wide


def mxfp8(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    power = np.ceil(np.log2(np.abs(w.reshape(w.shape[0], -1, 32)).max(-1) / 448)).astype(np.int32)
    wide = np.repeat(np.ldexp(np.float32(1), power), 32, axis=1).astype(np.float32)
    code = (w / wide).astype(E4M3)
    return {"weight": code, "weight_scale_inv": (power + 127).astype(np.uint8)}, code.astype(
        np.float32
    ) * wide


def mxfp4(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    power = np.ceil(np.log2(np.abs(w.reshape(w.shape[0], -1, 32)).max(-1) / 6)).astype(np.int32)
    wide = np.repeat(np.ldexp(np.float32(1), power), 32, axis=1).astype(np.float32)
    code = (w / wide).astype(ml_dtypes.float4_e2m1fn)
    nibble = code.view(np.uint8)
    packed = nibble[:, 0::2] | (nibble[:, 1::2] << 4)
    return {"weight_packed": packed, "weight_scale": (power + 127).astype(np.uint8)}, code.astype(
        np.float32
    ) * wide


def nvfp4_ct(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Encode as compressed-tensors does: the global scale is a divisor."""
    divisor = np.array([2688 / np.abs(w).max()], np.float32)
    scale = (np.abs(w.reshape(w.shape[0], -1, 16)).max(-1) * divisor / np.float32(6)).astype(E4M3)
    wide = np.repeat(scale.astype(np.float32) / divisor, 16, axis=1)
    code = (w / wide).astype(ml_dtypes.float4_e2m1fn)
    nibble = code.view(np.uint8)
    parts = {
        "weight_packed": nibble[:, 0::2] | (nibble[:, 1::2] << 4),
        "weight_scale": scale,
        "weight_global_scale": divisor,
        "input_global_scale": np.array([100.0], np.float32),
    }
    return parts, code.astype(np.float32) * wide


def float_ct(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Encode as compressed-tensors' float-quantized does, a BF16 scale for each row."""
    scale = (np.abs(w).max(1, keepdims=True) / np.float32(440)).astype(ml_dtypes.bfloat16)
    code = (w / scale.astype(np.float32)).astype(E4M3)
    return {"weight": code, "weight_scale": scale}, code.astype(np.float32) * scale.astype(
        np.float32
    )


CONFIGS: dict[Encoder, dict[str, object]] = {
    block_fp8: {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    },
    mxfp8: {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"]},
    mxfp4: {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "ignore": ["lm_head"],
    },
    nvfp4_ct: {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "ignore": ["lm_head"],
    },
    float_ct: {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
    },
}


def raw(kit, values: np.ndarray):
    names = {np.dtype(E4M3): "F8_E4M3", np.dtype(ml_dtypes.bfloat16): "BF16"}
    known = {np.dtype(np.uint8): "U8", np.dtype(np.float32): "F32"} | names
    return type(kit.bf16(1))(known[values.dtype], values.shape, values.tobytes())


def pair(kit, source: Path, path: Path, encoder: Encoder) -> tuple[Path, Path]:
    """Write a source with every linear quantized, and the same with those values in plain
    float32.
    """
    plain, quantized = {}, {}
    for name, tensor in kit.read(source).items():
        if not name.endswith(LINEAR):
            plain[name] = quantized[name] = tensor
            continue
        parts, values = encoder(tensor.array().astype(np.float32))
        plain[name] = raw(kit, values.astype(np.float32))
        quantized |= {name.removesuffix("weight") + leaf: raw(kit, v) for leaf, v in parts.items()}
    config = kit.config(source)
    kit.folder(path / "plain", plain, config)
    kit.folder(path / "quantized", quantized, config | {"quantization_config": CONFIGS[encoder]})
    return path / "quantized", path / "plain"


def same(kit, a: Path, b: Path, *, of: Callable[[str], bool] = lambda _: True) -> None:
    left, right = ({n: t for n, t in kit.read(x).items() if of(n)} for x in (a, b))
    assert left.keys() == right.keys() and left
    assert [n for n in left if left[n] != right[n]] == []


@pytest.mark.parametrize(
    "encoder", [block_fp8, mxfp8, nvfp4_ct, float_ct], ids=lambda e: e.__name__
)
@pytest.mark.parametrize("recipe", ["nvfp4_default", "fp8_block128"])
def test_a_quantized_source_exports_as_its_values_do(
    kit, tmp_path: Path, encoder: Encoder, recipe: str
) -> None:
    source, plain = pair(kit, kit.qwen, tmp_path, encoder)
    if encoder is block_fp8 and recipe == "fp8_block128":
        with pytest.raises(PlanError, match="all 56 modules that it selects are fp8_block already"):
            exporter.export(source, tmp_path / "out", recipe=recipe, engine="none")
        return
    # vLLM loads no blocks of these narrow experts.
    options: dict[str, Any] = {"recipe": recipe, "input_scale": "one", "engine": "none"}
    manifest = exporter.export(source, tmp_path / "out", **options)
    exporter.export(plain, tmp_path / "expected", **options)
    same(kit, tmp_path / "out", tmp_path / "expected")
    assert kit.config(tmp_path / "out") == kit.config(tmp_path / "expected")
    algo = {
        block_fp8: "FP8_PB_WO",
        mxfp8: "MXFP8",
        nvfp4_ct: "NVFP4_PACK_QUANTIZED",
        float_ct: "FP8_PER_CHANNEL_PER_TOKEN",
    }
    to = "NVFP4" if recipe == "nvfp4_default" else "FP8_PB_WO"
    assert manifest.notes["requantized"] == {f"{algo[encoder]} to {to}": 56}
    report = verifier.check(tmp_path / "out", base=source, depth="payload")
    assert report.verdict == "passed", report.findings


@pytest.mark.parametrize("spelling", ["packed", "blocks"])
def test_mxfp4_becomes_nvfp4_without_loss(
    kit, tmp_path: Path, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = pair(kit, kit.qwen, tmp_path, mxfp4)
    if spelling == "blocks":

        def respell(tensors: dict[str, object]) -> None:
            for name in [n for n in tensors if n.endswith("weight_packed")]:
                module = name.removesuffix("weight_packed")
                code, scale = tensors.pop(name), tensors.pop(f"{module}weight_scale")
                tensors[f"{module}weight_blocks"] = code._replace(shape=(*scale.shape, 16))
                tensors[f"{module}weight_scales"] = scale

        source = kit.edit(source, tmp_path / "respelt", respell)
    out = tmp_path / "out"
    assert (
        run(["export", str(source), str(out), "--recipe", "nvfp4_default", "--input-scale", "one"])
        == 0
    )
    text = capsys.readouterr().out
    sizes = {n: np.prod(t.shape) * 2 // 16 for n, t in kit.read(out).items() if t.dtype == "U8"}
    blocks = int(sum(sizes.values()))
    assert f"MXFP4        {blocks:,} of {blocks:,} blocks converted without loss, 0 with" in text
    assert "re-quantized 56 modules from MXFP4 to NVFP4" in text
    read, written = kit.read(tmp_path / "quantized"), kit.read(out)
    for name in [n for n in read if n.endswith("weight_packed")]:
        module = name.removesuffix(".weight_packed")
        mine = {
            leaf: written[f"{module}.{leaf}"].array()
            for leaf in ("weight", "weight_scale", "weight_scale_2")
        }
        theirs = {
            "weight_packed": read[name].array(),
            "weight_scale": read[f"{module}.weight_scale"].array(),
        }
        assert np.array_equal(verifier.decode(mine, "nvfp4"), verifier.decode(theirs, "mxfp4"))


def test_blocks_too_far_below_the_largest_are_counted(kit, tmp_path: Path) -> None:
    """E4M3 has 18 powers of two: with the largest block at 2^0, the one at 2^-18 loses its odd half
    steps.
    """
    source, _ = pair(kit, kit.qwen, tmp_path, mxfp4)
    name = "model.layers.0.mlp.experts.0.down_proj.weight"

    def spread(tensors: dict[str, object]) -> None:
        scale = tensors[f"{name}_scale"]
        values = np.full(scale.shape, 127, np.uint8)
        values[0, 0], values[1, 0], values[2, 0] = 127 - 17, 127 - 18, 100
        tensors[f"{name}_scale"] = scale._replace(data=values.tobytes())
        code = tensors[f"{name}_packed"]
        nibbles = np.full(code.shape, 0x11, np.uint8)
        nibbles[3, :16] = 0x80  # a block of zeros of both signs, whatever its scale
        tensors[f"{name}_packed"] = code._replace(data=nibbles.tobytes())

    edited = kit.edit(source, tmp_path / "spread", spread)
    manifest = exporter.export(
        edited, tmp_path / "out", recipe="nvfp4_experts_only", input_scale="one", rest="bf16"
    )
    kept, of = manifest.notes["mxfp4_blocks"]["NVFP4"]
    assert of - kept == 4  # two blocks of 32 below 2^-17 are four of 16
    written = kit.read(tmp_path / "out")
    scales = written[f"{name}_scale"].array()
    assert scales[3, 0] == 1.0 and scales[1, 0] == scales[2, 0] == scales[0, 0] == 2.0**-9


def test_a_scale_that_is_no_number_is_named(kit, tmp_path: Path) -> None:
    source, _ = pair(kit, kit.qwen, tmp_path, mxfp4)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"

    def poison(tensors: dict[str, object]) -> None:
        scale = tensors[f"{name}_scale"]
        tensors[f"{name}_scale"] = scale._replace(data=b"\xff" + scale.data[1:])

    edited = kit.edit(source, tmp_path / "poisoned", poison)
    with pytest.raises(
        EncodeError, match=r"experts\.2\.down_proj\.weight_packed: mxfp4: a block scale is NaN"
    ):
        exporter.export(edited, tmp_path / "out", recipe="nvfp4_default", input_scale="one")
    assert not (tmp_path / "out").exists()


# What a recipe leaves.


def test_block_fp8_that_is_left_is_decoded(
    kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, plain = pair(kit, kit.qwen, tmp_path, block_fp8)
    arguments = [
        "export",
        str(source),
        str(tmp_path / "out"),
        "--recipe",
        "nvfp4_experts_only",
        "--input-scale",
        "one",
    ]
    assert run([*arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "decode    8 modules from FP8_PB_WO to BF16" in text
    assert "re-quantize 48 modules from FP8_PB_WO to NVFP4" in text
    assert run(arguments) == 0
    written, values = kit.read(tmp_path / "out"), kit.read(plain)
    for name in [n for n in written if ".self_attn." in n and n.endswith(LINEAR)]:
        assert np.array_equal(
            written[name].array(), values[name].array().astype(ml_dtypes.bfloat16)
        )
    assert not any(n.endswith("weight_scale_inv") for n in written)
    assert run([*arguments, "--overwrite", "--rest", "keep"]) == 1
    assert (
        "are FP8_PB_WO, which engines do not read together with nvfp4; --rest bf16"
        in capsys.readouterr().err
    )


def test_mxfp8_that_is_left_keeps_its_bytes_or_is_decoded(kit, tmp_path: Path) -> None:
    source, plain = pair(kit, kit.qwen, tmp_path, mxfp8)
    exporter.export(source, tmp_path / "kept", recipe="nvfp4_experts_only", input_scale="one")
    same(kit, tmp_path / "kept", source, of=lambda n: "experts" not in n)
    assert kit.config(tmp_path / "kept")["quantization_config"]["quant_algo"] == "MIXED_PRECISION"
    exporter.export(
        source, tmp_path / "bf16", recipe="nvfp4_experts_only", input_scale="one", rest="bf16"
    )
    found, values = kit.read(tmp_path / "bf16"), kit.read(plain)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert found[name].dtype == "BF16"
    assert np.array_equal(found[name].array(), values[name].array().astype(ml_dtypes.bfloat16))
    for out in ("kept", "bf16"):
        assert verifier.check(tmp_path / out, base=source, depth="payload").verdict == "passed"


def test_a_source_whose_format_cannot_be_told(kit, tmp_path: Path) -> None:
    source, _ = pair(kit, kit.qwen, tmp_path, block_fp8)
    edited = kit.edit(
        source,
        tmp_path / "edited",
        lambda t: t.pop("model.layers.0.self_attn.q_proj.weight_scale_inv"),
    )
    with pytest.raises(
        PlanError, match=r"0\.self_attn\.q_proj\.weight is F8_E4M3 and has no weight_scale_inv"
    ):
        exporter.plan_export(edited, recipe="nvfp4_default", input_scale="one")
    (edited / "config.json").write_text(json.dumps(kit.config(kit.qwen)))
    with pytest.raises(
        PlanError,
        match=r"0\.self_attn\.q_proj\.weight is F8_E4M3, and its quantization format "
        r"cannot be inferred",
    ):
        exporter.plan_export(edited, recipe="nvfp4_default", input_scale="one")


def test_awq_sources_are_refused(kit, tmp_path: Path) -> None:
    source, _ = pair(kit, kit.qwen, tmp_path, mxfp8)
    name = "model.layers.0.self_attn.q_proj.pre_quant_scale"
    edited = kit.edit(source, tmp_path / "edited", lambda t: t.update({name: kit.bf16(64)}))
    with pytest.raises(PlanError, match=r"q_proj has a pre_quant_scale \(AWQ\)"):
        exporter.plan_export(edited, recipe="nvfp4_default", input_scale="one")


# FP8 out, and the KV cache.


def test_fp8_scales_are_modelopts_and_codes_are_the_nearest(
    kit, tmp_path: Path, shared_data: Path
) -> None:
    """ModelOpt rounds the quotient to BF16 before it rounds to E4M3; ours rounds once, so some
    codes are one apart.
    """
    exporter.export(
        kit.llama, tmp_path / "out", recipe="fp8_default", input_scale="one", kv_cache="fp8_cast"
    )
    mine, theirs = (
        kit.read(tmp_path / "out"),
        kit.read(shared_data / "modelopt" / "llama_fp8_kvfp8"),
    )
    source = kit.read(kit.llama)
    codes = [n for n, t in theirs.items() if t.dtype == "F8_E4M3"]
    assert len(codes) == 14
    for name in codes:
        assert mine[f"{name}_scale"] == theirs[f"{name}_scale"]
        a, b = mine[name].array(), theirs[name].array()
        scale = theirs[f"{name}_scale"].array()
        assert np.array_equal(a, (source[name].array().astype(np.float32) / scale).astype(E4M3))
        assert np.abs(a.view(np.uint8).astype(int) - b.view(np.uint8)).max() <= 1
    for file in ("config.json", "hf_quant_config.json"):
        ours, wanted = (
            kit.config(x, file)
            for x in (tmp_path / "out", shared_data / "modelopt" / "llama_fp8_kvfp8")
        )
        if file == "config.json":
            ours, wanted = ours["quantization_config"], wanted["quantization_config"]
        assert {k: v for k, v in ours.items() if k != "producer"} == {
            k: v for k, v in wanted.items() if k != "producer"
        }


def kv_stats(kit, path: Path, layers: int, *, without: str = "") -> Path:
    inputs = {n.removesuffix(".weight"): 3.0 for n in kit.read(kit.llama) if n.endswith(LINEAR)}
    tensors = {f"{m}.input_amax": kit.raw(np.array(v, np.float32)) for m, v in inputs.items()}
    for i in range(layers):
        for kind, value in (("k", 8.0 + i), ("v", 2.0)):
            tensors[f"model.layers.{i}.self_attn.{kind}_proj.{kind}_amax"] = kit.raw(
                np.array(value, np.float32)
            )
    tensors.pop(without, None)
    return kit.write(path, tensors)


@pytest.mark.parametrize("recipe", ["fp8_default", "nvfp4_default", "mxfp8_default"])
def test_kv_scales_come_from_the_stats(kit, tmp_path: Path, recipe: str) -> None:
    stats = kv_stats(kit, tmp_path / "stats", 2)
    exporter.export(kit.llama, tmp_path / "out", recipe=recipe, stats=stats, kv_cache="fp8")
    found = kit.read(tmp_path / "out")
    values = {n: float(t.array()) for n, t in found.items() if n.endswith((".k_scale", ".v_scale"))}
    assert values == {
        f"model.layers.{i}.self_attn.{k}_proj.{k}_scale": float(np.float32(a / 448))
        for i in range(2)
        for k, a in (("k", 8.0 + i), ("v", 2.0))
    }
    if recipe == "fp8_default":
        assert float(found["model.layers.0.mlp.up_proj.input_scale"].array()) == np.float32(
            3.0 / 448
        )
    config = kit.config(tmp_path / "out")["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert (
        kit.config(tmp_path / "out", "hf_quant_config.json")["quantization"]["kv_cache_quant_algo"]
        == "FP8"
    )
    assert verifier.check(tmp_path / "out", base=kit.llama, depth="payload").verdict == "passed"


def test_kv_scales_need_stats_that_have_them(kit, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="FP8 KV scales come from calibration: pass --stats"):
        exporter.plan_export(kit.llama, recipe="mxfp8_default", kv_cache="fp8")
    name = "model.layers.1.self_attn.v_proj.v_amax"
    stats = kv_stats(kit, tmp_path / "stats", 2, without=name)
    with pytest.raises(
        PlanError, match=r"the stats have no v_amax for model\.layers\.1\.self_attn\.v_proj"
    ):
        exporter.plan_export(kit.llama, recipe="mxfp8_default", stats=stats, kv_cache="fp8")
    with pytest.raises(PlanError, match="cannot declare a KV cache"):
        exporter.export(
            kit.llama,
            tmp_path / "out",
            recipe="fp8_block128",
            engine="none",
            stats=kv_stats(kit, stats, 2),
            kv_cache="fp8",
        )
    assert not (tmp_path / "out").exists()


def test_a_kv_cache_that_the_source_declares_stays_declared(kit, tmp_path: Path) -> None:
    exporter.export(kit.llama, tmp_path / "first", recipe="mxfp8_default", kv_cache="fp8_cast")
    rules = Recipe.model_validate(
        {"name": "two", "rules": [{"roles": ["mlp"], "format": "w4a16_nvfp4"}]}
    )
    exporter.export(tmp_path / "first", tmp_path / "second", recipe=rules)
    assert (
        kit.config(tmp_path / "second", "hf_quant_config.json")["quantization"][
            "kv_cache_quant_algo"
        ]
        == "FP8"
    )
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "first", other)
    config = kit.config(other)
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 4, "type": "float"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="declares a KV cache in 4, and ckptgate writes FP8 only"):
        exporter.export(other, tmp_path / "third", recipe=rules)


# Recipes and what they name.


def recipe_of(*rules: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"name": "mine", "rules": list(rules)})


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            [{"modules": ["*.gate_prj"], "format": "mxfp8"}],
            r"nothing matches \*\.gate_prj; the nearest names are",
        ),
        (
            [
                {"roles": ["routed_expert"], "format": "mxfp8"},
                {"modules": ["model.layers.9.*"], "format": None},
            ],
            r"nothing matches model\.layers\.9\.\*",
        ),
        (
            [{"roles": ["routed_expert", "indexer"], "format": "mxfp8"}],
            r"nothing matches indexer.*; `match: any` in that",
        ),
        ([{"roles": ["indexer"], "match": "any", "format": "mxfp8"}], r"nothing matches indexer"),
        (
            [{"roles": ["attention"], "modules": ["*.mlp.*"], "format": "mxfp8"}],
            r"matches \*\.mlp\.\* among attention",
        ),
        ([{"modules": ["*lm_hea?"], "format": "mxfp8"}], r"nothing matches \*lm_hea"),
    ],
)
def test_a_rule_that_finds_nothing_or_only_a_part(
    kit, rules: list[dict[str, object]], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        exporter.plan_export(kit.qwen, recipe=recipe_of(*rules))


@pytest.mark.parametrize(
    "name", ["nvfp4_default", "mxfp8_default", "nvfp4_mlp_only", "fp8_default", "fp8_block128"]
)
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_recipes_for_every_model_take_one_with_or_without_experts(
    kit, name: str, which: str
) -> None:
    plan = exporter.plan_export(getattr(kit, which), recipe=name, input_scale="one", engine="none")
    assert plan.formats()


def test_wildcards_reach_no_router_head_or_embedding(kit) -> None:
    plan = exporter.plan_export(kit.qwen, recipe=recipe_of({"modules": ["*"], "format": "mxfp8"}))
    found = {m for e in plan.encodes for m in e.modules}
    assert len(found) == 56 and not any(
        m.endswith((".gate", "lm_head", "embed_tokens")) for m in found
    )
    outright = recipe_of(
        {"modules": ["*"], "format": "mxfp8"},
        {"modules": ["lm_head", "*.mlp.gate"], "format": "mxfp8"},
    )
    found = {m for e in exporter.plan_export(kit.qwen, recipe=outright).encodes for m in e.modules}
    assert len(found) == 59 and "lm_head" in found and "model.layers.1.mlp.gate" in found
    by_role = recipe_of({"roles": ["lm_head"], "format": "mxfp8"})
    assert exporter.plan_export(kit.qwen, recipe=by_role).formats() == {"MXFP8": 1}


def test_a_pattern_that_names_what_is_no_linear(kit, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.conv.weight"
    edited = kit.edit(kit.qwen, tmp_path / "conv", lambda t: t.update({name: kit.bf16(8, 1, 32)}))
    with pytest.raises(
        PlanError,
        match=r"\*self_attn\* also matches model\.layers\.0\.self_attn\.conv, "
        r"which is not a linear",
    ):
        exporter.plan_export(
            edited, recipe=recipe_of({"modules": ["*self_attn*"], "format": "mxfp8"})
        )
    left = recipe_of(
        {"modules": ["*self_attn*"], "format": "mxfp8"}, {"modules": ["*.conv"], "format": None}
    )
    assert exporter.plan_export(edited, recipe=left).formats() == {"MXFP8": 8}
    by_role = recipe_of({"roles": ["attention"], "format": "mxfp8"})
    assert exporter.plan_export(edited, recipe=by_role).formats() == {"MXFP8": 8}


def test_every_expert_is_counted(kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "export",
        str(kit.qwen),
        str(tmp_path / "out"),
        "--recipe",
        "nvfp4_experts_only_mse",
    ]
    assert run([*arguments, "--input-scale", "one"]) == 0
    assert (
        "48 of 48 linear layers (32 after fusing), scale search: sweep" in capsys.readouterr().out
    )
