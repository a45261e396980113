# SPDX-License-Identifier: Apache-2.0
"""A part of the mutation score, the test of harm itself, and that what is committed is what the
code says.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.mutation import harmless, image, render
from tests.mutation.__main__ import RESULTS, kinds_table
from tests.mutation.harm import harm, view
from tests.mutation.kinds import APART, KINDS, TOTAL
from tests.mutation.run import FIRST_HARMLESS, run, schedule
from verifier.selftest.tiny import TINY, make

HERE = Path(__file__).parent
PARTS = 4


def test_kinds_are_as_declared() -> None:
    assert (TOTAL, APART, len(schedule())) == (2000, 40, 2040)
    assert kinds_table() in (HERE / "KINDS.md").read_text()
    assert len({k.name for k in KINDS}) == len(KINDS)
    assert all(k.edit.__doc__ for k in KINDS)


def test_page_is_rendered_from_the_results() -> None:
    assert render.PAGE.read_text(encoding="utf-8") == render.render()


@pytest.mark.parametrize("part", range(PARTS))
def test_two_hundred_mutations_are_caught_or_listed(part: int) -> None:
    """Whatever survives, and a kind without a checkpoint that suits it, is in the committed
    results.
    """
    results = json.loads(RESULTS.read_text())
    listed = {s["seed"] for s in results["survivors"]}
    for outcome in run(range(part * 50, part * 50 + 50), processes=1):
        assert not outcome.crash, outcome
        if not outcome.checkpoint:
            assert results["kinds"][outcome.kind]["unfit"], outcome
            continue
        with_base, without = outcome.caught
        caught = with_base and (without or outcome.knows != "nothing")
        assert caught or outcome.seed in listed, outcome


def test_fifty_harmless_rewritings_raise_no_finding() -> None:
    for outcome in run(range(FIRST_HARMLESS, FIRST_HARMLESS + 50), processes=1):
        assert (outcome.caught, outcome.harm, outcome.crash) == ((False, False), "", ""), outcome


def test_a_seed_gives_the_same_mutation_again() -> None:
    assert run([7], processes=1) == run([7], processes=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[image.Image, Path, Path]:
    made = make(tmp_path_factory.mktemp("tiny"), next(t for t in TINY if t.name == "mixtral-nvfp4"))
    return image.read(made.path), made.path, made.base


SCALE = "model.layers.0.block_sparse_moe.experts.1.w1.weight_scale"


def _edited(edit: str, mutant: image.Image) -> None:
    raw = mutant.tensors[SCALE].raw()
    if edit == "scale next":
        raw[3] += 1
    elif edit == "scale doubled":
        raw[3] += 8
    elif edit == "norm bit":
        mutant.put(
            "model.norm.weight",
            np.nextafter(mutant.tensors["model.norm.weight"].array(), np.float32(9)),
        )
    elif edit == "renamed":
        mutant.rename({SCALE: f"{SCALE}s"})
    elif edit == "index":
        mutant.on_index.append(lambda value: value["weight_map"].pop(SCALE))
    elif edit == "total_size":
        mutant.on_index.append(lambda value: value["metadata"].update({"total_size": 1}))
    elif edit == "excluded":
        mutant.declared()[0]["ignore"] += [SCALE.rpartition(".")[0]]
    elif edit == "idle":
        harmless.idle_keys(mutant, np.random.default_rng(0))
    if edit.startswith("scale"):
        mutant.tensors[SCALE].data = raw.tobytes()


@pytest.mark.parametrize(
    ("edit", "harmful"),
    [
        ("nothing", False),
        ("scale next", False),
        ("scale doubled", True),
        ("norm bit", True),
        ("renamed", True),
        ("index", True),
        ("total_size", False),
        ("excluded", True),
        ("idle", False),
    ],
)
def test_what_is_harm(
    edit: str, harmful: bool, tiny: tuple[image.Image, Path, Path], tmp_path: Path
) -> None:
    clean, path, base = tiny
    mutant = clean.copy()
    _edited(edit, mutant)
    assert bool(harm(view(path), view(mutant.write(tmp_path / "x")), view(base))) == harmful
