# SPDX-License-Identifier: Apache-2.0
"""Plain web servers: with ranges and without, with a listing and without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import exporter
import verifier
from tests.remote.conftest import BASE, CANDIDATE, Call, Server
from verifier.checkpoint import open_source
from verifier.checkpoint.web import PROBED

Serve = Callable[..., Server]


@pytest.fixture
def folder(repositories: Path, environment: pytest.MonkeyPatch) -> Path:
    return repositories / "org" / CANDIDATE


def equal(remote: verifier.Report, local: verifier.Report) -> bool:
    return (remote.verdict, remote.findings, remote.coverage) == (
        local.verdict,
        local.findings,
        local.coverage,
    )


@pytest.mark.parametrize("options", [(), ("--listing",)], ids=["bare", "listing"])
@pytest.mark.parametrize("depth", ["header", "payload"])
def test_a_server_with_ranges(
    serve: Serve, folder: Path, options: tuple[str, ...], depth: str
) -> None:
    server = serve(folder, *options)
    near = verifier.check(folder, depth=depth)
    assert equal(verifier.check(server.url, depth=depth), near)
    assert equal(verifier.check(f"{server.url}/", depth=depth), near)
    assert near.verdict == "passed"


def test_a_server_without_ranges_serves_headers_only(
    serve: Serve, folder: Path, call: Call
) -> None:
    server = serve(folder, "--no-ranges")
    assert equal(verifier.check(server.url), verifier.check(folder))
    size = (folder / "model.safetensors").stat().st_size
    assert sum(r["bytes"] for r in server.requests()) < 3 * size


def test_a_server_without_ranges_is_not_read_over_and_over(
    serve: Serve, folder: Path, call: Call, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr("verifier.checkpoint.http.MAX_SKIP", 30_000)
    server = serve(folder, "--no-ranges")
    code, _, err = call("stats", server.url, "--depth", "payload")
    assert code == 4
    assert "the server ignores range requests; only --depth header works there" in err


def test_a_sharded_checkpoint_is_found_by_its_index(
    serve: Serve, folder: Path, shared_data: Path
) -> None:
    sharded = shared_data / "modelopt" / "m3_bf16_sharded"
    server = serve(sharded)
    assert equal(verifier.check(server.url), verifier.check(sharded))
    shards = [r for r in server.requests() if r["path"].endswith(".safetensors")]
    assert max(map([r["path"] for r in shards].count, {r["path"] for r in shards})) <= 2
    assert all(r["method"] == "GET" for r in shards)


def test_a_shard_that_the_index_names_and_the_server_lacks(
    serve: Serve, folder: Path, shared_data: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(shared_data / "modelopt" / "m3_bf16_sharded", tmp_path / "copy")
    next(copy.glob("*-00002-*")).unlink()
    server = serve(copy)
    remote, local = verifier.check(server.url), verifier.check(copy)
    assert equal(remote, local)
    assert "QC101" in {f.rule for f in remote.findings}


@pytest.mark.parametrize("name", ["index", "shard"])
def test_a_file_that_changes_between_requests(
    serve: Serve, folder: Path, call: Call, name: str
) -> None:
    server = serve(folder)
    server.fault(model__safetensors={"etag": "changes"})
    code, _, err = call("stats", server.url, "--depth", "payload")
    assert code == 4
    assert "changed while it was read (its ETag changed)" in err


def test_what_is_no_checkpoint(serve: Serve, tmp_path: Path, folder: Path, call: Call) -> None:
    (tmp_path / "empty").mkdir()
    server = serve(tmp_path / "empty")
    for argv in (("check",), ("stats",)):
        code, _, err = call(*argv, server.url)
        assert code == 2
        assert "neither model.safetensors.index.json nor model.safetensors is there" in err
    code, _, err = call("check", f"{server.url}/x?download=1")
    assert code == 2
    assert "without '?' and '#'" in err
    server.fault(**{"model__safetensors__index__json": {"status": 401}})
    code, _, err = call("check", server.url)
    assert code == 2
    assert "asks for a login (401); put user and password into ~/.netrc" in err


def test_a_server_with_a_page_for_every_address(serve: Serve, folder: Path) -> None:
    server = serve(folder)
    missing = [n for n in PROBED if not (folder / n).exists()]
    server.fault(**{n.replace(".", "__"): {"html": True} for n in missing})
    assert equal(verifier.check(server.url), verifier.check(folder))


def test_links_of_other_listings(serve: Serve, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    shutil.copytree(folder, page / "dir")
    server = serve(page, "--pages")
    links = ["model.safetensors", "./config.json", "/dir/hf_quant_config.json"]
    links += [f"{server.url}/dir/generation_config.json", "../up.json", "sub/x.json", "?C=M"]
    links += ["https://example.org/y.json", "http://[", "//example.org/z.json"]
    (page / "dir" / "index.html").write_text("".join(f'<a href="{x}">x</a>' for x in links))
    source = open_source(f"{server.url}/dir")
    assert set(source.files()) == {
        "model.safetensors",
        "config.json",
        "hf_quant_config.json",
        "generation_config.json",
    }
    source.close()


def test_a_login_from_netrc(
    serve: Serve, folder: Path, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password word\n")
    netrc.chmod(0o600)
    environment.setenv("NETRC", str(netrc))
    server = serve(folder)
    assert verifier.check(server.url).verdict == "passed"
    assert all(r["authorization"].startswith("Basic ") for r in server.requests())


def test_a_proxy_is_used(serve: Serve, folder: Path, environment: pytest.MonkeyPatch) -> None:
    proxy = serve(folder)  # it answers whatever host is asked for
    environment.setenv("HTTP_PROXY", proxy.url)
    environment.setenv("NO_PROXY", "localhost")
    environment.setattr("verifier.checkpoint.remote.TRIES", 1)
    with pytest.raises(verifier.CkptgateError):
        verifier.check("http://checkpoints.invalid/m")
    assert {r["path"].partition("/m/")[0] for r in proxy.requests()} >= {
        "http://checkpoints.invalid"
    }


def test_a_source_of_an_export(
    serve: Serve, repositories: Path, folder: Path, tmp_path: Path
) -> None:
    server = serve(repositories / "org" / BASE)
    options = {"recipe": "nvfp4_experts_only", "input_scale": "one"}
    exporter.export(server.url, tmp_path / "far", **options)
    exporter.export(repositories / "org" / BASE, tmp_path / "near", **options)
    for file in (tmp_path / "near").glob("*.safetensors"):
        assert (tmp_path / "far" / file.name).read_bytes() == file.read_bytes()


def test_commands_that_build_a_model_copy_the_checkpoint(serve: Serve, folder: Path) -> None:
    from verifier.checkpoint import local_directory

    server = serve(folder)
    first = local_directory(server.url)
    bytes_once = sum(r["bytes"] for r in server.requests())
    assert {p.name: p.read_bytes() for p in Path(first).iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir() if p.name in _names(first)
    }
    assert local_directory(server.url) == first
    assert sum(r["bytes"] for r in server.requests()) < 1.2 * bytes_once
    assert verifier.check(first).verdict == "passed"


def _names(path: str) -> set[str]:
    return {p.name for p in Path(path).iterdir()}
