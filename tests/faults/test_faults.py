# SPDX-License-Identifier: Apache-2.0
"""A machine that fails: one message, the documented exit code, and the same command again ends
well.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import exporter
import verifier
from exporter.cli.output import UNCHECKED
from exporter.out import work_folder
from exporter.stream.write import RESULT
from tests.faults.conditions import RECIPE, SOURCE, Conditions, write_large
from tests.kill.run import files_of
from verifier.cli import run
from verifier.errors import MachineError

TORCH = pytest.mark.skipif(
    not os.environ.get("CKPTGATE_FAULTS"), reason="several seconds each: tox -e faults"
)
NORMAL = Conditions()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile what makes reads fail."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("library") / "unreadable.so"
    source = Path(__file__).with_name("unreadable.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export on a sound machine, without a check."""
    out = tmp_path_factory.mktemp("whole") / "out"
    exporter.export(SOURCE, out, recipe=RECIPE[1], input_scale="one", notes=UNCHECKED)
    return out


def unreadable(library: Path, path: str, first: int = 0) -> Conditions:
    """Return conditions under which files whose path contains ``path`` cannot be read from a byte
    on.
    """
    names = {"UNREADABLE": path, "UNREADABLE_FROM": str(first)}
    return Conditions(environment={"LD_PRELOAD": str(library), **names})


def one_message(stderr: str) -> str:
    (line,) = stderr.splitlines()
    assert line.startswith("ckptgate: ")
    assert "Traceback" not in line
    assert "internal error" not in line
    return line


def resumes(out: Path, whole: Path) -> bool:
    """Whether the same export ends with the files of an undisturbed one, and nothing is left."""
    assert NORMAL.export(out) == (0, "")
    return files_of(out) == files_of(whole) and [*out.parent.iterdir()] == [out]


# reads that fail


@pytest.mark.parametrize("file", ["model-00001-of-00001.safetensors", "config.json"])
def test_a_checkpoint_that_cannot_be_read(
    library: Path, whole: Path, tmp_path: Path, file: str
) -> None:
    checkpoint = shutil.copytree(whole, tmp_path / "unsound")
    conditions = unreadable(library, f"unsound/{file}")
    code, stderr = conditions.run("check", str(checkpoint), "--depth", "payload")
    assert code == 4
    assert f"cannot read {checkpoint / file}: Input/output error" in one_message(stderr)
    code, _ = NORMAL.run("check", str(checkpoint), "--depth", "payload")
    assert code == 0


@TORCH
@pytest.mark.parametrize("first", [0, 2_000_000])
def test_a_source_that_cannot_be_read(
    library: Path, whole: Path, tmp_path: Path, first: int
) -> None:
    source = shutil.copytree(SOURCE, tmp_path / "in" / "unsound")
    (tmp_path / "to").mkdir()
    out = tmp_path / "to" / "out"
    file = "model-00002-of-00002.safetensors"
    code, stderr = unreadable(library, f"unsound/{file}", first).export(out, source)
    assert code == 4
    assert f"cannot read {source / file}: Input/output error" in one_message(stderr)
    assert not out.exists()
    shutil.rmtree(source)
    assert resumes(out, whole)


def test_a_finished_shard_that_cannot_be_read_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, failed = os.preadv, []

    def unreadable_once(fd: int, buffers: Sequence[Any], offset: int) -> int:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if not failed and path.parent.name == RESULT and path.suffix == ".safetensors":
            failed.append(path.name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    def export(out: Path, **options: Any) -> None:
        exporter.export(
            SOURCE, out, recipe=RECIPE[1], input_scale="one", shard_bytes=200_000, **options
        )

    def stop(_nbytes: int) -> None:
        if list(work_folder(tmp_path / "out").glob("checkpoint/model-*.safetensors")):
            raise OSError(errno.EIO, "stopped")

    with pytest.raises(MachineError, match="stopped"):
        export(tmp_path / "out", progress=stop, workers=1)
    monkeypatch.setattr(os, "preadv", unreadable_once)
    export(tmp_path / "out")
    assert failed
    (tmp_path / "whole").mkdir()
    export(tmp_path / "whole" / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole" / "out")


# limits


@TORCH
@pytest.mark.parametrize("nbytes", [30_000, 1_000_000])
def test_a_quota(whole: Path, tmp_path: Path, nbytes: int) -> None:
    """A file that may not grow is what a full quota is, on every file system."""
    out = tmp_path / "out"
    code, stderr = Conditions(limits={resource.RLIMIT_FSIZE: nbytes}).export(out)
    assert code == 4
    message = one_message(stderr)
    assert "cannot write" in message
    assert "File too large; run the same command again" in message
    assert not out.exists()
    assert resumes(out, whole)


@TORCH
@pytest.mark.parametrize("files", [8, 12, 16])
def test_few_descriptors(whole: Path, tmp_path: Path, files: int) -> None:
    out = tmp_path / "out"
    code, stderr = Conditions(limits={resource.RLIMIT_NOFILE: files}).export(out)
    assert code == 4
    assert "Too many open files" in one_message(stderr)
    assert not out.exists()
    assert resumes(out, whole)


@TORCH
def test_memory_for_torch_only(whole: Path, tmp_path: Path) -> None:
    """900 MB of addresses are too few for numba, and enough without it."""
    out = tmp_path / "out"
    assert Conditions(limits={resource.RLIMIT_AS: 900_000 << 10}).export(out) == (0, "")
    assert files_of(out) == files_of(whole)


@TORCH
def test_too_little_memory(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stderr = Conditions(limits={resource.RLIMIT_AS: 300_000 << 10}).export(out)
    assert code == 4
    assert "out of memory" in one_message(stderr)
    assert resumes(out, whole)


# signals


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large(tmp_path_factory.mktemp("large"))


def wait_for_a_shard(process: subprocess.Popen[str], out: Path) -> None:
    """Wait until an export writes its shard."""
    deadline = time.monotonic() + 120
    while not list(work_folder(out).glob("checkpoint/*.part")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


@TORCH
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGINT] * 2, 130),
        ([signal.SIGINT] * 5, 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGTERM] * 2, 143),
    ],
    ids=lambda value: "" if isinstance(value, int) else f"{len(value)} {value[0].name}",
)
def test_signals(large: Path, tmp_path: Path, signals: list[signal.Signals], code: int) -> None:
    out = tmp_path / "out"
    process = NORMAL.start(["export", str(large), str(out), *RECIPE, "--progress", "none"])
    wait_for_a_shard(process, out)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert not out.exists()
    if len(signals) == 1:
        assert "run the same command again to resume" in stderr


def test_an_interrupted_check_of_an_export_says_that_out_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verifier, "check", interrupted)
    out = tmp_path / "out"
    assert run(["export", str(SOURCE), str(out), *RECIPE, "-q"]) == 130
    expected = f"ckptgate: interrupted; {out} is complete, but its check was not finished\n"
    assert capsys.readouterr().err.lstrip("\n") == expected
    assert out.is_dir()


def test_a_check_of_an_export_shows_its_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(SOURCE), str(tmp_path / "out"), *RECIPE, "--progress", "json"]
    assert run(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["task"] for line in lines} >= {"writing", "checking"}


# two at once, and what must not change bytes


@TORCH
def test_two_commands_into_one_out(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = NORMAL.start(["export", str(large), str(out), *RECIPE, "--no-check", "-q"])
    try:
        wait_for_a_shard(first, out)
        first.send_signal(signal.SIGSTOP)
        code, stderr = NORMAL.export(out, large)
        assert code == 2
        assert f"{out}: another export is writing it" in one_message(stderr)
    finally:
        first.send_signal(signal.SIGCONT)
        _, stderr = first.communicate(timeout=300)
    assert (first.returncode, stderr) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    written = []
    for workers in range(1, 9):
        out = tmp_path / str(workers) / "out"
        out.parent.mkdir()
        exporter.export(
            SOURCE, out, recipe=RECIPE[1], input_scale="one", workers=workers, shard_bytes=200_000
        )
        written.append(files_of(out))
    assert all(files == written[0] for files in written)


@TORCH
@pytest.mark.parametrize(
    "conditions",
    [
        Conditions(environment={"PYTHONHASHSEED": "1"}, umask=0o077),
        Conditions(environment={"PYTHONHASHSEED": "2", "LC_ALL": "C"}, folder=Path("/")),
        Conditions(environment={"LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo"}, umask=0),
        Conditions(environment={"CKPTGATE_FAST": "0", "OMP_NUM_THREADS": "3"}),
    ],
    ids=["seed and umask", "C locale and directory", "time zone", "torch"],
)
def test_the_same_bytes_under_any_conditions(
    conditions: Conditions, whole: Path, tmp_path: Path
) -> None:
    assert conditions.export(tmp_path / "out") == (0, "")
    assert files_of(tmp_path / "out") == files_of(whole)
