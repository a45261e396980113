# SPDX-License-Identifier: Apache-2.0
"""A rule that says that `ckptgate repair` fixes what it finds is held to it: a known defect of the
rule is made in a tiny checkpoint, repaired, and not found again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import exporter
import verifier
from verifier.errors import CkptgateError
from verifier.rules import all_rules
from verifier.selftest.corruptor import Corruptor, traits_of
from verifier.selftest.defects import CORRUPTORS
from verifier.selftest.editor import CheckpointEditor
from verifier.selftest.tiny import TINY, TinyCheckpoint, make

REPAIRABLE = [rule.id for rule in all_rules().values() if rule.repairable]
TRIED = ("llama-nvfp4", "minimax-m3-mixed", "qwen3-moe-nvfp4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[TinyCheckpoint]:
    folder = tmp_path_factory.mktemp("tiny")
    by_name = {spec.name: spec for spec in TINY}
    return [make(folder, by_name[name]) for name in TRIED]


def _suits(corruptor: Corruptor, checkpoint: TinyCheckpoint) -> bool:
    conditions = corruptor.on
    traits = traits_of(CheckpointEditor(checkpoint.path))
    return checkpoint.spec.kind in conditions.kinds and conditions.traits <= traits


def _is_repaired(corruptor: Corruptor, checkpoint: TinyCheckpoint, folder: Path) -> bool:
    """Make a defect, repair it, and return whether its rule finds nothing any more."""
    copy, out = folder / "ckpt", folder / "out"
    for path in (copy, out):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(checkpoint.path, copy)
    corruptor.apply(copy)
    arguments = {"base": checkpoint.base, "merged_from": checkpoint.merged_from}
    assert verifier.check(copy, depth="payload", **arguments).by_rule(corruptor.rule)
    try:
        exporter.repair(copy, out, base=checkpoint.base)
    except CkptgateError:
        return False
    return not verifier.check(out, depth="payload", **arguments).by_rule(corruptor.rule)


@pytest.mark.parametrize("rule", REPAIRABLE)
def test_repair_fixes_a_defect_of_the_rule(
    rule: str, tiny: list[TinyCheckpoint], tmp_path: Path
) -> None:
    tried = [
        (corruptor, checkpoint)
        for checkpoint in tiny
        for corruptor in CORRUPTORS
        if corruptor.rule == rule and _suits(corruptor, checkpoint)
    ]
    assert any(_is_repaired(corruptor, checkpoint, tmp_path) for corruptor, checkpoint in tried)


def test_merge_keeps_the_policy_of_the_scales(tiny: list[TinyCheckpoint], tmp_path: Path) -> None:
    """Scales of 1.0 by policy are so in the merged checkpoint too, and QC514 knows it."""
    base = tiny[2].base
    onto = tmp_path / "onto"
    recipe = {"recipe": "nvfp4_experts_only", "input_scale": "one"}
    exporter.export(base, tmp_path / "experts", **recipe)
    shutil.copytree(base, onto)
    manifest = exporter.merge(tmp_path / "experts", tmp_path / "merged", onto=onto)
    assert manifest.options["input_scale"] == "one"
    report = verifier.check(tmp_path / "merged", base=base, depth="payload")
    assert not report.by_rule("QC514")
