# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's model says next to a few prompts, greedily: a look at it, not a measure of
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from verifier.checkpoint import local_directory, open_checkpoint
from verifier.errors import ContentError
from verifier.load.hf import load_tokenizer
from verifier.load.model import load_model
from verifier.text import counted


@dataclass(frozen=True, slots=True)
class Continuation:
    """A prompt and what the model makes of it, as text and as token ids."""

    prompt: str
    text: str
    tokens: tuple[int, ...]

    def same(self, other: Continuation) -> int:
        """Return how many tokens from the start another continuation shares."""
        pairs = zip(self.tokens, other.tokens, strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b),
            min(len(self.tokens), len(other.tokens)),
        )


def trim(ids: Sequence[int], pad: int | None) -> list[int]:
    """Return ids without leading pads, unless nothing else would remain (the pad may be a token
    that means something).
    """
    start = next((i for i, t in enumerate(ids) if t != pad), None)
    return list(ids if start is None else ids[start:])


def preview(
    uri: str, prompts: Sequence[str | Sequence[int]], new_tokens: int
) -> list[Continuation]:
    """Return each prompt's greedy continuation; special tokens are not shown.

    Args:
        uri: a checkpoint; a remote one is downloaded. Its tokenizer is used; without one, ids are
            printed as numbers.
        prompts: texts or token ids.
        new_tokens: the maximum number of tokens to generate.

    Raises:
        ContentError: the model cannot be loaded, or a text is given and there is no tokenizer.
    """
    checkpoint = open_checkpoint(local_directory(uri))
    tokenizer = load_tokenizer(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(checkpoint, device=device).model
    pad = getattr(tokenizer, "pad_token_id", None)
    continuations = []
    for prompt in prompts:
        if isinstance(prompt, str) and tokenizer is None:
            raise ContentError(f"{uri}: no tokenizer; pass the prompts as token ids")
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        ids = trim(ids, pad)
        vocabulary = model.get_input_embeddings().num_embeddings
        if not ids or max(ids) >= vocabulary:
            raise ContentError(
                f"{uri}: a prompt of {counted(len(ids), 'token')} up to id {max(ids, default=0)}; "
                f"the vocabulary has {vocabulary}"
            )
        inputs = torch.tensor([ids], device=model.device)
        with torch.inference_mode(), _greedy(model):
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=pad if pad is not None else 0,
            )
        new = tuple(int(i) for i in output[0, len(ids) :])
        continuations.append(Continuation(_text(tokenizer, ids), _text(tokenizer, new), new))
    return continuations


@contextlib.contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """Generate without the checkpoint's own settings, such as temperature and penalties."""
    before = model.generation_config
    settings: Any = transformers.GenerationConfig
    model.generation_config = settings(eos_token_id=before.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = before


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids))
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
