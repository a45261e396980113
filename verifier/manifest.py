# SPDX-License-Identifier: Apache-2.0
"""The schema of manifests, for goldens and exports: what a directory contains, how and from what it
was made, and the digest of every file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MANIFEST = "ckptgate_manifest.json"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class File(BaseModel):
    """One file: its size in bytes and SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class SourceRecord(BaseModel):
    """A checkpoint that this one was made from; ``header_sha256`` and ``tensors`` identify it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["source", "onto", "experts", "text", "base"]
    uri: str
    tensors: int = 0
    header_sha256: Sha256 | None = None


class Score(BaseModel):
    """A score of the base: protocol key, and per document the sum in nats and the tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    corpus: str
    protocol: dict[str, Any]
    documents: list[tuple[float, int]]
    perplexity: float
    extra: dict[str, float] = {}


class Manifest(BaseModel):
    """The contents and origin of a directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal["1.0"] = "1.0"
    kind: Literal["export", "merge", "golden", "repair"]
    name: str
    made_by: dict[str, Any]
    sources: list[SourceRecord] = []
    options: dict[str, Any] = {}
    formats: dict[str, int] = {}
    tensors: int = 0
    bytes: int = 0
    files: dict[str, File] = {}
    scores: list[Score] = []
    notes: dict[str, Any] = {}


def digest(path: Path) -> File:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    return File(bytes=path.stat().st_size, sha256=sha256)
