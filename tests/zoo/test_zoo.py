# SPDX-License-Identifier: Apache-2.0
"""A seeded dozen of the zoo with the hard families always in it, and that no class of transformers
is left out.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import load_file, save_file

from exporter import export
from tests.zoo import run
from tests.zoo.__main__ import RESULTS
from tests.zoo.classes import expert_classes
from tests.zoo.families import BY_NAME, FAMILIES, HARD, model

COMMITTED: dict[str, Any] = json.loads(RESULTS.read_text())
ROWS: dict[str, Any] = {r["family"]: r for r in COMMITTED["families"]}
OTHERS = sorted(BY_NAME.keys() - set(HARD))
DOZEN = (*HARD, *random.Random(int(os.environ.get("CKPTGATE_ZOO_SEED", "0"))).sample(OTHERS, 3))  # noqa: S311
SAME = COMMITTED["versions"]["transformers"] == importlib.metadata.version("transformers")


def _left_out(found: dict[str, str]) -> list[str]:
    tried = {c for row in ROWS.values() for c in row.get("classes", ())}
    return sorted(f"{cls} ({family})" for cls, family in found.items() if cls not in tried)


def test_every_class_with_experts_is_in_the_zoo() -> None:
    """A class that a newer transformers adds is named here: give it a row in tests/zoo/families.py,
    and run the zoo.
    """
    assert _left_out(expert_classes()) == []


def test_a_class_that_is_new_is_named(tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "modeling_fresh.py").write_text(
        "@integrations.use_experts_implementation(is_transposed=True)\n"
        "class FreshMoe(nn.Module):\n    pass\n"
        "class FreshPlainExperts(nn.Module):\n"
        "    def __init__(self, e, h, i):\n"
        "        self.gate_up_proj = nn.Parameter(torch.empty((e, 2 * i, h)))\n"
        "class FreshExperts(nn.ModuleList):\n"
        "    def __init__(self, h, i):\n        self.scale = nn.Parameter(torch.empty(h, i))\n"
        "class FreshConv(nn.Module):\n"
        "    def __init__(self, h):\n        self.kernel = nn.Parameter(torch.empty(h, 1, 3))\n"
    )
    assert _left_out(expert_classes(tmp_path)) == ["FreshMoe (fresh)", "FreshPlainExperts (fresh)"]


def test_the_committed_results_are_of_the_whole_zoo() -> None:
    assert list(ROWS) == [f.name for f in FAMILIES]
    assert set(HARD) <= ROWS.keys()
    standings = {name: run.standing(row) for name, row in ROWS.items()}
    assert sum(s == "works" for s in standings.values()) >= 45
    assert [line for row in ROWS.values() for line in run.defects(row)] == []
    assert {n for n, s in standings.items() if s == "not built"} == set()
    for name, row in ROWS.items():
        if standings[name] == "refused":
            assert run.refusals(row), name


@pytest.mark.parametrize("name", DOZEN)
def test_a_family(name: str) -> None:
    family = BY_NAME[name]
    if family.config_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family.config_type}")
    found = run.judge(family)
    assert found["built"] == run.OK
    assert run.defects(found) == []
    if SAME:
        assert _without_texts(found) == _without_texts(ROWS[name])


def _without_texts(outcome: Any) -> Any:
    """Return an outcome without times, and with each message cut to its kind."""
    if isinstance(outcome, dict):
        return {k: _without_texts(v) for k, v in outcome.items() if k != "seconds"}
    for prefix in (run.REFUSED, run.INCONCLUSIVE):
        if isinstance(outcome, str) and outcome.startswith(prefix):
            return prefix
    return outcome


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("mixtral")
    with run.quiet():
        built = run.filled(model(BY_NAME["mixtral"]))
        built.save_pretrained(folder / "saved")
    export(folder / "saved", folder / "out", recipe="nvfp4_experts_only", input_scale="one")
    return built, folder / "out"


GATE = "model.layers.1.block_sparse_moe.experts.2.w1"


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    up = GATE.replace("w1", "w3")
    for leaf in ("weight", "weight_scale"):
        tensors[f"{GATE}.{leaf}"], tensors[f"{up}.{leaf}"] = (
            tensors[f"{up}.{leaf}"],
            tensors[f"{GATE}.{leaf}"],
        )


def _scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{GATE}.weight_scale_2"] *= 2


def _norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.01


@pytest.mark.parametrize("harm", [_swap, _scale, _norm])
def test_the_zoo_sees_what_is_wrong(harm: Any, mixtral: tuple[Any, Path], tmp_path: Path) -> None:
    """Gate and up exchanged, a scale doubled, a norm changed: the values that come back are
    others.
    """
    built, path = mixtral
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    harm(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with run.quiet():
        run.reload(built, path)
        with pytest.raises(run.Wrong, match="came back with a relative error"):
            run.reload(built, broken)
