# SPDX-License-Identifier: Apache-2.0
"""How each engine reads exclusions, and which differences in configs are no alarm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import verifier
from tests.paths import TESTS
from verifier.findings import Report
from verifier.schemes import READERS, Exclusions, parse
from verifier.selftest import CheckpointEditor

DATA = TESTS / "data" / "modelopt"
QWEN, SOURCE = DATA / "qwen3moe_nvfp4_experts_max", DATA / "src_qwen3moe"
ROUTER = "model.layers.1.mlp.gate"
M3 = "language_model.model.layers.5."


def copy(source: Path, target: Path) -> CheckpointEditor:
    target.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    return CheckpointEditor(target)


@pytest.mark.parametrize(
    ("pattern", "module", "wanted"),
    [
        (ROUTER, ROUTER, "vllm sglang trtllm"),
        ("model.layers.1.mlp.gate*", ROUTER, "vllm sglang trtllm"),
        ("*gate", ROUTER, "vllm sglang trtllm"),
        ("*.mlp.gate", ROUTER, "vllm sglang trtllm"),
        ("gate", ROUTER, "vllm sglang"),
        ("gat", ROUTER, "vllm"),
        ("mlp.gate", ROUTER, "vllm"),
        ("mlp*", ROUTER, "vllm sglang"),
        ("re:.*gate$", ROUTER, ""),
        (ROUTER, "model.layers.1.mlp.gate_proj", "vllm"),
        ("model.layers.1*", "model.layers.12.mlp.gate", "vllm sglang trtllm"),
        ("model.layers.1.*", "model.layers.12.mlp.gate", ""),
        ("model.layers.5.mlp.gate", f"{M3}mlp.gate", "vllm sglang trtllm"),
        ("lm_head", "language_model.lm_head", "vllm sglang trtllm"),
        ("vision_tower", "vision_tower.layers.0.fc1", "vllm sglang"),
        ("vision_tower*", "vision_tower.layers.0.fc1", "vllm sglang trtllm"),
        ("model.layers.*.mlp", f"{M3}mlp", "sglang trtllm"),
        (
            "model.layers.0.mlp.experts",
            "model.layers.0.mlp.experts.3.gate_proj",
            "vllm sglang trtllm",
        ),
        ("*", ROUTER, "vllm sglang trtllm"),
        ("other", ROUTER, ""),
    ],
)
def test_how_engines_read_a_pattern(pattern: str, module: str, wanted: str) -> None:
    exclusions = Exclusions([pattern])
    assert {r for r in READERS if exclusions.excludes(r, module)} == set(wanted.split())
    if wanted:
        assert exclusions.loose(module), "what one engine excludes, the loosest reading excludes"


def test_no_pattern_excludes_nothing() -> None:
    assert not any(Exclusions([]).excludes(r, ROUTER) for r in READERS)
    assert not any(Exclusions([""]).excludes(r, ROUTER) for r in READERS)


def changed(
    tmp_path: Path, ours: Callable[[dict[str, Any]], Any], theirs: Callable[[dict[str, Any]], Any]
) -> Report:
    folder, base = copy(QWEN, tmp_path / "ckpt"), copy(SOURCE, tmp_path / "base")
    folder.edit_json("config.json", ours)
    base.edit_json("config.json", theirs)
    return verifier.check(folder.path, base=base.path)


def nothing(config: dict[str, Any]) -> None:
    pass


def rope_inside(config: dict[str, Any]) -> None:
    found = dict(config.pop("rope_parameters", None) or {})
    config.pop("rope_scaling", None)
    found.setdefault("rope_theta", config.pop("rope_theta", 1e4))
    config["rope_parameters"] = found | {"rope_type": "default"}


def rope_outside(config: dict[str, Any]) -> None:
    inner = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = int(inner.get("rope_theta", config.get("rope_theta", 1e4)))
    config["rope_scaling"] = None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (rope_inside, rope_outside),
        (rope_outside, rope_inside),
        (lambda c: c.update(torch_dtype="bfloat16"), lambda c: c.update(dtype="float32")),
        (
            lambda c: c.update(transformers_version="5.0"),
            lambda c: c.update(transformers_version="4.50"),
        ),
        (
            lambda c: c.update(_name_or_path="elsewhere"),
            lambda c: c.update(_attn_implementation="eager"),
        ),
        (lambda c: c.update(new_field=1), nothing),
        (nothing, lambda c: c.update(lost_default=None)),
        (lambda c: c.update(rms_norm_eps=1.0), lambda c: c.update(rms_norm_eps=1)),
    ],
)
def test_spellings_of_one_config_are_no_alarm(tmp_path: Path, ours: Any, theirs: Any) -> None:
    report = changed(tmp_path, ours, theirs)
    assert report.findings == ()
    assert next(c for c in report.coverage if c.rule == "QC413").checked > 10


@pytest.mark.parametrize(
    ("ours", "theirs", "named"),
    [
        (nothing, lambda c: c.update(layer_types=["full", "sliding"]), "layer_types"),
        (
            lambda c: c.update(sliding_window=1),
            lambda c: c.update(sliding_window=4096),
            "sliding_window",
        ),
        (
            nothing,
            lambda c: c.update(text_config={"rope_scaling": {"type": "yarn"}}),
            "text_config",
        ),
        (
            lambda c: c.update(text_config={"a": 1}),
            lambda c: c.update(text_config={"a": 1, "b": [2]}),
            "text_config.b",
        ),
        (
            lambda c: c.update(attention_bias=0),
            lambda c: c.update(attention_bias=False),
            "attention_bias",
        ),
        (
            lambda c: c.update(rope_scaling={"rope_type": "linear", "factor": 2}),
            lambda c: c.update(rope_scaling={"type": "yarn", "factor": 2}),
            "rope_scaling",
        ),
    ],
)
def test_a_changed_config_is_a_warning(tmp_path: Path, ours: Any, theirs: Any, named: str) -> None:
    report = changed(tmp_path, ours, theirs)
    found = [f for f in report.by_rule("QC413") if f.message.startswith(f"{named} ")]
    assert [f.severity for f in found] == ["warning"], report.findings


@pytest.mark.parametrize(
    "head", ["mtp.layers.0", "model.layers.2", "model.mtp.layers.0.transformer_layer"]
)
def test_a_head_that_is_excluded_is_left_alone(tmp_path: Path, head: str) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    values = np.zeros((64, 64), ml_dtypes.bfloat16)
    for leaf in ("eh_proj", "self_attn.q_proj", "mlp.experts.0.gate_proj"):
        folder.add(f"{head}.{leaf}.weight", values)
    folder.edit_json("config.json", lambda c: c["quantization_config"]["ignore"].append(f"{head}*"))
    folder.edit_json(
        "hf_quant_config.json", lambda c: c["quantization"]["exclude_modules"].append(f"{head}*")
    )
    report = verifier.check(folder.path)
    assert {r: report.by_rule(r) for r in ("QC402", "QC403", "QC404", "QC405")} == dict.fromkeys(
        ("QC402", "QC403", "QC404", "QC405"), ()
    )
    assert next(c for c in report.coverage if c.rule == "QC403").checked == 3


@pytest.mark.parametrize(
    ("top", "inner", "head", "reported"),
    [
        (False, None, True, False),
        (True, None, False, False),
        (True, True, False, False),
        (False, False, True, False),
        (None, False, True, False),
        (None, None, True, False),
        (True, False, True, True),
        (True, False, False, True),
        (False, True, False, True),
        (None, True, False, True),
        ("true", None, True, True),
    ],
)
def test_tied_embeddings(
    tmp_path: Path, top: Any, inner: bool | None, head: bool, reported: bool
) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")

    def change(config: dict[str, Any]) -> None:
        config.pop("tie_word_embeddings", None)
        if top is not None:
            config["tie_word_embeddings"] = top
        config["text_config"] = {} if inner is None else {"tie_word_embeddings": inner}

    folder.edit_json("config.json", change)
    if not head:
        folder.drop(["lm_head.weight"])
    report = verifier.check(folder.path)
    assert [f.severity for f in report.by_rule("QC412")] == (["warning"] if reported else [])
    if top is True and not reported:
        assert {f.rule for f in report.findings if f.severity == "error"} == set()


def test_released_configs_raise_no_alarm_of_the_rules_on_fields(
    shared_data: Path, tmp_path: Path
) -> None:
    """QC411, QC412, QC415 look at fields alone: each release's configs are put beside tensors that
    are not its own.
    """
    known = {
        ("Qwen--Qwen3-32B-FP8-Static-PerTensor", "QC415"),  # kv_cache_scheme "FP8": a string
        (
            "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4",
            "QC411",
        ),  # the mirror's copy of the nested form is cut down
    }
    reported, seen = set(), 0
    for config in sorted((shared_data / "configs").glob("*_config.json")):
        name = config.name.removesuffix("_config.json")
        if name.endswith("_hf_quant"):
            continue
        folder = copy(QWEN, tmp_path / name)
        shutil.copyfile(config, folder.path / "config.json")
        nested = config.with_name(f"{name}_hf_quant_config.json")
        folder.remove("hf_quant_config.json")
        if nested.exists():
            shutil.copyfile(nested, folder.path / "hf_quant_config.json")
        report = verifier.check(folder.path, select="QC411,QC412,QC415")
        reported |= {(name, f.rule) for f in report.findings}
        seen += 1
    assert reported == known
    assert seen > 20


def test_engines_agree_on_the_exclusions_of_releases(shared_data: Path) -> None:
    """Each pattern of a published ModelOpt config, on a module of its own making, is read alike by
    all.
    """
    seen = 0
    for file in sorted((shared_data / "configs").glob("nvidia--*.json")):
        raw = json.loads(file.read_text())
        body = raw if "hf_quant_config" in file.name else raw.get("quantization_config")
        declared = parse(body, file.name) if body else None
        if declared is None or not declared.known or declared.mixed or declared.form == "vendor":
            continue
        for pattern in declared.exclude:
            plain = (
                [pattern]
                if "*" not in pattern
                else [pattern.replace("*", ""), f"{pattern.rstrip('.*')}.q_proj"]
            )
            for module in plain:
                assert all(declared.exclusions.excludes(r, module) for r in READERS), (
                    file.name,
                    pattern,
                )
                seen += 1
    assert seen > 1000


def test_a_tied_heads_copy_is_no_invention(tmp_path: Path) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")
    folder.edit_json("config.json", lambda c: c.update(tie_word_embeddings=True))
    assert json.loads((folder.path / "config.json").read_text())["tie_word_embeddings"] is True
    assert verifier.check(folder.path).by_rule("QC201") == ()


@pytest.mark.parametrize(
    ("pattern", "reported"),
    [
        ("gate", {"vllm": "info", "sglang": "info", "trtllm": "error"}),
        ("mlp.gate", {"vllm": "info", "sglang": "error", "trtllm": "error"}),
        ("re:.*mlp[.]gate$", {"vllm": "error", "sglang": "error", "trtllm": "error"}),
    ],
)
def test_a_profile_hears_of_its_own_reading(
    tmp_path: Path, pattern: str, reported: dict[str, str]
) -> None:
    folder = copy(QWEN, tmp_path / "ckpt")

    def change(body: dict[str, Any], key: str) -> None:
        body[key] = [p for p in body[key] if not p.endswith("gate")] + [pattern]

    folder.edit_json("config.json", lambda c: change(c["quantization_config"], "ignore"))
    folder.edit_json("hf_quant_config.json", lambda c: change(c["quantization"], "exclude_modules"))
    assert {f.severity for f in verifier.check(folder.path).by_rule("QC405")} == {"warning"}
    for engine, severity in reported.items():
        report = verifier.check(folder.path, profile=engine)
        assert {f.severity for f in report.by_rule("QC405")} == {severity}, engine
