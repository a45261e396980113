# SPDX-License-Identifier: Apache-2.0
"""Completion records in an object store, which both nodes of a Ray cluster reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray.commands import ckptgate_in
from tests.remote.s3 import BUCKET, client, serving, variables
from tests.units.cases import CASES, SOURCE, Alone
from verifier.run import report_of

pytest.importorskip("ray", reason="needs the extra 'ray': tox -e ray")


@pytest.fixture(scope="module", autouse=True)
def store() -> Iterator[Any]:
    """Return a client of a bucket; the nodes, which start later, get the variables of this
    process.
    """
    with serving() as url, pytest.MonkeyPatch.context() as environment:
        for name, value in {**variables(url), "NO_PROXY": "127.0.0.1"}.items():
            environment.setenv(name, value)
        yield client(url)


def objects(store: Any) -> dict[str, str]:
    """Return the ETag of each object by name; that of a record changes with its seconds."""
    listed = store.list_objects_v2(Bucket=BUCKET)["Contents"]
    return {entry["Key"]: entry["ETag"] for entry in listed}


def test_a_check_with_records_in_a_bucket(
    store: Any, cluster: Any, alone: Alone, tmp_path: Path
) -> None:
    (case,) = (case for case in CASES if case.name == "check")
    line = ["check", str(alone.inputs.broken), "--base", str(SOURCE), "--depth", "payload"]
    line += ["--records", f"s3://{BUCKET}/records", "-o", "report.json"]

    def report() -> Any:
        done = ckptgate_in(tmp_path, cluster.address, *line)
        assert (done.returncode, done.stderr) == (1, "")
        return report_of(json.loads((tmp_path / "report.json").read_bytes()))

    assert case.outcome(tmp_path, report()) == alone.outcome(case)
    kept = objects(store)
    assert len(kept) > 2
    lost, _ = kept.popitem()
    store.delete_object(Bucket=BUCKET, Key=lost)
    assert case.outcome(tmp_path, report()) == alone.outcome(case)
    assert kept.items() < objects(store).items()
    assert objects(store).keys() == {*kept, lost}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
