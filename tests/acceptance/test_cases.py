# SPDX-License-Identifier: Apache-2.0
"""Checkpoints rebuilt from public reports ($CKPTGATE_TEST_DATA/cases): each gets its verdict, and a
finding names the cause.

``case.json`` says how to run a case and which verdict it must get. Which finding names the cause is
written here, in `CAUSES`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import verifier
from verifier.findings import Finding, Report

CASES = Path(os.environ.get("CKPTGATE_TEST_DATA", "/nonexistent")) / "cases"
NAMES = sorted(p.name for p in CASES.iterdir() if p.is_dir()) if CASES.is_dir() else []
NEW_WORDS = {"unproven": "inconclusive", "broken": "error"}


@dataclass(frozen=True)
class Cause:
    """A finding that names a cause: by one of ``rules`` (any, where empty), at a tensor whose name
    holds ``place``, with a title or message that matches ``words``.
    """

    rules: str = ""
    place: str = ""
    words: str = ""

    def named_by(self, finding: Finding) -> bool:
        """Whether a finding names this cause."""
        rule = verifier.rules.all_rules()[finding.rule]
        text = f"{rule.title} {finding.message} {finding.observed} {finding.expected}"
        return (
            (not self.rules or finding.rule in self.rules.split())
            and self.place in f"{finding.where.tensor or ''} {finding.message} {finding.observed}"
            and re.search(self.words, text, re.IGNORECASE) is not None
        )


def by(rules: str, place: str = "", words: str = "") -> tuple[Cause, ...]:
    """Return one cause."""
    return (Cause(rules, place, words),)


EXPERT_2 = "model.layers.0.mlp.experts.2"
KV = r"KV|k_scale|v_scale"
CAUSES: dict[str, tuple[Cause, ...]] = {
    "algo-sib-w4a8mxfp4-over-nvfp4": by("QC408"),
    "autoround769-shared-experts": by("QC402", "shared_experts"),
    "awq-sib-first-of-group": by("QC604", "k_proj.pre_quant_scale"),
    "awq-sib-shape": by("QC306", "pre_quant_scale"),
    "awq-tagged-nvfp4-vllm": by("", "pre_quant_scale"),
    "awq-unfused-vllm": by("QC408", "", "NVFP4_AWQ"),
    "bias-bf16-nemotron": by("QC516", "e_score_correction_bias"),
    "bias-sib-fp16-nemotron": by("QC516", "e_score_correction_bias"),
    "ct-fp8-channel-nan-scale": by("QC502", f"{EXPERT_2}.up_proj.weight_scale", "NaN"),
    "ct-nvfp4-router-not-ignored": by("QC402", "mlp.gate"),
    "ct-nvfp4-weight-global-scale-zero": by(
        "QC501 QC502 QC509", f"{EXPERT_2}.down_proj.weight_global_scale", "zero|0"
    ),
    "ct225-zero-point-dropped": (
        Cause("QC302", "q_proj.weight_zero_point"),
        Cause("QC302", f"{EXPERT_2}.up_proj.weight_zero_point"),
    ),
    "ct595-input-global-scale-inf": by("QC503", f"{EXPERT_2}.down_proj.input_global_scale", "inf"),
    "ct832-nan-scale": (
        Cause("QC502", f"{EXPERT_2}.up_proj.weight_scale"),
        Cause("QC502", f"{EXPERT_2}.down_proj.weight_scale"),
    ),
    "fp8-no-input-scale-at-all": by("QC301 QC303", "input_scale"),
    "fp8block-sib-bf16-scale": by("QC304", "gate_proj.weight_scale_inv"),
    "fp8block-wrong-leaf": by("", "weight_scale", "weight_scale_inv"),
    "g128-leftover": by("QC308", "", "128"),
    "g16-sib-mxfp8": by("QC308", "", "16"),
    "g32-w4a4-defect": by("QC308", "", "32"),
    "gdn-mixed-qkv-z": by("QC409", "linear_attn.in_proj_"),
    "gemma-sib-vproj-lost": by("QC205", "layers.0.self_attn.v_proj"),
    "gemma-sib-vproj-written": by("QC201", "layers.1.self_attn.v_proj"),
    "glm-mtp-not-indexed-not-excluded": (Cause("QC103", "layers.2"), Cause("QC403", "layers.2")),
    "glm-shared-bf16-legit": by("QC414", "shared_experts"),
    "glm-sib-no-index": by("QC101"),
    "glm-sib-single-file": by("QC102 QC103"),
    "glmflash-experts-bf16": by("QC402", "mlp.experts"),
    "glmflash-sib-down-bf16": by("QC402", "down_proj"),
    "glmflash-sib-one-expert-bf16": by("QC402", "experts.3."),
    "gptoss-scale-nan": by("QC502 QC512", "layers.1.mlp.experts.down_proj_scales", "NaN"),
    "gptqmodel3077-qweight-missing": by("QC205 QC207 QC302", "o_proj.qweight"),
    "groups-sib-targets": by("", "", "config_groups|group_1"),
    "groups-sib-uniform-w4a16-acts": by("", "", "config_groups|group_0"),
    "kv-declared-never-made": by("QC402", "lm_head"),
    "kv-kscale-nan": by("", "layers.1.self_attn.k_proj.k_scale", KV),
    "kv-kscale-neginf": by("", "layers.1.self_attn.k_proj.k_scale", KV),
    "kv-kscale-zero": by("", "layers.1.self_attn.k_proj.k_scale", KV),
    "kv-only-vscale": by("QC312", "k_scale"),
    "kv-sib-mla-zero": by("", "layers.1.self_attn.kv_a_proj_with_mqa.k_scale", KV),
    "kv-sib-nvfp4-negative": by("", "layers.1.self_attn.v_proj.v_scale", KV),
    "kv-sib-only-kscale-one-layer": by("QC312", "layers.1.self_attn.v_proj.v_scale"),
    "llama4-sib-scale-not-transposed": by("QC306", "down_proj"),
    "llmc1869-qkv-global-scale": by("QC505", "weight_global_scale"),
    "lowmem-half-scale": by("QC306", "weight_scale"),
    "lowmem-sib-fp8-scale-one": by("QC509 QC515", "weight"),
    "lowmem-sib-mxfp8-half": by("QC306", "weight_scale"),
    "mixed-bare": (Cause("QC410"), Cause("QC411")),
    "mla-sib-a-scales-differ": (Cause("QC505", "weight_scale_2"), Cause("QC506", "input_scale")),
    "modelopt-w4a8-zero-scale": by("QC501", f"{EXPERT_2}.up_proj.weight_scale"),
    "nemo-excl-corrupt-all": (Cause("QC404"), Cause("QC402", "mixer")),
    "nemo-excl-corrupt-conv1d": by("QC404", "", "conv1d"),
    "nemo-sib-qwen3next-corrupt": (Cause("QC404"), Cause("QC402", "linear_attn")),
    "phi-sib-two-scalars": by("QC306", "layers.1.mlp.gate_up_proj.input_scale"),
    "ple-sib-scale-lost": by("QC302", "ple_embedding"),
    "q35-mtp-not-excluded": by("QC403", "mtp."),
    "qnext-ct-split-names": by("QC402 QC404 QC405", "", "in_proj"),
    "qnext-ignore-split-names": by("QC402 QC404 QC405", "", "in_proj"),
    "quark44-scale-names": by("QC201 QC302 QC111", "weight_quantizer.scale"),
    "stack-sib-scale-lost": by("QC302", "layers.1.mlp.experts"),
    "swz-mxfp8-same-shape": by("QC307 QC515"),
    "transformers37250-fp8-declared-bf16": by("QC402 QC408"),
    # Eight columns of codes for four experts: the stored router has four rows too many.
    "vllm25029-router-quantized": (Cause("QC513", "mlp.gate"), Cause("QC208", "mlp.gate")),
    "vllm38966-gptq-v2-zeros": by("", "qzeros", "zero"),
    "vllmomni4025-nan-block-scale": by("QC502", f"{EXPERT_2}.down_proj.weight_scale", "NaN"),
    "w4a8-scale-range": by("", "weight_scale", "448|74|range|large"),
}
"""Every one of a case's causes is named by a finding; a case without an entry is a sound one."""

ALONE = frozenset(
    {
        "autoround769-shared-experts",
        "ct225-zero-point-dropped",
        "ct832-nan-scale",
        "gptqmodel3077-qweight-missing",
        "vllm25029-router-quantized",
        "vllm38966-gptq-v2-zeros",
    }
)
"""Cases in formats whose sound twin once failed: any other failing finding is false."""

FAIL_ON_WARNING = frozenset({"groups-sib-targets", "groups-sib-uniform-w4a16-acts"})
"""What is wrong misleads some consumers only: a warning will do."""

VERDICTS = {
    # The case says inconclusive because 0.1.0 did not check the format.
    "w4a8-legit": {"passed", "inconclusive"},
    # The case says inconclusive because 0.1.0 had no layout of this family.
    "dsv4-release-legit": {"passed", "inconclusive"},
}
"""Verdicts that are right besides the one that ``case.json`` gives, with the reason."""


def wanted_verdicts(name: str, case: dict[str, Any]) -> set[str]:
    """Return the verdicts that are right for a case."""
    text = case["expect"]["verdict"]
    if text == "inconclusive or passed, never failed":
        return {"inconclusive", "passed"}
    return VERDICTS.get(name, {text})


def problems(name: str, case: dict[str, Any], report: Report) -> list[str]:
    """Return what is wrong with a report about a case."""
    verdict = NEW_WORDS.get(report.verdict, report.verdict)
    wanted = wanted_verdicts(name, case)
    found = (
        [f"verdict {verdict}, not {' or '.join(sorted(wanted))}"] if verdict not in wanted else []
    )
    findings = [f for f in report.findings if f.severity != "info"]
    causes = CAUSES.get(name, ())
    for cause in causes:
        if not any(cause.named_by(f) for f in findings):
            found.append(f"no finding names {cause}")
    if name in ALONE:
        others = [f for f in report.failing if not any(c.named_by(f) for c in causes)]
        found += [f"false: {f.rule} {f.where.tensor}: {f.message}" for f in others]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_case_gets_its_verdict_and_the_cause_is_named(name: str) -> None:
    folder = CASES / name
    case = json.loads((folder / "case.json").read_text())
    report = verifier.check(
        folder / "checkpoint",
        base=folder / "base" if case["run"]["base"] else None,
        depth=case["run"]["depth"],
        profile=case["run"]["profile"],
        fail_on="warning" if name in FAIL_ON_WARNING else "error",
    )
    found = problems(name, case, report)
    assert not found, "\n".join(found)


def test_every_case_of_the_tables_exists(shared_data: Path) -> None:
    listed = {*CAUSES, *ALONE, *FAIL_ON_WARNING, *VERDICTS}
    assert listed <= set(NAMES)
    assert len(NAMES) == 98


def test_every_defect_has_a_cause(shared_data: Path) -> None:
    """A defect that no cause is written for would pass this file by its verdict alone."""
    for name in NAMES:
        case = json.loads((CASES / name / "case.json").read_text())
        if "failed" in wanted_verdicts(name, case):
            assert name in CAUSES, name
