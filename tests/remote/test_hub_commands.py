# SPDX-License-Identifier: Apache-2.0
"""Every command that takes a checkpoint, on a hub-shaped server: the result is that of the same
files on this machine.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.remote.conftest import BASE, CANDIDATE, Call, Server
from tests.remote.server import COMMIT
from verifier.checkpoint.address import parse_address
from verifier.checkpoint.hub import HubSource

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
EXPERT = "model.layers.0.mlp.experts.0.gate_proj.weight"
EXPORT = ("export", BASE, "out", "--recipe", "nvfp4_experts_only")
Command = Callable[..., subprocess.CompletedProcess]


def local(server: Server, name: str) -> Path:
    return server.root / "org" / name


def same(text: str, server: Server) -> str:
    """Return an output with both spellings of each address replaced by its name."""
    for name in sorted((p.name for p in (server.root / "org").iterdir()), key=len, reverse=True):
        for spelling in (f"hf://org/{name}", str(local(server, name)), f"org/{name}"):
            text = text.replace(spelling, f"<{name}>")
    return "\n".join(line for line in text.splitlines() if not line.startswith("remote: "))


@pytest.fixture
def golden(hub: Server) -> Server:
    """Return the server with the tiny MiniMax-M3: BF16, MXFP8 and a corpus."""
    for name in ("bf16", "mxfp8"):
        shutil.copytree(GOLDEN / name, hub.root / "org" / name)
    return hub


@pytest.mark.parametrize(
    "argv",
    [
        ("check", CANDIDATE),
        ("check", CANDIDATE, "--depth", "payload", "--base", BASE),
        ("check", CANDIDATE, "--depth", "payload", "--merged-from", BASE),
        ("check", CANDIDATE, "--depth", "load", "--base", BASE),
        ("diff", BASE, CANDIDATE),
        ("diff", CANDIDATE, CANDIDATE, "--depth", "payload"),
        ("stats", CANDIDATE, "--depth", "payload"),
        ("show", CANDIDATE, EXPERT, "--row", "3", "--base", BASE),
        ("detect", BASE),
        (*EXPORT, "--input-scale", "one", "--dry-run"),
    ],
    ids=lambda argv: " ".join(argv),
)
def test_a_command_reads_the_hub_as_it_reads_a_directory(
    hub: Server, call: Call, argv: tuple[str, ...]
) -> None:
    names = (CANDIDATE, BASE)
    near = call(*[local(hub, a) if a in names else a for a in argv])
    far = call(*[f"hf://org/{a}" if a in names else a for a in argv])
    bare = call(*[f"org/{a}" if a in names else a for a in argv])
    assert near[0] in (0, 1)
    assert [(c, same(o, hub), same(e, hub)) for c, o, e in (far, bare)] == [
        (near[0], same(near[1], hub), same(near[2], hub))
    ] * 2


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file; the manifest names the source's address and comes apart."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if "manifest" not in p.name}


def sources(folder: Path) -> list[str]:
    manifest = json.loads((folder / "ckptgate_manifest.json").read_text())
    return [s["uri"] for s in manifest["sources"]]


def test_export_merge_and_repair_write_the_same_bytes(
    golden: Server, call: Call, tmp_path: Path
) -> None:
    recipe = ("--recipe", "nvfp4_experts_only")
    for kind, at in (("near", lambda n: local(golden, n)), ("far", lambda n: f"org/{n}")):
        out = tmp_path / kind
        out.mkdir()
        export = ("export", at("bf16"), out / "mixed", "--onto", at("mxfp8"), *recipe)
        assert call(*export)[0] == 0
        assert call("export", at(BASE), out / "experts", *recipe, "--input-scale", "one")[0] == 0
    assert contents(tmp_path / "far" / "mixed") == contents(tmp_path / "near" / "mixed")
    assert contents(tmp_path / "far" / "experts") == contents(tmp_path / "near" / "experts")
    assert sources(tmp_path / "far" / "mixed") == ["org/bf16", "org/mxfp8"]

    shutil.copytree(tmp_path / "near" / "experts", local(golden, "experts"))
    broken = shutil.copytree(tmp_path / "near" / "experts", local(golden, "broken"))
    config = json.loads((broken / "config.json").read_text())
    del config["quantization_config"]
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "hf_quant_config.json").unlink()
    for kind, at in (("near", lambda n: local(golden, n)), ("far", lambda n: f"hf://org/{n}")):
        out = tmp_path / kind
        merge = ("merge", at("experts"), out / "merged", "--onto", at(BASE))
        assert call(*merge)[0] in (0, 1)
        assert call("repair", at("broken"), out / "fixed", "--base", at(BASE))[0] == 0
    for name in ("merged", "fixed"):
        assert contents(tmp_path / "far" / name) == contents(tmp_path / "near" / name)


def test_gate_score_and_calibrate_download_into_the_hub_cache(
    golden: Server, command: Command, tmp_path: Path
) -> None:
    corpus = ("--corpus", GOLDEN / "corpus.jsonl", "--documents", "2", "--workers", "1")
    margin = ("--max-increase", "8%", "--format", "json")
    far = command("gate", "org/mxfp8", "--base", "hf://org/bf16", *corpus, *margin)
    near = command("gate", GOLDEN / "mxfp8", "--base", GOLDEN / "bf16", *corpus, *margin)
    assert (far.returncode, near.returncode) == (near.returncode, near.returncode)
    assert near.returncode in (0, 1, 3), near.stderr
    results = [json.loads(done.stdout) for done in (far, near)]
    assert results[0]["interval"] == results[1]["interval"]

    before = len(golden.requests())
    scored = command("score", "org/mxfp8", *corpus, "-o", tmp_path / "far.run")
    assert scored.returncode == 0, scored.stderr
    again = golden.requests()[before:]
    assert not [r for r in again if r["path"].partition("?")[0].endswith(".safetensors")]
    offline = command("score", "org/mxfp8", *corpus, "-o", tmp_path / "off.run", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(golden.requests()) == before + len(again)

    texts = tmp_path / "ids.jsonl"
    texts.write_text('{"ids": [1, 2, 3, 4, 5, 6, 7, 8]}\n')
    more = ("--samples", "1", "--seq-len", "8", "--recipe", "nvfp4_experts_only", "--texts", texts)
    stats = tmp_path / "stats.safetensors"
    done = command("calibrate", "org/bf16", "-o", stats, *more)
    assert done.returncode == 0, done.stderr
    assert stats.stat().st_size > 0


def test_the_report_names_commit_requests_and_bytes(hub: Server, call: Call) -> None:
    argv = ("check", f"hf://org/{CANDIDATE}@v1.0", "--base", f"org/{BASE}")
    code, out, _ = call(*argv, "--format", "json", "--depth", "payload")
    stats = json.loads(out)["stats"]
    assert code == 0
    assert stats["commits"] == {"base": COMMIT, "checkpoint": COMMIT}
    answered = hub.requests()
    assert stats["traffic"] == {
        "requests": len(answered),
        "bytes": sum(r["bytes"] for r in answered),
    }
    text = call(*argv)[1]
    assert f"remote: base at commit {COMMIT}; checkpoint at commit {COMMIT}; " in text


def test_history_names_commit_and_digest(hub: Server, call: Call, tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    assert call("check", f"org/{CANDIDATE}", "--history", history)[0] == 0
    checkpoint = json.loads(history.read_text().splitlines()[0])["checkpoint"]
    assert checkpoint["commit"] == COMMIT
    assert len(checkpoint["files_sha256"]) == 64
    heads = [r for r in hub.requests() if "range" in r and r["range"] and r["cdn"]]
    assert len(heads) == len({(r["path"], r["range"]) for r in heads})  # nothing is fetched twice


def test_a_directory_and_a_revision_of_a_repository(
    hub: Server, call: Call, shared_data: Path
) -> None:
    shutil.copytree(shared_data / "modelopt" / CANDIDATE, local(hub, BASE) / "nvfp4" / "v2")
    for revision in ("", "@main", f"@{COMMIT}", "@refs/pr/1", "@refs%2Fpr%2F1"):
        code, out, err = call("check", f"hf://org/{BASE}{revision}/nvfp4/v2")
        assert (code, err) == (0, ""), out
    page = f"{hub.url}/org/{BASE}/tree/main/nvfp4/v2"
    assert call("check", page)[0] == 0


def test_a_listing_of_several_pages(
    serve: Callable[..., Server], repositories: Path, environment: pytest.MonkeyPatch, call: Call
) -> None:
    server = serve(repositories, "--hub", "--page", "2")
    environment.setenv("HF_ENDPOINT", server.url)
    assert call("check", f"org/{CANDIDATE}")[0] == 0
    assert sum("/tree/" in r["path"] for r in server.requests()) > 1


def test_what_the_hub_cache_holds_is_not_fetched(hub: Server, call: Call, tmp_path: Path) -> None:
    code, out, _ = call("stats", f"org/{CANDIDATE}", "--depth", "payload")
    entries = HubSource(parse_address(f"hf://org/{CANDIDATE}")).entries()
    blobs = tmp_path / "hf" / "hub" / f"models--org--{CANDIDATE}" / "blobs"
    blobs.mkdir(parents=True)
    for name, entry in entries.items():
        shutil.copy(local(hub, CANDIDATE) / name, blobs / entry.blob)
    hub.forget()
    assert call("stats", f"org/{CANDIDATE}", "--depth", "payload") == (code, out, "")
    assert all("/api/" in r["path"] for r in hub.requests())
