# SPDX-License-Identifier: Apache-2.0
"""Object stores: S3 as moto serves it, and Google Cloud Storage's JSON API as far as it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

import exporter
import verifier
from tests.remote.conftest import BASE, CANDIDATE, Call, Server
from tests.remote.s3 import SECRET, client, serving, variables
from verifier.checkpoint import local_directory


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """Return the URL of a running S3 server."""
    with serving() as url:
        yield url


@pytest.fixture
def bucket(
    moto: str, repositories: Path, environment: pytest.MonkeyPatch
) -> Iterator[tuple[str, Path]]:
    """Return the address of a bucket with the checkpoints, and the same files here."""
    for name, value in variables(moto).items():
        environment.setenv(name, value)
    store = client(moto)
    for path in (repositories / "org").rglob("*.*"):
        key = str(path.relative_to(repositories / "org"))
        store.put_object(Bucket="bucket", Key=key, Body=path.read_bytes())
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://bucket", repositories / "org"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("depth", ["header", "payload"])
def test_a_check(bucket: tuple[str, Path], depth: str) -> None:
    uri, folder = bucket
    far = verifier.check(f"{uri}/{CANDIDATE}", base=f"{uri}/{BASE}", depth=depth)
    near = verifier.check(folder / CANDIDATE, base=folder / BASE, depth=depth)
    assert (far.verdict, far.findings, far.coverage) == (near.verdict, near.findings, near.coverage)
    assert far.verdict == "passed"
    fetched = far.summary.fetched
    assert fetched is not None
    everything = sum(p.stat().st_size for p in folder.rglob("*.*"))
    assert 0 < fetched.bytes <= (everything if depth == "payload" else 200_000)


def test_an_export_and_a_copy(bucket: tuple[str, Path], tmp_path: Path) -> None:
    uri, folder = bucket
    options = {"recipe": "nvfp4_experts_only", "input_scale": "one"}
    exporter.export(f"{uri}/{BASE}", tmp_path / "far", **options)
    exporter.export(folder / BASE, tmp_path / "near", **options)
    for file in (tmp_path / "near").glob("*.safetensors"):
        assert (tmp_path / "far" / file.name).read_bytes() == file.read_bytes()
    copied = Path(local_directory(f"{uri}/{CANDIDATE}"))
    for file in (folder / CANDIDATE).iterdir():
        assert (copied / file.name).read_bytes() == file.read_bytes()


def test_an_object_that_is_rewritten_stops_the_run(bucket: tuple[str, Path], moto: str) -> None:
    uri, folder = bucket
    checkpoint = verifier.open_checkpoint(f"{uri}/{CANDIDATE}")
    raw = (folder / CANDIDATE / "model.safetensors").read_bytes()
    changed = raw[:-1] + bytes([raw[-1] ^ 1])
    client(moto).put_object(Bucket="bucket", Key=f"{CANDIDATE}/model.safetensors", Body=changed)
    with pytest.raises(verifier.CkptgateError, match="changed while it was read; run again"):
        checkpoint.read(next(iter(checkpoint.tensors.values())))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket/nothing-here", "not found"),
        ("s3://no-such-bucket/m", "not found"),
    ],
)
def test_what_is_not_there(bucket: tuple[str, Path], call: Call, uri: str, message: str) -> None:
    code, out, err = call("check", uri)
    assert code == 2, out + err
    assert f"{uri}: {message}" in err
    assert len(err.splitlines()) == 1
    assert SECRET not in out + err


@pytest.fixture
def google(
    serve: Callable[..., Server], repositories: Path, environment: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Return the directory that gs://org shows."""
    # Its bucket probe speaks gRPC over TLS, which this server does not.
    environment.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs")
    server = serve(repositories, "--gcs")
    environment.setenv("STORAGE_EMULATOR_HOST", server.url)
    environment.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield repositories / "org"
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.mark.parametrize("depth", ["header", "payload"])
def test_google_cloud_storage(google: Path, depth: str) -> None:
    far = verifier.check(f"gs://org/{CANDIDATE}", base=f"gs://org/{BASE}", depth=depth)
    near = verifier.check(google / CANDIDATE, base=google / BASE, depth=depth)
    assert (far.verdict, far.findings, far.coverage) == (near.verdict, near.findings, near.coverage)


def test_a_google_object_that_is_rewritten_stops_the_run(google: Path, call: Call) -> None:
    checkpoint = verifier.open_checkpoint(f"gs://org/{CANDIDATE}")
    shard = google / CANDIDATE / "model.safetensors"
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(verifier.CkptgateError, match="changed while it was read; run again"):
        checkpoint.read(next(iter(checkpoint.tensors.values())))
    code, _, err = call("check", "gs://org/nothing-here")
    assert code == 2
    assert "gs://org/nothing-here: not found" in err
