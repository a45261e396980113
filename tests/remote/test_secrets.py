# SPDX-License-Identifier: Apache-2.0
"""The token and the signatures of the CDN are in no output, log, report, exception or file."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

import pytest

import verifier
from tests.remote.conftest import CANDIDATE, TOKEN, Call, Server
from tests.remote.server import SIGNATURE
from verifier.errors import CkptgateError

SECRETS = (TOKEN, SIGNATURE)


@pytest.fixture
def private(hub: Server, environment: pytest.MonkeyPatch) -> str:
    """Return the address of a repository that takes the token."""
    (hub.root / "org" / CANDIDATE).rename(hub.root / "org" / "private-model")
    environment.setenv("HF_TOKEN", TOKEN)
    return "hf://org/private-model"


def test_the_token_opens_a_private_repository_and_reaches_no_other_host(
    hub: Server, private: str
) -> None:
    assert verifier.check(private, depth="payload").verdict == "passed"
    sent = {r["cdn"]: r["authorization"] for r in hub.requests()}
    assert sent == {False: f"Bearer {TOKEN}", True: None}


@pytest.mark.parametrize(
    "fault",
    [
        {},
        {"reset": 10},
        {"status": 500},
        {"status": 403},
        {"html": True},
        {"etag": "changes"},
        {"content_range": "bytes 1-2/3"},
        {"location": f"http://example.org/?token={SIGNATURE}"},
    ],
    ids=str,
)
def test_secrets_are_nowhere(
    hub: Server,
    private: str,
    call: Call,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    environment: pytest.MonkeyPatch,
    fault: dict,
) -> None:
    hub.fault(model__safetensors=fault)
    environment.setenv("CKPTGATE_DEBUG", "1")
    out = tmp_path / "out"
    out.mkdir()
    files = ("json", "sarif", "junit", "markdown", "html")
    formats = [a for f in files for a in ("--format", f, "-o", out / f"report.{f}")]
    with caplog.at_level(logging.DEBUG):
        argv = ("check", private, "--depth", "payload", "--history", out / "history.jsonl")
        texts = [str(call(*argv, *formats)), str(call("stats", private, "--format", "json"))]
        try:
            texts.append(str(verifier.check(private, depth="payload")))
        except CkptgateError as error:
            texts.append("".join(traceback.format_exception(error)))
    texts += [p.read_text() for p in out.iterdir()]
    # At debug level httpcore2 logs the headers of answers, and so the address of a redirect.
    logged = [r for r in caplog.records if not r.name.startswith("httpcore2")]
    assert any(r.name == "httpx2" for r in logged)
    texts += [r.getMessage() for r in logged]
    for text in texts:
        assert not [s for s in SECRETS if s in text]
    assert TOKEN not in caplog.text


def test_a_token_that_the_hub_does_not_accept(
    hub: Server, private: str, call: Call, environment: pytest.MonkeyPatch
) -> None:
    wrong = f"{TOKEN}wrong"
    environment.setenv("HF_TOKEN", wrong)
    code, out, err = call("check", private, "--format", "json")
    assert code == 2
    assert "the hub does not accept the token (401); log in again" in err
    assert TOKEN not in out + err


def test_no_token_is_sent_where_implicit_tokens_are_off(
    hub: Server, call: Call, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("HF_TOKEN", TOKEN)
    environment.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert call("check", f"org/{CANDIDATE}")[0] == 0
    assert {r["authorization"] for r in hub.requests()} == {None}


@pytest.mark.parametrize(
    "uri", ["https://user:secret-word@example.org/m", "s3://key:secret-word@bucket/m"]
)
def test_credentials_in_an_address_are_refused_unseen(call: Call, uri: str) -> None:
    code, out, err = call("check", uri, "--format", "json")
    assert code == 2
    assert "secret-word" not in out + err


def test_the_hubs_token_is_not_sent_to_other_servers(
    serve, repositories: Path, environment: pytest.MonkeyPatch, call: Call
) -> None:
    environment.setenv("HF_TOKEN", TOKEN)
    server = serve(repositories / "org" / CANDIDATE)
    assert call("check", server.url)[0] == 0
    assert {r["authorization"] for r in server.requests()} == {None}
