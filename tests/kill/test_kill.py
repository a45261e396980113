# SPDX-License-Identifier: Apache-2.0
"""Ten of the 200 seeds of ``python -m tests.kill``, and a command that does not survive them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.kill import run
from tests.kill.commands import COMMANDS, Command, Inputs, make_inputs
from tests.kill.run import Undisturbed, killed, undisturbed

SEEDS = range(10)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_a_killed_command_resumes_to_the_same_bytes(
    command: Command, inputs: Inputs, tmp_path: Path
) -> None:
    known = {command.name: undisturbed(command, inputs, tmp_path / "undisturbed")}
    for seed in SEEDS:
        if COMMANDS[seed % len(COMMANDS)] == command:
            assert killed(seed, known, inputs, tmp_path / str(seed)).wrong == ""


def test_a_command_that_writes_in_place_is_caught(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_in_place(_inputs: Inputs, out: Path) -> None:
        out.mkdir(exist_ok=True)
        for number in range(20):
            (out / str(number)).write_text("x")
            time.sleep(0.01)

    monkeypatch.setattr(run, "COMMANDS", (Command("in place", write_in_place),))
    known = {"in place": Undisturbed({str(n): "" for n in range(20)}, 0.2)}
    outcomes = [killed(seed, known, inputs, tmp_path / str(seed)) for seed in range(5)]
    assert "OUT looks whole and is not" in {o.wrong for o in outcomes}
