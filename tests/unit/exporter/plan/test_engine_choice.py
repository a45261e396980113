# SPDX-License-Identifier: Apache-2.0
"""What an export changes so that engines load it, and what it refuses.

What vLLM 0.32 loads was seen by running its loader on a CPU; the expectations here are written by
hand from that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import exporter
import verifier
from tests.paths import ROOT
from verifier.errors import PlanError
from verifier.selftest.editor import RawShard, write_shard

M3 = ROOT / "goldens" / "minimax-m3-tiny"
GPT_OSS = ROOT / "goldens" / "gpt-oss-tiny" / "bf16"
LAYER = "language_model.model.layers.1.self_attn"
QKV = ("q_proj", "k_proj", "v_proj")
INDEXER = ("index_q_proj", "index_k_proj")


def make(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write a BF16 checkpoint of random values."""
    folder.mkdir()
    shard, rng = RawShard({"format": "pt"}), np.random.default_rng(1)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        shard.entries[name] = ("BF16", shape, values.tobytes())
    write_shard(folder / "model.safetensors", shard)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def attention(head: str, *leaves: str) -> dict[str, tuple[int, ...]]:
    return {f"{head}.{leaf}.weight": (64, 64) for leaf in leaves}


def tied(folder: Path, model_type: str = "qwen3") -> Path:
    shapes = {"model.embed_tokens.weight": (96, 64), "model.norm.weight": (64,)}
    shapes |= attention("model.layers.0.self_attn", *QKV, "o_proj")
    return make(folder, {"model_type": model_type, "tie_word_embeddings": True}, shapes)


def exclusions(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    nested = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    listed: list[str] = config["ignore"]
    assert listed == nested["exclude_modules"]
    return listed


def adapted(folder: Path) -> list[str]:
    manifest = json.loads((folder / "ckptgate_manifest.json").read_text())
    notes: list[str] = manifest["notes"]["adapted"]
    return notes


def formats(plan: exporter.Plan) -> dict[str, str]:
    return {name: fmt.name for name, fmt in plan.modules.items()}


@pytest.mark.parametrize("recipe", ["nvfp4_default", "mxfp8_default"])
def test_a_tied_head_is_excluded(tmp_path: Path, recipe: str) -> None:
    source, out = tied(tmp_path / "source"), tmp_path / "out"
    manifest = exporter.export(source, out, recipe=recipe, input_scale="one")
    assert exclusions(out) == ["lm_head", "model.embed_tokens"]
    assert any("lm_head is excluded by name" in note for note in manifest.notes["adapted"])
    assert manifest.options["engines"] == {"vllm": "0.32", "sglang": "0.5.23"}
    report = verifier.check(out, base=source, profile="vllm", select=["QC4"])
    assert (report.verdict, [f.rule for f in report.findings]) == ("passed", [])


def test_a_tied_head_that_is_not_excluded_is_an_error_for_vllm(tmp_path: Path) -> None:
    source, out = tied(tmp_path / "source"), tmp_path / "out"
    exporter.export(source, out, recipe="mxfp8_default")
    for file in ("config.json", "hf_quant_config.json"):
        text = (out / file).read_text()
        (out / file).write_text(text.replace('"lm_head",', ""))
    for profile, severity in (("vllm", "error"), (None, "warning")):
        findings = verifier.check(out, profile=profile).findings
        assert [(f.rule, f.severity) for f in findings if f.rule == "QC416"] == [
            ("QC416", severity)
        ]


def test_minimax_m3s_indexer_follows_in_formats_without_tensor_scales() -> None:
    plan = exporter.plan_export(M3 / "bf16", recipe="mxfp8_default")
    chosen = formats(plan)
    assert {chosen[f"{LAYER}.{leaf}"] for leaf in (*QKV, *INDEXER)} == {"mxfp8"}
    assert any("index_q_proj, index_k_proj are quantized" in note for note in plan.adapted)


def test_minimax_m3s_group_is_left_alone_in_formats_with_tensor_scales() -> None:
    for recipe in ("nvfp4_default", "fp8_default"):
        plan = exporter.plan_export(M3 / "bf16", recipe=recipe, input_scale="one")
        chosen = formats(plan)
        assert not any(f"{LAYER}.{leaf}" in chosen for leaf in (*QKV, *INDEXER))
        assert f"{LAYER}.o_proj" in chosen
        # The first layer has no indexer.
        assert LAYER.replace("1", "0") + ".q_proj" in chosen
        assert any("no place for the per-tensor scales" in note for note in plan.adapted)


@pytest.mark.parametrize("engine", ["sglang", "trtllm", "none"])
def test_other_engines_do_not_fuse_minimax_m3s_indexer(engine: Any) -> None:
    plan = exporter.plan_export(
        M3 / "bf16", recipe="nvfp4_default", input_scale="one", engine=engine
    )
    chosen = formats(plan)
    assert {f"{LAYER}.{leaf}" for leaf in QKV} <= chosen.keys()
    assert not {f"{LAYER}.{leaf}" for leaf in INDEXER} & chosen.keys()
    assert plan.adapted == ()


def test_a_quantized_group_with_an_unquantized_indexer_is_an_error_for_vllm(tmp_path: Path) -> None:
    for recipe in ("mxfp8_default", "nvfp4_default"):
        out = tmp_path / recipe
        exporter.export(M3 / "bf16", out, recipe=recipe, input_scale="one", engine="none")
        for profile, severity in (("vllm", "error"), ("sglang", "warning")):
            found = [f for f in verifier.check(out, profile=profile).findings if f.rule == "QC409"]
            assert {(f.severity, f.where.tensor) for f in found} == {
                (severity, f"{LAYER}.index_q_proj.weight")
            }


def test_latent_projections_share_their_global_scale(tmp_path: Path, kit: Any) -> None:
    shapes = {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    shapes |= attention("model.layers.0.self_attn", "q_a_proj", "kv_a_proj_with_mqa", "o_proj")
    source = make(tmp_path / "source", {"model_type": "deepseek_v3"}, shapes)
    exporter.export(source, tmp_path / "out", recipe="nvfp4_default", input_scale="one")
    tensors = kit.read(tmp_path / "out")
    scales = {
        leaf: tensors[f"model.layers.0.self_attn.{leaf}.weight_scale_2"]
        for leaf in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
    }
    assert scales["q_a_proj"] == scales["kv_a_proj_with_mqa"] != scales["o_proj"]


def test_a_head_that_vllm_asks_for_without_a_name(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    shapes |= attention("model.layers.0.self_attn", *QKV, "o_proj")
    source = make(tmp_path / "source", {"model_type": "exaone_moe"}, shapes)
    exporter.export(source, tmp_path / "out", recipe="mxfp8_default")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert set(config["quantized_layers"]) == {
        f"model.layers.0.self_attn.{leaf}" for leaf in (*QKV, "o_proj")
    }
    exporter.export(source, tmp_path / "other", recipe="mxfp8_default", engine="sglang")
    findings = verifier.check(tmp_path / "other", profile="vllm").findings
    assert [(f.rule, f.severity) for f in findings if f.rule == "QC402"] == [("QC402", "error")]
    assert exclusions(tmp_path / "other") == ["lm_head", "model.embed_tokens"]


def test_a_router_that_vllm_asks_for_by_another_name(tmp_path: Path) -> None:
    gate = "model.layers.0.block_sparse_moe.gate"
    shapes = {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    shapes |= attention("model.layers.0.self_attn", *QKV, "o_proj")
    source = make(
        tmp_path / "source", {"model_type": "phimoe"}, {**shapes, f"{gate}.weight": (8, 64)}
    )
    exporter.export(source, tmp_path / "out", recipe="mxfp8_default")
    assert {gate, "model.layers.0.mlp.router"} <= set(exclusions(tmp_path / "out"))
    rules = {f.rule for f in verifier.check(tmp_path / "out", profile="vllm").findings}
    assert not rules & {"QC402", "QC404"}


def test_experts_that_no_layout_makes_loadable_are_refused(tmp_path: Path) -> None:
    choices: dict[str, Any] = {"recipe": "nvfp4_experts_only", "input_scale": "one"}
    with pytest.raises(
        PlanError, match=r"vLLM 0\.32 does not load quantized experts of gpt_oss.*--for none writes"
    ):
        exporter.plan_export(GPT_OSS, **choices)
    assert exporter.plan_export(GPT_OSS, engine="sglang", **choices).modules
    with pytest.raises(PlanError, match=r"SGLang .* with --expert-layout per-expert"):
        exporter.plan_export(GPT_OSS, engine="sglang", expert_layout="per-expert", **choices)
    assert exporter.plan_export(GPT_OSS, engine="none", **choices).options["engines"] == {}


def test_unquantized_experts_are_not_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "attention.yaml"
    recipe.write_text("name: attention\nrules:\n  - roles: [attention]\n    format: mxfp8\n")
    assert exporter.plan_export(GPT_OSS, recipe=recipe).modules


def test_a_layout_that_an_engine_does_not_load_is_reported(tmp_path: Path) -> None:
    out = tmp_path / "out"
    exporter.export(GPT_OSS, out, recipe="nvfp4_experts_only", input_scale="one", engine="sglang")
    for profile, severity in (("vllm", "error"), ("sglang", "info"), (None, "info")):
        found = [f for f in verifier.check(out, profile=profile).findings if f.rule == "QC418"]
        assert [f.severity for f in found] == [severity]
        assert "vLLM loads no quantized experts of gpt_oss stored in stacks" in found[0].message


def test_a_projection_that_vllm_asks_for_by_the_name_in_transformers(tmp_path: Path) -> None:
    """Quantized, it has an entry by that name in a mixed checkpoint; unquantized, an exclusion."""
    attention_head = "model.layers.0.self_attn"
    asked = f"{attention_head}.q_gate_proj"
    shapes = {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    shapes |= attention(attention_head, "q_b_proj", "o_proj")
    source = make(tmp_path / "source", {"model_type": "axk2"}, shapes)
    recipe = tmp_path / "mixed.yaml"
    both = "mixed\nrules:\n  - roles: [attention]\n    format: mxfp8\n"
    recipe.write_text(f"name: {both}  - modules: ['*.o_proj']\n    format: w4a16_nvfp4\n")
    exporter.export(source, tmp_path / "out", recipe=recipe)
    exporter.export(source, tmp_path / "other", recipe=recipe, engine="sglang")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quantized_layers"][asked] == {"quant_algo": "MXFP8"}
    assert verifier.check(tmp_path / "out", profile="vllm", select=["QC4"]).findings == ()
    found = verifier.check(tmp_path / "other", profile="vllm", select=["QC4"]).findings
    assert [(f.rule, f.severity, f.expected) for f in found] == [("QC410", "error", asked)]
    recipe.write_text("name: o\nrules:\n  - modules: ['*.o_proj']\n    format: mxfp8\n")
    exporter.export(source, tmp_path / "plain", recipe=recipe)
    assert asked in exclusions(tmp_path / "plain")
    (note,) = adapted(tmp_path / "plain")
    assert "self_attn.q_gate_proj, which is excluded, too" in note
    exporter.export(source, tmp_path / "onto", recipe=recipe, onto=tmp_path / "out")
    (note,) = adapted(tmp_path / "onto")
    assert "self_attn.q_gate_proj, which is declared, too" in note


def test_experts_that_vllm_asks_for_by_another_name(tmp_path: Path) -> None:
    layer = "model.layers.0"
    shapes = {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    shapes |= attention(f"{layer}.self_attn", *QKV, "o_proj")
    for expert in range(2):
        shapes |= attention(f"{layer}.block_sparse_moe.experts.{expert}", "w1", "w2", "w3")
    source = make(tmp_path / "source", {"model_type": "minimax_m2"}, shapes)
    for engine in ("vllm", "sglang"):
        exporter.export(
            source,
            tmp_path / engine,
            recipe="mxfp8_nvfp4_experts",
            input_scale="one",
            engine=engine,  # type: ignore[arg-type]
        )
    asked = f"{layer}.mlp.experts"
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())["quantization_config"]
    assert config["quantized_layers"][asked] == {"quant_algo": "NVFP4", "group_size": 16}
    assert verifier.check(tmp_path / "vllm", profile="vllm", select=["QC4"]).findings == ()
    found = verifier.check(tmp_path / "sglang", profile="vllm", select=["QC4"]).findings
    assert {(f.rule, f.severity, f.expected) for f in found} == {("QC410", "error", asked)}


def test_longcats_router_and_latent_projections_stay_unquantized(tmp_path: Path) -> None:
    head = "model.layers.0.self_attn.0"
    shapes = {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    shapes |= attention(head, "q_a_proj", "kv_a_proj_with_mqa", "o_proj")
    experts = "model.layers.0.mlp.experts.{}"
    for expert in range(2):
        shapes |= attention(experts.format(expert), "gate_proj", "up_proj", "down_proj")
    router = "model.layers.0.mlp.router.classifier"
    shapes[f"{router}.weight"] = (6, 64)
    source = make(tmp_path / "source", {"model_type": "longcat_flash"}, shapes)
    exporter.export(source, tmp_path / "out", recipe="nvfp4_mlp_only", input_scale="one")
    assert {router, f"{head}.fused_qkv_a_proj"} <= set(exclusions(tmp_path / "out"))


def test_block_fp8_of_minimax_m3_is_refused_for_vllm(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"vLLM 0\.32 does not load .* every block scale stays unset"
    ):
        exporter.plan_export(M3 / "bf16", recipe="fp8_block128", engine="vllm")
    exporter.export(M3 / "bf16", tmp_path / "out", recipe="fp8_block128", engine="none")
    for profile, severity in (("vllm", "error"), ("sglang", "info")):
        found = verifier.check(tmp_path / "out", profile=profile, select=["QC418"]).findings
        assert [(f.rule, f.severity) for f in found] == [("QC418", severity)]
        assert "vLLM loads no modules of this family" in found[0].message


def test_a_tile_of_scales_that_reaches_into_the_next_projection(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (96, 128), "lm_head.weight": (96, 128)}
    for leaf in ("gate_proj", "up_proj"):
        shapes[f"model.layers.0.mlp.{leaf}.weight"] = (192, 128)
        shapes[f"model.layers.1.mlp.{leaf}.weight"] = (256, 128)
    source = make(tmp_path / "source", {"model_type": "qwen3"}, shapes)
    with pytest.raises(
        PlanError, match=r"gate_proj has 192 rows, not a multiple of 128: vLLM does not"
    ):
        exporter.plan_export(source, recipe="fp8_block128")
    exporter.export(source, tmp_path / "out", recipe="fp8_block128", engine="none")
    findings = verifier.check(tmp_path / "out", select=["QC309"], tp=1).findings
    assert [(f.severity, f.where.tensor) for f in findings] == [
        ("error", "model.layers.0.mlp.gate_proj.weight")
    ]


def test_kv_scales_that_vllm_does_not_read_are_reported(tmp_path: Path) -> None:
    stats = RawShard({"format": "pt"})
    for layer in range(4):
        for kind in "kv":
            name = f"language_model.model.layers.{layer}.self_attn.{kind}_proj.{kind}_amax"
            stats.entries[name] = ("F32", (), np.float32(8).tobytes())
    write_shard(tmp_path / "stats", stats)
    for engine, words in (
        ("vllm", "the KV scales of layers with sparse attention"),
        ("sglang", ""),
    ):
        plan = exporter.plan_export(
            M3 / "bf16",
            recipe="mxfp8_default",
            kv_cache="fp8",
            stats=tmp_path / "stats",
            engine=engine,  # type: ignore[arg-type]
        )
        notes = [note for note in plan.adapted if "KV scales" in note]
        assert len(notes) == bool(words)
        assert all(words in note for note in notes)
