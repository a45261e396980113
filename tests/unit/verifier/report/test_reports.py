# SPDX-License-Identifier: Apache-2.0
"""Every format: what it says of each verdict, what it does with hostile names, and how large it can
grow.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from verifier.cli.outputs import NAMES
from verifier.errors import MissingExtra
from verifier.findings import Coverage, Effect, Finding, Report, Verdict, Where
from verifier.report import FORMATS, render, render_json, schema
from verifier.report.github import MAX_ANNOTATIONS
from verifier.report.html import MAX_BYTES
from verifier.report.markdown import MAX_BYTES as MAX_MARKDOWN
from verifier.report.markdown import code
from verifier.report.text import render_text
from verifier.run.fingerprints import fingerprinted
from verifier.summary import Advice, BaselineSummary, Contents, ReportedOptions, StaleEntry, Summary

HOSTILE = (
    "a.\x1b[31mred\x1b]0;t\x07\r\n::error title=x::owned\r::stop-commands::y\n\x9b2J\u202egpj\ud800"
    "]]><script>alert(1)</script><img src=x onerror=alert(2)>{0}[l](javascript:x)`|``| @someone #1 https://evil.example/%0A%25&amp;\u2028.weight"
)
COVERAGE = (
    Coverage("QC101", True, 3, 3, "shards", "", "index names a missing shard"),
    Coverage("QC201", True, 9, 10, "tensors", "one cannot be read", "name is not the hub's"),
    Coverage("QC501", False, 0, 0, "weight scales", "depth payload", "zero weight scale"),
)
SUMMARY = Summary(
    contents=Contents(10, 1, 1000, 10, {"NVFP4": 4}, {}, "x"),
    options=ReportedOptions(),
    seconds=0.1,
)
ERROR = Finding(
    "QC201",
    "error",
    "no tensor of this layout has this name",
    Where("model.x.weight", "model.safetensors", 3, 2, 77),
    "A",
    "B",
    4,
    10,
    (Effect("vllm", "error", "stops"), Effect("trtllm", "warning", "")),
    "vllm: stops",
)
WARNING = Finding("QC101", "warning", "no index")
NOTE = Finding("QC101", "info", "a remark", Where(None, "config.json"))


def report(*findings: Finding, verdict: Verdict = "failed", **summary: Any) -> Report:
    return Report(
        verdict,
        "/data/ckpt",
        None,
        tuple(fingerprinted(findings)),
        COVERAGE,
        replace(SUMMARY, **summary),
    )


CLEAN = report(verdict="passed")
FAILED = report(ERROR, WARNING, NOTE)
INCONCLUSIVE = report(WARNING, verdict="inconclusive", inconclusive="no quantized tensor")
BROKEN = Report("error", "s3://bucket/x", None, (), (), Summary(error="Input/output error"))
KNOWN = report(
    replace(ERROR, standing="known", note="agreed"),
    replace(WARNING, standing="grown", note="2 now"),
    verdict="passed",
)
EVERY = {
    "clean": CLEAN,
    "failed": FAILED,
    "inconclusive": INCONCLUSIVE,
    "error": BROKEN,
    "known": KNOWN,
}
HOSTILES = report(
    Finding(
        "QC201",
        "error",
        f"message of {HOSTILE}",
        Where(HOSTILE, f"{HOSTILE}.safetensors", 1),
        HOSTILE,
        HOSTILE,
    ),
    Finding(
        "QC101",
        "error",
        HOSTILE,
        Where(None, HOSTILE),
        because=f"configuration: QC1 {HOSTILE} is error",
    ),
    replace(Finding("QC101", "error", "x", Where(HOSTILE)), standing="known", note=HOSTILE),
    verdict="inconclusive",
    inconclusive=HOSTILE,
    baseline=BaselineSummary(HOSTILE, 1, 0, (StaleEntry("0", "QC1", HOSTILE, HOSTILE),), 0),
    options=ReportedOptions(profile="all", base=HOSTILE),
    config=HOSTILE,
)
HOSTILES = replace(
    HOSTILES,
    uri=f"/data/{HOSTILE}",
    base=HOSTILE,
    coverage=(
        *COVERAGE,
        Coverage("QC9", True, 1, 2, HOSTILE, HOSTILE, HOSTILE),
        Coverage("QC8", False, 0, 0, HOSTILE, HOSTILE, HOSTILE),
    ),
)


def clean(text: str) -> bool:
    return all(c == "\n" or c.isprintable() for c in text)


def test_the_command_line_knows_every_format() -> None:
    assert NAMES == FORMATS


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", EVERY)
def test_every_verdict_in_every_format(format_: str, name: str) -> None:
    text = render(EVERY[name], format_)
    assert text.endswith("\n")
    assert EVERY[name].verdict in text.lower()
    assert clean(text)
    if name in ("inconclusive", "error"):
        assert ("no quantized tensor" if name == "inconclusive" else "Input/output error") in text


@pytest.mark.parametrize("format_", FORMATS)
def test_hostile_names_are_printable_and_encodable_in_every_format(format_: str) -> None:
    text = render(HOSTILES, format_)
    assert clean(text)
    text.encode("utf-8")
    assert "red" in text


# text


def test_text_says_what_where_how_many_and_why() -> None:
    text = render_text(FAILED)
    assert text.startswith("error   QC201  no tensor of this layout has this name   4 of 10\n")
    assert "        model.x.weight [row 3, block 2, byte 77, of model.safetensors]\n" in text
    assert "        observed A, expected B\n        vllm: stops\n" in text
    assert "partial: QC201 (1 of 10 tensors not checked: one cannot be read)\n" in text
    assert "skipped:" not in text
    assert "skipped: QC501 (depth payload)\n" in render_text(FAILED, verbose=True)
    assert text.endswith(
        "verdict: FAILED at depth header (1 error, 1 warning; 2 rules; 1 skipped)\n"
    )
    assert text.index("error ") < text.index("warning ") < text.index("info ")


def test_text_bounds_the_findings_of_a_rule_and_counts_the_rest() -> None:
    many = report(*(replace(ERROR, where=Where(f"t{i}x")) for i in range(30)), WARNING)
    text = render_text(many)
    assert text.count("error   QC201") == 1
    assert "error   QC201  no tensor of this layout has this name   120 of 120" in text
    assert len(re.findall(r"^        t\d+x$", text, re.M)) == 10
    assert "and 20 more findings of QC201; --verbose lists them" in text
    assert len(re.findall(r"^        t\d+x$", render_text(many, verbose=True), re.M)) == 30
    assert "warning QC101" in text
    known = report(
        *(replace(ERROR, where=Where(f"t{i}x"), standing="known", note="n") for i in range(30))
    )
    assert "and 10 more known findings" in render_text(known)


def test_color_is_asked_for_and_changes_nothing_else() -> None:
    plain, colored = render_text(FAILED), render_text(FAILED, color=True)
    assert "\x1b" not in plain
    assert "\x1b[1;31mFAILED" in colored
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain
    hostile = render_text(HOSTILES, color=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", hostile) == render_text(HOSTILES)


# JSON


@pytest.mark.parametrize("name", [*EVERY, "hostile"])
def test_json_is_by_its_schema(name: str) -> None:
    value = json.loads(render_json(EVERY.get(name, HOSTILES)))
    if name != "hostile":
        jsonschema.Draft202012Validator(schema()).validate(value)
    assert value["schema_version"] == schema()["properties"]["schema_version"]["const"]


def test_json_keeps_names_as_they_are_and_effects_by_engine() -> None:
    value = json.loads(render_json(HOSTILES))
    assert value["findings"][0]["where"]["tensor"] == HOSTILE
    value = json.loads(render_json(FAILED))
    assert value["findings"][0]["effects"] == {
        "vllm": {"severity": "error", "what": "stops"},
        "trtllm": {"severity": "warning", "what": ""},
    }
    assert re.fullmatch(r"[0-9a-f]{32}", value["findings"][0]["fingerprint"])


# JUnit


def cases(of: Report) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(render(of, "junit"))  # noqa: S314  (our own output)
    return {case.get("name", ""): case for case in root.iter("testcase")}


def test_junit_has_a_case_for_each_rule_and_the_verdict() -> None:
    found = cases(FAILED)
    assert set(found) == {f"{c.rule} {c.title}" for c in COVERAGE} | {"verdict"}
    failure = found["QC201 name is not the hub's"].find("failure")
    assert failure is not None
    assert failure.get("type") == "QC201"
    assert "model.x.weight [row 3, block 2, byte 77" in (failure.text or "")
    skipped = found["QC501 zero weight scale"].find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "depth payload"
    warned = found["QC101 index names a missing shard"]
    assert warned.find("failure") is None
    assert "warning no index" in (warned.findtext("system-out") or "")
    strict = report(WARNING, options=ReportedOptions(fail_on="warning"))
    assert cases(strict)["QC101 index names a missing shard"].find("failure") is not None


@pytest.mark.parametrize("name", EVERY)
def test_junit_is_green_only_where_the_check_passed(name: str) -> None:
    root = ElementTree.fromstring(render(EVERY[name], "junit"))  # noqa: S314
    bad = int(root.get("failures", "0")) + int(root.get("errors", "0"))
    assert bad == len(root.findall(".//failure")) + len(root.findall(".//error"))
    assert (bad == 0) == (EVERY[name].verdict == "passed")


def test_junit_escapes_what_ends_a_text() -> None:
    text = render(HOSTILES, "junit")
    assert "<script>" not in text
    assert "]]>" not in text
    failure = cases(HOSTILES)["QC201 name is not the hub's"].find("failure")
    assert failure is not None
    assert "]]><script>alert(1)</script>" in (failure.text or "")


# SARIF


@pytest.fixture(scope="session")
def sarif_schema(shared_data: Path) -> Any:
    return json.loads(
        (shared_data / "schemas" / "sarif-schema-2.1.0.json").read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("name", [*EVERY, "hostile"])
def test_sarif_is_by_the_official_schema(sarif_schema: Any, name: str) -> None:
    value = json.loads(render(EVERY.get(name, HOSTILES), "sarif"))
    validator = jsonschema.validators.validator_for(sarif_schema)
    validator(sarif_schema, format_checker=validator.FORMAT_CHECKER).validate(value)


def sarif(of: Report) -> dict[str, Any]:
    (run,) = json.loads(render(of, "sarif"))["runs"]
    found: dict[str, Any] = run
    return found


def test_sarif_places_a_finding_in_the_users_checkpoint() -> None:
    run = sarif(FAILED)
    assert run["originalUriBaseIds"]["CHECKPOINT"]["uri"] == "file:///data/ckpt/"
    first = run["results"][0]
    assert (first["ruleId"], first["level"], first["occurrenceCount"]) == ("QC201", "error", 4)
    assert run["tool"]["driver"]["rules"][first["ruleIndex"]]["id"] == "QC201"
    (location,) = first["locations"]
    assert location["physicalLocation"]["artifactLocation"] == {
        "uri": "model.safetensors",
        "uriBaseId": "CHECKPOINT",
    }
    assert location["physicalLocation"]["region"] == {"byteOffset": 77}
    assert location["logicalLocations"][0]["fullyQualifiedName"] == "model.x.weight"
    assert [r["level"] for r in run["results"]] == ["error", "warning", "note"]
    assert sarif(BROKEN)["originalUriBaseIds"]["CHECKPOINT"]["uri"] == "s3://bucket/x/"
    lost = sarif(report(Finding("QC201", "error", "missing", Where("model.y.weight"))))["results"][
        0
    ]["locations"][0]
    assert lost["physicalLocation"]["artifactLocation"]["uri"] == "config.json"


def test_sarif_fingerprints_are_the_baselines() -> None:
    (fingerprint,) = {f.fingerprint for f in FAILED.by_rule("QC201")}
    assert sarif(FAILED)["results"][0]["partialFingerprints"] == {"ckptgate/v2": fingerprint}
    moved = replace(FAILED, uri="/elsewhere")
    assert [r["partialFingerprints"] for r in sarif(moved)["results"]] == [
        r["partialFingerprints"] for r in sarif(FAILED)["results"]
    ]


def test_sarif_says_how_the_run_went() -> None:
    def invocation(of: Report) -> dict[str, Any]:
        (found,) = sarif(of)["invocations"]
        return dict(found)

    assert (invocation(CLEAN)["executionSuccessful"], invocation(CLEAN)["exitCode"]) == (True, 0)
    assert (
        invocation(INCONCLUSIVE)["executionSuccessful"],
        invocation(INCONCLUSIVE)["exitCode"],
    ) == (
        True,
        3,
    )
    assert (invocation(BROKEN)["executionSuccessful"], invocation(BROKEN)["exitCode"]) == (False, 4)
    assert (
        "no quantized tensor"
        in invocation(INCONCLUSIVE)["toolExecutionNotifications"][0]["message"]["text"]
    )
    assert (
        "QC501 did not run: depth payload"
        in invocation(CLEAN)["toolConfigurationNotifications"][0]["message"]["text"]
    )
    known, grown = sarif(KNOWN)["results"][::-1]
    assert known["suppressions"] == [{"kind": "external", "justification": "agreed"}]
    assert "suppressions" not in grown


def test_sarif_messages_hold_no_link_and_no_placeholder() -> None:
    for result in sarif(HOSTILES)["results"]:
        text = result["message"]["text"]
        assert "{0}" not in text.replace("{{0}}", "")
        assert not re.search(r"(?<!\\)\[[^\]]*\]\(", text)


# GitHub


def commands(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.startswith("::")]


def test_github_annotates_the_worst_ten() -> None:
    many = report(*(replace(WARNING, where=Where(f"t{i}x")) for i in range(12)), ERROR)
    found = commands(render(many, "github"))
    assert len(found) == MAX_ANNOTATIONS
    assert found[0].startswith(
        "::error title=QC201 name is not the hub's::no tensor of this layout"
    )
    assert all(line.startswith("::warning ") for line in found[1:])
    assert "3 more findings without an annotation\n" in render(many, "github")
    assert commands(render(KNOWN, "github"))[0].startswith("::warning title=QC101")
    assert len(commands(render(KNOWN, "github"))) == 1
    assert (
        commands(render(INCONCLUSIVE, "github"))[0]
        == "::error title=ckptgate%3A inconclusive::no quantized tensor"
    )


def test_github_commands_cannot_be_forged() -> None:
    text = render(HOSTILES, "github")
    assert len(commands(text)) == 3  # the verdict and two findings that are not known
    assert "\r" not in text
    # A % of a name is no escape of ours: what the runner decodes is the name as it was printed.
    assert "%250A%2525" in text


# Markdown


def test_markdown_is_a_table_of_findings() -> None:
    text = render(FAILED, "markdown")
    assert text.startswith("## ckptgate: failed\n")
    rows = [line for line in text.split("\n") if line.startswith("| error")]
    assert rows == [
        "| error | QC201 | no tensor of this layout has this name<br>observed A, expected B"
        "<br>vllm: stops | 4 of 10 | "
        "`model.x.weight [row 3, block 2, byte 77, of model.safetensors]` |"
    ]
    assert "* depth payload: QC501" in text


def test_hostile_names_stay_inside_code_spans() -> None:
    text = render(HOSTILES, "markdown")
    for line in text.split("\n"):
        cells = re.split(r"(?<!\\)\|", line) if line.startswith("|") else [line]
        if line.startswith("|"):
            assert len(cells) in (7, 2 + 5)
        for cell in cells:
            outside = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", cell)
            for bad in ("<script", "<img", "javascript", "@someone", "https://", "::error"):
                assert bad not in outside, (bad, cell)


@pytest.mark.parametrize("text", ["a", "`", "``", "a`b``c", " ", "", "a|b", "`a`"])
def test_a_code_span_holds_its_text(text: str) -> None:
    span = code(text)
    fence = re.match("`+", span)
    assert fence is not None
    assert span.endswith(fence[0])
    inner = span[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inner)
    assert inner.strip() == text.strip().replace("|", "\\|")


# HTML


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def page(of: Report) -> Page:
    found = Page()
    found.feed(render(of, "html"))
    return found


@pytest.mark.parametrize("name", [*EVERY, "hostile"])
def test_html_runs_nothing_and_fetches_nothing(name: str) -> None:
    found = page(EVERY.get(name, HOSTILES))
    assert not {"script", "img", "link", "iframe", "object", "a", "form", "base"} & set(found.tags)
    assert not [
        a
        for a in found.attributes
        if a[0].startswith("on") or a[0] in ("src", "href", "style", "srcdoc")
    ]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    text = render(EVERY.get(name, HOSTILES), "html")
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in text
    assert "@import" not in text


def test_html_shows_hostile_names_as_text() -> None:
    found = page(HOSTILES)
    assert "]]><script>alert(1)</script>" in found.text
    assert "\\x1b[31mred" in found.text
    assert set(found.tags) <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "code",
        "br",
        "span",
        "details",
        "summary",
        "b",
        "div",
        "table",
        "tr",
        "th",
        "td",
    }


def test_html_shows_findings_known_ones_and_what_was_examined() -> None:
    text = page(FAILED).text
    for words in (
        "FAILED at depth header (1 error, 1 warning; 2 rules; 1 skipped)",
        "no tensor of this layout",
        "vllm: stops",
        "9",
        "depth payload",
    ):
        assert words in text
    assert "known: agreed" in page(KNOWN).text
    assert "None." in page(CLEAN).text


def test_the_engine_table_is_there_under_all_only() -> None:
    everything = report(ERROR, options=ReportedOptions(profile="all"))
    for format_ in ("text", "markdown", "html"):
        assert "(warning)" in render(everything, format_)
        assert "(warning)" not in render(FAILED, format_)


@pytest.mark.parametrize(
    ("format_", "limit"), [("html", MAX_BYTES), ("markdown", MAX_MARKDOWN), ("text", 200_000)]
)
@pytest.mark.parametrize("long", [False, True])
def test_size_is_bounded_whatever_there_is_to_tell(format_: str, limit: int, long: bool) -> None:
    name = HOSTILE * 200 if long else "model.layers.1.x"
    many = report(
        *(
            Finding(
                "QC201",
                "error",
                f"m {i} {name}",
                Where(f"{name}.{i}", name),
                name,
                name,
                because=name,
            )
            for i in range(2_500)
        )
    )
    many = replace(many, uri=name * 50, coverage=COVERAGE * 1_000)
    text = render(many, format_)
    assert len(text.encode()) <= limit
    counted = re.search(r"([\d,]+) more findings", text)
    assert counted is not None
    assert int(counted[1].replace(",", "")) > 400


def test_two_thousand_findings_are_shown_whole() -> None:
    many = report(
        *(
            Finding("QC201", "error", "missing", Where(f"model.layers.1.x{i}.weight"))
            for i in range(2_000)
        )
    )
    text = render(many, "html")
    assert text.count('class="finding"') == 2_000
    assert len(text.encode()) < MAX_BYTES


# extras


@pytest.mark.parametrize(("format_", "module"), [("junit", "junitparser"), ("html", "jinja2")])
def test_a_format_without_its_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, format_: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtra,
        match=r"--format \w+ needs the extra 'report': pip install 'ckptgate\[report\]'",
    ):
        render(CLEAN, format_)
    for other in set(FORMATS) - {"junit", "html"}:
        assert render(CLEAN, other)


# fixes


def test_text_names_the_fix_of_each_rule_once() -> None:
    advice = {"QC201": Advice("unknown tensor name", "Rename it.", repairable=True)}
    text = render_text(report(ERROR, replace(ERROR, message="other"), WARNING, advice=advice))
    assert text.count("        fix: Rename it. (ckptgate explain QC201)\n") == 1
    assert "fix:" not in render_text(
        report(ERROR, advice=advice, different_base="its model_type is llama")
    )


def test_text_gives_the_command_that_repairs() -> None:
    advice = {"QC201": Advice("unknown tensor name", "Rename it.", repairable=True)}
    command = "repair: ckptgate repair /data/ckpt REPAIRED --base BASE fixes all errors without"
    assert command in render_text(report(ERROR, advice=advice))
    other = replace(ERROR, rule="QC501")
    assert "fixes QC201 without" in render_text(report(ERROR, other, advice=advice))
    assert "repair:" not in render_text(report(other, advice=advice))
    assert "repair:" not in render_text(report(replace(ERROR, severity="info"), advice=advice))


def test_text_folds_the_places_of_a_finding() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.w1.weight" for i in (1, 2, 3) for j in range(8)]
    first = Where(names[0])
    folded = "model.layers.{1-3}.mlp.experts.{0-7}.w1.weight"
    finding = Finding("QC201", "error", "x", first, count=24, places=tuple(names))
    assert f"        {folded}\n" in render_text(report(finding))
    exact = render_text(report(replace(finding, where=replace(first, row=3))))
    assert f"        {names[0]} [row 3]\n        in {folded}\n" in exact
    value = json.loads(render_json(report(finding)))
    jsonschema.validate(value, schema())
    assert value["findings"][0]["places"] == [folded]


@pytest.mark.parametrize("format_", ["markdown", "html"])
def test_pages_name_fixes_and_the_repair_command(format_: str) -> None:
    advice = {"QC201": Advice("unknown tensor name", "Rename it.", repairable=True)}
    text = render(report(ERROR, ERROR, advice=advice), format_)
    assert text.count("fix: Rename it.") == 1
    assert "ckptgate repair /data/ckpt REPAIRED --base BASE" in text
