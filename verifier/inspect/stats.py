# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in numbers: formats by role, bits per parameter, and at depth payload the values of
the scales.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import Checkpoint, Tensor, open_checkpoint
from verifier.errors import UsageError
from verifier.inspect.diff import precision_of, problems_of
from verifier.layouts.expert_stacks import unstacked
from verifier.quantized import QuantizedCheckpoint
from verifier.schemes import SCALE_LEAVES, Module, role
from verifier.text import counted

Kind = Literal["E4M3", "E8M0", "F32"]
Progress = Callable[[int, int], None]
CODES = 256
E4M3_FLOOR = 0x01  # 2^-9, the smallest value above zero


@dataclass(frozen=True, slots=True)
class RoleStats:
    """The modules of one role and format. ``parameters`` is None if the format is not known.

    ``weight_bytes`` are weights, ``scale_bytes`` all scales of weights and activations,
    ``other_bytes`` biases and KV scales.
    """

    role: str
    format: str
    modules: int
    parameters: int | None
    weight_bytes: int
    scale_bytes: int
    other_bytes: int

    @property
    def bits(self) -> float | None:
        """Bits per parameter, weights and scales together; None if the parameters are not
        known.
        """
        if not self.parameters:
            return None
        return 8 * (self.weight_bytes + self.scale_bytes) / self.parameters


@dataclass(slots=True)
class ScaleCodes:
    """How often each one-byte code of a scale occurs, by role."""

    format: str
    leaf: str
    kind: Kind
    roles: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """The counts of all roles together, int64 [256]."""
        total = np.zeros(CODES, np.int64)
        for counts in self.roles.values():
            total += counts
        return total


@dataclass(slots=True)
class FloatScales:
    """The values of a float32 scale in one role.

    ``low_at`` and ``high_at`` name the tensors with the smallest and largest finite value.
    """

    format: str
    leaf: str
    role: str
    count: int = 0
    zero: int = 0
    negative: int = 0
    invalid: int = 0
    distinct: int = 0
    low: float | None = None
    high: float | None = None
    low_at: str = ""
    high_at: str = ""
    seen: set[float] = field(default_factory=set, repr=False)


@dataclass(frozen=True)
class CheckpointStats:
    """A checkpoint in numbers; ``codes`` and ``floats`` are empty at depth header."""

    uri: str
    model_type: str | None
    tensors: int
    shards: int
    nbytes: int
    rows: tuple[RoleStats, ...]
    problems: tuple[str, ...]
    depth: str
    codes: tuple[ScaleCodes, ...] = ()
    floats: tuple[FloatScales, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def total(self) -> RoleStats:
        """The sum of all rows; its parameters are None if those of any row are not known."""
        known = [r for r in self.rows if r.parameters is not None]
        parameters = sum(r.parameters or 0 for r in known)
        modules = sum(r.modules for r in self.rows)
        weight, scale, other = (
            sum(getattr(r, k) for r in self.rows)
            for k in ("weight_bytes", "scale_bytes", "other_bytes")
        )
        return RoleStats(
            "all",
            "",
            modules,
            parameters if len(known) == len(self.rows) else None,
            weight,
            scale,
            other,
        )


def stats(
    uri: str | os.PathLike[str], *, depth: str = "header", progress: Progress | None = None
) -> CheckpointStats:
    """Return a checkpoint in numbers.

    Args:
        uri: a path or an fsspec URL.
        depth: ``header``, or ``payload`` to read every scale.
        progress: called with (bytes read, total bytes) while scales are read.

    Raises:
        UsageError: no such directory or depth.
        ContentError: not a checkpoint.
        MachineError: reading failed.
    """
    if depth not in ("header", "payload"):
        raise UsageError(f"unknown depth {depth!r}; one of header, payload")
    checkpoint = open_checkpoint(uri)
    quantized = QuantizedCheckpoint(unstacked(checkpoint))
    groups: dict[tuple[str, str], list[Module]] = {}
    for module in quantized.modules.values():
        key = (role(module.name), precision_of(quantized, module))
        groups.setdefault(key, []).append(module)
    rows = tuple(_row(r, f, modules) for (r, f), modules in sorted(groups.items()))
    head = (
        checkpoint.uri,
        checkpoint.model_type,
        len(checkpoint.tensors),
        len(checkpoint.shards),
        checkpoint.nbytes,
        rows,
        problems_of(checkpoint),
    )
    if depth == "header":
        return CheckpointStats(*head, depth)
    return CheckpointStats(*head, depth, *_scales(quantized.checkpoint, groups, progress))


def parameters(module: Module) -> int | None:
    """Return the number of parameters of a module, or None if its format is not known."""
    weight = module.weight
    if weight is None:
        return 0
    if weight.dtype != "U8":
        return weight.elements
    scale = module.parts.get("weight_scale")
    return 2 * weight.elements if scale is not None and scale.dtype == "F8_E4M3" else None


def _row(role_: str, format_: str, modules: list[Module]) -> RoleStats:
    weight = scale = other = 0
    counts = [parameters(m) for m in modules]
    for module in modules:
        for leaf, tensor in module.parts.items():
            if tensor is module.weight:
                weight += tensor.nbytes
            elif leaf in SCALE_LEAVES:
                scale += tensor.nbytes
            else:
                other += tensor.nbytes
    known = [c for c in counts if c is not None]
    total = sum(known) if len(known) == len(counts) else None
    return RoleStats(role_, format_, len(modules), total, weight, scale, other)


def _scales(
    checkpoint: Checkpoint, groups: dict[tuple[str, str], list[Module]], progress: Progress | None
) -> tuple[tuple[ScaleCodes, ...], tuple[FloatScales, ...], tuple[str, ...]]:
    work = [
        (role_, format_, leaf, tensor)
        for (role_, format_), modules in sorted(groups.items())
        for module in modules
        for leaf, tensor in module.parts.items()
        if leaf in SCALE_LEAVES and tensor is not module.weight
    ]
    checkpoint.expect(t for *_, t in work)
    total, done = sum(t.nbytes for *_, t in work), 0
    codes: dict[tuple[str, str, Kind], ScaleCodes] = {}
    floats: dict[tuple[str, str, str], FloatScales] = {}
    skipped: Counter[str] = Counter()
    for role_, format_, leaf, tensor in work:
        kind = _kind(tensor, format_)
        if kind is None:
            skipped[f"{leaf} of dtype {tensor.dtype}"] += 1
        elif kind == "F32":
            scales = floats.setdefault((format_, leaf, role_), FloatScales(format_, leaf, role_))
            _add(scales, tensor, checkpoint.array(tensor).reshape(-1))
        else:
            entry = codes.setdefault((format_, leaf, kind), ScaleCodes(format_, leaf, kind))
            counts = np.bincount(checkpoint.read(tensor), minlength=CODES).astype(np.int64)
            entry.roles[role_] = entry.roles.get(role_, np.zeros(CODES, np.int64)) + counts
        done += tensor.nbytes
        if progress:
            progress(done, total)
    for scales in floats.values():
        scales.distinct = len(scales.seen)
    uncounted = tuple(f"{counted(n, 'tensor')} {kind}" for kind, n in skipped.items())
    return (
        tuple(codes.values()),
        tuple(sorted(floats.values(), key=lambda f: (f.format, f.leaf, f.role))),
        uncounted,
    )


def _kind(tensor: Tensor, format_: str) -> Kind | None:
    if tensor.dtype == "F8_E4M3":
        return "E4M3"
    if tensor.dtype == "F8_E8M0" or (tensor.dtype == "U8" and format_ == "MXFP8"):
        return "E8M0"
    return "F32" if tensor.dtype == "F32" else None


def _add(scales: FloatScales, tensor: Tensor, values: npt.NDArray[np.float32]) -> None:
    finite = np.isfinite(values)
    scales.count += int(values.size)
    scales.invalid += int(values.size - finite.sum())
    scales.zero += int((values == 0).sum())
    scales.negative += int((values < 0).sum())
    if len(scales.seen) < 100_000:
        scales.seen.update(np.unique(values[finite])[:100_000].tolist())
    if not finite.any():
        return
    low, high = float(values[finite].min()), float(values[finite].max())
    if scales.low is None or low < scales.low:
        scales.low, scales.low_at = low, tensor.name
    if scales.high is None or high > scales.high:
        scales.high, scales.high_at = high, tensor.name


def shares(counts: npt.NDArray[np.int64], kind: Kind) -> dict[str, int]:
    """Return the number of scales with a notable value.

    Keys: ``total``, ``invalid``; for E4M3 also ``zero``, ``negative``, ``floor`` (2^-9, the lower
    clamp) and ``max`` (448); for E8M0 ``least`` (2^-127).
    """
    total = int(counts.sum())
    if kind == "E8M0":
        return {"total": total, "invalid": int(counts[0xFF]), "least": int(counts[0x00])}
    return {
        "total": total,
        "invalid": int(counts[0x7F] + counts[0xFF]),
        "zero": int(counts[0x00] + counts[0x80]),
        "negative": int(counts[0x81:0xFF].sum()),
        "floor": int(counts[E4M3_FLOOR]),
        "max": int(counts[0x7E]),
    }


def bins(counts: npt.NDArray[np.int64], kind: Kind) -> list[tuple[str, int]]:
    """Return (label, count) by power of two, from the smallest to the largest that occurs.

    E4M3 has one bin for 2^-9, the other subnormals by their power of two, then one bin per binade;
    negative codes count by magnitude. NaN has its own bin if it occurs.
    """
    exponents: dict[int, int] = {}
    if kind == "E8M0":
        nan, zero = int(counts[0xFF]), 0
        for code in range(0xFF):
            exponents[code - 127] = int(counts[code])
    else:
        both = counts[:0x80] + counts[0x80:]
        nan, zero = int(both[0x7F]), int(both[0])
        for code in range(1, 0x7F):
            exponent = (code >> 3) - 7 if code >> 3 else code.bit_length() - 10
            exponents[exponent] = exponents.get(exponent, 0) + int(both[code])
    seen = [e for e, n in exponents.items() if n]
    rows = [("0", zero)] if zero else []
    if seen:
        rows += _folded([(e, exponents[e]) for e in range(min(seen), max(seen) + 1)])
    return rows + ([("NaN", nan)] if nan else [])


def _folded(rows: list[tuple[int, int]], limit: int = 32) -> list[tuple[str, int]]:
    """Return at most ``limit`` rows; neighbors are combined."""
    step = -(-len(rows) // limit)
    parts: Iterable[list[tuple[int, int]]] = (rows[i : i + step] for i in range(0, len(rows), step))
    return [
        (f"2^{p[0][0]}" + (f"..2^{p[-1][0]}" if len(p) > 1 else ""), sum(n for _, n in p))
        for p in parts
    ]
