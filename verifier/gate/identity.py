# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run is of: everything in its directory that decides the scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from verifier.checkpoint import Checkpoint

CONFIG_FILES = ("config.json", "hf_quant_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Identity:
    """The SHA-256 of a checkpoint's weights, of its configuration and of its tokenizer."""

    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str


def identity_of(checkpoint: Checkpoint) -> Identity:
    """Return the identity of a checkpoint; the first call reads every byte of its weights."""
    return Identity(
        checkpoint.weights_sha256,
        _digest(checkpoint, CONFIG_FILES),
        _digest(checkpoint, TOKENIZER_FILES),
    )


def _digest(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    """Return one SHA-256 over the named files that a checkpoint has, with their names."""
    state = hashlib.sha256()
    for name in names:
        size = checkpoint.files.get(name)
        if size is not None:
            state.update(f"{name}\0{size}\0".encode())
            state.update(checkpoint.source.read(name, 0, size).data)
    return state.hexdigest()
