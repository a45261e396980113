# SPDX-License-Identifier: Apache-2.0
"""Every rule passes valid checkpoints, and catches a copy that differs only in one defect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import verifier
from exporter import export
from tests.paths import ROOT, TESTS
from verifier.findings import Finding, Report, Where, rules_of
from verifier.rules import Depth, all_rules
from verifier.selftest import CORRUPTORS, CheckpointEditor, Corruptor, kind_of, traits_of
from verifier.selftest.corruptor import CheckpointKind
from verifier.selftest.editor import INDEX, read_shard, write_shard
from verifier.selftest.tiny import TINY, make

DATA = TESTS / "data" / "modelopt"
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"


@dataclass(frozen=True)
class Spec:
    """A clean checkpoint: what it is, and which corruptors are tried on it (None: all that
    suit).
    """

    kind: CheckpointKind
    traits: frozenset[str]
    merged: bool = False
    only: frozenset[str] | None = None


CLEAN = {
    "modelopt_nvfp4": Spec("nvfp4", frozenset({"experts"})),
    "modelopt_mxfp8": Spec("mxfp8", frozenset()),
    "nvfp4": Spec("nvfp4", frozenset({"index", "experts"})),
    "mxfp8": Spec("mxfp8", frozenset({"index", "experts"})),
    "mixed": Spec("mixed", frozenset({"index", "experts", "shards"}), merged=True),
    "f32_router": Spec(
        "nvfp4", frozenset({"index", "experts", "f32"}), only=frozenset({"router-recast"})
    ),
    "gptq": Spec("gptq", frozenset({"index", "tokenizer"})),
    "mixtral": Spec(
        "nvfp4",
        frozenset({"index", "experts", "shards", "tokenizer", "mixtral"}),
        only=frozenset({"family-whose-experts-no-loader-reads"}),
    ),
    "golden": Spec(
        "mxfp8",
        frozenset({"index", "experts", "shards", "f32", "vision", "tokenizer", "mixtral"}),
        only=frozenset(
            {
                "indexer-unquantized",
                "spelled-as-transformers-does",
                "vocabulary-lost",
                "tokenizer-lost",
                "template-lost",
                "text-rule-on-the-tower",
                "tower-excluded-by-wrapper",
                "wrapped-tower",
                "tower-quantized",
            }
        ),
    ),
    "mtp": Spec(
        "mxfp8",
        frozenset({"index", "experts", "shards", "f32", "vision", "tokenizer", "mixtral", "mtp"}),
        only=frozenset({"mtp-lost", "mtp-tensor-lost"}),
    ),
}


@dataclass(frozen=True)
class Clean:
    """A clean checkpoint on disk, with what it is judged against."""

    path: Path
    base: Path
    merged_from: Path | None = None


def _copy(source: Path, target: Path) -> Path:
    """Copy a folder's files, writable whatever the source's mode."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    return target


def _float32_router(source: Path) -> Path:
    """Make the routers of a copy float32, with values that BF16 does not hold."""
    folder = CheckpointEditor(source)
    rng = np.random.default_rng(7)
    for name in [n for n in folder.tensors() if n.endswith(".mlp.gate.weight")]:
        values = folder.array(name).astype(np.float32)
        folder.store(name, values * (1 + rng.uniform(-1e-4, 1e-4, values.shape).astype(np.float32)))
    return source


def _with_mtp(path: Path) -> Path:
    """Give a copy of the golden one MTP module, unquantized, and declare it."""
    folder = CheckpointEditor(path)
    rng = np.random.default_rng(11)
    for leaf, shape in (("eh_proj", (128, 256)), ("enorm", (128,)), ("hnorm", (128,))):
        values = rng.normal(0, 0.05, shape).astype(ml_dtypes.bfloat16)
        folder.add(f"mtp.layers.0.{leaf}.weight", values, file=folder.shards[-1])

    def declare(config: dict[str, Any]) -> None:
        config["text_config"]["num_mtp_modules"] = 1
        if "quantization_config" in config:
            config["quantization_config"]["ignored_layers"].append("mtp.layers.0.eh_proj")

    folder.edit_json("config.json", declare)
    return path


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clean]:
    """Build the clean checkpoints once: two that NVIDIA ModelOpt wrote, four that the exporter
    makes, the golden.
    """
    root = tmp_path_factory.mktemp("clean")
    qwen, llama = DATA / "src_qwen3moe", DATA / "src_llama"
    routed = _float32_router(_copy(qwen, root / "src_f32_router"))
    export(qwen, root / "nvfp4", recipe="nvfp4_experts_only", input_scale="one")
    export(qwen, root / "mxfp8", recipe="mxfp8_default")
    export(
        qwen, root / "mixed", recipe="nvfp4_experts_only", onto=root / "mxfp8", shard_bytes=200_000
    )
    export(routed, root / "f32_router", recipe="nvfp4_experts_only", input_scale="one")
    gptq = make(root, next(t for t in TINY if t.kind == "gptq"))
    mixtral = make(root, next(t for t in TINY if t.name == "mixtral-nvfp4"))
    return {
        "gptq": Clean(gptq.path, gptq.base),
        "mixtral": Clean(mixtral.path, mixtral.base),
        "modelopt_nvfp4": Clean(DATA / "qwen3moe_nvfp4_experts_max", qwen),
        "modelopt_mxfp8": Clean(DATA / "llama_mxfp8", llama),
        "nvfp4": Clean(root / "nvfp4", qwen),
        "mxfp8": Clean(root / "mxfp8", qwen),
        "mixed": Clean(root / "mixed", qwen, root / "mxfp8"),
        "f32_router": Clean(root / "f32_router", routed),
        "golden": Clean(GOLDEN / "mxfp8", GOLDEN / "bf16"),
        "mtp": Clean(
            _with_mtp(_copy(GOLDEN / "mxfp8", root / "mtp")),
            _with_mtp(_copy(GOLDEN / "bf16", root / "src_mtp")),
        ),
    }


def _depth(corruptor: Corruptor) -> Depth:
    return all_rules()[corruptor.rule].depth


def _cases() -> Iterator[tuple[str, Corruptor]]:
    """Yield every corruptor with every clean checkpoint that it suits."""
    for name, spec in CLEAN.items():
        for corruptor in CORRUPTORS:
            if _depth(corruptor) == "load":  # test_reload.py
                continue
            if spec.only is not None and corruptor.name not in spec.only:
                continue
            if "merged_from" in corruptor.on.needs and not spec.merged:
                continue
            if corruptor.on.met_by(spec.kind, spec.traits):
                yield name, corruptor


CASES = list(_cases())
WITHOUT = [(name, c) for name, c in CASES if not c.on.needs]
EITHER = [
    (name, c) for name, c in CASES if c.on.needs == ("base|merged_from",) and CLEAN[name].merged
]


def _ids(cases: list[tuple[str, Corruptor]]) -> list[str]:
    return [f"{c.rule}-{c.name}-{name}" for name, c in cases]


@pytest.fixture(scope="module")
def broken(
    clean: dict[str, Clean],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[tuple[Clean, Corruptor, Where]]:
    """Yield the clean checkpoint of a case, copied, with its one defect made."""
    name, corruptor = request.param
    twin = clean[name]
    root = tmp_path_factory.mktemp("broken")
    path = _copy(twin.path, root / "ckpt")
    place = corruptor.apply(path)
    yield Clean(path, twin.base, twin.merged_from), corruptor, place
    shutil.rmtree(root)


def _caught_by(report: Report, corruptor: Corruptor) -> list[Finding]:
    instead = [f for r in corruptor.instead for f in report.by_rule(r)]
    return [
        f for f in report.by_rule(corruptor.rule) if f.severity == corruptor.severity
    ] or instead


def _points_at(finding: Finding, place: Where) -> bool:
    """Whether a finding's witness agrees with a place in everything that the place says."""
    known = [(f.name, getattr(place, f.name)) for f in fields(place)]
    return all(getattr(finding.where, name) == value for name, value in known if value is not None)


def _assert_caught(report: Report, corruptor: Corruptor, place: Where) -> None:
    found = _caught_by(report, corruptor)
    assert found, f"{corruptor.rule} is silent; said: {sorted(rules_of(report.findings))}"
    assert any(_points_at(f, place) for f in found), (place, [f.where for f in found])
    for finding in report.findings:
        assert finding.count >= 1
        assert finding.of is None or finding.of >= finding.count, finding
        assert finding.message
    if corruptor.severity != "error":
        assert corruptor.rule not in rules_of(report.findings, "error"), report.by_rule(
            corruptor.rule
        )
    assert (
        rules_of(report.findings, "error") <= {corruptor.rule} | corruptor.also | corruptor.instead
    ), report.findings
    wanted = 1 if corruptor.severity == "error" or rules_of(report.findings, "error") else 0
    # A scale that the declared algorithm does not have is a warning, and its values are not read.
    assert report.exit_code == (wanted or (3 if report.summary.not_checked else 0))


def test_every_rule_has_a_corruptor() -> None:
    # Depth eval judges numbers of a gate, not a file: tests of their own hold its rules.
    assert {c.rule for c in CORRUPTORS} == {
        r.id for r in all_rules().values() if r.depth not in ("engine", "eval")
    }


def test_corruptors_are_caught_by_apart() -> None:
    keys = [(c.rule, c.name) for c in CORRUPTORS]
    assert len(set(keys)) == len(keys)


def test_every_corruptor_is_tried() -> None:
    assert {(c.rule, c.name) for _, c in CASES} == {
        (c.rule, c.name) for c in CORRUPTORS if _depth(c) != "load"
    }


def test_corruptors_state_the_needs_of_their_rule() -> None:
    rules = all_rules()
    for c in CORRUPTORS:
        rule = rules[c.rule]
        assert c.also <= set(rules), c.name
        assert c.rule not in c.also, c.name
        for need in rule.needs:
            assert any(set(n.split("|")) <= set(need.split("|")) for n in c.on.needs), c.name


@pytest.mark.parametrize("name", CLEAN)
def test_clean_checkpoints_are_what_the_table_says(clean: dict[str, Clean], name: str) -> None:
    folder, spec = CheckpointEditor(clean[name].path), CLEAN[name]
    assert kind_of(folder) == spec.kind
    assert traits_of(folder) == spec.traits
    assert (clean[name].merged_from is not None) == spec.merged


@pytest.mark.parametrize("name", CLEAN)
def test_clean_twin_has_no_finding(clean: dict[str, Clean], name: str) -> None:
    twin = clean[name]
    report = verifier.check(
        twin.path, base=twin.base, merged_from=twin.merged_from, depth="payload"
    )
    assert report.findings == ()
    assert report.verdict == "passed"
    ran = {c.rule for c in report.coverage if c.ran}
    assert ran == {r.id for r in all_rules().values() if r.depth in ("header", "payload")}
    quiet = verifier.check(twin.path, depth="payload")
    assert quiet.findings == ()
    assert quiet.verdict == "passed"


@pytest.mark.parametrize(
    ("name", "base"),
    [("mixed", "mxfp8"), ("nvfp4", "mxfp8"), ("mixed", "nvfp4"), ("mxfp8", "mxfp8")],
)
def test_clean_against_a_quantized_base(clean: dict[str, Clean], name: str, base: str) -> None:
    """A base that is itself quantized is decoded first."""
    report = verifier.check(clean[name].path, base=clean[base].path, depth="payload")
    assert report.findings == ()
    assert all(c.checked == c.of for c in report.coverage if c.rule == "QC515")


@pytest.mark.parametrize("name", CLEAN)
def test_an_edit_that_changes_nothing_is_no_finding(
    clean: dict[str, Clean], name: str, tmp_path: Path
) -> None:
    """The editor itself leaves no trace: every shard written again, one tensor dropped and put
    back, JSON re-dumped.
    """
    twin = clean[name]
    folder = CheckpointEditor(_copy(twin.path, tmp_path / "ckpt"))
    before = {n: folder.read(n) for n in folder.tensors()}
    for file in folder.shards:
        write_shard(folder.path / file, read_shard(folder.path / file))
    moved = next(n for n in before if n.endswith("layernorm.weight"))
    values, home = folder.array(moved), folder.tensors()[moved].file
    folder.drop([moved])
    folder.add(moved, values, file=home)
    folder.rename({moved: "x.weight"})
    folder.rename({"x.weight": moved})
    for file in ("config.json", "hf_quant_config.json"):
        if (folder.path / file).is_file():
            folder.edit_json(file, lambda value: None)
    assert {n: folder.read(n) for n in folder.tensors()} == before
    if folder.has_index:
        index = json.loads((folder.path / INDEX).read_text())
        assert set(index["weight_map"]) == set(before)
        assert index["metadata"]["total_size"] == sum(map(len, before.values()))
    report = verifier.check(
        folder.path, base=twin.base, merged_from=twin.merged_from, depth="payload"
    )
    assert report.findings == ()


@pytest.mark.parametrize("broken", CASES, ids=_ids(CASES), indirect=True)
def test_defect_is_caught_by(broken: tuple[Clean, Corruptor, Where]) -> None:
    ckpt, corruptor, place = broken
    report = verifier.check(
        ckpt.path, base=ckpt.base, merged_from=ckpt.merged_from, depth="payload"
    )
    _assert_caught(report, corruptor, place)


@pytest.mark.parametrize("broken", WITHOUT, ids=_ids(WITHOUT), indirect=True)
def test_defect_is_caught_by_without_base(broken: tuple[Clean, Corruptor, Where]) -> None:
    """At the rule's own depth and with nothing to compare with."""
    ckpt, corruptor, place = broken
    report = verifier.check(ckpt.path, depth=_depth(corruptor))
    _assert_caught(report, corruptor, place)


@pytest.mark.parametrize("broken", EITHER, ids=_ids(EITHER), indirect=True)
@pytest.mark.parametrize("given", ["base", "merged_from"])
def test_defect_is_caught_with_either_source(
    broken: tuple[Clean, Corruptor, Where], given: str
) -> None:
    ckpt, corruptor, place = broken
    report = verifier.check(ckpt.path, **{given: getattr(ckpt, given)}, depth=_depth(corruptor))
    _assert_caught(report, corruptor, place)


# FP8 in its three granularities, encoded here: no exporter writes it, and rules judge it all the
# same.

E4M3 = ml_dtypes.float8_e4m3fn
FP8_DECLARED: dict[str, dict[str, Any]] = {
    "tensor": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
    "channel": {
        "quant_method": "modelopt",
        "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
        "ignore": ["lm_head"],
    },
    # k and v have 64 rows: a block would reach over the seam of q, k and v.
    "block": {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "self_attn"],
    },
}
FP8_ALGO = {"tensor": "FP8", "channel": "FP8_PER_CHANNEL_PER_TOKEN", "block": "FP8_PB_WO"}
VICTIM = "model.layers.1.mlp.down_proj"


def _fp8_parts(
    values: npt.NDArray[np.float32], how: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Return codes and scale of a weight whose sides are multiples of 128, or of one tile."""
    out, in_ = values.shape
    if how == "tensor":
        scale = np.float32(np.abs(values).max() / 448).reshape(())
        wide: npt.NDArray[Any] = np.broadcast_to(scale, values.shape)
    elif how == "channel":
        scale = (np.abs(values).max(axis=1) / 448).astype(np.float32)
        wide = scale[:, None]
    else:
        rows, cols = min(out, 128), min(in_, 128)
        tiles = np.abs(values).reshape(out // rows, rows, in_ // cols, cols)
        scale = (tiles.max(axis=(1, 3)) / 448).astype(np.float32)
        wide = np.repeat(np.repeat(scale, rows, axis=0), cols, axis=1)
    return (values / wide).astype(E4M3), np.asarray(scale)


def _fused_position(module: str) -> int:
    """Return a number that projections which engines fuse have in common."""
    order = ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")
    leaf = module.rpartition(".")[2]
    return next(i for i, leaves in enumerate(order) if leaf in leaves.split())


@pytest.fixture(scope="session")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the tiny llama in FP8, once for each granularity."""
    made = {}
    for how, declared in FP8_DECLARED.items():
        path = _copy(DATA / "src_llama", tmp_path_factory.mktemp("fp8") / how)
        folder = CheckpointEditor(path)
        leaf = "weight_scale_inv" if how == "block" else "weight_scale"
        shard = read_shard(path / "model.safetensors")
        for name, (_, shape, data) in list(shard.entries.items()):
            if (
                ".layers." in name
                and len(shape) == 2
                and not (how == "block" and ".self_attn." in name)
            ):
                values = np.frombuffer(data, ml_dtypes.bfloat16).reshape(shape).astype(np.float32)
                codes, scale = _fp8_parts(values, how)
                shard.entries[name] = ("F8_E4M3", shape, codes.tobytes())
                shard.entries[f"{name.removesuffix('weight')}{leaf}"] = (
                    "F32",
                    scale.shape,
                    scale.tobytes(),
                )
                if how == "tensor":  # its config declares static activations
                    module = name.removesuffix(".weight")
                    input_scale = np.float32(0.01 * (1 + _fused_position(module)))
                    entry = ("F32", (), input_scale.tobytes())
                    shard.entries[f"{module}.input_scale"] = entry
        write_shard(path / "model.safetensors", shard)
        config = folder.json("config.json") | {"quantization_config": declared}
        (path / "config.json").write_text(json.dumps(config))
        made[how] = path
    return made


def _fp8_value(value: float) -> Callable[[CheckpointEditor, str], Where]:
    """Return a change of a scale's last element."""

    def apply(folder: CheckpointEditor, name: str) -> Where:
        last = folder.array(name).size - 1
        folder.overwrite(name, last, np.float32(value).tobytes())
        found = folder.where(name, last)
        return Where(found.tensor, found.file, byte=found.byte)

    return apply


def _fp8_lost(folder: CheckpointEditor, name: str) -> Where:
    folder.drop([name])
    return Where(name)


def _fp8_as(dtype: npt.DTypeLike) -> Callable[[CheckpointEditor, str], Where]:
    return lambda folder, name: folder.store(name, folder.array(name).astype(dtype))


def _fp8_longer(folder: CheckpointEditor, name: str) -> Where:
    values = folder.array(name)
    return folder.store(
        name, np.concatenate([np.atleast_1d(values), np.atleast_1d(values)], axis=-1)
    )


def _fp8_weight(folder: CheckpointEditor, name: str) -> Where:
    """Roll the codes of a weight by one row."""
    weight = f"{VICTIM}.weight"
    return folder.store(weight, np.roll(folder.array(weight), 1, axis=0))


def _fp8_inverted(folder: CheckpointEditor, name: str) -> Where:
    return folder.store(name, np.asarray(np.float32(1) / folder.array(name), np.float32))


def _fp8_rows(folder: CheckpointEditor, name: str) -> Where:
    """Write the codes of four rows over four others."""
    weight = f"{VICTIM}.weight"
    codes = folder.array(weight)
    codes[4:8] = codes[12:16]
    return folder.store(weight, codes)


FP8_DEFECTS: dict[str, tuple[str, Callable[[CheckpointEditor, str], Where]]] = {
    "zero": ("QC501", _fp8_value(0.0)),
    "nan": ("QC502", _fp8_value(float("nan"))),
    "inf": ("QC502", _fp8_value(float("inf"))),
    "negative": ("QC502", _fp8_value(-0.5)),
    "lost": ("QC302", _fp8_lost),
    "as_bf16": ("QC304", _fp8_as(ml_dtypes.bfloat16)),
    "as_u8": ("QC304", _fp8_as(np.uint8)),
    "longer": ("QC306", _fp8_longer),
    "rolled": ("QC515", _fp8_weight),
    "inverted": ("QC509", _fp8_inverted),
    "rows": ("QC517", _fp8_rows),
}


@pytest.mark.parametrize("how", FP8_DECLARED)
def test_clean_fp8_has_no_finding(fp8: dict[str, Path], how: str) -> None:
    for base in (None, DATA / "src_llama"):
        report = verifier.check(fp8[how], base=base, depth="payload")
        assert report.findings == ()
        assert report.verdict == "passed"
        assert report.summary.contents.formats == {FP8_ALGO[how]: 6 if how == "block" else 14}


@pytest.mark.parametrize("defect", FP8_DEFECTS)
@pytest.mark.parametrize("how", FP8_DECLARED)
def test_defect_of_fp8_is_caught_by(
    fp8: dict[str, Path], tmp_path: Path, how: str, defect: str
) -> None:
    rule, change = FP8_DEFECTS[defect]
    folder = CheckpointEditor(_copy(fp8[how], tmp_path / "ckpt"))
    place = change(folder, f"{VICTIM}.{'weight_scale_inv' if how == 'block' else 'weight_scale'}")
    report = verifier.check(folder.path, base=DATA / "src_llama", depth="payload")
    assert report.exit_code == 1
    found = [f for f in report.by_rule(rule) if f.severity == "error"]
    assert any(_points_at(f, place) for f in found), (place, report.findings)
    assert rules_of(report.findings, "error") <= {rule, "QC512", "QC515"}


@pytest.mark.parametrize("how", FP8_DECLARED)
def test_inverted_fp8_is_caught_by_without_base(
    fp8: dict[str, Path], tmp_path: Path, how: str
) -> None:
    folder = CheckpointEditor(_copy(fp8[how], tmp_path / "ckpt"))
    _fp8_inverted(folder, f"{VICTIM}.{'weight_scale_inv' if how == 'block' else 'weight_scale'}")
    assert {f.rule for f in verifier.check(folder.path, depth="payload").findings} == {"QC509"}
