# SPDX-License-Identifier: Apache-2.0
"""What servers do wrong: interrupted, wrong and slow answers, refusals, changed files."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import verifier
from tests.remote.conftest import BASE, CANDIDATE, TOKEN, Call, Server
from tests.remote.server import SIGNATURE
from verifier.errors import MachineError

URI = f"hf://org/{CANDIDATE}"
SHARD = "model__safetensors"


def verdict(uri: str = URI) -> str:
    return verifier.check(uri, depth="payload").verdict


def one_message(done: tuple[int, str, str], code: int) -> str:
    """Return the only line on stderr of a command that ends with a code."""
    assert done[0] == code, done
    assert len(done[2].splitlines()) == 1, done[2]
    return done[2].strip()


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 403, "times": 2},
        {"reset": 100, "times": 3},
        {"reset": 0, "times": 3},
        {"short": 100, "times": 3},
        {"status": 500, "times": 2},
        {"status": 503, "headers": {"Retry-After": "0"}, "times": 2},
        {"status": 429, "headers": {"Retry-After": "0"}, "times": 2},
        {"status": 408, "times": 1},
    ],
    ids=lambda f: "-".join(map(str, f.items())),
)
def test_what_a_later_try_repairs(hub: Server, fault: dict) -> None:
    hub.fault(**{SHARD: fault})
    assert verdict() == "passed"


def test_a_read_resumes_where_it_was_cut(hub: Server) -> None:
    verdict()
    whole = sum(r["bytes"] for r in hub.requests())
    hub.forget()
    hub.fault(**{SHARD: {"reset": 200_000, "times": 4}})
    assert verdict() == "passed"
    again = hub.requests()
    assert sum(r["bytes"] for r in again) <= whole * 1.02
    starts = [int(re.findall(r"\d+", r["range"])[0]) for r in again if r["cdn"] and r["range"]]
    assert len(set(starts)) == len(starts)  # no byte is asked for twice


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ({"reset": 0}, 4, r"cannot read .*model\.safetensors: the connection .*\(6 tries\)"),
        ({"status": 500}, 4, r"the server failed \(500\) \(6 tries\)"),
        ({"status": 429, "headers": {"Retry-After": "0"}}, 4, r"too many requests \(429\)"),
        ({"status": 429, "headers": {"Retry-After": "900"}}, 4, r"asks to wait 900 s"),
        ({"content_range": "bytes 5-9/*"}, 4, r"answered a request for bytes 0-\d+ with"),
        ({"content_range": "bytes 0-1031/5"}, 4, r"changed while it was read"),
        ({"content_range": "nonsense"}, 4, r"a proxy on the way may be broken"),
        ({"html": True}, 4, r"a web page instead of the file; a login page or a captive portal"),
        ({"etag": "changes"}, 4, r"changed while it was read \(its ETag changed\); run again"),
        ({"status": 416}, 4, r"fewer bytes than it listed \(416\): the file changed"),
        ({"status": 404}, 4, r"was listed and is gone now; run again"),
        ({"status": 418}, 4, r"the server answered 418"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_what_stops_the_run(hub: Server, call: Call, fault: dict, code: int, message: str) -> None:
    hub.fault(**{SHARD: fault})
    text = one_message(call("stats", URI, "--depth", "payload"), code)
    assert re.search(message, text), text
    assert "Signature" not in text
    assert "127.0.0.1" not in text


def test_a_drip_is_given_up(hub: Server, environment: pytest.MonkeyPatch, call: Call) -> None:
    environment.setenv("CKPTGATE_TIMEOUT", "0.5")
    environment.setattr("verifier.checkpoint.remote.TRIES", 2)
    hub.fault(**{SHARD: {"drip": 0.02}})
    text = one_message(call("stats", URI), 4)
    assert re.search(r"only \d+ bytes came in \d+ s \(2 tries\)", text)


def test_a_silent_server_is_given_up(
    serve: Callable[..., Server],
    repositories: Path,
    environment: pytest.MonkeyPatch,
    call: Call,
) -> None:
    server = serve(repositories, "--hub", "--delay", "30")
    environment.setenv("HF_ENDPOINT", server.url)
    environment.setenv("CKPTGATE_TIMEOUT", "0.2")
    environment.setattr("verifier.checkpoint.remote.TRIES", 2)
    assert "no answer within 0.2 s (2 tries)" in one_message(call("check", URI), 4)
    environment.setenv("CKPTGATE_TIMEOUT", "soon")
    assert "CKPTGATE_TIMEOUT must be a positive number" in one_message(call("check", URI), 2)


def test_no_server_at_all(environment: pytest.MonkeyPatch, call: Call) -> None:
    environment.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "no connection to the server" in one_message(call("check", URI), 4)


def test_a_file_that_shrinks_during_the_run(hub: Server) -> None:
    checkpoint = verifier.open_checkpoint(URI)
    shard = hub.root / "org" / CANDIDATE / "model.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[: len(raw) // 2])
    tensor = list(checkpoint.tensors.values())[-1]
    with pytest.raises(MachineError, match="the file changed while it was read"):
        checkpoint.read(tensor)
    with pytest.raises(MachineError, match="changed while it was read"):
        checkpoint.read(next(iter(checkpoint.tensors.values())))


@pytest.mark.parametrize(
    ("location", "refused"),
    [
        ("http://example.org/x", r"redirects to http://example\.org, which is not https; refused"),
        ("file:///etc/passwd", r"redirects to file://, which is not https; refused"),
        ("ftp://127.0.0.1/x", r"redirects to ftp://127\.0\.0\.1, which is not https; refused"),
        ("http://[::1", r"redirects to an invalid address|the connection broke"),
    ],
)
def test_redirects_stay_on_https_or_the_host(
    hub: Server, call: Call, location: str, refused: str
) -> None:
    hub.fault(**{"resolve model__safetensors": {"location": location}})
    assert re.search(refused, one_message(call("stats", URI), 4))


def test_a_circle_of_redirects(hub: Server, call: Call) -> None:
    path = f"/org/{CANDIDATE}/model.safetensors?X-Signature={SIGNATURE}"
    hub.fault(**{SHARD: {"location": path}})
    assert "more than 5 redirects" in one_message(call("stats", URI), 4)


def test_a_signed_address_that_expires_is_asked_for_again(hub: Server) -> None:
    checkpoint = verifier.open_checkpoint(URI)
    hub.fault(**{SHARD: {"status": 403, "times": 1}})
    hub.forget()
    assert checkpoint.read(next(iter(checkpoint.tensors.values()))).size
    assert [(r["cdn"], r["status"]) for r in hub.requests()] == [
        (True, 403),
        (False, 302),
        (True, 206),
    ]


@pytest.mark.parametrize(
    ("uri", "code", "message"),
    [
        ("org/absent", 2, r"refuses access without a token \(401\).*private, or does not exist"),
        ("org/private-model", 2, r"without a token \(401\).*`hf auth login`, or set HF_TOKEN"),
        ("org/gated-model", 2, r"is gated \(403\); accept its terms at http://.*/org/gated-model"),
        ("org/forbidden-model", 2, r"the token may not read this repository \(403\)"),
        (f"{URI}@nosuch", 2, r"the repository has no revision nosuch \(404\)"),
        (f"{URI}/nosuch", 2, r"the repository has no directory nosuch \(404\)"),
        ("hf://org", 2, r"not a hub address; use hf://ORG/MODEL"),
        ("hf://datasets/org/name", 2, r"datasets hold no checkpoint"),
        (f"{URI}/../x", 2, r"must be a plain path inside the repository"),
    ],
)
def test_what_the_hub_refuses(hub: Server, call: Call, uri: str, code: int, message: str) -> None:
    text = one_message(call("check", uri), code)
    assert re.search(message, text), text


def test_a_repository_without_weights(hub: Server, call: Call) -> None:
    (hub.root / "org" / "empty").mkdir()
    (hub.root / "org" / "empty" / "README.md").write_text("x")
    assert "no *.safetensors" in one_message(call("check", "org/empty"), 2)


def test_a_bare_name_may_be_a_mistyped_directory(hub: Server, call: Call) -> None:
    text = one_message(call("check", "exports/m3"), 2)
    assert text.endswith("there is no directory exports/m3 here either")


def test_a_listing_without_end(
    serve: Callable[..., Server],
    repositories: Path,
    environment: pytest.MonkeyPatch,
    call: Call,
) -> None:
    server = serve(repositories, "--hub", "--circle")
    environment.setenv("HF_ENDPOINT", server.url)
    assert "the directory has more than 200 pages of files" in one_message(call("check", URI), 4)


def test_an_interrupted_command_does_not_wait(
    serve: Callable[..., Server], repositories: Path, environment: pytest.MonkeyPatch
) -> None:
    server = serve(repositories, "--hub", "--token", TOKEN)
    environment.setenv("HF_ENDPOINT", server.url)
    server.fault(**{SHARD: {"drip": 1.0}})
    line = [sys.executable, "-W", "ignore", "-m", "verifier", "check", URI]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while not any(r["path"].endswith("config.json") for r in server.requests()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)  # the drip would take minutes
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_captive_portal_before_the_hub(hub: Server, call: Call) -> None:
    hub.fault(**{f"org___{CANDIDATE}": {"html": True}})
    assert "a web page instead of the file" in one_message(call("check", URI), 4)


def test_an_index_that_names_other_files(hub: Server, call: Call) -> None:
    index = hub.root / "org" / BASE / "model.safetensors.index.json"
    index.write_text(
        '{"weight_map": {"a": "file:///etc/passwd", "b": "../x.safetensors", '
        '"c": "http://127.0.0.1:9/y.safetensors"}}'
    )
    code, out, _ = call("check", f"org/{BASE}", "--select", "QC102,QC101")
    assert code == 1
    assert "file:///etc/passwd" in out
    assert all("passwd" not in r["path"] for r in hub.requests())
