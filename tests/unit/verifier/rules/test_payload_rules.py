# SPDX-License-Identifier: Apache-2.0
"""What the value rules leave alone, however odd it looks, and what they tell in formats that no
exporter here writes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import verifier
from exporter import export
from tests.paths import TESTS
from verifier.findings import Finding, Report
from verifier.selftest import CheckpointEditor

Array = npt.NDArray[Any]
DATA = TESTS / "data" / "modelopt"
QWEN, SOURCE = DATA / "qwen3moe_nvfp4_experts_max", DATA / "src_qwen3moe"
LLAMA, LLAMA_SOURCE = DATA / "llama_mxfp8", DATA / "src_llama"
E2M1, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
GATE, UP = "model.layers.1.mlp.experts.4.gate_proj", "model.layers.1.mlp.experts.4.up_proj"


def copy(source: Path, target: Path) -> CheckpointEditor:
    target.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    return CheckpointEditor(target)


def loud(report: Report) -> list[Finding]:
    return [f for f in report.findings if f.severity != "info"]


def assert_clean(path: Path, base: Path) -> None:
    for given in (None, base):
        report = verifier.check(path, base=given, depth="payload")
        assert loud(report) == []
        assert report.verdict == "passed"


def assert_told(path: Path, rule: str, base: Path | None, severity: str = "error") -> Finding:
    """Return the finding; nobody else may alarm."""
    report = verifier.check(path, base=base, depth="payload")
    assert {f.rule for f in loud(report)} == {rule}, report.findings
    found = report.by_rule(rule)[0]
    assert found.severity == severity
    return found


def experts(folder: CheckpointEditor) -> list[str]:
    return [m for m, parts in folder.modules().items() if "weight" in parts and ".experts." in m]


def packed(codes: Array) -> Array:
    raw = codes.astype(E2M1).view(np.uint8)
    return raw[..., ::2] | (raw[..., 1::2] << 4)


def with_experts(change: Callable[[np.random.Generator, Array], Array], target: Path) -> Path:
    """Return a copy of the source whose experts' weights are changed."""
    folder, rng = copy(SOURCE, target), np.random.default_rng(5)
    for module in experts(folder):
        name = f"{module}.weight"
        values = folder.array(name).astype(np.float32)
        folder.store(name, change(rng, values).astype(ml_dtypes.bfloat16))
    return target


ODD_WEIGHTS: dict[str, Callable[[np.random.Generator, Array], Array]] = {
    "one number up to its sign": lambda rng, v: rng.choice([-0.03125, 0.03125], v.shape),
    "one number": lambda rng, v: np.full(v.shape, 0.03125),
    "zero": lambda rng, v: np.zeros(v.shape),
    "columns below the floor": lambda rng, v: (
        v * np.where(np.arange(v.shape[1]) % 64 < 32, 1.0, 1e-7)
    ),
    "one huge value": lambda rng, v: np.where(np.arange(v.size).reshape(v.shape) == 77, 40.0, v),
    "uniform": lambda rng, v: rng.uniform(-0.05, 0.05, v.shape),
    "heavy tails": lambda rng, v: rng.standard_t(2, v.shape) * 0.02,
    "as small as 1e-6": lambda rng, v: v * 1e-5,
    "as large as 30": lambda rng, v: v * 300,
}


@pytest.mark.parametrize("weights", ODD_WEIGHTS)
@pytest.mark.parametrize(
    "recipe", ["nvfp4_experts_only", "nvfp4_experts_only_mse", "mxfp8_default"]
)
def test_odd_weights_are_clean(tmp_path: Path, weights: str, recipe: str) -> None:
    base = with_experts(ODD_WEIGHTS[weights], tmp_path / "base")
    export(
        base,
        tmp_path / "out",
        recipe=recipe,
        input_scale=None if recipe == "mxfp8_default" else "one",
    )
    assert_clean(tmp_path / "out", base)


def test_negative_zeros_are_clean(tmp_path: Path) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    for module in experts(folder):
        codes = folder.array(f"{module}.weight")
        low, high = codes & 15, codes >> 4
        folder.store(
            f"{module}.weight", np.where(low == 0, 8, low) | (np.where(high == 0, 8, high) << 4)
        )
    assert_clean(folder.path, SOURCE)


def nvfp4(values: Array, scale_2: float, sizes: tuple[float, ...]) -> dict[str, Array]:
    """Encode under a given global scale; each block's largest code is one of ``sizes``, by squared
    error.
    """
    wide = values.astype(np.float32).reshape(len(values), -1, 16)
    tries = []
    for size in sizes:
        scale = np.clip(np.abs(wide).max(2) / (size * np.float32(scale_2)), 2**-9, 448).astype(E4M3)
        step = scale.astype(np.float32)[..., None] * np.float32(scale_2)
        codes = np.clip(wide / step, -6, 6).astype(E2M1)
        tries.append(
            (
                np.square(codes.astype(np.float32) * step - wide).sum(2),
                scale.view(np.uint8),
                codes.view(np.uint8),
            )
        )
    best = np.argmin(np.stack([t[0] for t in tries]), axis=0)
    scale = np.take_along_axis(np.stack([t[1] for t in tries]), best[None], 0)[0].view(E4M3)
    codes = np.take_along_axis(np.stack([t[2] for t in tries]), best[None, ..., None], 0)[
        0
    ].reshape(values.shape)
    return {
        "weight": packed(codes.view(E2M1)),
        "weight_scale": scale,
        "weight_scale_2": np.asarray(scale_2, np.float32),
    }


@pytest.mark.parametrize(
    ("range_", "sizes", "wider"),
    [
        (1536.0, (6.0, 4.0), 1.0),
        (2688.0, (6.0,), 3.0),
        (2688.0, (6.0, 5.5, 5.0, 4.5), 1.5),
        (2688.0, (6.0, 4.0), 20.0),
    ],
    ids=[
        "four over six",
        "unified far above its own maximum",
        "a search",
        "four over six and unified",
    ],
)
def test_other_calibrations_are_clean(
    tmp_path: Path, range_: float, sizes: tuple[float, ...], wider: float
) -> None:
    folder, source = copy(QWEN, tmp_path / "ckpt"), CheckpointEditor(SOURCE)
    for module in experts(folder):
        pair = [
            module,
            module.replace("gate_proj", "up_proj"),
            module.replace("up_proj", "gate_proj"),
        ]
        amax = max(
            float(np.abs(source.array(f"{m}.weight").astype(np.float32)).max()) for m in pair
        )
        values = source.array(f"{module}.weight").astype(np.float32)
        for leaf, tensor in nvfp4(values, amax * wider / range_, sizes).items():
            folder.store(f"{module}.{leaf}", tensor)
    assert_clean(folder.path, SOURCE)


def inputs(rng: np.random.Generator, kind: str, width: int) -> Array:
    """Return activations [256, width] whose Hessian moves weights little, or much."""
    noise = rng.normal(size=(256, width))
    if kind == "independent":
        return noise
    if kind == "correlated":
        return 0.95 * rng.normal(size=(256, 1)) + 0.3 * noise
    if kind == "low rank":
        return rng.normal(size=(256, 8)) @ rng.normal(size=(8, width)) + 0.1 * noise
    noise[:, ::17] *= 50
    return noise


def gptq(values: Array, step: Array, top: float, dtype: type, acts: Array) -> Array:
    """Return the codes of optimal brain quantization, column by column, with the error carried to
    the columns behind.
    """
    left, width = values.astype(np.float64), values.shape[1]
    hessian = acts.T @ acts
    hessian += np.eye(width) * 0.01 * np.mean(np.diag(hessian))
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    codes = np.zeros_like(left)
    for i in range(width):
        codes[:, i] = np.clip(left[:, i] / step[:, i], -top, top).astype(dtype).astype(np.float64)
        error = (left[:, i] - codes[:, i] * step[:, i]) / factor[i, i]
        left[:, i:] -= np.outer(error, factor[i, i:])
    return codes


@pytest.mark.parametrize("kind", ["independent", "correlated", "low rank", "outliers"])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_weights_that_gptq_moved_are_clean(tmp_path: Path, kind: str, fmt: str) -> None:
    candidate, base = (QWEN, SOURCE) if fmt == "nvfp4" else (LLAMA, LLAMA_SOURCE)
    folder, source, rng = (
        copy(candidate, tmp_path / "ckpt"),
        CheckpointEditor(base),
        np.random.default_rng(11),
    )
    changed = 0
    for module, parts in folder.modules().items():
        if (
            "weight_scale" not in parts
            or ".layers.0." not in module
            or re.search(r"\.experts\.[3-9]\.", module)
        ):
            continue
        scale = folder.array(f"{module}.weight_scale")
        values = source.array(f"{module}.weight").astype(np.float32)
        acts = inputs(rng, kind, values.shape[1])
        if fmt == "nvfp4":
            step = np.repeat(
                scale.astype(np.float64) * float(folder.array(f"{module}.weight_scale_2")),
                16,
                axis=1,
            )
            codes = packed(gptq(values, step, 6.0, E2M1, acts))
        else:
            step = np.repeat(np.exp2(scale.astype(np.float64) - 127), 32, axis=1)
            codes = gptq(values, step, 448.0, E4M3, acts).astype(E4M3)
        changed += int(
            (codes.view(np.uint8) != folder.array(f"{module}.weight").view(np.uint8)).sum()
        )
        folder.store(f"{module}.weight", codes)
    assert changed > 1000
    assert_clean(folder.path, base)


def test_dead_experts_with_one_fallback_are_clean(tmp_path: Path) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    for module in experts(folder):
        if ".experts.3." in module or ".experts.5." in module:
            folder.store(f"{module}.input_scale", np.asarray(0.5 / 2688, np.float32))
    assert_clean(folder.path, SOURCE)


def test_scales_of_one_are_clean_where_the_manifest_says_so(tmp_path: Path) -> None:
    export(SOURCE, tmp_path / "out", recipe="nvfp4_experts_only", input_scale="one")
    assert verifier.check(tmp_path / "out", depth="payload").findings == ()
    (tmp_path / "out" / "ckptgate_manifest.json").unlink()
    reported = verifier.check(tmp_path / "out", depth="payload")
    assert [(f.rule, f.severity) for f in reported.findings] == [("QC514", "info")]
    assert reported.verdict == "passed"


def one_expert_over_another(folder: CheckpointEditor) -> None:
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        parts = folder.modules()[f"model.layers.0.mlp.experts.2.{leaf}"]
        for name, tensor in parts.items():
            folder.store(f"model.layers.0.mlp.experts.6.{leaf}.{name}", folder.array(tensor.name))


def test_equal_experts_are_a_warning_without_a_base(tmp_path: Path) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    one_expert_over_another(folder)
    found = assert_told(folder.path, "QC507", None, "warning")
    assert (found.where.tensor, found.observed) == (
        "model.layers.0.mlp.experts.6.down_proj.weight",
        "equal to model.layers.0.mlp.experts.2.down_proj",
    )
    assert assert_told(folder.path, "QC507", SOURCE, "error").where == found.where


def test_equal_experts_are_clean_where_the_base_has_them(tmp_path: Path) -> None:
    folder, base = copy(QWEN, tmp_path / "ckpt"), copy(SOURCE, tmp_path / "base")
    one_expert_over_another(folder)
    one_expert_over_another(base)
    report = verifier.check(folder.path, base=base.path, depth="payload")
    assert loud(report) == []


# compressed-tensors: another spelling of the same codes, whose global scales are divisors


@pytest.fixture
def ct(tmp_path: Path) -> CheckpointEditor:
    folder = copy(QWEN, tmp_path / "ct")
    for module in experts(folder):
        divisor = (np.float32(1) / folder.array(f"{module}.weight_scale_2")).reshape(1)
        activation = (np.float32(1) / folder.array(f"{module}.input_scale")).reshape(1)
        folder.store(f"{module}.weight_scale_2", divisor)
        folder.store(f"{module}.input_scale", activation)
    names = {}
    for name in folder.tensors():
        if ".experts." in name:
            new = name.replace("weight_scale_2", "weight_global_scale").replace(
                "input_scale", "input_global_scale"
            )
            names[name] = f"{new}_packed" if new.endswith(".weight") else new
    folder.rename(names)
    folder.remove("hf_quant_config.json")
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {
        "targets": ["re:.*experts.*"],
        "weights": args,
        "input_activations": args | {"dynamic": "local"},
    }
    declared = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    folder.edit_json("config.json", lambda value: value.update({"quantization_config": declared}))
    return folder


def ct_value(leaf: str, factor: float) -> Callable[[CheckpointEditor], None]:
    return lambda f: f.store(f"{UP}.{leaf}", f.array(f"{UP}.{leaf}") * np.float32(factor)) and None


def ct_swapped(folder: CheckpointEditor) -> None:
    for leaf in ("weight_packed", "weight_scale"):
        gate, up = folder.array(f"{GATE}.{leaf}"), folder.array(f"{UP}.{leaf}")
        folder.store(f"{GATE}.{leaf}", up)
        folder.store(f"{UP}.{leaf}", gate)


def ct_nibbles(folder: CheckpointEditor) -> None:
    codes = folder.array(f"{UP}.weight_packed")
    folder.store(f"{UP}.weight_packed", (codes << 4) | (codes >> 4))


def ct_rows(folder: CheckpointEditor) -> None:
    codes = folder.array(f"{UP}.weight_packed")
    codes[:4] = codes[4:8]
    folder.store(f"{UP}.weight_packed", codes)


def ct_factors(folder: CheckpointEditor) -> None:
    for module in experts_ct(folder):
        name = f"{module}.weight_global_scale"
        folder.store(name, np.float32(1) / folder.array(name))


def experts_ct(folder: CheckpointEditor) -> list[str]:
    return [m for m in {n.rpartition(".")[0] for n in folder.tensors()} if ".experts." in m]


CT_DEFECTS: dict[str, tuple[str, Callable[[CheckpointEditor], None], bool, str]] = {
    "divisors differ": ("QC505", ct_value("weight_global_scale", 1 + 2**-23), False, "error"),
    "input divisors differ": ("QC506", ct_value("input_global_scale", 1.25), False, "warning"),
    "factors for divisors": ("QC509", ct_factors, False, "error"),
    "nibbles": ("QC510", ct_nibbles, True, "error"),
    "gate and up swapped": ("QC511", ct_swapped, True, "error"),
    "rows of others": ("QC517", ct_rows, True, "error"),
}


def test_clean_compressed_tensors(ct: CheckpointEditor) -> None:
    assert_clean(ct.path, SOURCE)


@pytest.mark.parametrize("defect", CT_DEFECTS)
def test_defect_of_compressed_tensors_is_told(ct: CheckpointEditor, defect: str) -> None:
    rule, change, needs_base, severity = CT_DEFECTS[defect]
    change(ct)
    assert_told(ct.path, rule, SOURCE, severity)
    if not needs_base:
        assert_told(ct.path, rule, None, severity)


def test_a_moved_weight_with_another_expert_in_part_is_not_called_foreign(tmp_path: Path) -> None:
    """Where codes lie beside the nearest throughout, a local defect cannot be told from the method:
    information at most.
    """
    folder, source, rng = (
        copy(QWEN, tmp_path / "ckpt"),
        CheckpointEditor(SOURCE),
        np.random.default_rng(3),
    )
    scale = folder.array(f"{GATE}.weight_scale").astype(np.float64) * float(
        folder.array(f"{GATE}.weight_scale_2")
    )
    values = source.array(f"{GATE}.weight").astype(np.float32)
    acts = inputs(rng, "outliers", values.shape[1])
    codes = packed(gptq(values, np.repeat(scale, 16, axis=1), 6.0, E2M1, acts))
    folder.store(f"{GATE}.weight", codes)
    assert verifier.check(folder.path, base=SOURCE, depth="payload").by_rule("QC517") == ()


def test_every_weight_is_judged_or_said_not_to_be(tmp_path: Path) -> None:
    folder, base = copy(QWEN, tmp_path / "ckpt"), copy(SOURCE, tmp_path / "base")
    base.drop([f"{GATE}.weight"])
    report = verifier.check(folder.path, base=base.path, depth="payload")
    coverage = {c.rule: c for c in report.coverage}
    for rule, missed in (("QC510", 1), ("QC511", 1), ("QC515", 1), ("QC517", 1), ("QC509", 0)):
        assert coverage[rule].of - coverage[rule].checked == missed, rule
        assert bool(coverage[rule].reason) == bool(missed)


def test_w4a16_is_judged_alike(tmp_path: Path) -> None:
    export(SOURCE, tmp_path / "out", recipe="w4a16_nvfp4_experts_only")
    assert_clean(tmp_path / "out", SOURCE)
    folder = CheckpointEditor(tmp_path / "out")
    name = f"{GATE.replace('gate_proj', 'down_proj')}.weight_scale_2"
    folder.store(name, np.asarray(1 / folder.array(name), np.float32))
    assert assert_told(folder.path, "QC509", None).where.tensor == name
    assert assert_told(folder.path, "QC509", SOURCE).where.tensor == name


def test_k_and_v_exchanged(tmp_path: Path) -> None:
    folder = copy(LLAMA, tmp_path / "ckpt")
    head = "model.layers.1.self_attn"
    for leaf in ("weight", "weight_scale"):
        k, v = folder.array(f"{head}.k_proj.{leaf}"), folder.array(f"{head}.v_proj.{leaf}")
        folder.store(f"{head}.k_proj.{leaf}", v)
        folder.store(f"{head}.v_proj.{leaf}", k)
    assert "v_proj" in assert_told(folder.path, "QC511", LLAMA_SOURCE).message


def test_one_foreign_block_is_placed(tmp_path: Path) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    codes = folder.array(f"{GATE}.weight")
    codes[5, 16:24] = codes[5, 24:32][::-1] ^ 0x88
    folder.store(f"{GATE}.weight", codes)
    found = assert_told(folder.path, "QC517", SOURCE)
    assert (found.where.tensor, found.where.row, found.where.block, found.count) == (
        f"{GATE}.weight",
        5,
        2,
        1,
    )


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a source whose gate_proj of layer 0 has two tiles of 128 rows."""
    folder = copy(LLAMA_SOURCE, tmp_path_factory.mktemp("wide") / "src")
    for i in range(2):
        for leaf, shape in (
            ("gate_proj", (256, 64)),
            ("up_proj", (256, 64)),
            ("down_proj", (64, 256)),
        ):
            values = np.random.default_rng(i).normal(scale=0.02, size=shape)
            folder.store(f"model.layers.{i}.mlp.{leaf}.weight", values.astype(ml_dtypes.bfloat16))
    folder.edit_json("config.json", lambda c: c.update(intermediate_size=256))
    return folder.path


@pytest.mark.parametrize(
    ("recipe", "leaf", "factors", "count", "row"),
    [
        ("fp8_block128", "weight_scale_inv", [[1.06], [0.94]], 2, 0),
        ("fp8_block128", "weight_scale_inv", [[1.0], [1.06]], 1, 128),
        ("fp8_default", "weight_scale", 1.06, 1, 0),
    ],
    ids=["each tile", "one tile", "the tensor"],
)
def test_scales_a_little_beside_those_of_the_codes(
    tmp_path: Path, wide_llama: Path, recipe: str, leaf: str, factors: Any, count: int, row: int
) -> None:
    export(wide_llama, tmp_path / "out", recipe=recipe, input_scale="one", engine="none")
    folder, name = CheckpointEditor(tmp_path / "out"), "model.layers.0.mlp.gate_proj"
    before = verifier.check(folder.path, base=wide_llama, depth="payload")
    assert not before.by_rule("QC515") and not before.by_rule("QC517")
    scale = folder.array(f"{name}.{leaf}")
    folder.store(
        f"{name}.{leaf}", (scale * np.asarray(factors)).astype(np.float32).reshape(scale.shape)
    )
    (found,) = verifier.check(folder.path, base=wide_llama, depth="payload").by_rule("QC517")
    assert "other scales" in found.message
    assert (found.where.tensor, found.where.row, found.count) == (f"{name}.weight", row, count)


@pytest.mark.parametrize("factor", [17 / 16, 15 / 16])
def test_a_scale_of_a_tensor_off_by_a_sixteenth(tmp_path: Path, factor: float) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    for module in (GATE, UP):
        scale_2 = folder.array(f"{module}.weight_scale_2")
        folder.store(f"{module}.weight_scale_2", (scale_2 * factor).astype(np.float32))
    report = verifier.check(folder.path, base=SOURCE, depth="payload")
    assert {f.where.tensor for f in loud(report)} == {f"{GATE}.weight", f"{UP}.weight"}
    for found in loud(report):
        assert found.rule in ("QC515", "QC517")
        said = re.search(r"values (\d\.\d+) of the base's", str(found.observed))
        assert said and abs(float(said[1]) - factor) < 0.01


def test_weights_scaled_for_awq_are_compared(tmp_path: Path) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    source = CheckpointEditor(SOURCE).array(f"{GATE}.weight").astype(np.float32)
    factor = np.linspace(0.2, 3, source.shape[1], dtype=np.float32)
    scale_2 = float(folder.array(f"{GATE}.weight_scale_2")) * 4
    for leaf, tensor in nvfp4(source * factor, scale_2, (6.0,)).items():
        folder.store(f"{GATE}.{leaf}", tensor)
    folder.add(f"{GATE}.pre_quant_scale", (1 / factor).astype(ml_dtypes.bfloat16))
    report = verifier.check(folder.path, base=SOURCE, depth="payload")
    assert not {"QC515", "QC517"} & {f.rule for f in loud(report)}
    coverage = next(c for c in report.coverage if c.rule == "QC515")
    assert coverage.of == coverage.checked
    folder.store(f"{GATE}.pre_quant_scale", np.ones(len(factor), ml_dtypes.bfloat16))
    broken = verifier.check(folder.path, base=SOURCE, depth="payload")
    assert {f.where.tensor for f in broken.findings if f.rule in ("QC515", "QC517")} == {
        f"{GATE}.weight"
    }


@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale", "weight", "weight_scale"])
def test_an_empty_tensor_is_no_crash(tmp_path: Path, leaf: str) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    folder.store(f"{UP}.{leaf}", folder.array(f"{UP}.{leaf}").reshape(-1)[:0])
    for base in (None, SOURCE):
        assert verifier.check(folder.path, base=base, depth="payload").verdict == "failed"


def test_an_exchanged_expert_is_named(tmp_path: Path) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    one, other = (f"model.layers.1.mlp.experts.{i}.down_proj" for i in (2, 7))
    for leaf in folder.modules()[one]:
        mine, theirs = folder.array(f"{one}.{leaf}"), folder.array(f"{other}.{leaf}")
        folder.store(f"{one}.{leaf}", theirs)
        folder.store(f"{other}.{leaf}", mine)
    found = assert_told(folder.path, "QC515", SOURCE)
    assert found.observed.endswith(f"; it begins like {other} of the base")
    assert found.count == 2


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "out"
    export(LLAMA_SOURCE, out, recipe="nvfp4_default", input_scale="one")
    return out


def test_clean_dense_nvfp4(dense: Path) -> None:
    assert_clean(dense, LLAMA_SOURCE)
    covered = {c.rule: c.checked for c in verifier.check(dense, depth="payload").coverage}
    assert covered["QC505"] == covered["QC506"] == 4  # two layers of q/k/v and gate/up


@pytest.mark.parametrize("module", ["self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"])
@pytest.mark.parametrize(
    ("leaf", "rule", "severity"),
    [("weight_scale_2", "QC505", "error"), ("input_scale", "QC506", "warning")],
)
def test_fused_scales_of_dense_layers(
    dense: Path, tmp_path: Path, module: str, leaf: str, rule: str, severity: str
) -> None:
    folder = copy(dense, tmp_path / "ckpt")
    name = f"model.layers.1.{module}.{leaf}"
    folder.store(name, np.nextafter(folder.array(name), np.float32(np.inf)))
    for base in (None, LLAMA_SOURCE):
        assert assert_told(folder.path, rule, base, severity).where.tensor == name


def test_a_copy_that_says_little_is_told_by_a_base(tmp_path: Path) -> None:
    base = with_experts(ODD_WEIGHTS["one number up to its sign"], tmp_path / "base")
    export(base, tmp_path / "out", recipe="nvfp4_experts_only", input_scale="one")
    folder = CheckpointEditor(tmp_path / "out")
    one_expert_over_another(folder)
    assert loud(verifier.check(folder.path, depth="payload")) == []
    assert_told(folder.path, "QC507", base)


def test_a_copy_of_codes_alone_is_still_told(tmp_path: Path) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    down = "model.layers.0.mlp.experts.{}.down_proj.weight"
    folder.store(down.format(6), folder.array(down.format(2)))
    assert_told(folder.path, "QC515", SOURCE)
