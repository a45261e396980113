# SPDX-License-Identifier: Apache-2.0
"""Prove a repair by values, before it is written and after: nothing lost, nothing swapped, no
quantized byte changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from exporter import codecs
from exporter.layout import Cut
from exporter.plan import Reader, SourceWeight, Take
from exporter.plan.repair import Repair, Replaced
from exporter.stream.load import load, region
from verifier.checkpoint import NUMPY_DTYPES, Checkpoint, Tensor, open_checkpoint
from verifier.errors import EncodeError, PlanError
from verifier.schemes import FLOATS, Module, gather, split
from verifier.text import counted

Difference = Literal["equal", "recast", "damaged"]
RECAST = 0.1
"""The relative RMS difference up to which a tensor is the base's, with its dtype changed or damaged
in places."""
ROWS = 128
"""How many rows of a weight, from its middle, are compared to identify it; a check of the result
reads them all."""
SWAPPED = 0.5
"""The relative RMS error above which decoded values are not those of the base's tensor.

NVFP4 leaves 0.1, 8-bit block formats 0.03; a different tensor of the same model leaves 1.4.
"""


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows of a weight: ``count`` of them from ``first``."""

    first: int
    count: int

    def divided(self, block: int) -> RowRange:
        """Return the rows of a tensor that has one row per ``block`` rows."""
        return RowRange(self.first // block, -(-self.count // block))


def require_scales(repair: Repair, broken: Checkpoint) -> None:
    """Refuse scales that are NaN, infinite, zero or negative: their weights cannot be recovered.

    Raises:
        PlanError: naming the first such tensor and how many of its scales are bad.
    """
    block_scales = ("weight_scale", "weight_scale_inv")
    for take in sorted(repair.quantized, key=lambda t: split(t.name)[1] not in block_scales):
        leaf = split(take.name)[1]
        if leaf in ("weight", "weight_packed", "blocks", "bias", ""):
            continue
        values = _scale_values(broken, take)
        bad = np.less_equal(values, 0) | np.logical_not(np.isfinite(values))
        if leaf == "weight_scale" and (values[bad] == 0).all():
            # The scale of a block of zeros has no effect.
            bad = bad & _nonzero_blocks(repair, broken, take, values.shape)
        if bad.any():
            first = values.reshape(-1)[int(np.argmax(bad.reshape(-1)))]
            text = "NaN" if np.isnan(first) else f"{first:g}"
            count = int(bad.sum())
            raise PlanError(
                f"{take.tensor.name}: {count:,} of {counted(bad.size, 'scale')} "
                f"{'is' if count == 1 else 'are'} not a positive number ({text} first) and cannot "
                "be recovered; re-quantize this module from the base"
            )


def _nonzero_blocks(
    repair: Repair, broken: Checkpoint, take: Take, shape: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    """Return which blocks of packed FP4 values hold anything but zeros; all, where values are not
    packed.
    """
    name = f"{split(take.name)[0]}.weight"
    packed = (t for t in repair.quantized if t.name == name and t.tensor.dtype == "U8")
    weight = next(packed, None)
    if weight is None:
        return np.ones(shape, np.bool_)
    codes = region(broken, weight)
    return np.asarray((codes.reshape(*shape, -1) & 0x77).any(axis=-1), np.bool_)


def compare(repair: Repair, broken: Checkpoint, base: Checkpoint) -> dict[str, Difference]:
    """Return for every unquantized tensor of both how the export's differs from the base's, which
    is written.

    Raises:
        PlanError: a tensor that differs by more than a cast: a different base, or weights with a
            scale folded in.
    """
    return {r.base.name: _difference(r, broken, base) for r in repair.replaced}


def _difference(replaced: Replaced, broken: Checkpoint, base: Checkpoint) -> Difference:
    take, reference = replaced.take, replaced.base
    (spec,) = take.specs
    if (spec.dtype, spec.shape) == (reference.dtype, reference.shape):
        if region(broken, take).tobytes() == base.read(reference).tobytes():
            return "equal"
    if spec.dtype not in FLOATS or reference.dtype not in FLOATS:
        raise PlanError(
            f"{take.tensor.name} is {spec.dtype} without a scale; the base has {reference.dtype}"
        )
    values = region(broken, take).view(NUMPY_DTYPES[spec.dtype])
    expected = base.array(reference)
    if values.ndim == 2 and values.shape != expected.shape:
        values = values.T
    if values.shape != expected.shape:
        raise PlanError(
            f"{take.tensor.name} is {list(spec.shape)}, and the base has {list(expected.shape)}"
        )
    wide, wide_expected = values.astype(np.float32), expected.astype(np.float32)
    finite = np.isfinite(wide) & np.isfinite(wide_expected)
    error = _relative_rms(wide[finite], wide_expected[finite])
    if error > RECAST:
        raise PlanError(
            f"{take.tensor.name} differs from {reference.name} of the base by {error:.0%}, which "
            f"no cast explains: it was not made from {base.uri}, or a scale was folded into it"
        )
    return "recast" if spec.dtype != reference.dtype else "damaged"


def _relative_rms(values: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the root mean square of the difference, relative to that of the expected values."""
    if not expected.size:
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        size = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
        # One damaged value is not the tensor: differences count up to ten times its size.
        apart = np.minimum(np.abs(values.astype(np.float64) - expected), 10 * size)
        error = float(np.sqrt(np.mean(np.square(apart))))
    return error / size if size else error


def require_places(repair: Repair, broken: Checkpoint, base: Checkpoint) -> int:
    """Refuse a quantized module that was renamed or cut out of a stack, and does not hold the
    base's values.

    `ROWS` rows of each are compared; a base that is itself quantized is decoded first. Returns how
    many modules were compared.

    Raises:
        PlanError: naming both.
    """
    takes = {t.name: t for t in repair.quantized}
    reader = Reader(base, gather(base.tensors.values()))
    modules = gather(_tensors(repair.quantized))
    compared = 0
    for name in repair.uncertain:
        module = modules.get(name)
        if module is None:  # not quantized: `compare` has covered it
            continue
        weight = reader.weight(name)
        rows = _middle_rows(weight.shape[0])
        values = _decoded_rows(module, takes, broken, weight.shape[0], rows)
        error = _relative_rms(values, _base_rows(base, weight, rows))
        compared += 1
        if error > SWAPPED:
            raise PlanError(
                f"{takes[f'{name}.weight'].tensor.name}: its values are not those of the base's "
                f"{name}, which its name and place imply: they differ by {error:.0%}"
            )
    return compared


def _middle_rows(count: int) -> RowRange:
    if count <= 2 * ROWS:
        return RowRange(0, count)
    first = count // 2 // ROWS * ROWS
    return RowRange(first, min(ROWS, count - first))


def _tensors(takes: Iterable[Take]) -> list[Tensor]:
    return [Tensor(s.name, s.dtype, s.shape, "", 0, s.nbytes) for t in takes for s in t.specs]


def _rows(take: Take, rows: RowRange) -> Take:
    """Return a `Take` restricted to some rows of its result."""
    cuts = list(take.cuts) or [Cut(0, 1, n) for n in take.tensor.shape]
    axes = [i for i, cut in enumerate(cuts) if not cut.drop]
    axis = axes[take.order[0] if take.order else 0]
    start, step, _, _ = cuts[axis]
    cuts[axis] = Cut(start + rows.first * step, step, rows.count)
    return replace(take, cuts=tuple(cuts))


def _base_rows(base: Checkpoint, weight: SourceWeight, rows: RowRange) -> npt.NDArray[Any]:
    """Return rows of a weight of the base, float32."""
    if weight.format is not None:
        decoded = load(base, weight)[rows.first : rows.first + rows.count].float()
        values: npt.NDArray[Any] = decoded.numpy()
        return values
    raw = region(base, _rows(Take(weight.name, weight.tensor, "onto"), rows))
    return raw.view(NUMPY_DTYPES[weight.tensor.dtype]).astype(np.float32)


def _decoded_rows(
    module: Module, takes: Mapping[str, Take], broken: Checkpoint, out: int, rows: RowRange
) -> npt.NDArray[Any]:
    """Return rows of a quantized module, float32; with a scale per 128 rows, they must begin at a
    multiple of 128.
    """
    fmt = module.inferred_format
    if fmt is None:
        raise PlanError(f"{module.name}: its quantization format cannot be inferred")
    parts = {}
    for leaf, tensor in module.parts.items():
        take = takes[tensor.name]
        if leaf != "bias" and tensor.shape[:1] == (out,):
            take = _rows(take, rows)
        elif fmt.name == "fp8_block" and tensor.shape and tensor.shape[0] == -(-out // ROWS):
            take = _rows(take, rows.divided(ROWS))
        raw = region(broken, take).copy()
        dtype = np.float32 if tensor.dtype == "F32" else np.uint8
        parts[leaf] = torch.from_numpy(raw.view(dtype))
    try:
        values: npt.NDArray[Any] = codecs.decode(parts, fmt.name).numpy()
    except EncodeError as error:
        raise PlanError(f"{module.name}: {error}") from error
    return values


def _scale_values(ckpt: Checkpoint, take: Take) -> npt.NDArray[Any]:
    (spec,) = take.specs
    dtype = "F8_E8M0" if spec.dtype == "U8" else spec.dtype  # a uint8 scale is E8M0
    return region(ckpt, take).view(NUMPY_DTYPES[dtype]).astype(np.float32)


def unchanged(repair: Repair, folder: Path) -> dict[str, Any]:
    """Return the digests of all quantized tensors before and after, and refuse a difference.

    ``sha256_before`` covers the bytes of each tensor of the broken export, or of the slice of a
    stack; ``sha256_after`` what the directory holds under the hub name. Stacks are also
    re-assembled from what was written.

    Raises:
        EncodeError: a tensor whose bytes changed, which is a defect of the writer.
    """
    broken, written = repair.plan.source, open_checkpoint(folder)
    before, after = hashlib.sha256(), hashlib.sha256()
    for take in sorted(repair.quantized, key=lambda t: t.name):
        old = hashlib.sha256(region(broken, take).tobytes()).hexdigest()
        new = hashlib.sha256(written.read(written.tensors[take.name]).tobytes()).hexdigest()
        if old != new:
            raise EncodeError(f"{take.name}: its bytes are not those of {take.tensor.name}")
        before.update(f"{take.name} {old}\n".encode())
        after.update(f"{take.name} {new}\n".encode())
    return {
        "quantized_tensors": len(repair.quantized),
        "sha256_before": before.hexdigest(),
        "sha256_after": after.hexdigest(),
        "stacks": _require_stacks(repair, broken, written),
    }


def _require_stacks(repair: Repair, broken: Checkpoint, written: Checkpoint) -> int:
    """Return how many stacks, re-assembled from what was written, have their original bytes.

    Raises:
        EncodeError: one that has not.
    """
    divided: dict[str, list[Take]] = {}
    for take in repair.quantized:
        if take.tensor.name in repair.split and take.tensor.shape and not take.whole:
            divided.setdefault(take.tensor.name, []).append(take)
    for name, takes in divided.items():
        tensor = takes[0].tensor
        original = broken.read(tensor).tobytes()
        dtype = np.dtype(f"u{tensor.nbytes // tensor.elements}")
        assembled = np.zeros(tensor.shape, dtype)
        for take in takes:
            raw = written.read(written.tensors[take.name]).tobytes()
            part = np.frombuffer(raw, dtype).reshape(take.specs[0].shape)
            if take.order:
                part = part.transpose(np.argsort(take.order))
            assembled[tuple(cut.selector for cut in take.cuts)] = part
        if assembled.tobytes() != original:
            raise EncodeError(f"{name}: its parts do not re-assemble to its bytes")
    return len(divided)
