# SPDX-License-Identifier: Apache-2.0
"""QC604: what loaders fuse and stack, on checkpoints whose parts are each sound by themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import verifier
from tests.paths import ROOT, TESTS
from verifier.checkpoint import open_checkpoint
from verifier.findings import Finding
from verifier.rules import Context, all_rules
from verifier.rules.fusing import changed_values, fused
from verifier.selftest import CheckpointEditor
from verifier.selftest.tiny import TINY, TinySpec, encode, make

DATA = TESTS / "data" / "modelopt"
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
NAMED = {t.name: t for t in TINY}
MLP = "model.layers.0.mlp"


def found(path: Path, **options: object) -> list[Finding]:
    """Return what the rule says, in the order of severity."""
    report = verifier.check(path, depth="payload", select="QC604", **options)  # type: ignore[arg-type]
    return list(report.findings)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[[str], CheckpointEditor]:
    """Return a maker of one of the self-test's checkpoints."""
    return lambda name: CheckpointEditor(make(tmp_path, NAMED[name]).path)


def unknown(folder: CheckpointEditor) -> CheckpointEditor:
    """Make the family one that no file describes."""
    folder.edit_json("config.json", lambda c: c.update({"model_type": "unheard_of"}))
    return folder


CLEAN = [
    DATA / "qwen3moe_nvfp4_experts_max",
    DATA / "llama_mxfp8",
    GOLDEN / "mxfp8",
    GOLDEN / "bf16",
]


@pytest.mark.parametrize("path", CLEAN, ids=lambda p: p.name)
def test_what_the_rule_passes_comes_back_byte_for_byte(path: Path) -> None:
    """The claim behind its silence, made by hand: every leaf of every group fused, stacked, and
    taken apart again.
    """
    ctx = Context.of(open_checkpoint(path))
    groups = list(fused(ctx))
    assert found(path) == []
    assert len(groups) > 3
    for group in groups:
        for leaf in group.modules[0].parts:
            arrays = [ctx.payload.array(m.parts[leaf]) for m in group.modules]
            if arrays[0].ndim < 2 and not group.stack:
                continue  # global scales: QC504 to QC506
            whole = np.stack(arrays) if group.stack else np.concatenate(arrays)
            heights = np.cumsum([len(a) for a in arrays])[:-1] if not group.stack else []
            parts = list(whole) if group.stack else np.split(whole, heights)
            for part, array in zip(parts, arrays, strict=True):
                assert (part.dtype, part.shape, part.tobytes()) == (
                    array.dtype,
                    array.shape,
                    array.tobytes(),
                )


def test_groups_of_a_moe_checkpoint() -> None:
    groups = {
        g.name: g for g in fused(Context.of(open_checkpoint(DATA / "qwen3moe_nvfp4_experts_max")))
    }
    layer = "model.layers.0"
    assert [m.name for m in groups[f"{layer}.self_attn.qkv_proj"].modules] == [
        f"{layer}.self_attn.{p}_proj" for p in "qkv"
    ]
    assert groups[f"{layer}.mlp.experts.down_proj"].numbers == tuple(range(8))
    assert not groups[f"{layer}.mlp.experts.3.gate_up_proj"].stack
    assert not any("mlp.gate." in name for name in groups)


def block_fp8(folder: CheckpointEditor, rows: int) -> CheckpointEditor:
    """Give gate, up and down of a layer's MLP another height, in 128x128 blocks."""
    rng = np.random.default_rng(rows)
    for leaf, shape in (
        ("gate_proj", (rows, 64)),
        ("up_proj", (rows, 64)),
        ("down_proj", (64, rows)),
    ):
        parts = encode(rng.standard_normal(shape).astype(np.float32), "fp8_block")
        folder.store(f"{MLP}.{leaf}.weight", parts["weight"])
        folder.store(f"{MLP}.{leaf}.weight_scale_inv", parts["weight_scale_inv"])
    return folder


def test_a_block_over_the_seam(tiny: Callable[[str], CheckpointEditor]) -> None:
    folder = unknown(block_fp8(tiny("llama-fp8-block"), 192))
    (finding,) = found(folder.path)
    assert finding.severity == "warning"
    assert finding.where.tensor == f"{MLP}.gate_proj.weight_scale_inv"
    assert "192 rows; 1 of 4 scales are lost" in finding.observed
    (strict,) = found(folder.path, profile="vllm")
    assert strict.severity == "error"
    assert found(folder.path, tp=1) == []  # QC309 says it then
    assert verifier.check(folder.path, tp=1, select="QC309").findings[0].rule == "QC309"
    assert found(block_fp8(folder, 256).path) == []


def test_the_last_part_may_end_inside_a_block(tiny: Callable[[str], CheckpointEditor]) -> None:
    folder = unknown(tiny("llama-fp8-block"))
    parts = encode(
        np.random.default_rng(0).standard_normal((192, 64)).astype(np.float32), "fp8_block"
    )
    folder.store(f"{MLP}.up_proj.weight", parts["weight"])
    folder.store(f"{MLP}.up_proj.weight_scale_inv", parts["weight_scale_inv"])
    assert found(folder.path) == []


def test_lost_counts_what_a_copy_changes() -> None:
    e8m0 = np.array([[127, 128], [0, 130]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    assert changed_values([e8m0], 2, ml_dtypes.float8_e8m0fnu) == 0
    assert changed_values([e8m0], 2, np.uint8) == 1  # 1, 2 and 8 are whole numbers, 2^-127 is not
    one, two = np.float32([[1], [2]]), np.float32([[3], [4]])
    assert changed_values([one, two], 4, np.float32, [0, 2]) == 0
    assert changed_values([one, two], 3, np.float32, [0, 1]) == 1
    assert changed_values([one, two], 3, np.float32, [0, 2]) == 1


@given(st.lists(st.integers(1, 6).map(lambda n: 64 * n), min_size=2, max_size=5))
def test_scales_are_lost_just_where_a_block_reaches_over_a_seam(heights: list[int]) -> None:
    rows = [-(-h // 128) for h in heights]
    values = np.split(np.arange(1, sum(rows) + 1, dtype=np.float32)[:, None], np.cumsum(rows)[:-1])
    starts = [sum(heights[:i]) // 128 for i in range(len(heights))]
    count = changed_values(values, -(-sum(heights) // 128), np.float32, starts)
    assert (count > 0) == any(h % 128 for h in heights[:-1])


def test_width_of_one_part(tiny: Callable[[str], CheckpointEditor]) -> None:
    folder = unknown(tiny("llama-nvfp4"))
    name = f"{MLP}.up_proj"
    for leaf in ("weight", "weight_scale"):
        folder.store(f"{name}.{leaf}", np.ascontiguousarray(folder.array(f"{name}.{leaf}")[:, ::2]))
    (finding,) = found(folder.path)
    assert (finding.severity, finding.where.tensor, finding.observed) == (
        "error",
        f"{name}.weight",
        "[192, 32]",
    )


def test_a_known_family_tells_shapes_once(tiny: Callable[[str], CheckpointEditor]) -> None:
    folder = tiny("llama-nvfp4")
    name = f"{MLP}.up_proj"
    for leaf in ("weight", "weight_scale"):
        folder.store(f"{name}.{leaf}", np.ascontiguousarray(folder.array(f"{name}.{leaf}")[:, ::2]))
    report = verifier.check(folder.path, depth="payload")
    assert {f.rule for f in report.findings} == {"QC208"}


def test_cross_attention_reads_two_inputs(tiny: Callable[[str], CheckpointEditor]) -> None:
    folder = unknown(tiny("llama-fp8"))
    for leaf in ("k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{leaf}.weight"
        folder.store(name, np.ascontiguousarray(folder.array(name)[:, :32]))
    assert found(folder.path) == []


@pytest.mark.parametrize("spelled", [(96, 1), (96,)])
def test_one_spelling_of_a_shape(
    tiny: Callable[[str], CheckpointEditor], spelled: tuple[int, ...]
) -> None:
    folder = unknown(tiny("llama-fp8-channel"))
    names = [f"{MLP}.{leaf}.weight_scale" for leaf in ("gate_proj", "up_proj")]
    odd = folder.array(names[1])
    folder.store(names[1], odd.reshape(-1, 1) if len(spelled) == 2 else odd.reshape(-1))
    said = found(folder.path)
    assert [f.where.tensor for f in said] == ([names[1]] if odd.ndim != len(spelled) else [])


def test_float_weights_of_two_dtypes(
    tiny: Callable[[str], CheckpointEditor], tmp_path: Path
) -> None:
    folder = tiny("mixtral-nvfp4")
    name = "model.layers.1.self_attn.k_proj.weight"
    folder.store(name, folder.array(name).astype(np.float32))
    (finding,) = found(folder.path)
    assert (finding.severity, finding.where.tensor) == ("warning", name)
    assert found(folder.path, base=tmp_path / "mixtral-nvfp4.base") == []  # QC516
    same = shutil.copytree(folder.path, tmp_path / "same")
    assert found(folder.path, base=same) == []  # the source has it so


def test_experts_without_a_number(tiny: Callable[[str], CheckpointEditor]) -> None:
    folder = tiny("mixtral-nvfp4")
    lost_ = [n for n in folder.tensors() if ".layers.1.block_sparse_moe.experts.2." in n]
    folder.drop(lost_)
    assert found(folder.path) == []  # QC207
    said = found(unknown(folder).path)
    assert {f.observed for f in said} == {"1 of 4 missing, 2 first"}
    assert sum(f.count for f in said) == 3


def test_the_last_expert_is_counted_by_the_config(tiny: Callable[[str], CheckpointEditor]) -> None:
    folder = unknown(tiny("mixtral-nvfp4"))
    folder.drop([n for n in folder.tensors() if ".layers.1.block_sparse_moe.experts.3." in n])
    assert {f.observed for f in found(folder.path)} == {"1 of 4 missing, 3 first"}


@pytest.mark.parametrize("spec", TINY, ids=lambda t: t.name)
def test_silent_where_no_layout_is_known(spec: TinySpec, tmp_path: Path) -> None:
    folder = unknown(CheckpointEditor(make(tmp_path, spec).path))
    assert found(folder.path) == []


def test_every_defect_of_the_catalog_has_a_rule_or_a_reason() -> None:
    rows = {1: 11, 2: 9, 3: 15, 4: 18, 5: 19, 6: 8, 7: 6}
    catalogue = {
        f"QC{family}{number:02}" for family, count in rows.items() for number in range(1, count + 1)
    }
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    without = page.partition("## Defects without a rule")[2]
    reported = {line[2:7] for line in without.splitlines() if line.startswith("| QC")}
    assert not reported & set(all_rules())
    assert reported | set(all_rules()) == catalogue


def test_two_lists_of_experts_in_one(tiny: Callable[[str], CheckpointEditor]) -> None:
    """Ernie 4.5 VL numbers its text experts first, then its vision experts, which are of another
    size.
    """
    folder = unknown(tiny("mixtral-w4a16"))
    names = [n for n in folder.tensors() if ".experts." in n]
    for name in names:
        number = int(name.partition(".experts.")[2].partition(".")[0])
        values = folder.array(name)
        if not values.shape:
            narrow = values
        elif ".w2." in name:
            narrow = np.ascontiguousarray(values[:, : values.shape[1] // 3])
        else:
            narrow = np.ascontiguousarray(values[: len(values) // 3])
        folder.add(name.replace(f".experts.{number}.", f".experts.{number + 4}."), narrow)
    assert found(folder.path) == []
    folder.drop([n for n in folder.tensors() if ".layers.1." in n and ".experts.7." in n])
    assert {f.message for f in found(folder.path)} == {
        "parts of one parameter have different shapes"
    }
