# SPDX-License-Identifier: Apache-2.0
"""State-dict adapters through torch.distributed.checkpoint: two gloo processes, a checkpoint as it
lies on disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests import adapting
from tests.paths import ROOT

SHARDINGS = ("dim0", "dim1", "both_tall", "both_wide", "crossed")
Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """Return what each of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    adapting.write(
        folder / "m3",
        adapting.mtp_config(),
        adapting.with_mtp(adapting.read(adapting.GOLDEN / "mxfp8")),
    )
    adapting.write(folder / "qwen", *adapting.ragged())
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.adapting", str(folder)]
    both = [
        subprocess.Popen(
            [*command, str(i)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [p.communicate(timeout=150)[0] for p in both]
    finally:
        for p in both:
            p.kill()
            p.wait()
    assert [p.returncode for p in both] == [0, 0], "\n".join(text[-3000:] for text in said)
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("which", ["m3", "qwen"])
def test_a_sharded_load_gives_the_checkpoint_bit_for_bit(
    ranks: list[Seen], which: str, sharding: str
) -> None:
    for seen in ranks:
        found = seen[f"{which}-{sharding}"]
        assert found["names"]
        assert found["wrong"] == []
        assert found["unlike"] == []
        assert found["sharded"] > 5
        assert found["left"] == []


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("which", ["m3", "qwen"])
def test_saved_by_the_framework_and_loaded_again_nothing_changed(
    ranks: list[Seen], which: str, sharding: str
) -> None:
    for seen in ranks:
        assert seen[f"{which}-{sharding}"]["changed"] == []


@pytest.mark.parametrize(("which", "suffix"), [("m3", "_scale_inv"), ("qwen", "_scale")])
def test_the_planner_asks_for_every_scale_whole(ranks: list[Seen], which: str, suffix: str) -> None:
    state = (
        adapting.with_mtp(adapting.read(adapting.GOLDEN / "mxfp8"))
        if which == "m3"
        else adapting.ragged()[1]
    )
    scales = {n: list(t.shape) for n, t in state.items() if n.endswith(f".weight{suffix}")}
    assert any("index_q_proj" in n for n in scales) == (which == "m3")
    assert (f"mtp.layers.0.eh_proj.weight{suffix}" in scales) == (which == "m3")
    for sharding in SHARDINGS:
        found = [seen[f"{which}-{sharding}"] for seen in ranks]
        assert all(f["placeholders"] for f in found)
        spread = sharding in ("dim0", "crossed")
        if spread:  # each rank asks for its own experts' scales, together for all
            assert set(found[0]["asked"]) < set(scales)
            assert set(found[0]["asked"]) & set(found[1]["asked"]) == {
                n for n in scales if ".experts." not in n
            }
        assert set(found[0]["asked"]) | set(found[1]["asked"]) == set(scales)
        for f in found:
            assert f["asked"] == sorted(f["shapes"])
            assert f["shapes"] == {n: scales[n] for n in f["asked"]}


def test_a_load_that_left_the_scales_out_is_refused(ranks: list[Seen]) -> None:
    for seen in ranks:
        for found in seen.values():
            assert f"{torch.float8_e4m3fn} without a scale" in found["without_scales"]
