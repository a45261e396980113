# SPDX-License-Identifier: Apache-2.0
"""A run is of weights, configuration and tokenizer: caches and journals ask for all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.paths import TESTS
from tests.results import scored_run
from verifier.checkpoint import open_checkpoint
from verifier.gate.cache import Cached, _difference, _name
from verifier.gate.corpora import Corpus, documents_digest
from verifier.gate.identity import identity_of
from verifier.gate.journal import Journal
from verifier.gate.options import ScoringOptions
from verifier.gate.run_file import Run, read_run, write_run
from verifier.gate.score import _journal_header
from verifier.gate.windows import ScoringPlan, plan_scoring

QWEN = TESTS / "data" / "modelopt" / "src_qwen3moe"
IDS = tuple((1, 2, i) for i in range(40))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shutil.copytree(QWEN, tmp_path / "base")


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))


def change_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def plan_of(folder: Path, say: Callable[[str], None] = print) -> ScoringPlan:
    corpus = Corpus("c", "", documents_digest(IDS), ids=IDS)
    return plan_scoring([open_checkpoint(folder)], ScoringOptions(corpus, say=say))


def cached_file(plan: ScoringPlan, folder: Path) -> Path:
    """Write a run of the plan's checkpoint where the cache looks for it."""
    (ckpt,) = plan.checkpoints
    folder.mkdir(exist_ok=True)
    file = folder / f"{_name(plan, ckpt)}.run"
    write_run(file, run_of(plan))
    return file


def run_of(plan: ScoringPlan, **changed: object) -> Run:
    """Return a run made by hand that has the identity of the plan's checkpoint."""
    run = scored_run(1, "a", key=plan.key)
    header = {
        **asdict(identity_of(plan.checkpoints[0])),
        "documents": [documents_digest([document])[:16] for document in IDS],
    }
    return replace(run, header=run.header.model_copy(update=header | changed))


def test_a_cached_base_is_used_only_while_its_configuration_and_tokenizer_are_the_same(
    base: Path, tmp_path: Path
) -> None:
    messages: list[str] = []
    plan = plan_of(base, messages.append)
    file = cached_file(plan, tmp_path / "cache")
    (run,) = Cached(tmp_path / "cache")(plan).runs
    assert run.header == read_run(file).header
    assert messages == [f"{base}: taken from the cache, {file}"]
    for change in (change_config, change_tokenizer):
        change(base)
        plan = plan_of(base)
        assert f"{_name(plan, plan.checkpoints[0])}.run" != file.name
        assert _difference(run, plan, plan.checkpoints[0]) == "config_sha256"
    shutil.copy(QWEN / "config.json", base)
    plan = plan_of(base)
    assert _difference(run, plan, plan.checkpoints[0]) == "tokenizer_sha256"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({}, None),
        ({"weights_sha256": "b" * 64}, "weights_sha256"),
        ({"config_sha256": None}, "config_sha256"),
        ({"documents": ["0" * 16] * 40}, "documents"),
    ],
)
def test_a_run_of_another_model_under_the_name_of_the_base_is_not_used(
    base: Path, change: dict[str, object], difference: str | None
) -> None:
    plan = plan_of(base)
    assert _difference(run_of(plan, **change), plan, plan.checkpoints[0]) == difference


def test_a_journal_of_another_configuration_starts_over(base: Path, tmp_path: Path) -> None:
    plan, file = plan_of(base), tmp_path / "a.run.part"
    with Journal(file, _journal_header(plan, plan.checkpoints[0])) as journal:
        assert not journal.restarted
    with Journal(file, _journal_header(plan, plan.checkpoints[0])) as journal:
        assert not journal.restarted
    change_config(base)
    plan = plan_of(base)
    with Journal(file, _journal_header(plan, plan.checkpoints[0])) as journal:
        assert journal.restarted
