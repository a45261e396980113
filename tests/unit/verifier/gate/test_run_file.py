# SPDX-License-Identifier: Apache-2.0
"""Run files, journals, attempts, units of work; comparison of runs that were made by hand. Nothing
here loads a model.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from verifier.cli import run as cli
from verifier.errors import ContentError, IncomparableError, UsageError
from verifier.evaluation import Margin
from verifier.gate.attempts import Attempts, Pair
from verifier.gate.comparison import compare_runs
from verifier.gate.corpora import Corpus, documents_digest
from verifier.gate.jobs import Unit, UnitScores
from verifier.gate.journal import Journal
from verifier.gate.options import ScoringOptions
from verifier.gate.render import render_json, render_text
from verifier.gate.run_file import Run, RunHeader, read_run, sums_of, write_run
from verifier.gate.score import assemble, floor_of
from verifier.gate.scorers.expert_counts import ExpertCounter
from verifier.gate.windows import floor_units, units_of

KEY: dict[str, Any] = {
    "protocol": "tokens",
    "version": 1,
    "window": 512,
    "corpus": "c",
    "corpus_sha256": "0" * 64,
    "documents": 40,
    "document_rule": "lines",
    "bos": False,
    "dtype": "bfloat16",
}
ENVIRONMENT = {"torch": "2", "device": "cpu", "batch": "8"}


def made(seed: int, weights: str, loss: float = 0.0, *, documents: int = 40, **header: Any) -> Run:
    """Return a run whose tokens lose ``loss`` nats more than those of seed 0."""
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    tokens = base.integers(20, 60, documents)
    total = int(tokens.sum())
    nats = base.exponential(3, total) + 1
    nats = (nats + loss + (own.normal(0, 0.05, total) if seed else 0)).clip(0).astype(np.float32)
    arrays = {
        "nats": nats,
        "top1": own.integers(0, 9, total).astype(np.int32),
        "sure": -own.exponential(0.3, total).astype(np.float32),
        "tokens": tokens,
        "sums": sums_of(nats, tokens),
    }
    fields = {
        "model": f"model{seed}",
        "weights_sha256": weights * 64,
        "formats": ["NVFP4"],
        "key": KEY | {"documents": documents},
        "environment": ENVIRONMENT,
        "documents": [f"{i:016x}" for i in range(documents)],
        "floor": 0.0,
    }
    header = {k.removeprefix("header_"): v for k, v in header.items()}
    return Run(RunHeader.model_validate(fields | header), arrays)


BASE, GOOD = made(0, "a"), made(1, "b", 0.01)
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


def test_comparison_passes_fails_and_says_why() -> None:
    good = compare_runs(BASE, GOOD, MARGIN)
    assert good.outcome == "passed"
    assert good.interval is not None
    assert good.interval.delta == pytest.approx(0.01, abs=0.005)
    assert compare_runs(BASE, made(2, "c", 0.2), MARGIN).outcome == "failed"
    near = compare_runs(BASE, GOOD, Margin(good.interval.delta + good.interval.se, ""))
    assert near.outcome == "inconclusive"
    assert near.needed is not None
    assert near.needed > 40
    with pytest.raises(UsageError, match="the base itself"):
        compare_runs(BASE, made(3, "a"), MARGIN)


def test_drift_fails_what_the_absolute_margin_passes() -> None:
    worse = made(3, "c", 0.03)
    assert compare_runs(BASE, worse, MARGIN).outcome == "passed"
    drift = compare_runs(
        BASE, worse, MARGIN, drift_against=GOOD, drift_margin=Margin(0.003, "default")
    )
    assert drift.outcome == "failed"
    assert drift.drift is not None
    assert drift.drift.interval.delta == pytest.approx(0.02, abs=0.005)
    assert "drift    +0.0" in render_text(drift)


def test_unlike_protocols_are_refused_by_name_and_unlike_environments_widen() -> None:
    for name, value in (
        ("window", 256),
        ("dtype", "float32"),
        ("corpus_sha256", "1" * 64),
        ("bos", True),
    ):
        with pytest.raises(ContentError, match=rf"\({name} is"):
            compare_runs(BASE, made(1, "b", key=KEY | {name: value}), MARGIN)
    with pytest.raises(ContentError, match="tokenizer_sha256 is null and"):
        compare_runs(BASE, made(1, "b", key=KEY | {"tokenizer_sha256": "2" * 64}), MARGIN)
    assert (
        compare_runs(BASE, made(1, "b", 0.01, key=KEY | {"corpus": "another name"}), MARGIN).outcome
        == "passed"
    )
    other = compare_runs(
        BASE, made(1, "b", 0.01, environment=ENVIRONMENT | {"device": "H200"}), MARGIN
    )
    same = compare_runs(BASE, GOOD, MARGIN)
    assert other.unlike == ("device cpu and H200",)
    assert other.interval is not None
    assert same.interval is not None
    assert other.interval.high == pytest.approx(same.interval.high + 0.0005)
    assert other.interval.low == pytest.approx(same.interval.low - 0.0005)
    assert "different environments (device cpu and H200)" in render_text(other)


def test_other_documents_are_refused() -> None:
    with pytest.raises(ContentError, match="other documents"):
        compare_runs(
            BASE, made(1, "b", header_documents=["f" * 16, *GOOD.header.documents[1:]]), MARGIN
        )


def test_logits_that_are_not_finite_leave_no_statistics() -> None:
    result = compare_runs(BASE, made(1, "b", nonfinite=[3]), MARGIN)
    assert (result.outcome, result.interval, result.nonfinite) == ("failed", None, [3])
    assert json.loads(render_json(result))["perplexity_base"] is None


def test_experts_that_the_text_does_not_reach_are_named() -> None:
    counts = {"layers.1.experts": [5, 0, 7], "layers.2.experts": [1, 1, 1]}
    result = compare_runs(BASE, made(1, "b", 0.01, experts=counts), MARGIN)
    text = render_text(result)
    assert "5 of 6 reached in 2 layers" in text
    assert "not evaluated: layers.1.experts experts 1 (1 of 3)" in text


def test_experts_are_counted_without_padding() -> None:
    import torch

    counter = ExpertCounter()
    counter.real = torch.tensor([True, True, False, False])
    counter.add(
        "x", 3, torch.tensor([[0, 1], [0, 3], [2, 2], [2, 2]])
    )  # 3 is beyond the last: no one
    assert counter.take() == {"x": [2, 1, 0]}
    assert counter.take() == {}


def test_a_logit_that_is_not_finite_anywhere_is_seen() -> None:
    import torch

    from verifier.gate.scorers.transformers import _rows

    rows = torch.randn((5, 50), generator=torch.Generator().manual_seed(1))
    rows[0, 3], rows[1, 4], rows[2, 5], rows[3, 1] = math.inf, -math.inf, math.nan, 3e38
    found = _rows(rows, torch.zeros(5, dtype=torch.long), 4)
    arrays, logprobs = found.arrays, found.logprobs
    assert found.finite.tolist() == [False, False, False, True, True]
    assert all(np.isfinite(v).all() for v in arrays.values())
    assert arrays["nats"][4] == -logprobs[4, 0]
    assert arrays["top_ids"][4, 0] == arrays["top1"][4]
    assert arrays["top_logprobs"][4].tolist() == sorted(logprobs[4].tolist(), reverse=True)[:4]


def test_few_documents_get_a_figure_that_decides_nothing() -> None:
    few = compare_runs(made(0, "a", documents=12), made(1, "b", 0.01, documents=12), MARGIN)
    many = compare_runs(BASE, GOOD, MARGIN)
    assert few.measures.se_blocks is not None
    assert many.measures.se_blocks is None
    assert "informational" in render_text(few)


def test_later_looks_are_at_a_stricter_level() -> None:
    first, second = compare_runs(BASE, GOOD, MARGIN), compare_runs(BASE, GOOD, MARGIN, looks=2)
    assert first.interval is not None
    assert second.interval is not None
    assert second.interval.high > first.interval.high
    assert "95% interval" in render_text(second)
    assert "look 2" in render_text(second)


def test_hostile_names_are_escaped() -> None:
    result = compare_runs(BASE, made(1, "b", 0.01, model="evil\x1b[31m\nverdict: PASSED"), MARGIN)
    text = render_text(result)
    assert "\x1b" not in text
    assert sum(line.startswith("verdict") for line in text.splitlines()) == 1


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {n: str(tmp_path / f"{n}.run") for n in ("base", "good", "worse", "bad")}
    for run, name in (
        (BASE, "base"),
        (GOOD, "good"),
        (made(3, "c", 0.03), "worse"),
        (made(4, "d", 0.3), "bad"),
    ):
        write_run(files[name], run)
    assert cli(["compare", files["base"], files["good"]]) == 0
    assert "default budget of NVFP4" in capsys.readouterr().out
    assert cli(["compare", files["base"], files["bad"], "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "failed"
    assert cli(["compare", files["base"], files["worse"], "--drift-against", files["good"]]) == 1
    capsys.readouterr()
    assert cli(["compare", files["base"], files["worse"], "--format", "json"]) == 0
    near = json.loads(capsys.readouterr().out)["interval"]["delta"]
    assert cli(["compare", files["base"], files["worse"], "--max-increase", f"{near:.6f}"]) == 3
    assert cli(["compare", files["base"], files["worse"], "--max-drift", "0.1"]) == 2
    assert cli(["compare", files["base"], files["base"]]) == 2
    assert cli(["compare", files["base"], str(tmp_path / "absent.run")]) == 2


def windows(lengths: list[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(range(n)), (d,) * n) for d, n in enumerate(lengths)]


def scores_of(units: list[Unit], shift: float = 0.0) -> dict[int, UnitScores]:
    """Return scores in which a token's nats tell its window and position."""
    found = {}
    for u in units:
        nats = [
            100 * p + i + shift
            for p, (ids, _) in zip(u.places, u.windows, strict=True)
            for i in range(len(ids) - 1)
        ]
        arrays = {"nats": np.array(nats, np.float32), "top1": np.zeros(len(nats), np.int32)}
        found[u.number] = UnitScores(
            u.number, arrays | {"sure": np.zeros(len(nats), np.float32)} if nats else {}
        )
    return found


def test_scores_fall_into_their_places_whatever_the_batch() -> None:
    lengths = [5, 1, 9, 2, 9]
    whole = [
        assemble(units_of(windows(lengths), b), scores_of(units_of(windows(lengths), b)), 5)
        for b in (1, 2, 3, 8)
    ]
    assert whole[0]["tokens"].tolist() == [4, 0, 8, 1, 8]
    assert whole[0]["nats"].tolist()[:5] == [0, 1, 2, 3, 200]
    for other in whole[1:]:
        assert all(np.array_equal(other[k], v) for k, v in whole[0].items())


def test_the_floor_is_what_other_batches_change() -> None:
    units = units_of(windows([20] * 12), 4)
    again = floor_units(units, 4)
    assert {p for u in again for p in u.places} == set(range(8))
    assert {u.number for u in again}.isdisjoint(u.number for u in units)
    assert {u.windows for u in again}.isdisjoint(u.windows for u in units)
    same = scores_of([*units, *again])
    assert floor_of(units, again, same) == 0.0
    assert floor_of(units, again, scores_of(units) | scores_of(again, 0.25)) == pytest.approx(0.25)
    assert floor_of(units, [], same) is None


def by_engine(shift: float, **header: Any) -> Run:
    """Return the base's run as another engine might score it: every token ``shift`` nats dearer,
    formats none.
    """
    nats = (BASE.arrays["nats"] + np.float32(shift)).astype(np.float32)
    arrays = BASE.arrays | {"nats": nats, "sums": sums_of(nats, BASE.tokens)}
    known = BASE.header.model_dump() | {
        "formats": [],
        "environment": {"engine": "vllm 0.32", "device": "cuda"},
    }
    return Run(
        RunHeader.model_validate(known | {"key": KEY | {"activations": "engine"}} | header), arrays
    )


def test_a_margin_within_what_engines_differ_by_is_inconclusive() -> None:
    small, wide = Margin(0.02, "given"), Margin(0.077, "given")
    assert compare_runs(BASE, GOOD, small).outcome == "passed"
    found = compare_runs(BASE, GOOD, small, floor_runs=[by_engine(0.001), by_engine(-0.03)])
    assert found.outcome == "inconclusive"
    assert found.floor == pytest.approx(0.03, abs=1e-6)
    assert "floor    0.0300" in render_text(found)
    assert "under vllm 0.32 on cuda the base differs from itself by up to 0.0010" in found.notes[0]
    assert "not above the noise floor" in found.notes[2]
    assert compare_runs(BASE, GOOD, wide, floor_runs=[by_engine(-0.03)]).outcome == "passed"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"weights_sha256": "c" * 64}, "other weights"),
        ({"key": KEY | {"window": 256}}, "window is 512 and 256"),
        ({"formats": ["NVFP4"]}, "activations"),
        ({"documents": [f"{i:016x}" for i in range(1, 41)]}, "other documents"),
        ({"nonfinite": [3]}, "not finite"),
    ],
)
def test_a_floor_that_is_none_is_refused(header: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, IncomparableError), match=message):
        compare_runs(BASE, GOOD, MARGIN, floor_runs=[by_engine(0.001, **header)])


def test_compare_takes_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, run in (
        ("base", BASE),
        ("good", GOOD),
        ("engine", by_engine(0.03)),
        ("other", made(2, "c")),
    ):
        write_run(tmp_path / f"{name}.run", run)
    pair = [
        "compare",
        str(tmp_path / "base.run"),
        str(tmp_path / "good.run"),
        "--max-increase",
        "0.02",
    ]
    assert cli(pair) == 0
    assert cli([*pair, "--floor", str(tmp_path / "engine.run")]) == 3
    assert "vllm 0.32" in capsys.readouterr().out
    assert cli([*pair, "--floor", str(tmp_path / "other.run")]) == 2
    assert "other weights" in capsys.readouterr().err


def test_a_journal_keeps_whole_units_only(tmp_path: Path) -> None:
    file, header = tmp_path / "x.part", {"key": "one"}
    scores = scores_of(units_of(windows([5, 4, 3]), 1))
    with Journal(file, header) as journal:
        journal.add(scores[0])
        journal.add(scores[1])
        with pytest.raises(UsageError, match="another process"):
            Journal(file, header)
    whole = file.read_bytes()
    for cut in range(1, 40):
        file.write_bytes(whole[:-cut])
        with Journal(file, header) as journal:
            assert set(journal.done) == {0}
            assert np.array_equal(journal.done[0].arrays["nats"], scores[0].arrays["nats"])
            journal.add(scores[1])
        assert file.read_bytes() == whole
    spoiled = bytearray(whole)
    spoiled[-10] ^= 1
    file.write_bytes(spoiled)
    with Journal(file, header) as journal:
        assert set(journal.done) == {0}
    with Journal(file, {"key": "another"}) as journal:
        assert (journal.done, journal.restarted) == ({}, True)


class Model:
    """Stands for a checkpoint whose weights are digested already."""

    def __init__(self, digest: str) -> None:
        self.uri, self.weights_sha256 = digest, digest


def pair(*texts: str, seq_len: int = 512) -> Pair:
    corpus = Corpus("c", "", documents_digest(texts), texts=texts)
    return Pair(Model("candidate"), Model("base"), ScoringOptions(corpus, seq_len=seq_len))  # type: ignore[arg-type]


def test_a_second_look_includes_the_first(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    near = compare_runs(BASE, GOOD, Margin(0.0101, ""))
    assert near.outcome == "inconclusive"
    assert attempts.looks(pair("a", "b")) == 1
    assert attempts.last_spread(pair("a")) is None
    attempts.record(pair("a", "b"), near, 3.0)
    assert attempts.looks(pair("b", "a")) == 1  # the same documents give the same numbers
    assert attempts.looks(pair("a", "b", "c")) == 2
    with pytest.raises(UsageError, match="1 of those 2 documents"):
        attempts.looks(pair("a", "c", "d"))
    assert attempts.looks(pair("x", seq_len=256)) == 1  # another protocol is another question
    with (tmp_path / "attempts.jsonl").open("ab") as handle:
        handle.write(b'{"pair": [1, \n[]\n{"documents": 3}\n')
        handle.write(b'{"documents": [[]], "pair": 5}\n{"documents": [[]], "pair": []}\n')
        handle.write(b'{"documents": ["a')
    attempts.record(pair("a", "b", "c"), compare_runs(BASE, GOOD, MARGIN), 3.0)
    assert attempts.looks(pair("a", "b", "c", "d")) == 3
    spread = attempts.last_spread(pair())
    assert spread is not None
    assert spread.scored == 40
