# SPDX-License-Identifier: Apache-2.0
"""Run files: read as they were written, refused if damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.results import scored_run
from verifier.errors import ContentError, UsageError
from verifier.evaluation import Margin
from verifier.gate.run_file import Run, read_run, write_run

BASE, GOOD = scored_run(0, "a"), scored_run(1, "b", 0.01)
MARGIN = Margin(0.077, "given")


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_run(tmp_path / "x.run", BASE)
    found = read_run(tmp_path / "x.run")
    assert found.header == BASE.header
    assert all(
        np.array_equal(found.arrays[k], v) and found.arrays[k].dtype == v.dtype
        for k, v in BASE.arrays.items()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["x.run"]


def spoil(tmp_path: Path, run: Run, **changes: Any) -> Path:
    """Write a run whose digest is right and whose arrays or header are not."""
    file = tmp_path / "bad.run"
    header = json.loads(run.header.model_dump_json()) | changes.pop("header", {})
    from verifier.gate.run_file import _digest

    arrays = {k: np.asarray(v) for k, v in (run.arrays | changes).items() if v is not None}
    text = json.dumps(header)
    save_file(arrays, file, {"ckptgate_run": text, "sha256": _digest(text, arrays)})
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nats": np.full(5, 1, np.float32)}, "nats is"),
        ({"tokens": -BASE.tokens}, "impossible number"),
        ({"sums": np.full(40, np.nan)}, "not finite"),
        ({"sums": BASE.sums + 1e-9}, "not the sums"),
        ({"sure": None}, "no array 'sure'"),
        ({"top_ids": np.zeros((3, 2), np.int32)}, "no array 'top_logprobs'"),
        ({"sums": BASE.sums[:3]}, "40 documents"),
        ({"sure": np.abs(BASE.arrays["sure"]) + 1}, "probability above one"),
        ({"other": np.zeros(3, np.float32)}, "unexpected array 'other'"),
        ({"nats": BASE.arrays["nats"].astype(np.float64)}, "of F64"),
        ({"header": {"nonfinite": [40]}}, "does not exist"),
        ({"header": {"documents": []}}, "0 documents"),
        ({"header": {"weights_sha256": "x"}}, "weights_sha256"),
        ({"header": {"floor": math.inf}}, "JSON"),
        ({"header": {"surprise": 1}}, "surprise"),
    ],
)
def test_a_run_that_is_not_one_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContentError, match=message):
        read_run(spoil(tmp_path, BASE, **changes))


def test_files_that_are_no_runs(tmp_path: Path) -> None:
    file = tmp_path / "x.run"
    with pytest.raises(UsageError, match="no such file"):
        read_run(file)
    for raw in (b"", b"\xff" * 16, (2**40).to_bytes(8, "little") + b"{}"):
        file.write_bytes(raw)
        with pytest.raises(ContentError, match="not a run file"):
            read_run(file)
    save_file({"a": np.zeros(1)}, file)
    with pytest.raises(ContentError, match="but not a run file"):
        read_run(file)
    write_run(file, BASE)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1  # in the last array
    file.write_bytes(raw)
    with pytest.raises(ContentError):
        read_run(file)
    raw[-1] ^= 1
    file.write_bytes(raw[:-4])
    with pytest.raises(ContentError):
        read_run(file)


def test_one_changed_byte_of_any_array_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.run"
    write_run(file, BASE)
    arrays = load_file(file)
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    whole = file.read_bytes()
    for at in range(start, len(whole), sum(a.nbytes for a in arrays.values()) // 7):
        raw = bytearray(whole)
        raw[at] ^= 0x10
        file.write_bytes(raw)
        with pytest.raises(ContentError):
            read_run(file)
