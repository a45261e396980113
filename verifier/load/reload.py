# SPDX-License-Identifier: Apache-2.0
"""Depth load: a checkpoint, decoded by the verifier, through transformers' own loader.

First names and shapes, on the meta device: seconds at any size, and no byte of a tensor is read.
Then, where the model fits into memory, its values and a forward pass on a fixed prompt, and the
base's logits beside them. What is found is plain data (`verifier.rules.loading`); the rules QC606
and QC608 judge it.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError, MissingExtra
from verifier.memory import free_memory
from verifier.rules.loading import Forward, Loaded, Misfit

try:
    import torch
    import transformers

    from verifier.load import hf
    from verifier.load.model import decoded_tensors, load_model, model_class
except ImportError as error:
    raise MissingExtra("loading a model", "load") from error

PROMPT = 48
"""Tokens of the fixed prompt."""
ROOM = 1.25
"""Memory that a load takes over that of the model's values in BF16."""


def reload(
    checkpoint: Checkpoint, base: Checkpoint | None = None, *, memory: int | None = None
) -> Loaded:
    """Return what transformers makes of a checkpoint.

    Args:
        checkpoint: what to load.
        base: the checkpoint whose logits the candidate's are compared with, and whose own misfits
            are not the candidate's.
        memory: bytes that the values of one model may take; what is free where nothing is given. 0
            loads no values.
    """
    loader = f"transformers {transformers.__version__}"
    try:
        cls, config = model_class(checkpoint)
        model, misfits = _names(cls, config, checkpoint)
    except ContentError as error:
        return Loaded(loader, reason=_without_uri(error, checkpoint))
    shared = _shared(misfits, base)
    keys = model.state_dict()
    found = Loaded(
        loader,
        keys=len(keys),
        misfits=tuple(m for m in misfits if m not in shared),
        shared=tuple(shared),
        dropped=_dropped(model, checkpoint),
        native=_native(checkpoint),
    )
    if any(m.kind != "unexpected" for m in misfits):
        return replace(found, why_no_values="names and shapes do not fit the model")
    size = sum(2 * v.numel() for v in keys.values())
    del model, keys
    device = _device(size, memory)
    if not device:
        left = free_memory() if memory is None else memory
        why = f"its values take {size * ROOM / 1e9:,.1f} GB of memory, and {left / 1e9:,.1f} GB are free"
        return replace(found, why_no_values=why)
    try:
        forward = _forward(checkpoint, base, device)
    except ContentError as error:
        return replace(found, why_no_values=_without_uri(error, checkpoint))
    return replace(found, forward=forward)


def _without_uri(error: Exception, checkpoint: Checkpoint) -> str:
    return str(error).removeprefix(f"{checkpoint.uri}: ")


class _Shape:
    """Stands for a tensor of which the loader is to see the shape alone."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __getitem__(self, _index: Any) -> torch.Tensor:
        return torch.empty(self._shape, dtype=torch.bfloat16, device="meta")


def _names(cls: Any, config: Any, checkpoint: Checkpoint) -> tuple[Any, list[Misfit]]:
    """Return the model on the meta device after a load of names and shapes, and what does not fit
    it.

    Raises:
        ContentError: the model cannot be built, or a tensor's format cannot be inferred.
    """
    state = {name: _Shape(lazy.shape) for name, lazy in decoded_tensors(checkpoint).items()}
    model, report = hf.load_shapes(checkpoint.uri, cls, config, state)
    return model, _misfits(model, report, state)


def _misfits(model: Any, report: Any, names: Iterable[str]) -> list[Misfit]:
    """Return what the loading report lists, under the names of tensors where they are known."""
    unconverted, mismatched = report.conversion_errors, report.mismatched_keys
    if not (report.missing_keys or report.unexpected_keys or mismatched or unconverted):
        return []
    tensors: dict[str, list[str]] = {}
    for name, key in hf.parameter_keys(model, names).items():
        tensors.setdefault(key.name, []).append(name)

    def tensor_name(key: str) -> str:
        names = tensors.get(key, [])
        return names[0] if len(names) == 1 else key

    elsewhere = {*unconverted, *(key for key, _, _ in mismatched)}
    misfits = [Misfit("missing", k) for k in report.missing_keys if k not in elsewhere]
    misfits += [Misfit("unexpected", tensor_name(k)) for k in report.unexpected_keys]
    misfits += [
        Misfit("mismatched", tensor_name(k), str(list(have)), str(list(want)))
        for k, have, want in mismatched
    ]
    misfits += [
        Misfit("unconverted", k, _conversion_error(text, tensors.get(k, [])))
        for k, text in unconverted.items()
    ]
    return sorted(misfits)


def _conversion_error(text: str, tensors: Iterable[str]) -> str:
    """Return what was to be put together, and what a conversion error says of it without its
    traceback.
    """
    counts = Counter(".".join(name.split(".")[-2:]) for name in tensors)
    message, _, which = text.rpartition("\nError")
    operation = re.split(
        r" on tensors| when ", which.removeprefix(" via").lstrip(": "), maxsplit=1
    )[0]
    given = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    return " ".join(f"{given}; {operation}: {message.strip().rpartition(chr(10))[2]}".split())[:300]


def _shared(misfits: list[Misfit], base: Checkpoint | None) -> list[Misfit]:
    """Return the misfits that the base has as well: they are transformers', not the export's."""
    if base is None or not misfits:
        return []
    try:
        theirs = set(_names(*model_class(base), base)[1])
    except ContentError:
        return []
    return [m for m in misfits if m in theirs]


def _dropped(model: Any, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the tensors that the model's class ignores by name (``mtp.…`` in several families) and
    that it has no parameter for.
    """
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    patterns = [re.compile(p) for p in ignored]
    names = [n for n in checkpoint.tensors if any(p.search(n) for p in patterns)]
    keys, state = hf.parameter_keys(model, names), model.state_dict()
    return tuple(n for n in names if keys[n].name not in state)


def _native(checkpoint: Checkpoint) -> bool:
    """Whether this version of transformers has a quantizer for what config.json declares."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # noqa: PLC0415

    declared = (checkpoint.config or {}).get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    return isinstance(method, str) and method in AUTO_QUANTIZATION_CONFIG_MAPPING


def _device(size: int, memory: int | None) -> str:
    """Return where a model of so many bytes fits, or ''."""
    if memory is not None:
        return "cpu" if size * ROOM <= memory else ""
    if torch.cuda.is_available() and size * ROOM <= free_memory("cuda"):
        return "cuda"
    return "cpu" if size * ROOM <= free_memory() else ""


def _forward(checkpoint: Checkpoint, base: Checkpoint | None, device: str) -> Forward:
    """Return what a forward pass gives, and how far it is from the base's.

    Raises:
        ContentError: the candidate cannot be loaded or run.
    """
    mine = _logits(checkpoint, device)
    finite = torch.isfinite(mine).all(dim=-1)
    found = Forward(len(mine), int((~finite).sum()))
    if base is None or found.broken:
        return replace(
            found, why_not="there is no base" if base is None else "the logits are not finite"
        )
    try:
        theirs = _logits(base, device)
    except ContentError as error:
        return replace(found, why_not=f"the base: {_without_uri(error, base)}")
    if theirs.shape != mine.shape or not torch.isfinite(theirs).all():
        what = (
            "are not finite" if theirs.shape == mine.shape else f"have shape {list(theirs.shape)}"
        )
        return replace(found, why_not=f"the base's logits {what}")
    # A constant added to all logits of a position changes no probability.
    a, b = (x - x.mean(dim=-1, keepdim=True) for x in (mine, theirs))
    size = float(torch.linalg.vector_norm(b))
    if size == 0:
        return replace(found, why_not="the base's logits are all equal")
    agree = int((a.argmax(dim=-1) == b.argmax(dim=-1)).sum())
    return replace(found, distance=float(torch.linalg.vector_norm(a - b)) / size, agree=agree)


def _logits(checkpoint: Checkpoint, device: str) -> torch.Tensor:
    """Return the logits of the fixed prompt, float32 [tokens, vocabulary]; the model is freed.

    Raises:
        ContentError: the model cannot be loaded, or its forward pass fails.
    """
    model = load_model(checkpoint, device=device).model
    try:
        ids = torch.tensor(
            [prompt(model.get_input_embeddings().num_embeddings, checkpoint.config or {})],
            device=device,
        )
        with torch.inference_mode(), hf.quiet():
            logits: torch.Tensor = model(input_ids=ids).logits[0].float().cpu()
        return logits
    except hf.BUILD_ERRORS as error:
        raise ContentError(
            f"{checkpoint.uri}: the forward pass fails: {hf.one_line(error)}"
        ) from error
    finally:
        del model
        gc.collect()


def prompt(vocabulary: int, config: Mapping[str, Any]) -> list[int]:
    """Return the fixed prompt: ids spread over the vocabulary, none that the config gives a meaning
    (an image, an end).
    """
    special = set(_special(config))
    found: list[int] = []
    for i in range(16 * PROMPT):
        token = (7919 * i + 31) % vocabulary
        if token not in special:
            found.append(token)
        if len(found) == PROMPT:
            break
    return found or [0]


def _special(node: Mapping[str, Any]) -> Iterable[int]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif "token" in key:
            yield from (
                v for v in (value if isinstance(value, list) else [value]) if type(v) is int
            )
