# SPDX-License-Identifier: Apache-2.0
"""Repair: broken twins of clean exports come out byte for byte as they were, and what cannot be
known is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import exporter
import verifier
from exporter.cli.repair import repair as command
from exporter.detect import meta_model
from exporter.layout.hf_mapping import of_model
from exporter.plan.repair import logical
from tests.layouts import to_memory
from verifier.checkpoint import open_checkpoint
from verifier.errors import CkptgateError, PlanError, UnsupportedConversion, UsageError
from verifier.selftest import CORRUPTORS, CheckpointEditor

BY_NAME = {c.name: c for c in CORRUPTORS}
INDEX = "model.safetensors.index.json"


def copy(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    return target


def clean(out: Path, base: Path) -> None:
    report = verifier.check(str(out), base=str(base), depth="payload")
    assert report.verdict == "passed"
    # ModelOpt's MiniMax-M3 has config.json in transformers' spelling, as its base does (QC417).
    rest = [f for f in report.findings if f.rule != "QC417"]
    assert [f for f in rest if f.severity != "info"] == []


def quantized(folder: Path) -> int:
    """Return how many tensors belong to modules with a weight scale."""
    return sum(
        len(p)
        for p in CheckpointEditor(folder).modules().values()
        if {"weight_scale", "weight_scale_inv"} & set(p)
    )


# twins

MENDED = [
    "in-memory-names",
    "one-in-memory-name",
    "quantized-module-with-wrong-prefix",
    "amax-of-a-quantizer",
    "scale-of-a-quantizer",
    "qkv-fused",
    "container",
    "norm-lost",
    "linear-transposed",
    "config-of-other-size",
    "norm-widened",
    "embedding-as-f16",
    "one-bit-of-the-embedding",
    "router-cast-there-and-back",
    "not-declared",
    "config-absent",
    "config-not-json",
    "quant-config-cut",
    "declaration-is-text",
]
EXPERTS = ["amax-of-fused-experts", "experts-stacked", "expert-leaves", "linear-lost"]


@pytest.mark.parametrize(
    ("kind", "defect"),
    [*(("qwen", d) for d in [*MENDED, *EXPERTS]), *(("llama", d) for d in MENDED)],
)
def test_a_broken_twin_is_mended_byte_for_byte(kit, kind: str, defect: str, tmp_path: Path) -> None:
    twin, base = (kit.qwen_nvfp4, kit.qwen) if kind == "qwen" else (kit.llama_mxfp8, kit.llama)
    broken = copy(twin, tmp_path / "broken")
    BY_NAME[defect].apply(broken)
    manifest = exporter.repair(broken, tmp_path / "out", base=base)
    assert kit.read(tmp_path / "out") == kit.read(twin)
    clean(tmp_path / "out", base)
    same = manifest.notes["unchanged"]
    assert same["quantized_tensors"] == quantized(twin)
    assert same["sha256_before"] == same["sha256_after"]


@pytest.mark.parametrize(
    "defect", ["in-memory-names", "qkv-fused", "experts-stacked", "expert-leaves", "container"]
)
def test_spellings_are_enough_without_transformers(
    kit, defect: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("exporter.repairing.find_spec", lambda _name: None)
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    BY_NAME[defect].apply(broken)
    exporter.repair(broken, tmp_path / "out", base=kit.qwen)
    assert kit.read(tmp_path / "out") == kit.read(kit.qwen_nvfp4)


@pytest.mark.parametrize(
    "defect", [*EXPERTS[1:3], "container", "quantized-module-with-wrong-prefix"]
)
def test_a_mixed_minimax_m3_is_mended(kit, defect: str, shared_data: Path, tmp_path: Path) -> None:
    twin, base = (
        shared_data / "modelopt" / n for n in ("m3_mixed_mxfp8_nvfp4_recipe__cpushim", "src_m3")
    )
    broken = copy(twin, tmp_path / "broken")
    BY_NAME[defect].apply(broken)
    exporter.repair(broken, tmp_path / "out", base=base)
    assert kit.read(tmp_path / "out") == kit.read(twin)
    clean(tmp_path / "out", base)


def test_a_recast_router_is_the_bases_again(kit, tmp_path: Path) -> None:
    base, twin = copy(kit.qwen, tmp_path / "base"), copy(kit.qwen_nvfp4, tmp_path / "twin")
    name = "model.layers.0.mlp.gate.weight"
    values = (
        np.random.default_rng(3)
        .standard_normal(CheckpointEditor(base).tensors()[name].shape)
        .astype(np.float32)
        * 0.02
    )
    for folder in (base, twin):
        CheckpointEditor(folder).store(name, values)
    broken = copy(twin, tmp_path / "broken")
    CheckpointEditor(broken).store(name, values.astype(ml_dtypes.bfloat16))
    manifest = exporter.repair(broken, tmp_path / "out", base=base)
    assert kit.read(tmp_path / "out") == kit.read(twin)
    assert manifest.notes["repair"]["replaced"] == [1, {name: "recast"}]
    clean(tmp_path / "out", base)


def in_memory(kit, twin: Path, base: Path, path: Path) -> Path:
    """Write a checkpoint as transformers holds it in memory: fused and stacked, under those
    names.
    """
    opened = open_checkpoint(base)
    layout = of_model(meta_model(base, opened.config or {}), logical(opened))
    torches: dict[str, torch.Tensor] = {}
    for name, raw in kit.read(twin).items():
        dtype = {
            "F32": torch.float32,
            "BF16": torch.bfloat16,
            "U8": torch.uint8,
            "F8_E4M3": torch.float8_e4m3fn,
        }[raw.dtype]
        torches[name] = torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(raw.shape)
    names = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.uint8: "U8",
        torch.float8_e4m3fn: "F8_E4M3",
    }
    raws = {
        n: type(next(iter(kit.read(twin).values())))(
            names[t.dtype],
            tuple(t.shape),
            bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy()),
        )
        for n, t in to_memory(layout, torches).items()
    }
    return kit.folder(path, raws, json.loads((twin / "config.json").read_text()))


def test_a_mixed_minimax_m3_as_transformers_holds_it(
    kit, shared_data: Path, tmp_path: Path
) -> None:
    data = shared_data / "modelopt"
    twin, base = data / "m3_mixed_mxfp8_nvfp4_recipe__cpushim", data / "src_m3"
    broken = in_memory(kit, twin, base, tmp_path / "broken")
    names = set(kit.read(broken))
    assert "model.language_model.layers.1.mlp.experts.gate_up_proj" in names
    assert "model.language_model.layers.0.mlp.gate_up_proj.weight_scale" in names
    assert not any(".block_sparse_moe." in n for n in names)
    found = CliRunner().invoke(command, [str(broken), str(tmp_path / "out"), "--base", str(base)])
    assert found.exit_code == 0, found.output
    assert "stacks re-assembled from their parts: equal" in found.output
    assert "verdict: PASSED" in found.output
    assert kit.read(tmp_path / "out") == kit.read(twin)


@pytest.mark.parametrize("name", ["m3_mixed_mxfp8_nvfp4_recipe__cpushim", "m3_nvfp4_experts_max"])
def test_what_modelopt_described_wrongly(kit, name: str, shared_data: Path, tmp_path: Path) -> None:
    broken, base = shared_data / "modelopt" / name, shared_data / "modelopt" / "src_m3"
    assert verifier.check(str(broken), base=str(base), depth="payload").findings != ()
    found = CliRunner().invoke(command, [str(broken), str(tmp_path / "out"), "--base", str(base)])
    assert found.exit_code == 0, found.output
    assert kit.read(tmp_path / "out") == kit.read(broken)
    clean(tmp_path / "out", base)
    dead = (
        "5 quantized_layers keys without a module"
        if "mixed" in name
        else "2 exclusions without a module"
    )
    assert f"drop         {dead}" in found.output


def test_stacks_with_siblings_joined_by_an_underscore(kit, tmp_path: Path) -> None:
    """The spelling in which ModelOpt and transformers keep the siblings of a bare parameter."""
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    BY_NAME["experts-stacked"].apply(broken)
    folder = CheckpointEditor(broken)
    stacked = [
        n
        for n in folder.tensors()
        if "_proj." in n and n.rpartition(".")[0].endswith("experts.gate_up_proj")
    ]
    folder.rename(
        {
            n: n.replace("_proj.weight", "_proj", 1) if n.endswith(".weight") else _under(n)
            for n in stacked
        }
    )
    assert any(n.endswith("experts.gate_up_proj_weight_scale_2") for n in folder.tensors())
    exporter.repair(broken, tmp_path / "out", base=kit.qwen)
    assert kit.read(tmp_path / "out") == kit.read(kit.qwen_nvfp4)


def _under(name: str) -> str:
    head, _, leaf = name.rpartition(".")
    return f"{head}_{leaf}"


def test_digests_are_those_of_the_slices(kit, tmp_path: Path) -> None:
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    BY_NAME["experts-stacked"].apply(broken)
    manifest = exporter.repair(broken, tmp_path / "out", base=kit.qwen)
    state = hashlib.sha256()
    for name, raw in sorted(kit.read(kit.qwen_nvfp4).items()):
        if ".experts." in name:
            state.update(f"{name} {hashlib.sha256(raw.data).hexdigest()}\n".encode())
    assert manifest.notes["unchanged"]["sha256_after"] == state.hexdigest()
    assert (
        manifest.notes["unchanged"]["stacks"] == 8
    )  # four leaves of gate_up_proj and of down_proj
    assert manifest.kind == "repair" and [s.role for s in manifest.sources] == ["source", "base"]


def test_index_config_and_side_files(kit, tmp_path: Path) -> None:
    base = copy(kit.qwen, tmp_path / "base")
    (base / "processor_config.json").write_text('{"of": "base"}')
    (base / "generation_config.json").write_text('{"of": "base"}')
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    (broken / "generation_config.json").write_text('{"of": "export"}')
    (broken / INDEX).write_text('{"weight_map": {"model.norm.weight": "nowhere.safetensors"}}')
    exporter.repair(broken, tmp_path / "out", base=base, shard_bytes=300_000)
    out = tmp_path / "out"
    assert json.loads((out / "processor_config.json").read_text()) == {"of": "base"}
    assert json.loads((out / "generation_config.json").read_text()) == {"of": "export"}
    where = json.loads((out / INDEX).read_text())["weight_map"]
    assert len(set(where.values())) > 1
    for file in set(where.values()):
        assert set(kit.header(out / file)) - {"__metadata__"} == {
            n for n, f in where.items() if f == file
        }
    made, wanted = (
        json.loads((out / "config.json").read_text()),
        json.loads((base / "config.json").read_text()),
    )
    assert made.pop("quantization_config")["quant_algo"] == "NVFP4" and made == wanted
    clean(out, base)


def test_a_kv_cache_that_the_export_declares_is_declared_again(
    kit, shared_data: Path, tmp_path: Path
) -> None:
    broken = copy(shared_data / "modelopt" / "llama_fp8_kvfp8", tmp_path / "broken")
    BY_NAME["container"].apply(broken)
    exporter.repair(broken, tmp_path / "out", base=kit.llama)
    assert kit.read(tmp_path / "out") == kit.read(shared_data / "modelopt" / "llama_fp8_kvfp8")
    made = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert made["kv_cache_scheme"]["num_bits"] == 8


def test_kv_scales_of_attention_that_is_not_quantized(kit, tmp_path: Path) -> None:
    twin = copy(kit.qwen_nvfp4, tmp_path / "twin")
    for layer in (0, 1):
        for kind in "kv":
            CheckpointEditor(twin).add(
                f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale",
                np.array(0.25, np.float32),
            )
    broken = copy(twin, tmp_path / "broken")
    BY_NAME["in-memory-names"].apply(broken)
    exporter.repair(broken, tmp_path / "out", base=kit.qwen)
    assert kit.read(tmp_path / "out") == kit.read(twin)
    clean(tmp_path / "out", kit.qwen)


# refusals


def refused(
    broken: Path, base: Path, tmp_path: Path, said: str, error: type[CkptgateError] = PlanError
) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=said):
        exporter.repair(broken, tmp_path / "out", base=base)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "base", "said"),
    [
        (
            "qwen3moe_nvfp4_experts_adversarial",
            "src_qwen3moe",
            r"experts\.0\.\w+\.weight_scale: 512 of 512 scales .*NaN",
        ),
        (
            "aria_nvfp4_transposed",
            "src_aria",
            r"down_proj is \[64, 128\].*blocks run along the output axis",
        ),
    ],
)
def test_what_modelopt_lost(
    name: str, base: str, said: str, shared_data: Path, tmp_path: Path
) -> None:
    data = shared_data / "modelopt"
    refused(data / name, data / base, tmp_path, said)
    dry = CliRunner().invoke(
        command, [str(data / name), str(tmp_path / "out"), "--base", str(data / base), "--dry-run"]
    )
    assert isinstance(dry.exception, PlanError) and dry.exception.exit_code == 1


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ("expert-lost", "its values are missing and cannot be recovered"),
        ("layer-without-experts", "its values are missing and cannot be recovered"),
        ("quantized-transposed", "are stored transposed"),
        ("halved-twice", "is it the right base"),
        ("weight-scale-2-lost", "weight_scale_2 is missing"),
        ("block-scale-lost", "weight_scale is missing"),
        ("input-scale-of-one-expert", "has no input_scale, and 15 modules like it have one"),
        ("block-scale-as-f32", r"is F32 \[64, 8\], where NVFP4 has F8_E4M3"),
        ("one-column-short", r"is F8_E4M3 \[64, 7\]"),
        ("nan-block-scale", "1 of 512 scales is not a positive number .NaN first."),
        ("zero-block-scale", "1 of 512 scales is not a positive number .0 first."),
        ("negative-weight-scale-2", "1 of 1 scale is not a positive number .-1 first."),
        ("stray-copy-of-a-tensor", "is in .* and in"),
        ("truncated", "ends 100 bytes early"),
    ],
)
def test_what_is_lost_is_refused(kit, defect: str, said: str, tmp_path: Path) -> None:
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    BY_NAME[defect].apply(broken)
    refused(broken, kit.qwen, tmp_path, said)


def swap_gate_and_up(folder: CheckpointEditor) -> None:
    """Call every gate of a layer w3 and every up w1: the names are in the wrong order."""
    other = {"gate_proj": "w3", "up_proj": "w1", "down_proj": "w2"}
    names = {}
    for name in folder.tensors():
        head, _, leaf = name.rpartition(".")
        stem, _, kind = head.rpartition(".")
        if ".layers.1.mlp.experts." in name:
            names[name] = f"{stem}.{other[kind]}.{leaf}"
    folder.rename(names)


def interleave_gate_and_up(folder: CheckpointEditor) -> None:
    """Stack a layer's experts with gate and up row by row, which no name tells."""
    BY_NAME["experts-stacked"].apply(folder.path)
    for name, tensor in folder.tensors().items():
        if "gate_up_proj." in name and len(tensor.shape) == 3:
            values = folder.array(name)
            halves = np.split(values, 2, axis=1)
            folder.store(name, np.stack(halves, axis=2).reshape(values.shape))


def stack_transposed(folder: CheckpointEditor) -> None:
    """Stack a layer's experts as [experts, in, out]."""
    BY_NAME["experts-stacked"].apply(folder.path)
    for name, tensor in folder.tensors().items():
        if ".experts.down_proj." in name and len(tensor.shape) == 3:
            folder.store(name, np.ascontiguousarray(folder.array(name).transpose(0, 2, 1)))


def lose_an_expert_of_a_stack(folder: CheckpointEditor) -> None:
    BY_NAME["experts-stacked"].apply(folder.path)
    for name, tensor in folder.tensors().items():
        if ".experts.down_proj." in name and tensor.shape:
            folder.store(name, folder.array(name)[:-1])


def fold_a_scale(folder: CheckpointEditor) -> None:
    """Multiply a norm, as AWQ and SmoothQuant do."""
    name = "model.layers.0.post_attention_layernorm.weight"
    values = folder.array(name)
    scale = np.linspace(0.5, 2.0, values.size).astype(np.float32)
    folder.store(name, (values.astype(np.float32) * scale).astype(values.dtype))


def add_a_pre_quant_scale(folder: CheckpointEditor) -> None:
    folder.add(
        "model.layers.0.mlp.experts.0.gate_proj.pre_quant_scale", np.ones(128, ml_dtypes.bfloat16)
    )


def add_a_bias(folder: CheckpointEditor) -> None:
    folder.add("model.layers.0.self_attn.o_proj.bias", np.ones(128, ml_dtypes.bfloat16))


def call_a_norm_anything(folder: CheckpointEditor) -> None:
    folder.rename({"model.norm.weight": "model.thing.weight"})


def two_of_one_name(folder: CheckpointEditor) -> None:
    for leaf in [
        n.rpartition(".")[2] for n in folder.tensors() if ".layers.0.mlp.experts.0.gate_proj." in n
    ]:
        values = folder.array(f"model.layers.0.mlp.experts.0.gate_proj.{leaf}")
        folder.add(f"model.layers.0.mlp.experts.0.w1.{leaf}", values)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            swap_gate_and_up,
            PlanError,
            r"w1\.weight: its values are not those of the base's .*gate_proj",
        ),
        (
            interleave_gate_and_up,
            PlanError,
            r"gate_up_proj\.weight: its values are not those of the base's",
        ),
        (stack_transposed, UnsupportedConversion, r"down_proj\.\w+: axes \(qwen3_moe\)"),
        (lose_an_expert_of_a_stack, UnsupportedConversion, r"down_proj\.\w+: axes \(qwen3_moe\)"),
        (fold_a_scale, PlanError, "post_attention_layernorm.* which no cast explains"),
        (add_a_pre_quant_scale, PlanError, "has a pre_quant_scale .AWQ."),
        (
            call_a_norm_anything,
            PlanError,
            "model.thing.weight: neither transformers' mapping nor a known spelling",
        ),
        (
            add_a_bias,
            PlanError,
            r"o_proj\.bias: .* has model\.layers\.0\.self_attn\.o_proj without a bias",
        ),
        (
            two_of_one_name,
            UnsupportedConversion,
            r"experts\.0\.w1\.\w+: rename .*becomes .*gate_proj",
        ),
    ],
)
def test_what_values_and_names_do_not_tell(
    kit,
    change: Callable[[CheckpointEditor], None],
    error: type[CkptgateError],
    said: str,
    tmp_path: Path,
) -> None:
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    change(CheckpointEditor(broken))
    refused(broken, kit.qwen, tmp_path, said, error)


@pytest.mark.parametrize("change", [stack_transposed, lose_an_expert_of_a_stack])
def test_a_stack_that_does_not_fit_is_refused_without_transformers_too(
    kit, change: Callable[[CheckpointEditor], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("exporter.repairing.find_spec", lambda _name: None)
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    change(CheckpointEditor(broken))
    with pytest.raises((PlanError, UnsupportedConversion), match="down_proj"):
        exporter.repair(broken, tmp_path / "out", base=kit.qwen)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_names_are_proved_by_a_quantized_base_too(kit, vendor, tmp_path: Path) -> None:
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    BY_NAME["expert-leaves"].apply(broken)
    found = exporter.plan_repair(broken, base=vendor.path)
    assert found.compared == 24
    swap_gate_and_up(CheckpointEditor(copy(kit.qwen_nvfp4, tmp_path / "swapped")))
    refused(tmp_path / "swapped", vendor.path, tmp_path, "its values are not those of the base's")


@pytest.fixture(scope="module")
def wide(kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Llama with MLPs of 384, so that rows of their middle tell them, and keys of whole
    128x128 blocks.
    """
    path = tmp_path_factory.mktemp("wide") / "source"

    def widen(tensors: dict[str, Any]) -> None:
        for seed, name in enumerate(n for n in tensors if ".mlp." in n):
            tensors[name] = kit.bf16(
                *((128, 384) if "down_proj" in name else (384, 128)), seed=seed
            )
        for name in [n for n in tensors if n.endswith(("k_proj.weight", "v_proj.weight"))]:
            tensors[name] = kit.bf16(128, 128, seed=len(name))

    kit.edit(kit.llama, path, widen)
    CheckpointEditor(path).edit_json(
        "config.json", lambda config: config.update(intermediate_size=384, num_key_value_heads=4)
    )
    return path


def fuse(folder: CheckpointEditor, order: tuple[str, str]) -> None:
    """Write gate and up of the first layer as one, under a name that no mapping knows."""
    head = "model.layers.0.mlp"
    parts = folder.modules()[f"{head}.gate_proj"]
    file = parts["weight"].file
    made = {}
    for leaf, tensor in parts.items():
        values = [folder.array(f"{head}.{n}.{leaf}") for n in order]
        made[f"model.decoder.layers.0.ffn.gate_up_proj.{leaf}"] = (
            np.concatenate(values) if tensor.shape else values[0]
        )
    folder.drop(n for m in order for n in folder.siblings(f"{head}.{m}"))
    for name, values in made.items():
        folder.add(name, values, file=file)


@pytest.mark.parametrize("recipe", ["fp8_block128", "mxfp8_default", "nvfp4_mlp_only"])
def test_a_fused_pair_of_each_format_is_told_by_rows_of_its_middle(
    kit, wide: Path, recipe: str, tmp_path: Path
) -> None:
    scales = {"input_scale": "one"} if recipe == "nvfp4_mlp_only" else {}
    exporter.export(wide, tmp_path / "twin", recipe=recipe, engine="none", **scales)
    fuse(CheckpointEditor(copy(tmp_path / "twin", tmp_path / "broken")), ("gate_proj", "up_proj"))
    fuse(CheckpointEditor(copy(tmp_path / "twin", tmp_path / "swapped")), ("up_proj", "gate_proj"))
    exporter.repair(tmp_path / "broken", tmp_path / "out", base=wide)
    assert kit.read(tmp_path / "out") == kit.read(tmp_path / "twin")
    clean(tmp_path / "out", wide)
    shutil.rmtree(tmp_path / "out")
    refused(tmp_path / "swapped", wide, tmp_path, "its values are not those of the base's")


def test_another_base_is_refused(kit, tmp_path: Path) -> None:
    base = copy(kit.qwen, tmp_path / "base")
    folder = CheckpointEditor(base)
    folder.store("model.embed_tokens.weight", folder.array("model.embed_tokens.weight")[::-1])
    refused(kit.qwen_nvfp4, base, tmp_path, "it was not made from")


def test_nothing_quantized(kit, tmp_path: Path) -> None:
    refused(kit.qwen, kit.qwen, tmp_path, "nothing in it is quantized")


# the command


def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(kit, tmp_path: Path) -> None:
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    for defect in ("experts-stacked", "amax-of-a-quantizer", "norm-widened", "linear-lost"):
        BY_NAME[defect].apply(broken)
    out = tmp_path / "out"
    dry = CliRunner().invoke(command, [str(broken), str(out), "--base", str(kit.qwen), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    for line in (
        "keep         192 quantized tensors, byte for byte, 24 compared with the base",
        "split        8 stacked",
        "replace      1 unquantized tensor",
        "(recast)",
        "add          1 missing tensor of the base",
        "drop         1 tensor without a place in a checkpoint",
        "index and configs: NVFP4 (declared: NVFP4)",
        "nothing was written (dry run)",
    ):
        assert line in dry.output, dry.output
    assert not out.exists()
    report = tmp_path / "report.json"
    done = CliRunner().invoke(
        command, [str(broken), str(out), "--base", str(kit.qwen), "--json-report", str(report)]
    )
    assert done.exit_code == 0, done.output
    shared = [
        x for x in dry.output.splitlines() if x.startswith("  ") and not x.startswith("  result")
    ]
    assert [x for x in shared if x not in done.output] == []
    value: dict[str, Any] = json.loads(report.read_text())
    assert value["check"]["verdict"] == "passed" and value["manifest"]["kind"] == "repair"


def test_an_export_without_input_scales_is_described_as_weight_only(kit, tmp_path: Path) -> None:
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    folder = CheckpointEditor(broken)
    folder.drop([n for n in folder.tensors() if n.endswith(".input_scale")])
    done = CliRunner().invoke(
        command, [str(broken), str(tmp_path / "out"), "--base", str(kit.qwen)]
    )
    assert done.exit_code == 0, done.output
    assert "W4A16_NVFP4 (declared: NVFP4)" in done.output


def test_out_is_not_an_input_and_not_swapped_unasked(kit, tmp_path: Path) -> None:
    broken = copy(kit.qwen_nvfp4, tmp_path / "broken")
    for out in (broken, kit.qwen):
        with pytest.raises(UsageError, match="is the directory of an input"):
            exporter.repair(broken, out, base=kit.qwen, overwrite=True)
    copy(kit.qwen_nvfp4, tmp_path / "out")
    with pytest.raises(UsageError, match="use --overwrite to replace it"):
        exporter.repair(broken, tmp_path / "out", base=kit.qwen)
