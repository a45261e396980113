# SPDX-License-Identifier: Apache-2.0
"""Compares a quantized weight with its base and names the one cause of a difference.

Several rules ask about every weight and exactly one of them reports it: QC507 (duplicate), QC509
(inverted), QC510 (nibbles), QC511 (order), QC512 (e8m0), QC517 (part), QC515 (everything else;
values that were moved on purpose, for information). A weight is compared once for all of them, in
chunks of rows; only one that is not as near as its format allows is decoded whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.decoding import Float32, decode
from verifier.decoding.parts import as_floats
from verifier.errors import ContentError
from verifier.payload.reader import PayloadReader
from verifier.quantized import QuantizedCheckpoint
from verifier.reconstruction.blocks import (
    Blocks,
    WeightPair,
    foreign_blocks,
    is_moved,
    is_off_by_a_factor,
    norm,
    relative_error,
    rescaled_blocks,
    rescaled_groups,
)
from verifier.reconstruction.distance import along
from verifier.reconstruction.exponents import e8m0_zeros
from verifier.reconstruction.rows import WeightRows
from verifier.reconstruction.yardstick import by_max, is_compared, nearest
from verifier.schemes import SCALE_BITS, ExpertKey, Format, Module, expert_key

Cause = Literal[
    "",
    "unjudged",
    "bad scale",
    "zero base",
    "nan codes",
    "overflow",
    "lost",
    "weak",
    "inverted",
    "nibbles",
    "order",
    "e8m0",
    "duplicate",
    "part",
    "moved",
    "explained",
    "unexplained",
]
UNDECODED = "the values cannot be decoded"
NO_NUMBERS = "the base has NaN or infinite values"
EXACT = 1e-3
"""A relative error below this is none."""
WEAK = 1.25
LOST = 0.5
EXPLAINED = 0.2
"""A cause explains a lost weight where undoing it brings the relative error below this, or below
1.5 times what ``max`` gives."""
BIAS = 0.03
"""A weight whose values are off by more than this as a whole has the scales of different values:
minimizing the squared error leaves the square of the relative error (0.01 for NVFP4), and one step
of an E4M3 scale is 0.06 to 0.12."""
SMALL_BIAS, NOISE = 0.004, 0.3
"""A weight whose values are off by more than this as a whole is compared value by value. Sound
weights of N values stay within 0.2 / sqrt(N) (measured on the exports of all goldens: at most
0.0039 with 3,072 values)."""
E8M0_WIDESPREAD = 0.1
_PARTNERS = {
    "gate_proj": "up_proj",
    "up_proj": "gate_proj",
    "w1": "w3",
    "w3": "w1",
    "k_proj": "v_proj",
    "v_proj": "k_proj",
}


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """The result of a comparison.

    Attributes:
        cause: of the difference, '' where the weight is as near as its format allows.
        reason: why nothing was compared (cause ``unjudged``).
        relative: relative error of the stored weight.
        best: relative error that the format allows on this tensor.
        by_max: relative error under ``max`` calibration.
        detail: more about the cause, for the finding.
        place: row and block of the first affected block, or (byte, 0).
        count: affected blocks or bytes.
        bias: the factor by which the values are too large as a whole, minus one; 0 where it is no
            more than a format leaves.
    """

    cause: Cause
    reason: str = ""
    relative: float = 0.0
    best: float = 0.0
    by_max: float = 0.0
    detail: str = ""
    place: tuple[int, int] | None = None
    count: int = 1
    bias: float = 0.0

    @property
    def as_a_whole(self) -> str:
        """The bias in words, to follow the relative error."""
        return f", values {1 + self.bias:.3f} of the base's as a whole" if self.bias else ""


@dataclass(frozen=True, slots=True)
class CheckpointPair:
    """A checkpoint, its base, and the reader of the checkpoint's bytes."""

    candidate: QuantizedCheckpoint
    base: QuantizedCheckpoint
    payload: PayloadReader


def reconstruct(pair: CheckpointPair, module: Module) -> Reconstruction:
    """Return the comparison of a quantized weight with its base."""
    base_module, fmt = pair.base.modules.get(module.name), pair.candidate.format_of(module)
    if module.weight is None or base_module is None or fmt is None:
        return Reconstruction("unjudged", "the base has no such weight, or the format is not known")
    if not is_compared(fmt):
        return Reconstruction("unjudged", f"weights in {fmt.algo} are not compared with the base")
    try:
        near = near_base(pair, module, fmt)
    except ContentError:  # QC302, QC306, QC208 and QC518 report why
        return Reconstruction("unjudged", UNDECODED)
    return near if near is not None else _compare(pair, module, base_module, fmt)


def near_base(pair: CheckpointPair, module: Module, fmt: Format) -> Reconstruction | None:
    """Return the comparison of a weight whose every block is as near as its format allows, None for
    any other.

    Raises:
        ContentError: the two do not fit one another, or cannot be decoded.
    """
    rows = WeightRows(pair.candidate, module, pair.base, pair.base.modules[module.name])
    if not rows.same_shape:
        raise ContentError(f"{module.name}: the base's weight has a different shape")
    d, defined = rows.distance(fmt)
    if d.size == d.error == 0:
        return Reconstruction("")
    if not defined or d.size == 0 or not (np.isfinite(d.error) and np.isfinite(d.size)):
        return None
    relative, by_max = float(np.sqrt(d.error / d.size)), float(np.sqrt(d.by_max / d.size))
    # Rounding to the nearest takes half of the squared error from the values' common factor.
    values = math.prod(rows.module.dims or ())
    biased = abs(d.along + d.error / 2) > (SMALL_BIAS + NOISE / math.sqrt(values)) * d.size
    if relative >= EXACT and (d.suspect or relative > WEAK * by_max or biased):
        return None
    return Reconstruction("", relative=relative, best=by_max, by_max=by_max)


def _compare(
    pair: CheckpointPair, module: Module, base_module: Module, fmt: Format
) -> Reconstruction:
    """Return the comparison of a weight that is decoded whole."""
    base = pair.base.values(base_module)
    parts = {leaf: pair.payload.array(t) for leaf, t in module.parts.items()}
    try:
        decoded = decode(parts, fmt)
    except ContentError:
        decoded = None
    if base is None or decoded is None or base.shape != decoded.shape:
        return Reconstruction("unjudged", UNDECODED)
    if fmt.weight.codes == "e4m3" and module.weight is not None:
        codes = (
            np.ascontiguousarray(parts[module.signature.weight or ""]).view(np.uint8).reshape(-1)
        )
        nan = np.flatnonzero((codes & 0x7F) == 0x7F)
        if nan.size:
            return Reconstruction("nan codes", place=(int(nan[0]), 0), count=int(nan.size))
    size = norm(base)
    if not np.isfinite(size):
        return Reconstruction("unjudged", NO_NUMBERS)
    if _has_bad_scale(pair, module):
        return Reconstruction("bad scale")  # QC502
    infinite = np.flatnonzero(~np.isfinite(decoded))
    if infinite.size:
        place = np.unravel_index(int(infinite[0]), decoded.shape)
        return Reconstruction(
            "overflow", place=(int(place[-2]), int(place[-1])), count=int(infinite.size)
        )
    error = norm(decoded - base)
    if size == 0:
        return Reconstruction("zero base" if error > 0 else "")
    if error / size < EXACT:
        return Reconstruction("", relative=error / size)
    return _with_cause(pair, module, WeightPair(fmt, parts, decoded, base))


def _has_bad_scale(pair: CheckpointPair, module: Module) -> bool:
    """Whether a scale is NaN or infinite, or negative where it has to be positive, or zero where it
    is a divisor.
    """
    for _, fmt, sibling, tensor in pair.candidate.part([module]).scales_of(
        "scale", "tensor_scale", "pre_quant", "bias", "lora"
    ):
        dtype = sibling.values_in(tensor.dtype)
        if dtype not in SCALE_BITS:
            continue
        flaws = pair.payload.flaws(tensor, dtype)
        if flaws.nan.count or flaws.infinite.count or (sibling.divisor and flaws.zero.count):
            return True
        # Integers under a negative scale decode as well.
        signed = sibling.signed or sibling.role in ("bias", "lora") or fmt.weight.codes == "int"
        if flaws.negative.count and not signed:
            return True
    return False


def is_e8m0(fmt: Format, dtype: npt.DTypeLike) -> bool:
    """Whether a weight scale that is read as ``dtype`` holds exponents."""
    sibling = fmt.siblings[0]
    return (np.dtype(dtype) == np.uint8 and not sibling.holds and "U8" in sibling.dtypes) or (
        np.dtype(dtype) == ml_dtypes.float8_e8m0fnu
    )


def _with_cause(pair: CheckpointPair, module: Module, weight: WeightPair) -> Reconstruction:
    """Return the comparison of a weight that may differ by more than its format leaves."""
    base = weight.base
    encoded = by_max(base, weight.parts, weight.format)
    best = nearest(base, weight.parts, weight.format)
    known = _errors(weight, best, encoded)
    lost, limit = known.relative > max(LOST, 2 * known.by_max), max(EXPLAINED, 1.5 * known.by_max)
    if lost:
        cause, detail = _explanation(pair, module, weight, limit)
        if cause:
            return replace(known, cause=cause, detail=detail)
    affected, detail = _affected_blocks(weight, best, encoded, lost)
    if affected.count:
        place, count = affected.first, affected.count
        return replace(known, cause="part", place=place, count=count, detail=detail)
    if lost:
        return _similar_expert(pair, module, weight, known, limit)
    if known.bias:
        return replace(known, cause="weak")
    if known.relative <= WEAK * known.best:
        zeros = e8m0_zeros(pair.payload, module, weight.format)  # QC512 reports those blocks
        if zeros is None and is_off_by_a_factor(weight, best):
            blocks = weight.base.size // weight.width
            return replace(known, cause="part", place=(0, 0), count=blocks, detail="other scales")
        return known
    moved = known.relative <= 4 * known.best and is_moved(weight, best)
    return replace(known, cause="moved" if moved else "weak")


def _errors(weight: WeightPair, best: Float32, encoded: Float32 | None) -> Reconstruction:
    """Return the errors of a weight; ``best`` is the base under the stored scales, ``encoded`` the
    base under ``max`` calibration where that is defined.
    """
    size = norm(weight.base)
    relative, possible = (norm(x - weight.base) / size for x in (weight.decoded, best))
    by_max = norm(encoded - weight.base) / size if encoded is not None else possible
    bias = along(weight.decoded, weight.base) / size**2
    # Blocks at the format's smallest scale, and values that no code is near, are off whatever the
    # codes.
    least = max(abs(along(x, weight.base)) / size**2 for x in (best, encoded) if x is not None)
    biased = abs(bias) > BIAS + least and relative > 1.1 * by_max
    return Reconstruction(
        "",
        relative=relative,
        best=max(min(possible, 4 * by_max), by_max),
        by_max=by_max,
        bias=bias if biased else 0.0,
    )


def _affected_blocks(
    weight: WeightPair, best: Float32, encoded: Float32 | None, lost: bool
) -> tuple[Blocks, str]:
    """Return the blocks that differ where the others do not, and a detail for the finding."""
    foreign = foreign_blocks(weight, best)
    if foreign.count or encoded is None:
        return foreign, ""
    rescaled = rescaled_blocks(weight, encoded, best)
    if lost and rescaled.count > weight.base.size / weight.width / 2:
        rescaled = Blocks()
    if not rescaled.count and not lost and not weight.format.rowwise:
        rescaled = rescaled_groups(weight, encoded)
    return rescaled, "other scales"


def _explanation(
    pair: CheckpointPair, module: Module, weight: WeightPair, limit: float
) -> tuple[Cause, str]:
    """Return the defect that explains a lost weight and a detail, or '' twice.

    A defect explains it where undoing the defect leaves a relative error of at most ``limit``.
    """
    fmt = weight.format
    zeros = e8m0_zeros(pair.payload, module, fmt)
    if zeros is not None and zeros[0] > E8M0_WIDESPREAD * zeros[2]:
        return "e8m0", ""
    if _explains(decode(inverse(weight.parts, fmt), fmt), weight.base, limit):
        return "inverted", ""
    if fmt.packed:
        leaf = module.signature.weight or "weight"
        codes = weight.parts[leaf].view(np.uint8)
        swapped = {**weight.parts, leaf: (codes << 4) | (codes >> 4)}
        if _explains(decode(swapped, fmt), weight.base, limit):
            return "nibbles", ""
    for detail, values in _wrong_orders(pair.base, module, weight.base):
        if _explains(weight.decoded, values, limit):
            return "order", detail
    return "", ""


def _explains(values: Float32, target: Float32, limit: float) -> bool:
    return values.shape == target.shape and relative_error(values, target) <= limit


def inverse(parts: Mapping[str, npt.NDArray[Any]], fmt: Format) -> dict[str, npt.NDArray[Any]]:
    """Return the parts with the tensor's scale read by the opposite convention: 1/x, or 2^-e for
    E8M0.
    """
    result = dict(parts)
    packed = ("weight_scale_2", "weight_global_scale")
    for leaf in packed if fmt.packed else ("weight_scale", "weight_scale_inv"):
        if leaf not in parts:
            continue
        if is_e8m0(fmt, parts[leaf].dtype):
            exponents = parts[leaf].view(np.uint8).astype(np.int16)
            result[leaf] = np.maximum(254 - exponents, 0).astype(np.uint8)
        else:
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                result[leaf] = np.asarray(np.float32(1) / as_floats(parts[leaf]))
    return result


def _wrong_orders(
    base: QuantizedCheckpoint, module: Module, values: Float32
) -> Iterator[tuple[str, Float32]]:
    """Yield the values that a wrong split of a fused projection would have put here."""
    head, _, leaf = module.name.rpartition(".")
    partner = _PARTNERS.get(leaf)
    partner_module = base.modules.get(f"{head}.{partner}") if partner else None
    other = base.values(partner_module) if partner_module is not None else None
    if other is None or other.shape != values.shape:
        return
    yield f"the values are those of {partner}", other
    if leaf in ("k_proj", "v_proj"):
        return
    gate, up = (values, other) if leaf in ("gate_proj", "w1") else (other, values)
    rows, joined = len(values), np.concatenate([gate, up])
    detail = "every second row of gate and up behind one another: split as if interleaved"
    yield detail, joined[0::2]
    yield detail, joined[1::2]
    interleaved = np.stack([gate, up], axis=1).reshape(2 * rows, -1)
    detail = "rows of gate and up in turn: interleaved, and split in halves"
    yield detail, interleaved[:rows]
    yield detail, interleaved[rows:]


def _similar_expert(
    pair: CheckpointPair,
    module: Module,
    weight: WeightPair,
    known: Reconstruction,
    limit: float,
) -> Reconstruction:
    """Return a loss with the expert of the same layer whose base weight begins with this one's
    first row.

    Where that expert has the same bytes in the checkpoint, one is a duplicate of the other.
    """
    lost, key = replace(known, cause="lost"), expert_key(module.name)
    if key is None or not len(weight.decoded) or not np.any(weight.decoded[0]):
        return lost
    row = weight.decoded[0]
    errors = {
        name: relative_error(row, other)
        for name, other in _first_rows(pair, key).items()
        if other.shape == row.shape and name != module.name
    }
    expert = min(errors, key=errors.__getitem__, default="")
    if not expert or errors[expert] > limit:
        return lost
    return replace(
        lost, cause="duplicate" if _same_bytes(pair, module, expert) else "lost", detail=expert
    )


def _first_rows(pair: CheckpointPair, key: ExpertKey) -> Mapping[str, Float32]:
    """Return the first row of the base's weight of each expert of a layer, by module name."""
    rows: dict[str, dict[str, Float32]] = pair.payload.results.of_checkpoint("first rows", dict)
    kind = f"{key.container}.*.{key.leaf}"
    if kind not in rows:
        rows.clear()  # of one layer at a time: modules come in the order of the files
        rows[kind] = dict(_expert_rows(pair.base, key))
    return rows[kind]


def _expert_rows(base: QuantizedCheckpoint, key: ExpertKey) -> Iterator[tuple[str, Float32]]:
    for module in base.modules.values():
        other = expert_key(module.name)
        if other is not None and (other.container, other.leaf) == (key.container, key.leaf):
            values = base.values(module)
            if values is not None and len(values):
                yield module.name, values[0].copy()


def _same_bytes(pair: CheckpointPair, module: Module, other: str) -> bool:
    """Whether another module has the same bytes of weight and scale."""
    for tensor in (module.weight, module.scale):
        if tensor is None:
            continue
        leaf = tensor.name.removeprefix(module.name)
        twin = pair.candidate.checkpoint.tensors.get(f"{other}{leaf}")
        if twin is None or pair.payload.digest(twin) != pair.payload.digest(tensor):
            return False
    return True
