# SPDX-License-Identifier: Apache-2.0
"""The summary of a report, its JSON form, and the name that it had in 0.1.0."""

from __future__ import annotations

import json

import pytest

from verifier.evaluation import NotScored
from verifier.findings import Report
from verifier.summary import (
    BaselineSummary,
    Contents,
    Fetched,
    ReportedOptions,
    StaleEntry,
    Summary,
    summary_of,
)

CONTENTS = Contents(3, 1, 100, 8, {"NVFP4": 2}, {}, None)
SUMMARIES = {
    "nothing": Summary(),
    "error": Summary(config="ckptgate.toml", error="Input/output error"),
    "unreadable": Summary(options=ReportedOptions()),
    "all": Summary(
        CONTENTS,
        ReportedOptions(
            "payload", ("QC501",), "warning", 8, None, "base", select=("QC5",), subset="1/2"
        ),
        "ckptgate.toml",
        {"checkpoint": "a" * 40},
        Fetched(7, 4096),
        BaselineSummary("b.json", 1, 0, (StaleEntry("0" * 32, "QC501", "what", "place"),), 2),
        {"QC502": "cut off"},
        1.5,
        "QC501 examined none of 3 scales",
        NotScored("nothing was scored"),
    ),
    "different base": Summary(different_base="its model_type is llama, the checkpoint's is m3"),
    "sample": Summary(CONTENTS, ReportedOptions(sample=5.0, seed=0)),
}


@pytest.mark.parametrize("summary", SUMMARIES.values(), ids=SUMMARIES)
def test_the_json_form_is_read_back(summary: Summary) -> None:
    assert summary_of(json.loads(json.dumps(summary.as_json()))) == summary


def test_the_json_form_has_what_applies_only() -> None:
    assert Summary().as_json() == {}
    assert SUMMARIES["error"].as_json() == {
        "options": {"config": "ckptgate.toml"},
        "error": "Input/output error",
    }
    options = SUMMARIES["unreadable"].as_json()["options"]
    assert options["base"] is None
    assert not {"subset", "sample", "seed", "config"} & options.keys()
    assert Summary(CONTENTS).as_json() == {
        "tensors": 3,
        "shards": 1,
        "bytes": 100,
        "scale_bytes": 8,
        "formats": {"NVFP4": 2},
        "unquantized": {},
        "model_type": None,
    }


@pytest.mark.parametrize(
    "stats", [{"tensors": 3}, {"options": {"dept": "header"}}, {"baseline": {"file": "x"}}], ids=str
)
def test_a_field_that_is_missing_or_unknown_is_an_error(stats: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError)):
        summary_of(stats)


def test_stats_of_a_report_warns() -> None:
    report = Report("passed", "x", None, (), (), SUMMARIES["all"])
    with pytest.warns(DeprecationWarning, match="Report.stats is now Report.summary"):
        assert report.stats == SUMMARIES["all"].as_json()
