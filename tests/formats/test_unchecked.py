# SPDX-License-Identifier: Apache-2.0
"""What is not checked is not passed: it is named, with its number and the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import verifier
from tests.formats.files import BF16, E4M3, E8M0, Array, Checkpoint
from tests.formats.formats import build
from tests.formats.matrix import FAILED, INCONCLUSIVE, PASSED
from tests.formats.table import FORMATS
from verifier.findings import Report
from verifier.report import render, render_json, schema
from verifier.run import merge_reports, report_of, schedule

ATTENTION = "model.layers.0.self_attn.q_proj"
SCALAR = np.float32(0.01).reshape(())
NAN: dict[np.dtype, Callable[[Array], Array]] = {
    **{np.dtype(d): lambda a: np.full_like(a, np.nan) for d in (np.float32, np.float16, BF16)},
    E4M3: lambda a: np.full(a.shape, 0x7F, np.uint8).view(E4M3),
    E8M0: lambda a: np.full(a.shape, 0xFF, np.uint8).view(E8M0),
}
WEIGHTS = ("weight", "qweight", "weight_packed", "_weight_qdata", "blocks")


def clean(name: str) -> Checkpoint:
    return build(FORMATS[name])[0]


def stats(report: Report) -> list[tuple[str, int, str]]:
    return [(e.kind, e.count, e.example) for e in report.summary.not_checked]


# each kind


def foreign_method(checkpoint: Checkpoint) -> None:
    checkpoint.config["quantization_config"]["quant_method"] = "tomorrows_method"
    checkpoint.json.pop("hf_quant_config.json", None)


def unknown_group(checkpoint: Checkpoint) -> None:
    groups = checkpoint.config["quantization_config"]["config_groups"]
    groups["group_9"] = {**groups["group_0"], "targets": ["SomeLayer"]}


def unread_exclusion(checkpoint: Checkpoint) -> None:
    checkpoint.config["quantization_config"]["ignore"].append("re:model.(layers")


def scale_without_weight(checkpoint: Checkpoint) -> None:
    checkpoint.tensors["model.layers.0.extra_proj.weight_scale"] = SCALAR


def scale_of_another_format(checkpoint: Checkpoint) -> None:
    checkpoint.tensors[f"{ATTENTION}.weight_scale_2"] = SCALAR
    checkpoint.tensors["model.layers.0.self_attn.k_proj.weight_scale_2"] = SCALAR


def scale_of_no_format(checkpoint: Checkpoint) -> None:
    checkpoint.config["model_type"] = "a_family_that_nobody_knows"
    checkpoint.tensors[f"{ATTENTION}.weight_scale_3"] = SCALAR


CONFIG = "config.json"
KINDS: dict[str, tuple[str, Callable[[Checkpoint], None], tuple[str, int, str], str]] = {
    "method": ("ct_fp8_tensor", foreign_method, ("declarations", 1, CONFIG), "tomorrows_method"),
    "group": ("ct_nvfp4", unknown_group, ("declarations", 1, CONFIG), "SomeLayer"),
    "exclusion": ("ct_nvfp4", unread_exclusion, ("declarations", 1, CONFIG), "re:model"),
    "no weight": (
        "modelopt_nvfp4",
        scale_without_weight,
        ("scales", 1, "model.layers.0.extra_proj.weight_scale"),
        "no weight",
    ),
    "other format": (
        "modelopt_mxfp8",
        scale_of_another_format,
        ("scales", 2, f"{ATTENTION}.weight_scale_2"),
        "MXFP8 has no weight_scale_2",
    ),
    "no format": (
        "modelopt_mxfp8",
        scale_of_no_format,
        ("scales", 1, f"{ATTENTION}.weight_scale_3"),
        "no format",
    ),
    "bitsandbytes": (
        "bnb_nf4",
        lambda _: None,
        ("modules", 16, ATTENTION),
        "BITSANDBYTES_4BIT is recognized by name only",
    ),
    "torchao": ("torchao_int4", lambda _: None, ("modules", 16, ATTENTION), "TORCHAO"),
}


@pytest.mark.parametrize("depth", ["header", "payload"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_checked_is_named_and_not_passed(
    kind: str, depth: verifier.rules.Depth, tmp_path: Path
) -> None:
    name, edit, expected, why = KINDS[kind]
    checkpoint = clean(name)
    edit(checkpoint)
    report = verifier.check(checkpoint.write(tmp_path / "ckpt"), depth=depth)
    assert (report.verdict, report.exit_code) == (INCONCLUSIVE, 3), report.findings
    assert expected in stats(report)
    entry = report.summary.not_checked[stats(report).index(expected)]
    assert why in entry.why
    assert entry.why in report.summary.inconclusive or entry is not report.summary.not_checked[0]
    for form in ("text", "markdown", "html"):
        text = render(report, form)
        assert "ot checked" in text
        assert expected[2].rpartition(".")[2] in text


def test_formats_that_are_recognized_by_shape_pass_until_values_are_read(tmp_path: Path) -> None:
    for name, algo in (("bnb_int8", "BITSANDBYTES_INT8"), ("w4afp8", "W4AFP8")):
        path = clean(name).write(tmp_path / name)
        assert verifier.check(path).verdict == PASSED
        report = verifier.check(path, depth="payload")
        assert report.verdict == INCONCLUSIVE
        assert [e.kind for e in report.summary.not_checked] == ["modules"]
        assert algo in report.summary.inconclusive


def test_what_an_error_names_is_not_listed_again(tmp_path: Path) -> None:
    checkpoint = clean("modelopt_mxfp8")
    name = f"{ATTENTION}.weight_scale"
    checkpoint.tensors[name] = checkpoint.tensors[name].astype(np.float32)
    path = checkpoint.write(tmp_path / "ckpt")
    failed = verifier.check(path, depth="payload")
    assert failed.verdict == FAILED
    assert failed.summary.not_checked == ()
    lenient = verifier.check(path, depth="payload", severity={"QC304": "info"})
    assert lenient.verdict == INCONCLUSIVE
    assert name in {e.example for e in lenient.summary.not_checked}


# reports


def test_the_json_report_has_what_its_schema_says(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    report = verifier.check(clean("bnb_nf4").write(tmp_path / "ckpt"), depth="payload")
    value = json.loads(render_json(report))
    jsonschema.validate(value, schema())
    assert value["stats"]["not_checked"][0]["count"] == 16
    assert report_of(value) == report
    value["stats"]["not_checked"][0]["kind"] = "something else"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, schema())


def split(checkpoint: Checkpoint, folder: Path, count: int) -> Path:
    """Write a checkpoint in shards of every ``count``-th tensor, without an index."""
    checkpoint.write(folder)
    whole = checkpoint.tensors
    for i in range(count):
        part = Checkpoint(dict(list(whole.items())[i::count]), {})
        shard = part.write(folder / str(i)) / "model.safetensors"
        shard.rename(folder / f"model-{i}.safetensors")
        for left in (folder / str(i)).iterdir():
            left.unlink()
        (folder / str(i)).rmdir()
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Return shards with scales of no format, and with scales that no rule reads by their dtype."""
    checkpoint = clean("modelopt_nvfp4")
    scale_without_weight(checkpoint)
    for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for scale in ("weight_scale_2", "input_scale"):
            name = f"model.layers.0.self_attn.{leaf}.{scale}"
            checkpoint.tensors[name] = checkpoint.tensors[name].astype(BF16)
    return split(checkpoint, tmp_path / "ckpt", 5)


LENIENT = {"QC315": "info", "QC1": "info"}


def test_subsets_put_together_are_the_whole(several: Path) -> None:
    whole = verifier.check(several, depth="payload", severity=LENIENT)
    assert {e.kind: e.count for e in whole.summary.not_checked if e.kind == "scales"}
    assert sum(e.count for e in whole.summary.not_checked if e.kind == "values") == 8
    parts = [
        verifier.check(several, depth="payload", severity=LENIENT, subset=f"{k}/3")
        for k in (3, 1, 2)
    ]
    merged = merge_reports(report_of(json.loads(render_json(p))) for p in parts)
    key = [(e.kind, e.count, e.why) for e in whole.summary.not_checked]
    assert sorted((e.kind, e.count, e.why) for e in merged.summary.not_checked) == sorted(key)
    assert merged.summary.scale_bytes_read == whole.summary.scale_bytes_read
    assert (merged.verdict, merged.summary.inconclusive) == (
        whole.verdict,
        whole.summary.inconclusive,
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_and_threads_find_the_same(
    several: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = verifier.check(several, depth="payload", severity=LENIENT, workers=1).summary
    monkeypatch.setattr(schedule, "WORTH_COPIES", 1)
    found = verifier.check(several, depth="payload", severity=LENIENT, workers=workers).summary
    assert found.not_checked == alone.not_checked
    assert found.scale_bytes_read == alone.scale_bytes_read
    monkeypatch.setattr(schedule, "can_fork", lambda: False)
    threads = verifier.check(several, depth="payload", severity=LENIENT, workers=workers).summary
    assert threads.not_checked == alone.not_checked


def test_a_sample_counts_the_scales_that_it_read(tmp_path: Path) -> None:
    path = clean("modelopt_nvfp4").write(tmp_path / "ckpt")
    whole = verifier.check(path, depth="payload")
    part = verifier.check(path, depth="payload", sample="10%")
    assert whole.summary.contents is not None
    assert whole.summary.scale_bytes_read == whole.summary.contents.scale_bytes
    assert 0 < (part.summary.scale_bytes_read or 0) < whole.summary.contents.scale_bytes
    assert "of scales read" not in render(verifier.check(path), "text")
    only = verifier.check(path, depth="payload", select="QC304")
    assert "of scales read" not in render(only, "text")


def nan_in(checkpoint: Checkpoint, module: str) -> None:
    name = f"{module}.weight"
    values = checkpoint.tensors[name].copy()
    values.reshape(-1)[5] = np.nan
    checkpoint.tensors[name] = values


def test_a_base_with_nan_leaves_weights_unchecked_in_every_subset(tmp_path: Path) -> None:
    checkpoint, base = build(FORMATS["modelopt_nvfp4"])
    for leaf in ("q_proj", "v_proj", "o_proj"):
        nan_in(base, f"model.layers.0.self_attn.{leaf}")
    path, other = split(checkpoint, tmp_path / "ckpt", 4), base.write(tmp_path / "base")
    lenient = {"QC1": "info"}
    whole = verifier.check(path, base=other, depth="payload", severity=lenient)
    assert whole.verdict == INCONCLUSIVE
    assert [(e.kind, e.count) for e in whole.summary.not_checked] == [("weights", 3)]
    assert "NaN" in whole.summary.inconclusive
    parts = [
        verifier.check(path, base=other, depth="payload", severity=lenient, subset=f"{k}/2")
        for k in (1, 2)
    ]
    merged = merge_reports(report_of(json.loads(render_json(p))) for p in parts)
    assert [(e.kind, e.count) for e in merged.summary.not_checked] == [("weights", 3)]
    assert merged.verdict == INCONCLUSIVE


# values that no rule asked for


OUT = "model.layers.0.self_attn.o_proj"


def one_byte(value: int) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        changed = array.copy()
        changed.view(np.uint8).reshape(-1)[3] = value
        return changed

    return change


def to(value: float) -> Callable[[Array], Array]:
    return lambda array: np.full_like(array, value)


REPORTED: dict[str, tuple[str, str, Callable[[Array], Array], str, bool]] = {
    "a huge tensor scale": ("modelopt_nvfp4", "weight_scale_2", to(1e20), "QC502", False),
    "a tiny divisor": ("ct_nvfp4", "weight_global_scale", to(1e-20), "QC502", False),
    "a huge exponent": ("modelopt_mxfp8", "weight_scale", one_byte(254), "QC502", False),
    "an overflow": ("modelopt_nvfp4", "weight_scale_2", to(3e38), "QC515", True),
    "an overflow of one block": ("modelopt_mxfp8", "weight_scale", one_byte(254), "QC515", True),
}


@pytest.mark.parametrize("case", REPORTED)
def test_a_scale_that_makes_the_weight_unusable_is_an_error(case: str, tmp_path: Path) -> None:
    name, leaf, change, rule, with_base = REPORTED[case]
    checkpoint, base = build(FORMATS[name])
    tensor = f"{OUT}.{leaf}"
    checkpoint.tensors[tensor] = change(checkpoint.tensors[tensor])
    path = checkpoint.write(tmp_path / "ckpt")
    other = base.write(tmp_path / "base") if with_base else None
    report = verifier.check(path, base=other, depth="payload")
    assert report.verdict == FAILED
    assert any(f.where.tensor.startswith(OUT) for f in report.by_rule(rule) if f.where.tensor)


def test_a_plain_weight_with_scales_that_no_target_covers_is_an_error(tmp_path: Path) -> None:
    checkpoint = clean("ct_fp8_tensor")
    groups = checkpoint.config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"] = ["re:.*experts.*"]
    for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{leaf}.weight"
        checkpoint.tensors[name] = checkpoint.tensors[name].astype(np.float32).astype(BF16)
    report = verifier.check(checkpoint.write(tmp_path / "ckpt"))
    assert report.verdict == FAILED
    assert sum(f.count for f in report.by_rule("QC401")) == 4


# everything that has values


@pytest.mark.parametrize("name", FORMATS)
def test_no_tensor_of_nan_passes(name: str, tmp_path: Path) -> None:
    """A tensor that no rule reads is not passed, whatever it is called: but for weights, one
    tensor of each name and dtype is filled with NaN.
    """
    checkpoint = clean(name)
    kinds: dict[tuple[str, str], str] = {}
    for tensor, array in checkpoint.tensors.items():
        leaf = re.sub(r"\d+", "*", tensor)
        quantized_weight = array.dtype == E4M3 and tensor.rpartition(".")[2] in WEIGHTS
        if array.dtype in NAN and array.size and not quantized_weight:
            kinds.setdefault((leaf, array.dtype.name), tensor)
    passed = []
    for number, tensor in enumerate(kinds.values()):
        broken = checkpoint.copy()
        broken.tensors[tensor] = NAN[broken.tensors[tensor].dtype](broken.tensors[tensor])
        report = verifier.check(broken.write(tmp_path / str(number)), depth="payload")
        if report.verdict == PASSED:
            passed.append(tensor)
    assert passed == []
