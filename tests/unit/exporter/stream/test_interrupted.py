# SPDX-License-Identifier: Apache-2.0
"""Exports that were killed, interrupted, raced or ran out of disk: never a folder that looks
finished, and a true resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import exporter
from exporter.out import work_folder
from exporter.stream import tasks
from exporter.stream.write import RESULT, STATE
from verifier.cli import run
from verifier.errors import CkptgateError, MachineError, UsageError
from verifier.manifest import Manifest

NVFP4 = "nvfp4_experts_only"
SHARD = 2_000_000
KILL_AFTER = 150  # of 192 quantizations
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import exporter
from exporter.out import work_folder
from exporter.stream.write import STATE

source, out, shard, calls = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
seen = 0

def progress(_count):
    global seen
    seen += 1
    if seen == calls:
        for _ in range(2000):  # until the writer has noted a finished shard
            if json.loads((work_folder(out) / STATE).read_text())["shards"]:
                break
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

exporter.export(
    source, out, recipe="nvfp4_experts_only", input_scale="one",
    shard_bytes=shard, workers=1, progress=progress,
)
"""


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def export(source: Path, out: Path, **options: object) -> Manifest:
    given = {"recipe": NVFP4, "input_scale": "one", "shard_bytes": SHARD, "workers": 2} | options
    return exporter.export(source, out, **given)


@pytest.fixture(scope="module")
def whole(big: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export without disturbance."""
    out = tmp_path_factory.mktemp("whole") / "out"
    export(big, out)
    return out


@pytest.fixture(scope="module")
def killed_once(big: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kill an export in the middle and return the OUT that it did not make."""
    out = tmp_path_factory.mktemp("killed") / "out"
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(big), str(out), str(SHARD), str(KILL_AFTER)],
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    return out


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """Copy what the killed export left; return its OUT."""
    out = tmp_path / "out"
    shutil.copytree(work_folder(killed_once), work_folder(out))
    return out


def finished(out: Path) -> list[str]:
    return sorted(json.loads((work_folder(out) / STATE).read_text())["shards"])


@contextmanager
def begun(out: Path) -> Iterator[Callable[[], int]]:
    """Hold the shards of an unfinished export open, and yield a function that counts those that OUT
    has taken over: a shard that is written again is another file.
    """
    with ExitStack() as stack:
        shards = (work_folder(out) / RESULT).glob("model-*.safetensors")
        files = [stack.enter_context(path.open("rb")) for path in shards]
        before = {os.fstat(file.fileno()).st_ino for file in files}
        yield lambda: len(before & {p.stat().st_ino for p in out.glob("model-*.safetensors")})


def test_a_killed_export_does_not_look_finished(killed_once: Path) -> None:
    assert not killed_once.exists()
    assert [p.name for p in killed_once.parent.iterdir()] == [work_folder(killed_once).name]
    assert work_folder(killed_once).name.startswith(".")
    left = work_folder(killed_once) / RESULT
    assert not (left / "config.json").exists()
    assert not (left / "model.safetensors.index.json").exists()
    done = finished(killed_once)
    assert done
    shards = sorted(p.name for p in left.glob("*.safetensors"))
    assert set(done) <= set(shards)
    assert len(shards) < int(shards[0][-17:-12])
    assert list(left.glob("*.part"))


def test_a_killed_export_resumes_to_the_same_bytes(big: Path, whole: Path, killed: Path) -> None:
    count = len(finished(killed))
    with begun(killed) as taken_over:
        export(big, killed)
        assert taken_over() == count > 0
    assert digests(killed) == digests(whole)
    assert [p.name for p in killed.parent.iterdir()] == ["out"]


def test_a_resumed_export_counts_every_byte(big: Path, whole: Path, killed: Path) -> None:
    seen: list[int] = []
    manifest = export(big, killed, progress=seen.append)
    assert sum(seen) == manifest.bytes


@pytest.mark.parametrize("damage", ["flipped bit", "shorter", "longer", "removed"])
def test_a_finished_shard_that_was_damaged_is_redone(
    big: Path, whole: Path, killed: Path, damage: str, kit
) -> None:
    done = finished(killed)
    shard = work_folder(killed) / RESULT / done[-1]
    blob = bytearray(shard.read_bytes())
    if damage == "flipped bit":
        blob[-1] ^= 1
        shard.write_bytes(blob)
    elif damage == "removed":
        shard.unlink()
    else:
        shard.write_bytes(blob[:-7] if damage == "shorter" else blob + b"\0")
    with begun(killed) as taken_over:
        export(big, killed)
        assert taken_over() == len(done) - 1
    assert kit.read(killed) == kit.read(whole)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"plan": 1, "shards": []}'])
def test_a_damaged_note_of_what_was_done_starts_afresh(
    big: Path, whole: Path, killed: Path, text: str, kit
) -> None:
    (work_folder(killed) / STATE).write_text(text)
    with begun(killed) as taken_over:
        export(big, killed)
        assert taken_over() == 0
    assert kit.read(killed) == kit.read(whole)


def test_other_options_start_afresh(big: Path, killed: Path, kit, tmp_path: Path) -> None:
    maxima = {n.removesuffix(".weight"): 26.88 for n in kit.read(big) if ".experts." in n}
    stats = kit.stats(tmp_path / "stats.safetensors", maxima)
    with begun(killed) as taken_over:
        export(big, killed, input_scale="stats", stats=stats)
        assert taken_over() == 0
    scales = {r.array().item() for n, r in kit.read(killed).items() if n.endswith(".input_scale")}
    assert scales == {np.float32(np.float32(26.88) / 2688)}


def test_another_recipe_starts_afresh(big: Path, killed: Path, kit, tmp_path: Path) -> None:
    with begun(killed) as taken_over:
        manifest = export(big, killed, recipe="mxfp8_default", input_scale=None)
        assert taken_over() == 0
    assert manifest.formats == {"MXFP8": 392}
    assert {p.name for p in killed.iterdir()} == set(manifest.files) | {"ckptgate_manifest.json"}


def test_another_shard_size_leaves_no_shard_of_the_old_one(
    big: Path, whole: Path, killed: Path, kit
) -> None:
    manifest = export(big, killed, shard_bytes=5 * SHARD)
    assert {p.name for p in killed.iterdir()} == set(manifest.files) | {"ckptgate_manifest.json"}
    assert kit.read(killed) == kit.read(whole)
    assert manifest.bytes == sum(len(r.data) for r in kit.read(whole).values())


def test_another_shard_size_with_as_many_shards_keeps_every_tensor(
    big: Path, whole: Path, killed: Path, kit
) -> None:
    plan = exporter.plan_export(big, recipe=NVFP4, input_scale="one")
    usual = [[s.name for s in t.specs] for t in tasks(plan, SHARD)]
    sizes = [SHARD + i * 25_000 for i in range(-4, 5) if i]
    other = next(
        size
        for size in sizes
        if len(t := [[s.name for s in x.specs] for x in tasks(plan, size)]) == len(usual)
        and t[0] != usual[0]
    )
    export(big, killed, shard_bytes=other)
    assert kit.read(killed) == kit.read(whole)


def test_a_source_that_changed_since_starts_afresh(
    big: Path, killed: Path, kit, tmp_path: Path
) -> None:
    """The headers are the same; the bytes are those of another training step."""

    def change(tensors: dict) -> None:
        values = tensors["model.embed_tokens.weight"].array().copy()
        values[0, 0] = 1.0
        tensors["model.embed_tokens.weight"] = kit.raw(values)

    source = kit.edit(big, tmp_path / "new", change)
    assert kit.header(source / "model.safetensors") == kit.header(big / "model.safetensors")
    export(source, killed)
    assert (
        kit.read(killed)["model.embed_tokens.weight"]
        == kit.read(source)["model.embed_tokens.weight"]
    )


def rewrite(source: Path) -> None:
    """Rewrite a shard, as a training run that goes on would."""
    shard = source / "model.safetensors"
    copy = source / "copy"
    copy.write_bytes(shard.read_bytes())
    copy.rename(shard)


def truncate(source: Path) -> None:
    shard = source / "model.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)


def remove(source: Path) -> None:
    (source / "model.safetensors").unlink()


@pytest.mark.parametrize("change", [rewrite, truncate, remove])
def test_a_source_that_changes_during_the_export_is_named(
    big: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    source = shutil.copytree(big, tmp_path / "source")
    changed: list[None] = []

    def progress(_count: int) -> None:
        if not changed:
            changed.append(None)
            change(source)

    with pytest.raises(CkptgateError, match=r"model\.safetensors: "):
        export(source, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_an_overwritten_out_is_there_at_every_moment(
    big: Path, whole: Path, tmp_path: Path, kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(big, tmp_path / "out")
    rename = Path.rename

    def never_away(path: Path, target: Path) -> Path:
        assert path != out, "OUT is absent until the next rename"
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", never_away)
    export(big, out, overwrite=True)
    assert kit.read(out) == kit.read(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_manifest_does_not_depend_on_the_current_directory(
    big: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(big.parent)
    export(Path(big.name), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(whole)


# signals


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, kit) -> Path:
    """Write a source of 100 MB of holes: large enough for a signal to arrive while its one shard is
    written.
    """
    rows, width, count = 2048, 2048, 12
    folder = tmp_path_factory.mktemp("slow")
    kit.folder(folder / "source", {}, {"model_type": "qwen3_moe"})
    header: dict[str, object] = {}
    size = rows * width * 2
    for i in range(count):
        entry = {
            "dtype": "BF16",
            "shape": [rows, width],
            "data_offsets": [i * size, (i + 1) * size],
        }
        header[f"model.layers.0.mlp.experts.{i}.down_proj.weight"] = entry
    raw = json.dumps(header).encode()
    with (folder / "source" / "model.safetensors").open("wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        handle.truncate(8 + len(raw) + count * size)
    return folder / "source"


@dataclass(frozen=True)
class Stopped:
    """An export that a signal ended."""

    expected: int
    code: int
    stdout: str
    stderr: str
    out: Path


@pytest.fixture(
    scope="module", params=[(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def stopped(
    slow: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Stopped:
    """Send a signal to an export on the command line while it writes its shard."""
    number, code = request.param
    out = tmp_path_factory.mktemp("stopped") / "out"
    args = [
        sys.executable,
        "-m",
        "verifier",
        "export",
        str(slow),
        str(out),
        "--recipe",
        NVFP4,
        "--input-scale",
        "one",
    ]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            for _ in range(20_000):
                parts = list(work_folder(out).glob(f"{RESULT}/model-*.part"))
                if parts or process.poll() is not None:
                    break
                time.sleep(0.002)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # prints the stack of every thread
            pytest.fail(process.communicate()[1])
        finally:
            process.kill()
    return Stopped(code, process.returncode, stdout, stderr, out)


def test_a_signal_ends_an_export_with_its_exit_code(stopped: Stopped) -> None:
    assert stopped.code == stopped.expected, stopped.stderr
    assert stopped.stdout == ""
    assert "Traceback" not in stopped.stderr
    how = "interrupted" if stopped.expected == 130 else "terminated"
    kept = f"finished shards are kept in {work_folder(stopped.out)}; run the same command again"
    assert f"ckptgate: {how}; {kept} to resume\n" in stopped.stderr
    assert len([line for line in stopped.stderr.splitlines() if line]) <= 1, (
        "click writes a blank line after ^C"
    )
    assert not stopped.out.exists()
    assert [p.name for p in stopped.out.parent.iterdir()] == [work_folder(stopped.out).name]
    assert not list(work_folder(stopped.out).rglob("*.part"))


def test_what_a_stopped_export_finished_is_noted_for_the_next(stopped: Stopped) -> None:
    """A shard that was written to its end after the signal must not be thrown away: it may be 5
    GB.
    """
    shards = sorted(p.name for p in work_folder(stopped.out).rglob("*.safetensors"))
    assert shards == finished(stopped.out)


# two at once


def test_a_second_export_to_the_same_out_is_refused(
    big: Path, whole: Path, tmp_path: Path, kit
) -> None:
    begun, go = threading.Event(), threading.Event()
    results: list[Manifest] = []

    def progress(_count: int) -> None:
        begun.set()
        go.wait(60)

    first = threading.Thread(
        target=lambda: results.append(export(big, tmp_path / "out", progress=progress))
    )
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(UsageError, match="another export is writing it"):
            export(big, tmp_path / "out")
        with pytest.raises(UsageError, match="another export is writing it"):
            export(big, tmp_path / "out", recipe="mxfp8_default")
    finally:
        go.set()
        first.join(60)
    assert len(results) == 1
    assert kit.read(tmp_path / "out") == kit.read(whole)


def test_a_second_export_while_the_first_gets_its_final_name(
    kit, nvfp4, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Syncing 250 GB takes a while; an export that begins then must neither win nor empty the
    folder.
    """
    out, real, tried = tmp_path / "out", os.fsync, []

    def fsync(fd: int) -> None:
        if not tried and (work_folder(out) / RESULT / "ckptgate_manifest.json").exists():
            tried.append(fd)
            with pytest.raises(UsageError, match="another export is writing it"):
                exporter.export(kit.qwen, out, recipe=NVFP4, input_scale="one")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    exporter.export(kit.qwen, out, recipe=NVFP4, input_scale="one")
    assert tried
    assert kit.read(out) == kit.read(nvfp4.path)


# disk full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_exit_4_with_one_message(
    big: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "out"
    assert run(["export", str(big), str(out), "--recipe", NVFP4, "--input-scale", "one"]) == 4
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    assert "are to be written and 1.0 MB are free; free some space" in stderr
    assert not out.exists()
    assert not list(work_folder(out).rglob("*.part"))


def test_after_room_was_made_the_export_goes_through(
    big: Path, whole: Path, small_disk: Path, kit
) -> None:
    out = small_disk / "out"
    with pytest.raises(MachineError, match="are free; free some space"):
        export(big, out)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    export(big, out)
    assert kit.read(out) == kit.read(whole)


def test_a_disk_that_others_fill_meanwhile(big: Path, whole: Path, small_disk: Path, kit) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    out, other = small_disk / "out", small_disk / "other"

    def fill(_count: int) -> None:
        with other.open("ab") as handle, suppress(OSError):
            handle.write(bytes(64 << 20))

    with pytest.raises(MachineError, match=r"cannot write .*No space left on device; run the same"):
        export(big, out, progress=fill)
    assert not out.exists()
    other.unlink()
    export(big, out)
    assert kit.read(out) == kit.read(whole)


def test_a_missing_permission_is_exit_4(
    big: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    args = ["export", str(big), str(small_disk / "out"), "--recipe", NVFP4, "--input-scale", "one"]
    assert run(args) == 4
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "Read-only file system" in err
    assert str(small_disk) in err
