# SPDX-License-Identifier: Apache-2.0
"""What an address means, before anything is contacted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.checkpoint.address import Address, parse_address
from verifier.errors import UsageError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


@pytest.mark.parametrize(
    ("text", "repo", "revision", "directory"),
    [
        ("hf://org/model", "org/model", "", ""),
        ("HF://org/model/", "org/model", "", ""),
        ("hf://models/org/model", "org/model", "", ""),
        ("hf://org/model@main", "org/model", "main", ""),
        ("hf://org/model@v1.0/nvfp4/", "org/model", "v1.0", "nvfp4"),
        ("hf://org/model/a/b", "org/model", "", "a/b"),
        ("hf://org/model@refs/pr/7", "org/model", "refs/pr/7", ""),
        ("hf://org/model@refs/pr/7/sub", "org/model", "refs/pr/7", "sub"),
        ("hf://org/model@refs%2Fpr%2F7/sub", "org/model", "refs/pr/7", "sub"),
        ("org/model", "org/model", "", ""),
        ("org/model@abc", "org/model", "abc", ""),
        ("https://huggingface.co/org/model", "org/model", "", ""),
        ("https://huggingface.co/org/model/tree/main", "org/model", "main", ""),
        ("https://huggingface.co/org/model/tree/v1/a/b", "org/model", "v1", "a/b"),
    ],
)
def test_hub(text: str, repo: str, revision: str, directory: str) -> None:
    assert parse_address(text) == Address("hub", text, repo, revision, directory)


@pytest.mark.parametrize(
    "text", ["model", "./org/model", "../m", "/org/model", "a/b/c", "~/m/n", ""]
)
def test_local(text: str) -> None:
    assert parse_address(text) == Address("local", text)


def test_what_exists_here_is_local(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    assert parse_address("org/model").kind == "local"  # a mistyped path below a directory
    assert parse_address("other/model").kind == "hub"
    assert parse_address(Path("other/model")).kind == "local"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("https://example.org/m", "web"),
        ("http://127.0.0.1:8000", "web"),
        ("s3://bucket/m/", "store"),
        ("gs://bucket/m", "store"),
        ("memory://x", "store"),
        ("simplecache::s3://bucket/m", "store"),
    ],
)
def test_other_addresses(text: str, kind: str) -> None:
    assert parse_address(text) == Address(kind, text.rstrip("/"))  # type: ignore[arg-type]


def test_the_endpoint_decides_which_pages_are_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:99/")
    assert parse_address("http://127.0.0.1:99/org/model").repo == "org/model"
    assert parse_address("https://huggingface.co/org/model").kind == "web"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf://model", "not a hub address"),
        ("hf://", "not a hub address"),
        ("hf://datasets/org/x", "datasets hold no checkpoint"),
        ("hf://org/model/../secret", "a plain path inside the repository"),
        ("hf://org/model/a//b", "a plain path inside the repository"),
        ("hf://org/model@..", "not a revision"),
        ("hf://org/model@%2Fetc%2Fpasswd", "not a revision"),
        ("hf://org/model@a%2F..%2Fb", "not a revision"),
        ("https:///m", "the host is missing"),
        ("https://[::1/m", "not a URL"),
        ("https://host/m?token=x", "without '?' and '#'"),
        ("https://host/m#x", "without '?' and '#'"),
        ("https://user:word@host/m", "~/.netrc"),
        ("https://huggingface.co/org/model/blob/main/config.json", "use the repository's address"),
        ("s3://", "needs a bucket"),
        ("s3://key:word@bucket/m", "no credentials"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        parse_address(text)
    assert "word" not in str(error.value).replace("password", "")
    assert "token=x" not in str(error.value)


@given(st.text(max_size=60), st.sampled_from(["", "hf://", "https://", "s3://", "x::y://"]))
def test_any_text_is_an_address_or_refused(text: str, scheme: str) -> None:
    try:
        address = parse_address(scheme + text)
    except UsageError:
        return
    assert address.kind == "hub" or not address.repo
    assert ".." not in address.directory.split("/")
