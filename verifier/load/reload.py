# SPDX-License-Identifier: Apache-2.0
"""Depth load: a checkpoint, decoded by the verifier, in transformers' own loader.

First names and shapes, on the meta device: seconds at any size, and no byte of a tensor is read.
Then, if the model fits in memory, its values and a forward pass on a fixed prompt, compared with
the base's logits. The result is plain data (`verifier.rules.loading`), which the rules QC606 and
QC608 check.
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
"""Memory of a load, as a factor of the model's values in BF16."""


def reload(
    checkpoint: Checkpoint, base: Checkpoint | None = None, *, memory: int | None = None
) -> Loaded:
    """Return what transformers makes of a checkpoint.

    Args:
        checkpoint: what to load.
        base: the checkpoint to compare logits with; misfits that it has too are reported as shared.
        memory: bytes that the values of one model may take; None takes the free memory, and 0 loads
            no values.
    """
    loader = f"transformers {transformers.__version__}"
    try:
        cls, config = model_class(checkpoint)
        model, misfits = _names(cls, config, checkpoint)
    except ContentError as error:
        return Loaded(loader, reason=_without_uri(error, checkpoint))
    shared = _shared(misfits, base)
    keys = model.state_dict()
    loaded = Loaded(
        loader,
        keys=len(keys),
        misfits=tuple(m for m in misfits if m not in shared),
        shared=tuple(shared),
        dropped=_dropped(model, checkpoint),
        native=_native(checkpoint),
    )
    if any(m.kind != "unexpected" for m in misfits):
        return replace(loaded, why_no_values="names and shapes do not fit the model")
    size = sum(2 * v.numel() for v in keys.values())
    del model, keys
    device = _device(size, memory)
    if not device:
        left = free_memory() if memory is None else memory
        need = f"its values take {size * ROOM / 1e9:,.1f} GB of memory"
        return replace(loaded, why_no_values=f"{need}, and {left / 1e9:,.1f} GB are free")
    try:
        forward = _forward(checkpoint, base, device)
    except ContentError as error:
        return replace(loaded, why_no_values=_without_uri(error, checkpoint))
    return replace(loaded, forward=forward)


def _without_uri(error: Exception, checkpoint: Checkpoint) -> str:
    return str(error).removeprefix(f"{checkpoint.uri}: ")


class _Shape:
    """In place of a tensor of which the loader reads the shape only."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __getitem__(self, _index: Any) -> torch.Tensor:
        return torch.empty(self._shape, dtype=torch.bfloat16, device="meta")


def _names(cls: Any, config: Any, checkpoint: Checkpoint) -> tuple[Any, list[Misfit]]:
    """Load names and shapes; return the model on the meta device and its misfits.

    Raises:
        ContentError: the model cannot be built, or a tensor's format cannot be inferred.
    """
    state = {name: _Shape(lazy.shape) for name, lazy in decoded_tensors(checkpoint).items()}
    model, report = hf.load_shapes(checkpoint.uri, cls, config, state)
    return model, _misfits(model, report, state)


def _misfits(model: Any, report: Any, names: Iterable[str]) -> list[Misfit]:
    """Return the misfits of a loading report, by tensor name where it is known."""
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
        Misfit("mismatched", tensor_name(k), str(list(shape)), str(list(expected)))
        for k, shape, expected in mismatched
    ]
    misfits += [
        Misfit("unconverted", k, _conversion_error(text, tensors.get(k, [])))
        for k, text in unconverted.items()
    ]
    return sorted(misfits)


def _conversion_error(text: str, tensors: Iterable[str]) -> str:
    """Return the tensors of a failed conversion and its error message without the traceback."""
    counts = Counter(".".join(name.split(".")[-2:]) for name in tensors)
    message, _, which = text.rpartition("\nError")
    operation = re.split(
        r" on tensors| when ", which.removeprefix(" via").lstrip(": "), maxsplit=1
    )[0]
    inputs = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    return " ".join(f"{inputs}; {operation}: {message.strip().rpartition(chr(10))[2]}".split())[
        :300
    ]


def _shared(misfits: list[Misfit], base: Checkpoint | None) -> list[Misfit]:
    """Return the misfits that the base has as well: they are transformers', not the export's."""
    if base is None or not misfits:
        return []
    try:
        base_misfits = set(_names(*model_class(base), base)[1])
    except ContentError:
        return []
    return [m for m in misfits if m in base_misfits]


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
    """Run a forward pass on the fixed prompt and compare its logits with the base's.

    Raises:
        ContentError: the candidate cannot be loaded or run.
    """
    logits = _logits(checkpoint, device)
    finite = torch.isfinite(logits).all(dim=-1)
    forward = Forward(len(logits), int((~finite).sum()))
    if forward.broken:
        return replace(forward, why_not="the logits are not finite")
    if base is None:
        return replace(forward, why_not="there is no base")
    try:
        base_logits = _logits(base, device)
    except ContentError as error:
        return replace(forward, why_not=f"the base: {_without_uri(error, base)}")
    if base_logits.shape != logits.shape:
        shape = list(base_logits.shape)
        return replace(forward, why_not=f"the base's logits have shape {shape}")
    if not torch.isfinite(base_logits).all():
        return replace(forward, why_not="the base's logits are not finite")
    # A constant added to all logits of a position changes no probability.
    a, b = (x - x.mean(dim=-1, keepdim=True) for x in (logits, base_logits))
    size = float(torch.linalg.vector_norm(b))
    if size == 0:
        return replace(forward, why_not="the base's logits are all equal")
    agree = int((a.argmax(dim=-1) == b.argmax(dim=-1)).sum())
    return replace(forward, distance=float(torch.linalg.vector_norm(a - b)) / size, agree=agree)


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
    """Return the fixed prompt: token ids spread over the vocabulary, without the special tokens of
    the config.
    """
    special = set(_special(config))
    ids: list[int] = []
    for i in range(16 * PROMPT):
        token = (7919 * i + 31) % vocabulary
        if token not in special:
            ids.append(token)
        if len(ids) == PROMPT:
            break
    return ids or [0]


def _special(node: Mapping[str, Any]) -> Iterable[int]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif "token" in key:
            yield from (
                v for v in (value if isinstance(value, list) else [value]) if type(v) is int
            )
