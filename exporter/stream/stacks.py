# SPDX-License-Identifier: Apache-2.0
"""Write stacks of experts: some experts at a time, each one call of a codec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch

from exporter import codecs, weights
from exporter.layout import Stack, read_region
from exporter.plan import Plan, Restack
from verifier.checkpoint import Checkpoint, Tensor
from verifier.errors import EncodeError
from verifier.schemes import FORMATS

CHUNK = 128 << 20
"""Bytes of float32 values of a stack that are worked on at a time; one expert is the least."""
Put = Callable[[str, torch.Tensor, int], None]
_TORCH = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def write_restack(action: Restack, plan: Plan, put: Put) -> tuple[float, float, int, int]:
    """Write the stacks of an action.

    Args:
        action: what to write.
        plan: what it belongs to.
        put: called with a tensor's name, what belongs into it, and at which byte of it.

    Returns:
        The smallest and largest effective scale; the blocks of 16 that were read from MXFP4, and
        those that lost something.

    Raises:
        EncodeError: a weight that cannot be encoded, by name.
    """
    low, high, blocks, lost = float("inf"), 0.0, 0, 0
    owed = {s.name: s.nbytes for s in action.specs}
    shared = _shared(action, plan) if action.one_scale else None
    for start, stop in _chunks(action):
        parts, n, odd = _encoded(action, plan, start, stop, shared)
        blocks, lost = blocks + n, lost + odd
        for i, each in enumerate(parts):
            specs = action.specs_of(i)
            for leaf, value in each.items():
                name = (
                    action.scale_leaf
                    if leaf == "weight_scale" and action.scale_leaf in specs
                    else leaf
                )
                spec = specs[name]
                if not spec.shape:
                    put(spec.name, value.reshape(-1)[:1], 0)
                    owed[spec.name] = 0
                    continue
                turned = action.stacks[i].written_turned and value.ndim == 3
                value = (value.transpose(1, 2) if turned else value).contiguous()
                put(spec.name, value, start * (spec.nbytes // spec.shape[0]))
                owed[spec.name] -= value.nbytes
            if action.format is not None:
                lo, hi = _range(each)
                low, high = min(low, lo), max(high, hi)
    for i in range(len(action.stacks)):
        if action.input_scales is not None:
            scales = torch.tensor(action.input_scales)
            put(name := action.specs_of(i)["input_scale"].name, scales, 0)
            owed[name] -= scales.nbytes
    if any(owed.values()):
        short = next(n for n, left in owed.items() if left)
        raise EncodeError(f"{short}: {owed[short]:,} bytes of it were not written")
    return low, high, blocks, lost


def _chunks(action: Restack) -> Iterator[tuple[int, int]]:
    """Yield ranges of experts."""
    experts, out, in_ = action.stacks[0].shape
    size = max(1, CHUNK // (out * in_ * 4 * len(action.stacks)))
    if action.method == "exact" and not action.one_scale:
        size = 1  # what shares a scale is one call
    yield from ((s, min(experts, s + size)) for s in range(0, experts, size))


def _encoded(
    action: Restack, plan: Plan, start: int, stop: int, shared: torch.Tensor | int | None
) -> tuple[list[codecs.Parts], int, int]:
    if action.method == "exact":
        read = [_parts(plan.source, s, start, stop) for s in action.stacks]
        try:
            return weights.exact(read, top=shared if isinstance(shared, int) else None)
        except EncodeError as error:
            raise EncodeError(f"{action.stacks[0].key} [expert {start} and on]: {error}") from error
    values = [load_stack(plan.source, action, s, start, stop) for s in action.stacks]
    if action.format is None:
        return [{"weight": v.to(torch.bfloat16)} for v in values], 0, 0
    amax = shared if isinstance(shared, torch.Tensor) else None
    if amax is None and action.format.packed:
        amax = torch.stack(
            [_amax(action, s, v, start) for s, v in zip(action.stacks, values, strict=True)]
        ).amax(0)
    found = []
    for stack, value in zip(action.stacks, values, strict=True):
        method = cast(weights.Method, action.method)
        try:
            found.append(weights.encode(value, action.format.name, method=method, amax=amax))
        except EncodeError as error:
            raise EncodeError(f"{stack.key} [expert {start} and on]: {error}") from error
    return found, 0, 0


def _shared(action: Restack, plan: Plan) -> torch.Tensor | int | None:
    """Return what all experts of a stack share: the maximum, or the exponent of the largest MXFP4
    scale.
    """
    if action.method == "exact":
        tops = [
            top
            for s in action.stacks
            for a, b in _chunks(action)
            if (top := weights.top_exponent(_parts(plan.source, s, a, b))) is not None
        ]
        return max(tops, default=None)
    if action.format is None or not (action.format.packed or action.format.name == "fp8"):
        return None
    maxima = []
    for stack in action.stacks:
        for start, stop in _chunks(action):
            maxima.append(
                _amax(
                    action, stack, load_stack(plan.source, action, stack, start, stop), start
                ).amax()
            )
    return torch.stack(maxima).amax()


def _amax(action: Restack, stack: Stack, value: torch.Tensor, start: int) -> torch.Tensor:
    fmt = action.format or FORMATS["nvfp4"]
    try:
        return codecs.amax(value, fmt.name)
    except EncodeError as error:
        raise EncodeError(f"{stack.key} [expert {start} and on]: {error}") from error


def load_stack(
    ckpt: Checkpoint, action: Restack, stack: Stack, start: int, stop: int
) -> torch.Tensor:
    """Return the values of some experts of a stack, [experts, out, in]: as stored, or decoded to
    float32.

    Raises:
        EncodeError: the tensors of a quantized stack do not fit one another.
    """
    parts = _parts(ckpt, stack, start, stop)
    if action.read is None:
        return parts["weight"]
    try:
        return codecs.decode(parts, action.read.name)
    except EncodeError as error:
        raise EncodeError(f"{stack.key}: {error}") from error


def _parts(ckpt: Checkpoint, stack: Stack, start: int, stop: int) -> codecs.Parts:
    """Return the tensors of some experts of a stack by leaf, [experts, out, in]; FP8 codes as their
    bytes.
    """
    found: codecs.Parts = {}
    for leaf, tensor in stack.parts.items():
        if leaf in ("bias", "input_scale", "input_global_scale", "pre_quant_scale"):
            continue
        value = _tensor(ckpt, tensor, start, stop)
        found[leaf] = value.transpose(1, 2) if stack.turned and value.ndim == 3 else value
    return found


def _tensor(ckpt: Checkpoint, tensor: Tensor, start: int, stop: int) -> torch.Tensor:
    each = bool(tensor.shape) and tensor.elements > 1
    runs = (
        [(start, 1, stop - start, False), *((0, 1, n, False) for n in tensor.shape[1:])]
        if each
        else []
    )
    raw: np.ndarray = read_region(ckpt, tensor, runs, ())
    shape = (stop - start, *tensor.shape[1:]) if each else ()
    flat = torch.from_numpy(raw.reshape(-1).view(np.uint8).copy())
    return flat.view(_TORCH.get(tensor.dtype, torch.uint8)).reshape(shape)


def _range(parts: codecs.Parts) -> tuple[float, float]:
    """Return the smallest and largest effective scale of some experts."""
    scale = parts["weight_scale"] if "weight_scale" in parts else parts["weight_scale_inv"]
    if scale.dtype == torch.float32:
        return float(scale.min()), float(scale.max())
    if scale.dtype == torch.uint8:
        return 2.0 ** (int(scale.min()) - 127), 2.0 ** (int(scale.max()) - 127)
    raw, whole = scale.view(torch.uint8).flatten(1), parts["weight_scale_2"].reshape(-1)
    ends = [e.view(torch.float8_e4m3fn).float() * whole for e in (raw.amin(1), raw.amax(1))]
    return float(ends[0].min()), float(ends[1].max())
