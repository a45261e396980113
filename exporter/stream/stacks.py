# SPDX-License-Identifier: Apache-2.0
"""Write stacks of experts: some experts at a time, each one call of a codec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch

from exporter import codecs, weights
from exporter.plan import Restack
from exporter.stream.load import load_stack, load_stack_parts, naming
from exporter.stream.summary import EncodeSummary, scale_range
from verifier.checkpoint import Checkpoint
from verifier.errors import EncodeError
from verifier.layouts.expert_stacks import StoredStack

CHUNK = 128 << 20
"""Bytes of float32 values of a stack that are in memory at a time; at least one expert."""
Put = Callable[[str, torch.Tensor, int], None]
"""Takes a tensor's name, values of it, and the byte of it where they belong."""


def write_restack(action: Restack, source: Checkpoint, put: Put) -> list[EncodeSummary]:
    """Write the stacks of an action, and return a summary of what was encoded.

    Args:
        action: what to write.
        source: the checkpoint that it reads.
        put: called for each part of a tensor.

    Raises:
        EncodeError: a weight that cannot be encoded, by name.
    """
    writer = _StackWriter(action, put)
    encoder = _StackEncoder(action, source)
    low, high, blocks, changed = float("inf"), 0.0, 0, 0
    for start, stop in _chunks(action):
        stacks, chunk_blocks, chunk_changed = encoder.encode(start, stop)
        blocks, changed = blocks + chunk_blocks, changed + chunk_changed
        for i, parts in enumerate(stacks):
            writer.write(i, parts, start)
            if action.format is not None:
                part_low, part_high = scale_range(parts)
                low, high = min(low, part_low), max(high, part_high)
    writer.finish()
    if action.format is None:
        return []
    return [EncodeSummary(action.format.algo, len(action.modules), low, high, blocks, changed)]


class _StackWriter:
    """Puts the parts of an action's stacks in place, and counts the bytes that are left."""

    def __init__(self, action: Restack, put: Put) -> None:
        self._action, self._put = action, put
        self._remaining = {spec.name: spec.nbytes for spec in action.specs}

    def write(self, index: int, parts: codecs.Parts, start: int) -> None:
        """Write the tensors of some experts, from expert ``start`` on."""
        specs, stack = self._action.specs_of(index), self._action.stacks[index]
        for leaf, value in parts.items():
            renamed = leaf == "weight_scale" and self._action.scale_leaf in specs
            spec = specs[self._action.scale_leaf if renamed else leaf]
            if not spec.shape:
                self._put(spec.name, value.reshape(-1)[:1], 0)
                self._remaining[spec.name] = 0
                continue
            if stack.hub_transposed and value.ndim == 3:
                value = value.transpose(1, 2)
            self._put(spec.name, value.contiguous(), start * (spec.nbytes // spec.shape[0]))
            self._remaining[spec.name] -= value.nbytes

    def finish(self) -> None:
        """Write the input scales.

        Raises:
            EncodeError: bytes that were not written, which is a defect of the writer.
        """
        if self._action.input_scales is not None:
            scales = torch.tensor(self._action.input_scales)
            for i in range(len(self._action.stacks)):
                name = self._action.specs_of(i)["input_scale"].name
                self._put(name, scales, 0)
                self._remaining[name] -= scales.nbytes
        for name, count in self._remaining.items():
            if count:
                raise EncodeError(f"{name}: {count:,} bytes of it were not written")


class _StackEncoder:
    """Encodes some experts of an action's stacks at a time.

    Where the family has one scale per stack, the maximum of all experts (or the exponent of the
    largest MXFP4 scale) is read first.
    """

    def __init__(self, action: Restack, source: Checkpoint) -> None:
        self._action, self._source = action, source
        self._top: int | None = None
        self._amax: torch.Tensor | None = None
        if action.one_scale and action.method == "exact":
            self._top = self._top_exponent()
        elif action.one_scale and action.format is not None:
            if action.format.packed or action.format.name == "fp8":
                self._amax = self._stack_amax(action.format.name)

    def encode(self, start: int, stop: int) -> tuple[list[codecs.Parts], int, int]:
        """Return the tensors of some experts, stack by stack; of MXFP4 sources the blocks of 16 and
        those that changed.

        Raises:
            EncodeError: a weight that cannot be encoded, by name.
        """
        action = self._action
        if action.method == "exact":
            parts = [load_stack_parts(self._source, s, start, stop) for s in action.stacks]
            with naming(f"{action.stacks[0].key} [experts {start} to {stop - 1}]"):
                return weights.exact(parts, top=self._top)
        values = [load_stack(self._source, action, s, start, stop) for s in action.stacks]
        if action.format is None:
            return [{"weight": v.to(torch.bfloat16)} for v in values], 0, 0
        amax = self._amax
        if amax is None and action.format.packed:
            pairs = zip(action.stacks, values, strict=True)
            maxima = [self._expert_amax(s, v, start, action.format.name) for s, v in pairs]
            amax = torch.stack(maxima).amax(0)
        method = cast(weights.Method, action.method)
        encoded = []
        for stack, value in zip(action.stacks, values, strict=True):
            with naming(f"{stack.key} [experts {start} to {stop - 1}]"):
                encoded.append(weights.encode(value, action.format.name, method=method, amax=amax))
        return encoded, 0, 0

    def _top_exponent(self) -> int | None:
        """Return the exponent of the largest MXFP4 scale of the stacks."""
        exponents = []
        for stack in self._action.stacks:
            for start, stop in _chunks(self._action):
                parts = load_stack_parts(self._source, stack, start, stop)
                exponents.append(weights.top_exponent(parts))
        return max((e for e in exponents if e is not None), default=None)

    def _stack_amax(self, fmt: str) -> torch.Tensor:
        """Return the largest magnitude of the stacks, a float32 scalar."""
        maxima = []
        for stack in self._action.stacks:
            for start, stop in _chunks(self._action):
                value = load_stack(self._source, self._action, stack, start, stop)
                maxima.append(self._expert_amax(stack, value, start, fmt).amax())
        return torch.stack(maxima).amax()

    @staticmethod
    def _expert_amax(stack: StoredStack, value: torch.Tensor, start: int, fmt: str) -> torch.Tensor:
        """Return the largest magnitude of each expert, float32 [experts]."""
        with naming(f"{stack.key} [experts {start} to {start + len(value) - 1}]"):
            return codecs.amax(value, fmt)


def _chunks(action: Restack) -> Iterator[tuple[int, int]]:
    """Yield ranges of experts that fit in memory together."""
    experts, out, in_ = action.stacks[0].shape
    size = max(1, CHUNK // (out * in_ * 4 * len(action.stacks)))
    if action.method == "exact" and not action.one_scale:
        size = 1  # what shares a scale is one call
    yield from ((start, min(experts, start + size)) for start in range(0, experts, size))
