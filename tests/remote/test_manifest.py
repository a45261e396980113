# SPDX-License-Identifier: Apache-2.0
"""``ckptgate manifest verify``: published files against the manifest of an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import exporter
from tests.remote.conftest import BASE, Call, Server
from tests.remote.server import COMMIT
from verifier.manifest import MANIFEST

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def published(hub: Server, tmp_path: Path) -> Path:
    """Return an export as it is on the hub under ``org/export``; its manifest is kept aside."""
    folder = hub.root / "org" / "export"
    source = hub.root / "org" / BASE
    exporter.export(source, folder, recipe="nvfp4_experts_only", input_scale="one")
    shutil.copy(folder / MANIFEST, tmp_path / MANIFEST)
    return folder


def verify(call: Call, tmp_path: Path, uri: object, *more: str) -> tuple[int, dict[str, str]]:
    argv = ("manifest", "verify", uri, "--manifest", tmp_path / MANIFEST, "--format", "json")
    code, out, err = call(*argv, *more)
    assert err == ""
    return code, {f["name"]: f["status"] for f in json.loads(out)["files"]}


def test_weights_are_compared_without_a_download(
    hub: Server, published: Path, call: Call, tmp_path: Path
) -> None:
    code, files = verify(call, tmp_path, "org/export")
    assert code == 0
    assert set(files.values()) == {"equal"}
    assert SHARD in files
    assert not [r for r in hub.requests() if r["cdn"]]
    argv = ("manifest", "verify", "hf://org/export", "--manifest", tmp_path / MANIFEST)
    code, out, _ = call(*argv)
    assert code == 0
    assert f"{len(files)} files of hf://org/export at commit {COMMIT}: {len(files)} equal" in out


def test_what_differs_is_named(hub: Server, published: Path, call: Call, tmp_path: Path) -> None:
    shard = published / SHARD
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    (published / "config.json").write_text("{}")
    (published / "hf_quant_config.json").unlink()
    (published / "stray.safetensors").write_bytes(raw)
    for uri in ("org/export", published):
        code, files = verify(call, tmp_path, uri)
        assert code == 1
        assert {n: s for n, s in files.items() if s != "equal"} == {
            SHARD: "different",
            "config.json": "different",
            "hf_quant_config.json": "missing",
            "stray.safetensors": "extra",
        }


def test_a_server_without_digests(
    serve: Callable[..., Server],
    published: Path,
    call: Call,
    tmp_path: Path,
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setattr("verifier.published.SMALL", 100_000)
    server = serve(published, "--listing")
    code, files = verify(call, tmp_path, server.url)
    assert code == 3
    assert {n for n, s in files.items() if s == "size only"} == {SHARD}
    code, files = verify(call, tmp_path, server.url, "--read-all")
    assert code == 0
    assert set(files.values()) == {"equal"}


def test_what_is_no_manifest(hub: Server, call: Call, tmp_path: Path) -> None:
    for text, code, message in (
        (None, 2, "No such file or directory"),
        ("{}", 1, "not a ckptgate manifest"),
        ("[", 1, "not a ckptgate manifest"),
        (json.dumps({"kind": "export", "name": "x", "made_by": {}}), 1, "lists no file"),
    ):
        if text is not None:
            (tmp_path / MANIFEST).write_text(text)
        argv = ("manifest", "verify", f"org/{BASE}", "--manifest", tmp_path / MANIFEST)
        done = call(*argv)
        assert done[0] == code
        assert message in done[2]
