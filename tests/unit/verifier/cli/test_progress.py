# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: amounts, rate and time left, by a clock that the test turns."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys

import pytest

import verifier
from tests.paths import ROOT, TESTS
from verifier.cli import run
from verifier.cli.progress import JsonLines, Lines, Ticker, TrackedJob, duration, progress_bar
from verifier.selftest.runner import selftest

DATA = TESTS / "data" / "modelopt"
QWEN, QWEN_NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_line_has_amount_detail_rate_and_time_left(clock: Clock) -> None:
    job, stream = TrackedJob("checking", "byte", clock=clock), io.StringIO()
    job.update(0, 250_000_000_000)
    clock.now += 25
    job.update(12_500_000_000, 250_000_000_000, "3 of 52 shards")
    Lines(stream).draw(job)
    assert stream.getvalue() == (
        "ckptgate: checking: 12.5 GB of 250.0 GB (5%), 3 of 52 shards, 500.0 MB/s, 8 min left\n"
    )


def test_work_of_an_unknown_size_shows_its_time(clock: Clock) -> None:
    job, stream = TrackedJob("building the model", clock=clock), io.StringIO()
    clock.now += 90
    Lines(stream).draw(job)
    assert stream.getvalue() == "ckptgate: building the model: 2 min\n"


def test_what_a_resumed_job_finds_done_is_no_speed(clock: Clock) -> None:
    job = TrackedJob("scoring", "window", clock=clock)
    job.update(900, 1000)
    clock.now += 10
    job.update(910, 1000)
    assert (job.rate, job.left) == (1.0, 90.0)


def test_a_second_stage_has_a_rate_of_its_own(clock: Clock) -> None:
    job = TrackedJob("scoring", "document", clock=clock)
    job.update(0, 0, "loading candidate")
    clock.now += 500
    job.update(1, 10, "candidate")
    clock.now += 9
    job.update(10, 10, "candidate")
    job.update(0, 0, "loading base")
    assert (job.left, job.amount()) == (None, "")
    clock.now += 500
    job.update(2, 10, "base")
    clock.now += 4
    job.update(4, 10, "base")
    assert (job.rate, job.left) == (0.5, 12.0)


def test_json_lines(clock: Clock) -> None:
    job, stream = TrackedJob("scoring", "window", clock=clock), io.StringIO()
    job.update(0, 10)
    clock.now += 2
    job.update(4, 10, "base")
    JsonLines(stream).draw(job)
    assert json.loads(stream.getvalue()) == {
        "task": "scoring",
        "done": 4,
        "total": 10,
        "unit": "windows",
        "detail": "base",
        "seconds": 2.0,
        "rate": 2.0,
        "left": 3.0,
    }


def test_a_log_gets_a_line_every_30_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    ticker = Ticker(Lines(stream), clock)
    ticker.jobs.append(job := TrackedJob("checking", "byte", clock=clock))
    progress = ticker.progress_of(job)
    for second in range(0, 100, 5):
        clock.now = 100.0 + second
        progress(second, 100)
    assert len(stream.getvalue().splitlines()) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1, "1 s"), (45, "45 s"), (61, "2 min"), (3600, "1 h 0 min"), (12_000, "3 h 20 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("workers", [1, 2])
def test_a_check_reports_all_its_bytes(workers: int) -> None:
    calls: list[tuple[int, int, str]] = []
    verifier.check(
        QWEN_NVFP4,
        base=QWEN,
        depth="payload",
        workers=workers,
        progress=lambda *call: calls.append(call),
    )
    total = verifier.open_checkpoint(QWEN_NVFP4).nbytes
    assert calls[0] == (0, total)
    assert calls[-1][:2] == (total, total)
    assert [done for done, *_ in calls] == sorted(done for done, *_ in calls)
    assert (total, total, "1 of 1 part") in calls


def test_a_header_check_reports_nothing() -> None:
    verifier.check(QWEN_NVFP4, progress=lambda *call: pytest.fail(str(call)))


def test_the_self_test_reports_its_checkpoints() -> None:
    calls: list[tuple[int, int, str]] = []
    selftest(["QC101"], checkpoints=["llama-nvfp4"], progress=lambda *call: calls.append(call))
    assert calls == [(0, 1, "llama-nvfp4")]


def test_json_lines_of_a_check_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check", str(QWEN_NVFP4), "--depth", "payload", "--format", "json"]
    assert run([*argv, "--progress", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] == "passed"
    last = json.loads(err.splitlines()[-1])
    assert (last["task"], last["unit"]) == ("checking", "bytes")
    assert last["done"] == last["total"] > 0


@pytest.mark.parametrize("option", [["--progress", "none"], ["--progress", "plain"], ["-q"], []])
def test_a_short_check_prints_no_progress(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", str(QWEN_NVFP4), *option]) == 0
    assert capsys.readouterr().err == ""


def test_options_before_the_command_count_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--progress", "json", "check", str(QWEN_NVFP4), "--depth", "payload"]) == 0
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["task"] == "checking"


def test_a_block_leaves_the_timer_as_it_was() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with progress_bar("outer") as outer, progress_bar("inner") as inner:
        outer(1, 2)
        inner(1, 2)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def _on_a_terminal(*argv: str) -> tuple[int, str]:
    """Run a command whose stderr is a terminal; return the exit code and what it drew."""
    reader, writer = pty.openpty()
    command = [sys.executable, "-m", "verifier", *argv]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    done = subprocess.Popen(command, stderr=writer, stdout=subprocess.DEVNULL, env=env)
    os.close(writer)
    drawn = b""
    try:
        while chunk := os.read(reader, 65536):
            drawn += chunk
    except OSError:  # Linux: the other end is closed
        pass
    finally:
        os.close(reader)
    return done.wait(timeout=60), drawn.decode(errors="replace")


def test_a_terminal_gets_a_bar_that_is_removed() -> None:
    code, drawn = _on_a_terminal("selftest", "--rule", "QC101")
    assert code == 0
    assert "verifying rules" in drawn
    assert "checkpoints" in drawn
    assert drawn.rstrip("\r\n").endswith(("\x1b[2K", "\x1b[?25h", "\x1b[1A\x1b[2K"))


def test_libraries_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    verifier.check(QWEN_NVFP4, base=QWEN, depth="payload", progress=lambda *_: None)
    verifier.diff(QWEN_NVFP4, QWEN, payload=True, progress=lambda *_: None)
    assert capfd.readouterr() == ("", "")
