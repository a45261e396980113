# SPDX-License-Identifier: Apache-2.0
"""Subsets put together are the whole; a sample says that it is one."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_schedule import BASE, NVFP4, damage, reshard

import verifier
from verifier.checkpoint import Bytes
from verifier.checkpoint.source import LocalSource
from verifier.cli import run
from verifier.errors import ContentError, UsageError
from verifier.findings import Report
from verifier.report import render_json, render_text
from verifier.run import merge_reports, report_of
from verifier.run.sample import sample_of
from verifier.run.subset import Subset, subset_numbers, subset_of
from verifier.schemes import gather
from verifier.selftest.editor import CheckpointEditor, RawShard, write_shard


def _many_kinds(path: Path) -> Path:
    """Write a checkpoint whose zero scales are of more kinds than a report holds."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for i in range(6):
        entries = {}
        for name in (f"m.{a}{b}.up_proj" for a in "abcdefghij"[i::2] for b in "pqrstuvwxy"):
            scale = np.full((4, 2), 0x38, np.uint8)
            scale[rng.integers(4), 1] = 0 if rng.random() < 0.9 else 0x7F
            codes = np.full((4, 16), int(rng.random() < 0.5), np.uint8)
            entries[f"{name}.{i}.weight"] = ("U8", (4, 16), codes.tobytes())
            entries[f"{name}.{i}.weight_scale"] = ("F8_E4M3", (4, 2), scale.tobytes())
            entries[f"{name}.{i}.weight_scale_2"] = ("F32", (), np.float32(1).tobytes())
        write_shard(path / f"model-{i}.safetensors", RawShard({}, entries))
    (path / "config.json").write_text("{}")
    return path


MAKE: dict[str, Callable[[Path], Path]] = {
    "clean": lambda p: reshard(NVFP4, p, 6),
    "damaged": lambda p: damage(reshard(NVFP4, p, 6)),
    "kinds": _many_kinds,
    "unquantized": lambda p: reshard(BASE, p, 3),
    "one file": lambda p: Path(shutil.copytree(NVFP4, p)),
}


def _headless(path: Path) -> Path:
    """Break a header as well, so that its shard is no longer read."""
    damage(reshard(NVFP4, path, 6))
    file = sorted(path.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-300])
    return path


MAKE["cut"] = _headless


@pytest.fixture(scope="module", params=list(MAKE))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKE[request.param](tmp_path_factory.mktemp("subset") / "ckpt")


def _parts(path: Path, count: int, **options: object) -> list[Report]:
    """Return one report for each subset, through JSON and in a random order."""
    found = [
        verifier.check(path, depth="payload", subset=f"{k}/{count}", **options)
        for k in range(1, count + 1)
    ]
    random.Random(count).shuffle(found)  # noqa: S311  (an order, no secret)
    return [report_of(json.loads(render_json(r))) for r in found]


def _untimed(report: Report) -> Report:
    return replace(report, summary=replace(report.summary, seconds=None))


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "base"])
def test_all_subsets_merged_are_the_whole(checkpoint: Path, count: int, base: Path | None) -> None:
    whole = verifier.check(checkpoint, base=base, depth="payload")
    merged = merge_reports(_parts(checkpoint, count, base=base))
    assert merged.findings == whole.findings
    assert merged.coverage == whole.coverage
    assert (merged.verdict, merged.exit_code) == (whole.verdict, whole.exit_code)
    assert _untimed(merged) == _untimed(whole)


REQUIRED = [{"require": ("QC504", "QC501")}, {"require": ("QC605",)}, {"fail_on": "warning"}]


@pytest.mark.parametrize("options", REQUIRED, ids=str)
def test_what_is_required_is_required_of_all_together(
    tmp_path: Path, options: dict[str, object]
) -> None:
    path = reshard(NVFP4, tmp_path / "ckpt", 4)
    whole = verifier.check(path, depth="payload", **options)
    parts = _parts(path, 4, **options)
    assert [p.verdict for p in parts] == ["passed"] * 4
    assert _untimed(merge_reports(parts)) == _untimed(whole)
    assert (whole.verdict == "inconclusive") == (options.get("require") == ("QC605",))


def test_a_defect_is_told_by_the_subset_that_holds_it(tmp_path: Path) -> None:
    path = reshard(NVFP4, tmp_path / "ckpt", 4)
    folder = CheckpointEditor(path)
    name = next(
        n
        for n, t in folder.tensors().items()
        if t.file.endswith("00003-of-00004.safetensors") and "layernorm" in n
    )
    folder.overwrite(name, 0, b"\x80\x7f")
    reports = [verifier.check(path, depth="payload", subset=f"{k}/4") for k in range(1, 5)]
    assert sorted(r.verdict for r in reports) == ["failed", "passed", "passed", "passed"]
    (reported,) = (r for r in reports if r.verdict == "failed")
    assert "subset 3/4 of" in render_text(reported)
    for report in reports:
        whole = {c.rule: c for c in verifier.check(path, depth="payload").coverage}
        assert all(
            c.of < whole[c.rule].of
            for c in report.coverage
            if c.rule in ("QC501", "QC502", "QC508")
        )


SIZES = [[], [0, 0, 0], [7], [5, 0, 90, 1, 1, 1, 1, 1], [3] * 1000]


@pytest.mark.parametrize("of", [1, 2, 5, 40])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} modules")
def test_subsets_are_in_order_and_about_equal(sizes: list[int], of: int) -> None:
    numbers = subset_numbers(sizes, of)
    assert len(numbers) == len(sizes)
    assert numbers == sorted(numbers)
    assert set(numbers) <= set(range(1, of + 1))
    found: Counter[int] = Counter()
    for number, size in zip(numbers, sizes, strict=True):
        found[number] += size
    assert all(total <= sum(sizes) / of + max(sizes) for total in found.values())


SURVEYS = "QC519"
"""Reads some weights of the whole checkpoint, in the first subset."""


@pytest.mark.parametrize("files", [1, 6])
def test_each_subset_reads_its_part_of_the_base(
    files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = reshard(NVFP4, tmp_path / "ckpt", files), Counter[str]()
    read_into = LocalSource.read_into

    def counted(self: LocalSource, name: str, offset: int, out: Bytes) -> None:
        read[self.uri] += out.size
        read_into(self, name, offset, out)

    monkeypatch.setattr(LocalSource, "read_into", counted)

    def of_base(subset: str | None) -> int:
        read.clear()
        verifier.check(path, base=BASE, depth="payload", subset=subset, workers=1, ignore=SURVEYS)
        return read[str(BASE)]

    parts = [of_base(f"{k}/4") for k in range(1, 5)]
    assert sum(parts) < 1.1 * of_base(None), "each reads all headers, and no more"


def test_reports_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, other = reshard(NVFP4, tmp_path / "a", 4), reshard(NVFP4, tmp_path / "b", 5)
    one, two, three = (verifier.check(path, depth="payload", subset=f"{k}/3") for k in (1, 2, 3))
    strange = verifier.check(other, depth="payload", subset="2/3")
    against = verifier.check(path, base=BASE, depth="payload", subset="2/3")
    for parts, words in [
        ([one, one, two], "two reports are of"),
        ([one, verifier.check(path, depth="payload", subset="1/2")], "among those of n = 3"),
        ([verifier.check(path, depth="payload")], "is not of a subset"),
        ([one, strange, three], "different checkpoints"),
        ([one, against, three], "different checkpoints"),
    ]:
        with pytest.raises(ContentError, match=words):
            merge_reports(parts)
    for parts, words in (([], "no report"), ([one, three], "no report for 2/3: 1 subset missing")):
        with pytest.raises(UsageError, match=words):
            merge_reports(parts)
    assert merge_reports([three, one, two]).verdict == "passed"


@pytest.mark.parametrize(
    "text", ["", "2", "0/3", "4/3", "1/0", "-1/3", "1/10001", "1.0/2", "\u0661/\u0662", "1/2/3"]
)
def test_a_share_is_written_k_of_n(text: str) -> None:
    with pytest.raises(UsageError, match="--subset"):
        verifier.check(NVFP4, depth="payload", subset=text)
    assert subset_of(" 2/8 ") == Subset(2, 8)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = damage(reshard(NVFP4, tmp_path / "ckpt", 4))
    files = []
    for k in (2, 1):
        code = run(
            [
                "check",
                str(path),
                "--depth",
                "payload",
                "--subset",
                f"{k}/2",
                "--workers",
                "2",
                "--format",
                "json",
            ]
        )
        assert code == 1
        files.append(tmp_path / f"{k}.json")
        files[-1].write_text(capsys.readouterr().out)
    assert run(["merge-reports", *map(str, files), "--format", "json"]) == 1
    merged = report_of(json.loads(capsys.readouterr().out))
    assert _untimed(merged) == _untimed(verifier.check(path, depth="payload"))
    assert run(["merge-reports", *map(str, files)]) == 1
    assert "verdict: FAILED" in capsys.readouterr().out
    assert run(["merge-reports", str(files[0])]) == 2
    assert "no report for 1/2: 1 subset missing" in capsys.readouterr().err
    junit = tmp_path / "merged.xml"
    merge = ["merge-reports", *map(str, files)]
    assert run([*merge, "--format", "concise", "-o", "-", "-o", str(junit)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{path}: FAILED")
    assert junit.read_text().startswith("<?xml")
    assert run(["merge-reports", str(tmp_path / "absent.json")]) == 2
    capsys.readouterr()
    odd = (
        "",
        "[]",
        "{}",
        '{"a": 1, "a": 2}',
        '{"schema_version": "9.9"}',
        '{"schema_version": "1.0", "findings": [1]}',
        "\xff",
    )
    for text in odd:
        (tmp_path / "odd.json").write_bytes(text.encode("latin-1"))
        assert run(["merge-reports", str(tmp_path / "odd.json")]) == 1
        err = capsys.readouterr().err
        assert "odd.json: " in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"), [("unproven", "inconclusive"), ("broken", "error"), ("failed", "failed")]
)
def test_a_report_of_version_1_is_read_with_the_verdicts_named_as_now(old: str, new: str) -> None:
    value = json.loads(render_json(verifier.check(NVFP4)))
    value |= {"schema_version": "1.1", "verdict": old}
    value["stats"]["unproven"] = "nothing was examined"
    read = report_of(value)
    assert (read.verdict, read.summary.inconclusive) == (new, "nothing was examined")
    assert "unproven" not in read.summary.as_json()


def test_a_sample_says_so_and_counts_what_it_left_out() -> None:
    whole = verifier.check(NVFP4, base=BASE, depth="payload")
    sampled = verifier.check(NVFP4, base=BASE, depth="payload", sample="5%")
    full = {c.rule: c for c in whole.coverage}
    seen = {c.rule: c for c in sampled.coverage}
    for rule in ("QC501", "QC502", "QC508", "QC515", "QC605"):
        assert 0 < seen[rule].checked < seen[rule].of == full[rule].of
        assert seen[rule].reason == "a sample of 5% (seed 0)"
    assert seen["QC515"].checked == 3  # of 48 alike
    assert (sampled.summary.options.sample, sampled.summary.options.seed) == (5.0, 0)
    assert "checked a sample of 5% (seed 0) of " in render_text(sampled)
    assert [seen[r] for r in seen if r < "QC5"] == [full[r] for r in full if r < "QC5"]


def test_a_sample_is_the_seed_s() -> None:
    modules = list(gather(verifier.open_checkpoint(NVFP4).tensors.values()).values())

    def names(percent: str, seed: int, order: int = 1) -> set[str]:
        sample = sample_of(percent, seed)
        assert sample is not None
        return {m.name for chosen, _ in sample.choose(modules[::order]) for m in chosen}

    assert names("10", 1) == names("10%", 1) == names("10", 1, -1)
    assert names("10", 1) != names("10", 2)
    assert names("10", 1) < names("40", 1)
    looks = {m.signature for m in modules}
    assert {m.signature for m in modules if m.name in names("0.001", 5)} == looks
    assert len(names("0.001", 5)) == len(looks)


def test_a_sample_finds_no_more_than_the_whole(tmp_path: Path) -> None:
    path = damage(Path(shutil.copytree(NVFP4, tmp_path / "ckpt")))
    count = {f.message: f.count for f in verifier.check(path, depth="payload").by_rule("QC501")}
    for seed in range(6):
        report = verifier.check(path, depth="payload", sample=30, seed=seed)
        assert report == replace(
            verifier.check(path, depth="payload", sample=30, seed=seed, workers=3),
            summary=report.summary,
        )
        assert all(f.count <= count[f.message] for f in report.by_rule("QC501"))


def test_everything_is_no_sample() -> None:
    whole, all_of_it = (verifier.check(NVFP4, depth="payload", sample=s) for s in (None, "100%"))
    assert _untimed(whole) == _untimed(all_of_it)


@pytest.mark.parametrize("text", ["0", "-1", "101", "nan", "inf", "five", "", "5%%"])
def test_a_sample_is_a_percentage(text: str) -> None:
    with pytest.raises(UsageError, match="--sample"):
        verifier.check(NVFP4, depth="payload", sample=text)


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="one of both"):
        verifier.check(NVFP4, depth="payload", sample="5%", subset="1/2")
    for options in ({"sample": "5%"}, {"subset": "1/2"}):
        with pytest.raises(UsageError, match="needs --depth payload"):
            verifier.check(NVFP4, **options)
