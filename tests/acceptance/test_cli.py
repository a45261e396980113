# SPDX-License-Identifier: Apache-2.0
"""The command line as a person and a CI job see it: exit codes, one message, valid JSON, cheap
help.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import fsspec
import jsonschema
import ml_dtypes
import numpy as np
import pytest

import verifier
from tests.paths import TESTS
from verifier.cli import run
from verifier.manifest import Manifest
from verifier.report import FORMATS, schema
from verifier.rules import all_rules

DATA = TESTS / "data" / "modelopt"
QWEN, QWEN_NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
LLAMA, LLAMA_MXFP8 = DATA / "src_llama", DATA / "llama_mxfp8"
COMMANDS = ("baseline", "check", "config", "explain", "export", "gate", "merge", "rules")
NVFP4 = ["--recipe", "nvfp4_experts_only", "--input-scale", "one"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def call(capsys: Capture) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command line and returns exit code, stdout and stderr."""

    def one(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(a) for a in argv])
        return (code, *capsys.readouterr())

    return one


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    """Copy a clean quantized checkpoint, to be damaged."""
    return Path(shutil.copytree(QWEN_NVFP4, tmp_path / "candidate"))


def python(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=False, timeout=120, **options
    )


def one_message(result: tuple[int, str, str], code: int, *words: str) -> None:
    """Hold that a command ended with one line on stderr and nothing on stdout."""
    assert result[0] == code
    assert result[1] == ""
    lines = result[2].splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ckptgate: ")
    assert "Traceback" not in result[2]
    for word in words:
        assert word in lines[0]


def finding(result: tuple[int, str, str], *words: str) -> None:
    """Hold that a check failed with a finding on stdout and nothing on stderr."""
    assert result[0] == 1
    assert result[2] == ""
    assert "verdict: FAILED" in result[1]
    assert "Traceback" not in result[1]
    for word in words:
        assert word in result[1]


def edit_header(shard: Path, change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    blob = shard.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    raw = json.dumps(change(json.loads(blob[8:start]))).encode()
    shard.write_bytes(len(raw).to_bytes(8, "little") + raw + blob[start:])


# exit 2: wrong before a header is read


@pytest.mark.parametrize(
    "command",
    [
        "check",
        "check --base",
        "check --merged-from",
        "export",
        "export --onto",
        "merge",
        "merge --onto",
    ],
)
def test_a_missing_path_is_named(call, tmp_path: Path, command: str) -> None:
    missing, out = tmp_path / "missing", tmp_path / "out"
    argv = {
        "check": ("check", missing),
        "check --base": ("check", QWEN_NVFP4, "--base", missing),
        "check --merged-from": ("check", QWEN_NVFP4, "--merged-from", missing),
        "export": ("export", missing, out, *NVFP4),
        "export --onto": ("export", QWEN, out, *NVFP4, "--onto", missing),
        "merge": ("merge", missing, out, "--onto", QWEN),
        "merge --onto": ("merge", QWEN_NVFP4, out, "--onto", missing),
    }[command]
    one_message(call(*argv), 2, str(missing), "no such directory")
    assert not list(tmp_path.iterdir())


def test_a_file_instead_of_a_folder(call, tmp_path: Path) -> None:
    file = QWEN_NVFP4 / "model.safetensors"
    one_message(call("check", file), 2, "a file; give the directory")
    one_message(call("check", QWEN_NVFP4, "--base", file), 2, "a file; give the directory")
    one_message(call("export", file, tmp_path / "out", *NVFP4), 2, "a file; give the directory")


def test_an_unknown_recipe(call, tmp_path: Path) -> None:
    one_message(
        call("export", QWEN, tmp_path / "out", "--recipe", "int3"),
        2,
        'unknown recipe "int3"',
        "nvfp4_experts_only",
    )
    assert not list(tmp_path.iterdir())


def test_an_unknown_rule(call) -> None:
    one_message(call("explain", "QC999"), 2, "QC999", "ckptgate rules")
    one_message(call("explain", ""), 2, "ckptgate rules")
    one_message(call("check", QWEN_NVFP4, "--require", "QC999"), 2, "QC999", "ckptgate rules")


@pytest.mark.parametrize(
    "line",
    [
        "check",
        "check . --depth abyss",
        "check . --format yaml",
        "check . --nosuch",
        "nosuch",
        "export a b",
        "merge a b",
        "export a b --recipe r --workers 0",
    ],
)
def test_a_wrong_call_is_exit_2(call, line: str) -> None:
    code, out, err = call(*line.split())
    assert (code, out) == (2, "")
    assert "Error: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("uri", ["memory://ckptgate/no/such", "nosuch://folder"])
def test_an_address_that_leads_nowhere(call, uri: str) -> None:
    one_message(call("check", uri), 2, uri)


def test_an_extra_that_is_not_installed_is_named(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    script = f"""
import sys
sys.modules["torch"] = None
from verifier.cli import run
for argv in (
    ["export", {str(QWEN)!r}, {out!r}, *{NVFP4}],
    ["export", {str(QWEN)!r}, {out!r}, *{NVFP4}, "--dry-run"],
    ["merge", {str(QWEN_NVFP4)!r}, {out!r}, "--onto", {str(QWEN)!r}],
    ["gate", {str(QWEN_NVFP4)!r}, "--base", {str(QWEN)!r}, "--corpus", "wikitext2-test"],
    ["check", {str(QWEN_NVFP4)!r}],
    ["export", "--help"],
):
    print("code", run(argv))
"""
    done = python("-c", script)
    assert re.findall(r"^code (\d)$", done.stdout, re.M) == ["2", "2", "2", "2", "0", "0"]
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert all("pip install 'ckptgate[export]'" in line for line in lines[:3])
    assert "pip install 'ckptgate[gate]'" in lines[3]


# exit 1: the contents


def test_an_empty_folder_and_one_without_safetensors(call, tmp_path: Path) -> None:
    one_message(call("check", tmp_path), 2, "the directory is empty")
    (tmp_path / "notes.txt").write_text("x")
    one_message(call("check", tmp_path), 2, "no *.safetensors among its 1 file (notes.txt)")
    one_message(call("check", QWEN_NVFP4, "--base", tmp_path), 2, "--base ", "no *.safetensors")
    one_message(call("export", tmp_path, tmp_path / "out", *NVFP4), 2, "no *.safetensors")


def test_a_truncated_shard(call, candidate: Path, tmp_path: Path) -> None:
    shard = candidate / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    for depth in ("header", "payload"):
        finding(
            call("check", candidate, "--depth", depth),
            "QC104",
            "model.safetensors",
            "ends 1,000 bytes early",
        )
    shard.write_bytes(shard.read_bytes()[:20])
    finding(call("check", candidate), "QC104", "ends inside its header")
    shard.write_bytes(b"")
    finding(call("check", candidate), "QC104", "0 bytes")
    one_message(call("export", candidate, tmp_path / "out", *NVFP4), 1, "model.safetensors")


def test_a_shard_of_zeros(call, candidate: Path) -> None:
    shard = candidate / "model.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    finding(call("check", candidate), "QC104", "zeros")


@pytest.mark.parametrize(
    "text",
    ["[1]", "3", "null", '"x"', "{", "", '{"a": NaN}', "[" * 99_999, '{"a": 1, "a": 2}', "\0"],
)
def test_a_config_that_is_no_object(call, candidate: Path, tmp_path: Path, text: str) -> None:
    (candidate / "config.json").write_text(text)
    finding(call("check", candidate), "config.json")
    finding(call("check", candidate, "--depth", "payload", "--base", QWEN), "config.json")
    one_message(call("export", candidate, tmp_path / "out", *NVFP4), 1, "config.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_that_is_not_utf_8(call, candidate: Path, encoding: str) -> None:
    """Neither transformers nor safetensors reads a byte order mark or another encoding."""
    config = candidate / "config.json"
    text = config.read_text()
    config.write_bytes(text.encode(encoding))
    finding(call("check", candidate), "config.json")
    config.write_text(text)
    shard = candidate / "model.safetensors"
    blob = shard.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    raw = blob[8:start].decode().encode(encoding)
    shard.write_bytes(len(raw).to_bytes(8, "little") + raw + blob[start:])
    finding(call("check", candidate), "QC104")


@pytest.mark.parametrize(
    "value",
    [
        [],
        "x",
        3,
        {"quant_algo": 4},
        {"quant_algo": "NVFP4", "ignore": "x"},
        {"quantized_layers": []},
    ],
)
def test_a_declaration_of_the_wrong_type(call, candidate: Path, value: object) -> None:
    config = json.loads((candidate / "config.json").read_text())
    (candidate / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
    code, out, err = call("check", candidate)
    assert (code, err) == (1, "")
    assert "QC4" in out


def test_a_base_of_another_model(call) -> None:
    for depth in ("header", "payload"):
        result = call("check", LLAMA_MXFP8, "--base", QWEN, "--depth", depth)
        finding(result, "error", "the base is a different model", "15 of 69 names")
        finding(call("check", QWEN_NVFP4, "--base", LLAMA, "--depth", depth), "error")


# exits 0 and 3


def test_a_clean_checkpoint(call) -> None:
    for argv in (
        (QWEN_NVFP4,),
        (LLAMA_MXFP8, "--base", LLAMA),
        (QWEN_NVFP4, "--base", QWEN, "--depth", "payload"),
    ):
        code, out, err = call("check", *argv)
        assert (code, err) == (0, "")
        depth = "payload" if "payload" in argv else "header"
        last = out.splitlines()[-1]
        assert re.fullmatch(rf"verdict: PASSED at depth {depth} \(\d+ rules; [^;]+\)", last)


def test_an_unquantized_checkpoint_is_unproven(call) -> None:
    for depth in ("header", "payload"):
        code, out, err = call("check", LLAMA, "--depth", depth)
        assert (code, err) == (3, "")
        assert "(0 errors, 0 warnings; no quantized tensor; " in out
        assert f"verdict: INCONCLUSIVE at depth {depth} (" in out


def test_a_required_rule_that_did_not_run_is_unproven(call) -> None:
    code, out, _ = call("check", QWEN_NVFP4, "--require", "QC605", "--depth", "payload")
    assert code == 3
    assert "QC605 is required and did not run: needs --base or --merged-from" in out
    code, out, _ = call("check", QWEN_NVFP4, "--require", "QC501")
    assert code == 3
    assert "QC501 is required and did not run: needs --depth payload" in out
    assert (
        call("check", QWEN_NVFP4, "--require", "QC605", "--depth", "payload", "--base", QWEN)[0]
        == 0
    )
    assert call("check", QWEN_NVFP4, "--depth", "payload")[0] == 0


def test_fail_on_warning(call, candidate: Path) -> None:
    shard = candidate / "model.safetensors"
    shard.write_bytes(shard.read_bytes() + b"\0" * 8)
    code, out, _ = call("check", candidate)
    assert code == 0
    assert "verdict: PASSED at depth header (0 errors, 1 warning; " in out
    code, out, _ = call("check", candidate, "--fail-on", "warning")
    assert code == 1
    assert "verdict: FAILED at depth header (0 errors, 1 warning; " in out
    assert call("check", QWEN_NVFP4, "--fail-on", "warning")[0] == 0


# JSON


def report_of(result: tuple[int, str, str], code: int, verdict: str) -> dict[str, object]:
    assert result[0] == code
    value = json.loads(result[1])
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(value, schema())
    assert value["verdict"] == verdict
    return value


def test_json_of_a_clean_an_unproven_and_a_failed_check(call, candidate: Path) -> None:
    clean = report_of(
        call("check", QWEN_NVFP4, "--base", QWEN, "--depth", "payload", "--format", "json"),
        0,
        "passed",
    )
    assert clean["findings"] == []
    assert {c["rule"] for c in clean["coverage"]} == set(all_rules())
    assert clean["stats"]["tensors"] == 213
    report_of(call("check", LLAMA, "--format", "json"), 3, "inconclusive")
    report_of(call("check", LLAMA_MXFP8, "--base", QWEN, "--format", "json"), 1, "failed")
    shard = candidate / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    cut = report_of(call("check", candidate, "--format", "json"), 1, "failed")
    assert "QC104" in {f["rule"] for f in cut["findings"]}


def test_a_wrong_kind_of_folder_writes_no_json(call, tmp_path: Path) -> None:
    """A consumer of the JSON reads stdout unless the exit code is 2."""
    one_message(call("check", tmp_path, "--format", "json"), 2, "the directory is empty")
    for option in ("--base", "--merged-from"):
        one_message(call("check", QWEN_NVFP4, option, tmp_path, "--format", "json"), 2, option)


def test_json_says_where(call, candidate: Path) -> None:
    name = "model.layers.1.mlp.experts.5.up_proj.weight_scale"
    shard = candidate / "model.safetensors"
    tensor = verifier.open_checkpoint(candidate).tensors[name]
    with shard.open("r+b") as handle:
        handle.seek(tensor.offset + 3 * tensor.shape[1] + 2)
        handle.write(b"\x7f")
    report = report_of(
        call("check", candidate, "--depth", "payload", "--format", "json"), 1, "failed"
    )
    found = next(f for f in report["findings"] if f["rule"] == "QC502")
    byte = tensor.offset + 3 * tensor.shape[1] + 2
    assert found["where"] == {
        "tensor": name,
        "file": "model.safetensors",
        "row": 3,
        "block": 2,
        "byte": byte,
    }
    text = call("check", candidate, "--depth", "payload")[1]
    assert f"{name} [row 3, block 2, byte {byte:,}, of model.safetensors]" in text


class _Failing(fsspec.AbstractFileSystem):
    """A folder whose files cannot be read."""

    protocol = "failing"
    cachable = False

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> list[dict[str, object]]:
        if "list" in path:
            raise OSError(5, "Input/output error")
        return [
            {"name": f"{path}/{n}", "size": 4096, "type": "file"}
            for n in ("config.json", "model.safetensors")
        ]

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: object
    ) -> bytes:
        if "timeout" in path:
            raise TimeoutError("timed out")
        if "client" in path:  # what httpx and botocore raise is no OSError
            raise RuntimeError("connection reset by peer")
        raise OSError(5, "Input/output error")


@pytest.fixture
def failing() -> None:
    fsspec.register_implementation("failing", _Failing, clobber=True)


@pytest.mark.parametrize("how", ["list", "read", "timeout", "client"])
def test_a_read_that_fails_is_exit_4(call, failing: None, how: str) -> None:
    report = report_of(call("check", f"failing://{how}", "--format", "json"), 4, "error")
    assert report["uri"] == f"failing://{how}"
    code, out, err = call("check", f"failing://{how}")
    assert code == 4
    assert "Traceback" not in out + err
    assert len(err.splitlines()) == 1
    report_of(
        call("check", QWEN_NVFP4, "--base", f"failing://{how}", "--format", "json"), 4, "error"
    )


# reports: where they go, and what is on stdout

DOCUMENTS = ("json", "sarif", "junit")


def parsed(text: str, format_: str) -> object:
    """Parse a whole text as one document; anything beside it is an error."""
    if format_ == "junit":
        return ElementTree.fromstring(text)  # noqa: S314  (our own output)
    return json.loads(text)


@pytest.mark.parametrize("format_", DOCUMENTS)
def test_stdout_is_one_document_for_every_exit_code(
    call, failing: None, tmp_path: Path, format_: str
) -> None:
    cases = [
        (0, (QWEN_NVFP4,)),
        (1, (LLAMA_MXFP8, "--base", QWEN)),
        (3, (LLAMA,)),
        (3, (QWEN_NVFP4, "--select", "QC501")),
        (4, ("failing://read",)),
        (4, ("failing://client",)),
        (4, (QWEN_NVFP4, "--base", "failing://list")),
    ]
    for wanted, argv in cases:
        code, out, err = call("check", *argv, "--format", format_)
        assert (code, err) == (wanted, ""), argv
        assert parsed(out, format_) is not None
        assert call("check", *argv)[0] == wanted
    code, out, err = call("check", tmp_path / "missing", "--format", format_)
    assert (code, out) == (2, "")


@pytest.mark.parametrize("format_", FORMATS)
def test_the_exit_code_does_not_depend_on_the_format(
    call, candidate: Path, tmp_path: Path, format_: str
) -> None:
    shard = candidate / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    for uri, wanted in ((QWEN_NVFP4, 0), (candidate, 1), (LLAMA, 3)):
        assert call("check", uri, "--format", format_)[0] == wanted
        assert call("check", uri, "--format", f"{format_}={tmp_path / 'out'}")[0] == wanted


def test_a_defect_of_the_tool_is_a_broken_document(call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 4 and one document even where something raises that nobody thought of."""
    monkeypatch.delenv("CKPTGATE_DEBUG", raising=False)
    errors = (
        (ZeroDivisionError("boom"), "internal error: ZeroDivisionError: boom"),
        (MemoryError(), "memory"),
        (OSError(5, "I/O"), "I/O"),
    )
    for error, words in errors:

        def raising(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("verifier.run.engine.open_checkpoint", raising)
        for format_ in DOCUMENTS:
            code, out, err = call("check", QWEN_NVFP4, "--format", format_)
            assert (code, err) == (4, "")
            assert words in out
            assert parsed(out, format_) is not None
        code, out, err = call("check", QWEN_NVFP4)
        assert (code, out) == (4, "")
        assert len(err.splitlines()) == 1
        assert words in err


def test_o_belongs_to_the_format_before_it(call, tmp_path: Path) -> None:
    sarif, junit, text = tmp_path / "a" / "out.sarif", tmp_path / "out.xml", tmp_path / "out.txt"
    code, out, err = call(
        "check",
        QWEN_NVFP4,
        "--format",
        "text",
        "-o",
        text,
        "--format",
        "json",
        "--format",
        "sarif",
        "-o",
        sarif,
        "--format",
        f"junit={junit}",
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["verdict"] == "passed"
    assert json.loads(sarif.read_text())["version"] == "2.1.0"
    assert ElementTree.parse(junit).getroot().tag == "testsuites"  # noqa: S314
    assert "\nverdict: PASSED at depth header (" in text.read_text()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "out.sarif", "out.txt", "out.xml"]
    code, out, _ = call("check", QWEN_NVFP4, "--format", "text", "--format", "sarif", "-o", sarif)
    assert out.startswith("checked 213 tensors")
    assert call("check", QWEN_NVFP4, "--format", "sarif", "-o", sarif)[1] == ""
    assert call("check", QWEN_NVFP4, "--format", "json", "-o", "-")[1].startswith("{")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("-o", "x"), "-o x: its ending says no format (.txt, .json,"),
        (("--format", "sarif=x", "-o", "y"), "-o y: its ending says no format"),
        (("--format", "text", "--format", "json"), "text and json both go to stdout"),
        (("--format", "json=x", "--format", "sarif=./x"), "both go to"),
        (("--format", "sarif", "-o", "."), "is a directory"),
    ],
)
def test_reports_that_cannot_be_placed(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call("check", QWEN_NVFP4, *argv)
    assert (code, out) == (2, "")
    assert words in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "beginning"),
    [
        ("x.json", "{"),
        ("x.SARIF", "{"),
        ("x.xml", "<?xml"),
        ("x.md", "## ckptgate"),
        ("x.html", "<!doctype html>"),
        ("x.txt", "checked 213 tensors"),
    ],
)
def test_a_file_alone_says_its_format(call, tmp_path: Path, file: str, beginning: str) -> None:
    assert call("check", QWEN_NVFP4, "-o", tmp_path / file) == (0, "", "")
    assert (tmp_path / file).read_text().startswith(beginning)


def test_a_line_per_finding(call) -> None:
    code, out, _ = call("check", LLAMA_MXFP8, "--base", QWEN, "--format", "concise")
    *findings, verdict = out.splitlines()
    assert code == 1
    assert findings[0].startswith(f"{LLAMA_MXFP8}: error QC201 the base is a different model")
    assert verdict.startswith(f"{LLAMA_MXFP8}: FAILED")


def test_statistics_count_findings_per_rule(call, candidate: Path) -> None:
    edit_header(
        candidate / "model.safetensors",
        lambda header: {k.replace("model.layers", "layers"): v for k, v in header.items()},
    )
    code, out, _ = call("check", candidate, "--statistics")
    assert code == 1
    counts = [line.split()[:3] for line in out.splitlines()[:-1]]
    assert ["66", "QC201", "error"] in counts
    assert out.splitlines()[-1].startswith("verdict: FAILED")
    one_message(call("check", candidate, "--statistics", "--format", "json"), 2, "--statistics")


def test_several_checkpoints_end_with_the_most_severe_code(call, tmp_path: Path) -> None:
    code, out, err = call("check", QWEN_NVFP4, LLAMA, LLAMA_MXFP8, "--format", "concise")
    assert (code, err) == (3, "")
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        str(QWEN_NVFP4),
        str(LLAMA),
        str(LLAMA_MXFP8),
    ]
    json_of_each = ("--format", f"json={tmp_path}/{{name}}.json")
    assert call("check", QWEN_NVFP4, LLAMA, *json_of_each)[0] == 3
    assert json.loads((tmp_path / f"{LLAMA.name}.json").read_text())["verdict"] == "inconclusive"
    both = ("check", QWEN_NVFP4, LLAMA)
    one_message(call(*both, "--format", "json"), 2, "one document for one checkpoint")
    one_message(call(*both, "-o", tmp_path / "x.json"), 2, "{name}")
    one_message(call(*both, "--golden", tmp_path / "x.golden.json"), 2, "--golden")


def test_exit_zero_hides_findings_only(call, tmp_path: Path, failing: None) -> None:
    assert call("check", LLAMA, "--exit-zero")[0] == 0
    assert call("check", LLAMA_MXFP8, "--base", QWEN, "--exit-zero")[0] == 0
    assert call("check", tmp_path, "--exit-zero")[0] == 2
    assert call("check", "failing://read", "--exit-zero")[0] == 4


@pytest.mark.parametrize("text", ["yaml", "sarif=", "=x", ""])
def test_a_format_that_is_none(call, text: str) -> None:
    code, out, err = call("check", QWEN_NVFP4, "--format", text)
    assert (code, out) == (2, "")
    assert "Error: " in err


def test_a_report_replaces_a_file_whole_or_not_at_all(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link = tmp_path / "out.json", tmp_path / "link.json"
    file.write_text("before")
    file.chmod(0o640)
    link.symlink_to(file)
    monkeypatch.setattr("os.fsync", _full)
    for argv in (("--format", f"json={file}"), ("--format", f"json={file}", "--format", "text")):
        code, out, err = call("check", QWEN_NVFP4, *argv)
        assert (code, out) == (4, "")
        assert "No space left" in err
    code, out, err = call("check", QWEN_NVFP4, "--format", f"json={file}", "--format", "sarif")
    assert (code, err) == (4, "")
    assert json.loads(out)["runs"][0]["invocations"][0]["exitCode"] == 4
    assert file.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "out.json"]
    monkeypatch.undo()
    assert call("check", QWEN_NVFP4, "--format", f"json={link}")[0] == 0
    assert json.loads(file.read_text())["verdict"] == "passed"
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640


def _full(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_what_is_no_file_is_written_to_and_stays(call, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        assert call("check", LLAMA, "--format", f"github={pipe}") == (3, "", "")
        assert pipe.is_fifo()
        assert os.read(reader, 65536).startswith(b"::error title=ckptgate")
    finally:
        os.close(reader)


def test_github_appends_to_the_step_summary(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("# before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code, out, _ = call("check", LLAMA, "--format", "github")
    assert code == 3
    assert out.startswith("::error title=ckptgate%3A inconclusive::no quantized tensor\n")
    assert summary.read_text().startswith("# before\n## ckptgate: inconclusive\n")
    before = summary.read_text()
    call("check", LLAMA, "--format", "text")
    assert summary.read_text() == before
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    code, out, _ = call("check", LLAMA, "--format", "github")
    assert code == 4
    assert "GITHUB_STEP_SUMMARY" in out


def test_a_missing_package_is_said_before_the_check(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, format_ in (("junitparser", "junit"), ("jinja2", "html")):
        monkeypatch.setitem(sys.modules, module, None)
        one_message(
            call("check", "failing://read", "--format", f"{format_}={tmp_path / 'x'}"),
            2,
            "ckptgate[report]",
        )
    assert not list(tmp_path.iterdir())


def on_a_terminal(*argv: str, **env: str) -> str:
    """Run a command with a terminal as its stdout and return what the terminal got."""
    master, slave = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-m", "verifier", *argv],
            stdout=slave,
            stderr=subprocess.PIPE,
            check=False,
            timeout=120,
            env={k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
            | {"TERM": "xterm"}
            | env,
        )
        os.close(slave)
        found = b""
        with suppress(OSError):  # the end of a terminal whose other side is closed
            while part := os.read(master, 65536):
                found += part
    finally:
        os.close(master)
    return found.decode().replace("\r\n", "\n")


def test_colour_is_for_terminals_that_want_it() -> None:
    argv = ("check", str(QWEN_NVFP4))
    colored = on_a_terminal(*argv)
    assert "\x1b[1;32mPASSED" in colored
    plain = on_a_terminal(*argv, NO_COLOR="1")
    assert plain == re.sub(r"\x1b\[[\d;]*m", "", colored)
    assert "\x1b" not in on_a_terminal(*argv, TERM="dumb")
    assert "\x1b" in on_a_terminal(*argv, NO_COLOR="")
    assert "\x1b" not in on_a_terminal(*argv, "--format", "json")
    assert python("-m", "verifier", *argv).stdout == plain


# rules, explain, help


def test_rules(call) -> None:
    code, out, err = call("rules")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(all_rules())
    assert any("(needs --base or --merged-from)" in line for line in lines)
    code, out, _ = call("rules", "--format", "json")
    assert code == 0
    rows = json.loads(out)
    assert [r["id"] for r in rows] == sorted(all_rules())
    assert all(r["doc"] and r["title"] and r["consumers"] and r["sources"] for r in rows)
    assert {r["severity"] for r in rows} <= {"error", "warning", "info"}


def test_explain_prints_the_docstring(call) -> None:
    code, out, err = call("explain", "QC501")
    assert (code, err) == (0, "")
    assert "No block scale, global scale, tensor scale, KV scale or" in out
    assert "Clamp the scale to 2^-9 before the cast" in out
    assert call("explain", "qc501")[1] == out
    for rule in all_rules().values():
        words = re.sub(r"`+|\*\*(\w[\w ]*)\.\*\*", r"\1", rule.doc).split()
        printed = call("explain", rule.id)[1].replace("`", "").split()
        assert [w for w in words if w not in printed] == []


def test_every_command_is_listed_and_has_help(call) -> None:
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^  {command}  +\S", out, re.M)
        code, text, err = call(command, "--help")
        assert (code, err) == (0, "")
        assert text.startswith(f"Usage: ckptgate {command}")
    assert call("--version")[:2] == (0, f"ckptgate, version {verifier.__version__}\n")


@pytest.mark.parametrize("argv", [(), *((c,) for c in COMMANDS)], ids=["root", *COMMANDS])
def test_help_imports_no_torch_and_of_check_no_numpy(argv: tuple[str, ...]) -> None:
    done = python("-X", "importtime", "-m", "verifier", *argv, "--help")
    assert done.returncode == 0
    assert "Usage: ckptgate" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "verifier.cli.main" in imported
    assert not {"torch", "transformers"} & imported
    assert argv not in ((), ("check",)) or "numpy" not in imported


def test_a_header_check_imports_no_torch() -> None:
    done = python(
        "-X", "importtime", "-m", "verifier", "check", str(QWEN_NVFP4), "--base", str(QWEN)
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not {"torch", "transformers", "exporter", "fsspec"} & imported


def test_the_process_ends_with_the_exit_code(tmp_path: Path) -> None:
    for uri, code in ((QWEN_NVFP4, 0), (tmp_path, 2), (tmp_path / "no", 2), (LLAMA, 3)):
        assert python("-m", "verifier", "check", str(uri)).returncode == code


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["rules"], 0),
        (["check", str(QWEN_NVFP4)], 0),
        (["check", str(LLAMA_MXFP8), "--base", str(QWEN)], 1),
    ],
)
def test_a_reader_that_closes_the_pipe_changes_no_verdict(argv: list[str], code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "verifier", *argv],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (code, "")


# hostile names


HOSTILE = "model.\x1b[31mred\x1b]0;title\x07\r\n\x9b2J\u202egpj.\ud800.weight"


def clean(text: str) -> bool:
    return all(c == "\n" or c.isprintable() for c in text)


def test_hostile_tensor_names_are_escaped(call, candidate: Path, tmp_path: Path) -> None:
    def add(header: dict[str, object]) -> dict[str, object]:
        end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        header[HOSTILE] = {"dtype": "F32", "shape": [0, 4], "data_offsets": [end, end]}
        return header

    edit_header(candidate / "model.safetensors", add)
    for depth in ("header", "payload"):
        code, out, err = call("check", candidate, "--depth", depth)
        assert (code, err) == (1, "")
        assert clean(out)
        assert "\\x1b[31mred" in out
    report = report_of(call("check", candidate, "--format", "json"), 1, "failed")
    assert HOSTILE in {f["where"]["tensor"] for f in report["findings"]}
    result = call("export", candidate, tmp_path / "out", *NVFP4)
    one_message(result, 1)
    assert clean(result[2])


def test_hostile_file_names_and_configs_are_escaped(call, candidate: Path) -> None:
    (candidate / "model.safetensors").rename(candidate / "model\x1b[2J\x07.safetensors")
    (candidate / "model.safetensors.index.json").write_text(
        json.dumps(
            {
                "weight_map": {"a\x1b[31m": "b\x1b[31m.safetensors"},
                "metadata": {"total_size": "\x1b[31m"},
            }
        )
    )
    config = json.loads((candidate / "config.json").read_text())
    config["model_type"] = "\x1b[31m"
    config["quantization_config"] |= {
        "quant_algo": "NVFP4\x1b[31m",
        "ignore": ["\x1b[31m*"],
        "quant_method": "\x1b[31m",
    }
    (candidate / "config.json").write_text(json.dumps(config))
    code, out, err = call("check", candidate, "--depth", "payload")
    assert (code, err) == (1, "")
    assert clean(out)
    assert "\\x1b" in out


def test_a_surrogate_in_a_name_does_not_reach_the_exporter(call, tmp_path: Path) -> None:
    source = Path(shutil.copytree(QWEN, tmp_path / "source"))
    edit_header(
        source / "model.safetensors",
        lambda h: {n.replace("model.norm.", "model.norm\ud800."): e for n, e in h.items()},
    )
    one_message(call("export", source, tmp_path / "out", *NVFP4), 1, "\\xd800")
    assert not (tmp_path / "out").exists()


def test_output_in_an_encoding_that_lacks_a_character(candidate: Path) -> None:
    name = "model.n\u00f6rm\u2026."
    edit_header(
        candidate / "model.safetensors",
        lambda h: {n.replace("model.norm.", name): e for n, e in h.items()},
    )
    done = python(
        "-m", "verifier", "check", str(candidate), env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "verdict: FAILED" in done.stdout


# export


def test_a_dry_run_writes_nothing(call, tmp_path: Path) -> None:
    code, out, err = call("export", QWEN, tmp_path / "out", *NVFP4, "--dry-run")
    assert (code, err) == (0, "")
    assert not list(tmp_path.iterdir())
    assert "quantize  48 linear layers (32 after fusing) to NVFP4 in 2 layers" in out
    assert f"result    213 tensors, {verifier.open_checkpoint(QWEN_NVFP4).nbytes:,} bytes" in out
    assert "nothing was written (dry run)" in out
    code, out, _ = call("export", LLAMA, tmp_path / "out", "--recipe", "mxfp8_default", "--dry-run")
    assert code == 0
    assert "quantize  14 linear layers (8 after fusing) to MXFP8 in 2 layers" in out


def test_an_export_ends_with_a_check(call, tmp_path: Path) -> None:
    code, out, err = call("export", QWEN, tmp_path / "out", *NVFP4)
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {tmp_path / 'out'}: 213 tensors")
    assert "48 modules (48 quantized now, 0 kept)" in out
    assert "\nverdict: PASSED at depth payload (" in out
    again = call("check", tmp_path / "out", "--base", QWEN, "--depth", "payload")
    assert again[0] == 0
    assert out.endswith(again[1])
    one_message(call("export", QWEN, tmp_path / "out", *NVFP4), 2, "exists", "--overwrite")
    assert call("export", QWEN, tmp_path / "out", *NVFP4, "--overwrite")[0] == 0


def nan_in_a_norm(folder: Path) -> Path:
    tensor = verifier.open_checkpoint(folder).tensors["model.norm.weight"]
    with (folder / tensor.file).open("r+b") as handle:
        handle.seek(tensor.offset)
        handle.write(np.array(np.nan, ml_dtypes.bfloat16).tobytes())
    return folder


def test_an_export_that_fails_its_check_returns_the_checks_exit_code(call, tmp_path: Path) -> None:
    source = nan_in_a_norm(Path(shutil.copytree(QWEN, tmp_path / "source")))
    code, out, err = call(
        "export", source, tmp_path / "out", *NVFP4, "--json-report", tmp_path / "report.json"
    )
    assert (code, err) == (1, "")
    assert "QC508" in out
    assert "verdict: FAILED" in out
    assert (tmp_path / "out" / "config.json").is_file()
    check = json.loads((tmp_path / "report.json").read_text())["check"]
    assert check["verdict"] == "failed"


def test_the_report_is_written_into_a_folder_that_is_made(call, tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "report.json"
    assert call("export", QWEN, tmp_path / "out", *NVFP4, "--json-report", file)[0] == 0
    value = json.loads(file.read_text())
    assert set(value) == {"manifest", "check"}
    jsonschema.validate(value["check"], schema())
    assert value["check"]["verdict"] == "passed"
    written = Manifest.model_validate_json(
        (tmp_path / "out" / "ckptgate_manifest.json").read_text()
    )
    assert Manifest.model_validate(value["manifest"]) == written
    merged = tmp_path / "c" / "merge.json"
    assert (
        call("merge", QWEN_NVFP4, tmp_path / "merged", "--onto", QWEN, "--json-report", merged)[0]
        == 0
    )
    assert json.loads(merged.read_text())["manifest"]["kind"] == "merge"


@pytest.mark.parametrize("place", ["below a file", "a folder"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    call, tmp_path: Path, place: str
) -> None:
    """A report path that cannot be is wrong before a header is read; the export must not have run
    for hours by then.
    """
    (tmp_path / "file").write_text("x")
    report = tmp_path / "file" / "report.json" if place == "below a file" else tmp_path
    code, _, err = call("export", QWEN, tmp_path / "out", *NVFP4, "--json-report", report)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_exporter_is_one_message(call, tmp_path: Path) -> None:
    one_message(
        call("export", LLAMA, tmp_path / "out", *NVFP4),
        1,
        "nothing matches routed_expert",
        "nearest names",
    )
    one_message(call("export", QWEN_NVFP4, tmp_path / "out", *NVFP4), 1, "are nvfp4 already")
    one_message(
        call("export", QWEN, tmp_path / "out", *NVFP4, "--layers", "5"), 1, "hold no routed experts"
    )
    one_message(call("export", QWEN, tmp_path / "out", *NVFP4, "--layers", "x"), 2, "not a layer")
    one_message(
        call("export", QWEN, tmp_path / "out", *NVFP4, "--stats", tmp_path / "no"), 2, "contradict"
    )
    assert not list(tmp_path.iterdir())


def test_a_nan_in_a_weight_is_exit_1_and_leaves_no_out(call, tmp_path: Path) -> None:
    source = Path(shutil.copytree(QWEN, tmp_path / "source"))
    tensor = verifier.open_checkpoint(source).tensors[
        "model.layers.0.mlp.experts.2.down_proj.weight"
    ]
    with (source / tensor.file).open("r+b") as handle:
        handle.seek(tensor.offset + 2 * (5 * tensor.shape[1] + 9))
        handle.write(np.array(np.nan, ml_dtypes.bfloat16).tobytes())
    one_message(
        call("export", source, tmp_path / "out", *NVFP4), 1, tensor.name, "NaN at index [5, 9]"
    )
    assert not (tmp_path / "out").exists()


# fsspec


@pytest.fixture
def memory() -> Iterator[Callable[[Path], str]]:
    """Return a function that copies a folder into memory and returns its address."""
    system = fsspec.filesystem("memory")

    def put(folder: Path) -> str:
        system.put(f"{folder}/", f"/ckptgate-tests/{folder.name}/", recursive=True)
        return f"memory://ckptgate-tests/{folder.name}"

    yield put
    if system.exists("/ckptgate-tests"):
        system.rm("/ckptgate-tests", recursive=True)


def test_a_checkpoint_behind_an_address(call, memory: Callable[[Path], str]) -> None:
    candidate, base = memory(QWEN_NVFP4), memory(QWEN)
    for depth in ("header", "payload"):
        remote = verifier.check(candidate, base=base, depth=depth)
        local = verifier.check(QWEN_NVFP4, base=QWEN, depth=depth)
        assert (remote.verdict, remote.findings, remote.coverage) == (
            local.verdict,
            (),
            local.coverage,
        )
    assert remote.uri == candidate
    code, out, err = call("check", candidate, "--base", QWEN, "--depth", "payload")
    assert (code, err) == (0, "")
    assert "213 tensors" in out


def test_a_broken_checkpoint_behind_an_address(
    call, memory: Callable[[Path], str], candidate: Path
) -> None:
    shard = candidate / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    finding(call("check", memory(candidate)), "QC104", "ends 1,000 bytes early")
