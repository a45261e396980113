# SPDX-License-Identifier: Apache-2.0
"""What values say of a repair, before it is written and after: nothing lost, nothing swapped, no
quantized byte changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from exporter import codecs
from exporter.plan import Plan, Reader, Take, Weight
from exporter.plan.repair import Repair, Same
from exporter.stream.shards import load, region
from verifier.checkpoint import NUMPY_DTYPES, Checkpoint, Tensor, open_checkpoint
from verifier.errors import EncodeError, PlanError
from verifier.schemes import FLOATS, Module, gather, split

How = Literal["equal", "recast", "damaged"]
RECAST = 0.1
"""The relative difference, root mean square, up to which a tensor is the base's, cast or damaged in
places."""
ROWS = 128
"""How many rows of a weight, from its middle, tell which tensor it is; a check of the result reads
them all."""
SWAPPED = 0.5
"""The relative error, root mean square, above which decoded values are not those of the base's
tensor.

NVFP4 leaves 0.1, block formats of 8 bits 0.03; another tensor of the same model leaves 1.4.
"""


def require_scales(repair: Repair, broken: Checkpoint) -> None:
    """Refuse scales that hold NaN, infinity, zero or a negative value: the weights behind them are
    lost.

    Raises:
        PlanError: naming the first such tensor and how many of its scales are so.
    """
    for take in sorted(
        repair.quantized, key=lambda t: split(t.name)[1] not in ("weight_scale", "weight_scale_inv")
    ):
        leaf = split(take.name)[1]
        if leaf in ("weight", "weight_packed", "blocks", "bias", ""):
            continue
        values = _values(broken, take)
        bad = np.less_equal(values, 0) | np.logical_not(np.isfinite(values))
        if (
            leaf == "weight_scale" and (values[bad] == 0).all()
        ):  # the scale of a block of zeros says nothing
            bad = bad & _coded(repair, broken, take, values.shape)
        if bad.any():
            first = values.reshape(-1)[int(np.argmax(bad.reshape(-1)))]
            what = "NaN" if np.isnan(first) else f"{first:g}"
            raise PlanError(
                f"{take.tensor.name}: {int(bad.sum()):,} of {bad.size:,} scales are no positive numbers ({what} first): "
                "what they were cannot be known; quantize this module anew from the base"
            )


def _coded(
    repair: Repair, broken: Checkpoint, take: Take, shape: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    """Return which blocks of packed codes hold a code that is not zero; all, where codes are not
    packed.
    """
    name = f"{split(take.name)[0]}.weight"
    weight = next((t for t in repair.quantized if t.name == name and t.tensor.dtype == "U8"), None)
    if weight is None:
        return np.ones(shape, np.bool_)
    codes = region(broken, weight)
    return np.asarray((codes.reshape(*shape, -1) & 0x77).any(axis=-1), np.bool_)


def compare(repair: Repair, broken: Checkpoint, base: Checkpoint) -> dict[str, How]:
    """Return for every unquantized tensor of both how the export's differs from the base's, which
    is written.

    Raises:
        PlanError: another tensor than the base's, not a cast of it: another base, or weights that
            were folded.
    """
    return {s.base.name: _difference(s, broken, base) for s in repair.same}


def _difference(same: Same, broken: Checkpoint, base: Checkpoint) -> How:
    (spec,) = same.take.specs
    if spec.dtype == same.base.dtype and spec.shape == same.base.shape:
        if region(broken, same.take).tobytes() == base.read(same.base).tobytes():
            return "equal"
    if spec.dtype not in FLOATS or same.base.dtype not in FLOATS:
        raise PlanError(
            f"{same.take.tensor.name} is {spec.dtype} without a scale; the base has {same.base.dtype}"
        )
    mine, theirs = region(broken, same.take).view(NUMPY_DTYPES[spec.dtype]), base.array(same.base)
    if mine.shape != theirs.shape:
        if mine.ndim != 2 or mine.T.shape != theirs.shape:
            raise PlanError(
                f"{same.take.tensor.name} is {list(mine.shape)}, and the base has {list(theirs.shape)}"
            )
        mine = mine.T
    wide, wanted = mine.astype(np.float32), theirs.astype(np.float32)
    finite = np.isfinite(wide) & np.isfinite(wanted)
    off = _relative(wide[finite], wanted[finite])
    if off > RECAST:
        raise PlanError(
            f"{same.take.tensor.name} differs from {same.base.name} of the base by {off:.0%}, which no cast explains: "
            f"{base.uri} is not what this was made from, or a scale was folded into it"
        )
    return "recast" if spec.dtype != same.base.dtype else "damaged"


def _relative(mine: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    """Return the root mean square of the difference, against that of the wanted values."""
    with np.errstate(over="ignore", invalid="ignore"):
        size = float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))) if wanted.size else 0.0
        # One damaged value is not the tensor: differences count up to ten times its size.
        apart = np.minimum(np.abs(mine.astype(np.float64) - wanted), 10 * size)
        off = float(np.sqrt(np.mean(np.square(apart)))) if wanted.size else 0.0
    return off / size if size else off


def require_places(repair: Repair, broken: Checkpoint, base: Checkpoint) -> int:
    """Refuse a quantized module that was given a name or cut out of a stack, and does not hold the
    base's values.

    `ROWS` rows of each are compared. Returns how many modules were; a base that is itself quantized
    is decoded first.

    Raises:
        PlanError: naming both.
    """
    takes = {t.name: t for t in repair.quantized}
    reader = Reader(base, gather(base.tensors.values()))
    modules = gather(_tensors(repair.quantized))
    compared = 0
    for name in repair.doubtful:
        module = modules.get(name)
        if module is None:  # not quantized: it was compared as such
            continue
        weight = reader.weight(name)
        first = weight.shape[0] // 2 // ROWS * ROWS if weight.shape[0] > 2 * ROWS else 0
        count = min(ROWS, weight.shape[0] - first) if first else weight.shape[0]
        values = _decoded(module, takes, broken, weight.shape[0], (first, count))
        off = _relative(values, _rows_of_base(base, weight, (first, count)))
        compared += 1
        if off > SWAPPED:
            was = takes[f"{name}.weight"].tensor.name
            said = f"its values are not those of the base's {name}, which its name and place say it is: off by {off:.0%}"
            raise PlanError(f"{was}: {said}")
    return compared


def _tensors(takes: Iterable[Take]) -> list[Tensor]:
    return [Tensor(s.name, s.dtype, s.shape, "", 0, s.nbytes) for t in takes for s in t.specs]


def _rows(take: Take, first: int, count: int) -> Take:
    """Return what of a `Take` its result has in some rows."""
    cuts = list(take.cuts) or [(0, 1, n, False) for n in take.tensor.shape]
    left = [i for i, c in enumerate(cuts) if not c[3]]
    at = left[take.order[0] if take.order else 0]
    start, step, _, _ = cuts[at]
    cuts[at] = (start + first * step, step, count, False)
    return replace(take, cuts=tuple(cuts))


def _rows_of_base(base: Checkpoint, weight: Weight, rows: tuple[int, int]) -> npt.NDArray[Any]:
    first, count = rows
    if weight.format is not None:
        found: npt.NDArray[Any] = load(base, weight)[first : first + count].float().numpy()
        return found
    raw = region(base, _rows(Take(weight.name, weight.tensor, "onto"), first, count))
    return raw.view(NUMPY_DTYPES[weight.tensor.dtype]).astype(np.float32)


def _decoded(
    module: Module, takes: Mapping[str, Take], broken: Checkpoint, out: int, rows: tuple[int, int]
) -> npt.NDArray[Any]:
    """Return the values of some rows of a module; what has a scale for each 128 rows is read from a
    multiple of 128 on.
    """
    shown, (first, count) = module.inferred_format, rows
    if shown is None:
        raise PlanError(f"{module.name}: its format cannot be told")
    parts = {}
    for leaf, tensor in module.parts.items():
        take = takes[tensor.name]
        if leaf != "bias" and tensor.shape[:1] == (out,):
            take = _rows(take, first, count)
        elif shown.name == "fp8_block" and tensor.shape and tensor.shape[0] == -(-out // ROWS):
            take = _rows(take, first // ROWS, -(-count // ROWS))
        raw = region(broken, take).copy()
        parts[leaf] = torch.from_numpy(
            raw.view(np.float32) if tensor.dtype == "F32" else raw.view(np.uint8)
        )
    try:
        found: npt.NDArray[Any] = codecs.decode(parts, shown.name).numpy()
    except EncodeError as error:
        raise PlanError(f"{module.name}: {error}") from error
    return found


def _values(ckpt: Checkpoint, take: Take) -> npt.NDArray[Any]:
    (spec,) = take.specs
    raw = region(ckpt, take)
    dtype = "F8_E8M0" if spec.dtype == "U8" else spec.dtype  # a uint8 scale is E8M0
    return raw.view(NUMPY_DTYPES[dtype]).astype(np.float32)


def unchanged(plan: Plan, repair: Repair, folder: Path) -> dict[str, Any]:
    """Return the digests of all quantized tensors before and after, and refuse a difference.

    ``before`` is over the bytes of each tensor of the broken export, or of the slice of a stack;
    ``after`` over what the folder holds under the hub name. Stacks are also put together again from
    what was written.

    Raises:
        EncodeError: a tensor whose bytes are others, which is a defect of the writer.
    """
    written = open_checkpoint(folder)
    before, after = hashlib.sha256(), hashlib.sha256()
    for take in sorted(repair.quantized, key=lambda t: t.name):
        was = hashlib.sha256(region(plan.source, take).tobytes()).hexdigest()
        now = hashlib.sha256(written.read(written.tensors[take.name]).tobytes()).hexdigest()
        if was != now:
            raise EncodeError(f"{take.name}: its bytes are not those of {take.tensor.name}")
        before.update(f"{take.name} {was}\n".encode())
        after.update(f"{take.name} {now}\n".encode())
    return {
        "quantized_tensors": len(repair.quantized),
        "sha256_before": before.hexdigest(),
        "sha256_after": after.hexdigest(),
        "stacks": _stacks(plan, repair, written),
    }


def _stacks(plan: Plan, repair: Repair, written: Checkpoint) -> int:
    """Return how many stacks, put together again from what was written, have the digest that they
    had.
    """
    cut: dict[str, list[Take]] = {}
    for take in repair.quantized:
        if take.tensor.name in repair.split and take.tensor.shape and not take.whole:
            cut.setdefault(take.tensor.name, []).append(take)
    for name, takes in cut.items():
        tensor = takes[0].tensor
        whole = np.frombuffer(
            plan.source.read(tensor).tobytes(), f"u{tensor.nbytes // tensor.elements}"
        )
        again = np.zeros_like(whole).reshape(tensor.shape)
        for take in takes:
            at = tuple(
                s if drop else slice(s, s + (n - 1) * k + 1, k) for s, k, n, drop in take.cuts
            )
            found = np.frombuffer(written.read(written.tensors[take.name]).tobytes(), whole.dtype)
            shape = tuple(take.specs[0].shape)
            again[at] = (
                found.reshape(shape).transpose(np.argsort(take.order))
                if take.order
                else found.reshape(shape)
            )
        if hashlib.sha256(again.tobytes()).digest() != hashlib.sha256(whole.tobytes()).digest():
            raise EncodeError(f"{name}: its parts do not make it again")
    return len(cut)
