# SPDX-License-Identifier: Apache-2.0
"""Scores of engines in other processes: the numbers that they compute, and each way in which they
fail.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.engines.formula import row
from tests.paths import TESTS
from verifier.cli import run
from verifier.errors import CkptgateError, MachineError, UsageError
from verifier.gate.jobs import Job, Scorer, Unit, UnitScores
from verifier.gate.run_file import read_run
from verifier.gate.scorers.dispatch import score_by_engine
from verifier.gate.scorers.vllm import WORKER

ENGINES = TESTS / "engines"
QWEN = TESTS / "data" / "modelopt" / "src_qwen3moe"
WINDOWS = [tuple((7 * i + 3 * j) % 64 for i in range(n)) for j, n in enumerate((9, 2, 5, 1, 6))]
CLEAN = [tuple(14 if t == 13 else t for t in w) for w in WINDOWS]


def units(windows: list[tuple[int, ...]]) -> tuple[Unit, ...]:
    pairs = [(w, (d,) * len(w)) for d, w in enumerate(windows)]
    return Unit(0, tuple(pairs[:3]), (0, 1, 2)), Unit(1, tuple(pairs[3:]), (3, 4))


def scored(
    scorer: Scorer, windows: list[tuple[int, ...]] = CLEAN, top_k: int = 4
) -> tuple[list[UnitScores], dict[str, str]]:
    found: list[UnitScores] = []
    job = Job(str(QWEN), "cpu", "tokens", 4, 16, units(windows), top_k=top_k, scorer=scorer)
    environment = score_by_engine(job, found.append)
    return found, environment


def wanted(windows: list[tuple[int, ...]], top_k: int) -> dict[str, np.ndarray]:
    rows = [(row(a), b) for w in windows for a, b in pairwise(w)]
    order = [sorted(range(64), key=lambda i, r=r: (-r[i], i)) for r, _ in rows]
    return {
        "nats": np.array([-r[b] for r, b in rows], np.float32),
        "top1": np.array([o[0] for o in order], np.int32),
        "sure": np.array([r[o[0]] for (r, _), o in zip(rows, order, strict=True)], np.float32),
        "top_ids": np.array([o[:top_k] for o in order], np.int32),
        "top_logprobs": np.array(
            [[r[i] for i in o[:top_k]] for (r, _), o in zip(rows, order, strict=True)], np.float32
        ),
    }


def same(
    found: list[UnitScores],
    names: tuple[str, ...],
    windows: list[tuple[int, ...]] = CLEAN,
    top_k: int = 4,
) -> None:
    for piece, part in zip(found, (windows[:3], windows[3:]), strict=True):
        assert set(piece.arrays) == set(names)
        for name, values in wanted(part, top_k).items():
            if name in names:
                assert piece.arrays[name].dtype == values.dtype
                assert np.array_equal(piece.arrays[name], values), name
        assert piece.nonfinite == []


ALL = ("nats", "top1", "sure", "top_ids", "top_logprobs")


@pytest.fixture
def interpreter(tmp_path: Path) -> str:
    """Return an interpreter of its own that has a package named vllm."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{ENGINES}" exec "{sys.executable}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@contextmanager
def serving(mode: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, str(ENGINES / "server.py"), mode], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.communicate()


def vllm(python: str, timeout: float = 60.0, **options: str | bool) -> Scorer:
    return Scorer("vllm", python=python, options=tuple(options.items()), timeout=timeout)


def test_vllm_in_its_own_interpreter(interpreter: str) -> None:
    found, environment = scored(vllm(interpreter))
    same(found, ALL)
    assert environment["engine"] == "vllm 0.0-stand-in"
    assert set(environment) == {"engine", "device", "batch"}
    same(scored(vllm(interpreter), top_k=0)[0], ALL[:3])


def test_the_worker_does_not_import_its_neighbours(interpreter: str) -> None:
    """Next to it are modules named vllm and transformers, which a file run by path finds first."""
    names = {path.stem for path in WORKER.parent.glob("*.py")}
    assert {"vllm", "transformers"} <= names
    code = f"import runpy, sys; sys.path.insert(0, {str(WORKER.parent)!r})\n"
    code += f"runpy.run_path({str(WORKER)!r}, run_name='worker')\n"
    code += "import vllm; print(vllm.__version__)"
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0.0-stand-in\n"


def test_vllm_with_logits_that_are_not_finite(interpreter: str) -> None:
    windows = [(1, 2, 3), (4, 13, 5), (6, 7)]
    found, _ = scored(vllm(interpreter, mode="nan"), windows)
    assert found[0].nonfinite == [1]
    assert found[0].arrays["nats"][2] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fail": True}, "no kernel for this format on this card"),
        ({"hide": True}, r"ValueError: no room \(RuntimeError: Engine core"),
        ({"mode": "speculates"}, "vLLM speculates"),
        ({"die": True}, "CUDA error: out of memory"),
        ({"mode": "hang", "timeout": 1.0}, r"within 1 s \(--engine-timeout\)"),
        ({"mode": "short"}, "KeyError|ValueError"),
        ({"nonsense": "x"}, "AssertionError"),
    ],
    ids=["raises", "hides-the-cause", "speculates", "dies", "hangs", "answers-less", "option"],
)
def test_vllm_that_fails_is_one_message(
    interpreter: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(MachineError, match=message):
        scored(vllm(interpreter, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("print('hello')", "not JSON"),
        ("print('[1]')", "not an object"),
        ("print('{}')", "ready"),
        ("pass", "ended"),
        ("print('x' * 200000)", "more than"),
    ],
)
def test_an_interpreter_that_speaks_otherwise(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.stdin.readline()\n{lines}\n")
    path.chmod(0o755)
    with pytest.raises(MachineError, match=message):
        scored(vllm(str(path)))
    with pytest.raises(UsageError, match="No such file"):
        scored(vllm(str(tmp_path / "absent")))


def test_a_server_with_prompt_logprobs() -> None:
    with serving("vllm") as url:
        found, environment = scored(Scorer("server", endpoint=url))
        same(found, ALL)
        assert environment["engine"] == "server 0.0-stand-in"
        found, _ = scored(
            Scorer("server", endpoint=url, served="one"), [(1, 2, 3), (4, 13, 5), (6, 7)]
        )
        assert found[0].nonfinite == [1]
        with pytest.raises(UsageError, match="serves one, not 'other'"):
            scored(Scorer("server", endpoint=url, served="other"))
        long = (3,) * 599
        assert len(scored(Scorer("server", endpoint=url), [long])[0][0].arrays["nats"]) == 598
        with pytest.raises(UsageError, match=r"context of 600 tokens.* give --seq-len 599"):
            scored(Scorer("server", endpoint=url), [(*long, 3)])
        with pytest.raises(UsageError, match=r"max allowed: 20.*serve with --max-logprobs 21"):
            scored(Scorer("server", endpoint=url), top_k=21)


def test_a_server_with_echo_only() -> None:
    with serving("ids") as url:
        same(scored(Scorer("server", endpoint=url))[0], ALL)
    with serving("text") as url:
        with pytest.raises(UsageError, match="serves 2 models"):
            scored(Scorer("server", endpoint=url))
        same(scored(Scorer("server", endpoint=url, served="two"), top_k=0)[0], ("nats",))
        with pytest.raises(UsageError, match="need ids"):
            scored(Scorer("server", endpoint=url, served="two"))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("broken", "not JSON"),
        ("long", "more than"),
        ("short", "not an answer with scores"),
        ("slow", "failed 3 times: TimeoutError"),
    ],
)
def test_a_server_that_fails_is_one_message(
    mode: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.gate.scorers.server.time.sleep", lambda _s: None)
    with serving(mode) as url, pytest.raises(MachineError, match=message):
        scored(Scorer("server", endpoint=url, timeout=0.3 if mode == "slow" else 30.0))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("drafts", "vllm:spec_decode counters"),
        ("eagle", "speculative_algorithm is EAGLE3"),
        ("slots", "its /slots are speculative"),
    ],
)
def test_a_server_that_speculates_is_refused(mode: str, message: str) -> None:
    with serving(mode) as url, pytest.raises(UsageError, match=message):
        scored(Scorer("server", endpoint=url))


def test_a_server_that_does_not_say_whether_it_speculates_scores_twice() -> None:
    with serving("wavers") as url:
        with pytest.raises(MachineError, match=r"the second time, by \d\.\d\d nats per token"):
            scored(Scorer("server", endpoint=url))
    with serving("denies") as url:  # the same answers, from a server that says: no drafts
        same(scored(Scorer("server", endpoint=url))[0], ALL)


def test_a_server_that_answers_zero_for_every_token_does_not_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"ids": [i, 1, 2, 3, 4]}) + "\n" for i in range(9)))
    runs = {}
    for mode, model in (("vllm", QWEN), ("zeros", QWEN.with_name("qwen3moe_nvfp4_experts_max"))):
        runs[mode] = str(tmp_path / f"{mode}.run")
        with serving(mode) as url:
            score = ["score", str(model), "--corpus", str(corpus), "--scorer", "server"]
            assert run([*score, "--endpoint", url, "-o", runs[mode]]) == 0
    capsys.readouterr()
    assert run(["compare", runs["vllm"], runs["zeros"]]) == 3
    assert "100% of the candidate's tokens have one and the same" in capsys.readouterr().out


def test_a_busy_server_is_asked_again_and_an_absent_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("verifier.gate.scorers.server.time.sleep", lambda _s: None)
    with serving("busy") as url:
        windows = [(1, 2, 3), (4, 5)]
        assert len(scored(Scorer("server", endpoint=url), windows)[0]) == 2
    with pytest.raises(MachineError, match="ConnectionRefusedError"):
        scored(Scorer("server", endpoint=url))
    for wrong in ("ftp://h/v1", "http://", "http://user@h/v1", "http://h:99999/v1"):
        with pytest.raises(CkptgateError, match="--endpoint"):
            scored(Scorer("server", endpoint=wrong))


def test_score_and_compare_through_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"ids": list(w)}) + "\n" for w in CLEAN))
    out = tmp_path / "a.run"
    with serving("text") as url:
        engine = ["--scorer", "server", "--endpoint", url, "--served", "one"]
        assert run(["score", str(QWEN), "--corpus", str(corpus), *engine, "-o", str(out)]) == 0
        assert "engine (rounded as the engine does)" in capsys.readouterr().out
        found = read_run(out)
        assert np.array_equal(found.arrays["nats"], wanted(CLEAN, 1)["nats"])
        assert "top1" not in found.arrays
        assert found.header.floor == 0
        gate = ["gate", str(QWEN), "--base", str(QWEN), "--corpus", str(corpus), *engine]
        assert run(gate) == 2
        assert "then `ckptgate compare`" in capsys.readouterr().err
    assert (
        run(
            [
                "score",
                str(QWEN),
                "--corpus",
                str(corpus),
                "--engine-option",
                "x",
                "-o",
                str(tmp_path / "b.run"),
            ]
        )
        == 2
    )
    assert sorted(os.listdir(tmp_path)) == ["a.run", "c.jsonl"]


def test_a_gate_through_vllm(
    interpreter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"ids": list(w)}) + "\n" for w in CLEAN))
    candidate = QWEN.with_name("qwen3moe_nvfp4_experts_max")
    command = [
        "gate",
        str(candidate),
        "--base",
        str(QWEN),
        "--corpus",
        str(corpus),
        "--scorer",
        "vllm",
    ]
    command += ["--engine-python", interpreter]
    assert run([*command, "--kl", "lockstep"]) == 2
    assert "use --kl top-k with --scorer vllm" in capsys.readouterr().err
    assert run([*command, "--format", "json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert (result["key"]["activations"], result["experts"]) == ("engine", [])
    assert result["interval"]["delta"] == 0  # the stand-in looks at ids alone
    assert "bit for bit" in result["doubts"][1]
    assert result["measures"]["kl"]["kind"].startswith("a lower bound")
    assert result["environment"]["engine"] == "vllm 0.0-stand-in"


def test_what_an_engine_adds_is_noise(
    interpreter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, engine = tmp_path / "c.jsonl", tmp_path / "engine.run"
    corpus.write_text("".join(json.dumps({"ids": list(w)}) + "\n" for w in CLEAN))
    score = [
        "score",
        str(QWEN),
        "--corpus",
        str(corpus),
        "--scorer",
        "vllm",
        "--engine-python",
        interpreter,
    ]
    assert run([*score, "-o", str(engine)]) == 0
    candidate = QWEN.with_name("qwen3moe_nvfp4_experts_max")
    gate = ["gate", str(candidate), "--base", str(QWEN), "--corpus", str(corpus), "--workers", "1"]
    capsys.readouterr()
    assert run([*gate, "--floor", str(engine), "--format", "json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert result["floor"] > result["margin"]["nats"]  # the stand-in looks at ids alone
    assert "under vllm 0.0-stand-in" in result["notes"][0]
    assert run([*gate, "--seq-len", "4", "--floor", str(engine)]) == 1
    assert "window is 4 and 512" in capsys.readouterr().err
