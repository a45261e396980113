# SPDX-License-Identifier: Apache-2.0
"""A weight and its base, some rows at a time, so that memory does not grow with the weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import NUMPY_DTYPES, Checkpoint
from verifier.decoding import decode, widen
from verifier.errors import ContentError
from verifier.quantized import QuantizedCheckpoint
from verifier.reconstruction.distance import (
    CHUNK_VALUES,
    Distance,
    Parts,
    RowChunk,
    distance,
    peak_of,
)
from verifier.reconstruction.yardstick import has_tensor_scale, is_sliced
from verifier.schemes import FLOATS, SCALE_LEAVES, Format, Module

TILE = 128
"""Rows per tile of `FP8`'s block scales; chunks of rows begin at a multiple of it."""
SHARED = 64.0
"""A tensor scale shared with other weights may be this many times what the weight's own amax asks
for. Block scales then stay normal numbers of E4M3, and the yardstick stays as fine, for all blocks
above 1/448 of the weight's amax."""
MOST = float(np.finfo(np.float32).max)
ONE_MORE = 1 + 2**-20
"""A scale is rounded: the amax that it stands for may be this much less than the true one."""
HELD = 64 << 20
"""A remote base weight of at most this many bytes is kept in memory for its second reading."""
_DECODED = frozenset(
    {
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_scale_inv",
        "weight_scale_2",
        "weight_global_scale",
        "scales",
        "scale",
    }
)


class WeightRows:
    """The rows of a quantized weight next to those of its base."""

    def __init__(
        self,
        candidate: QuantizedCheckpoint,
        module: Module,
        base: QuantizedCheckpoint,
        base_module: Module,
    ) -> None:
        self.candidate, self.module = candidate, module
        self.base, self.base_module = base, base_module
        self._held: list[npt.NDArray[Any]] = []
        self._sliced = True
        self._peak = 0.0
        # The base may be read twice. A local file is cheaper to read again than fresh memory is.
        weight = base_module.weight
        small = weight is not None and weight.nbytes <= HELD
        self._holds = base.checkpoint.source.remote and small

    @property
    def same_shape(self) -> bool:
        """Whether the two weights have the same two dimensions."""
        return self.module.dims is not None and self.module.dims == self.base_module.dims

    def __iter__(self) -> Iterator[RowChunk]:
        checkpoint = self.candidate.checkpoint
        whole: Parts = {}
        if not self._sliced:
            whole = {leaf: checkpoint.array(t) for leaf, t in self.module.parts.items()}
        self._peak = 0.0
        for start, stop, reference in self._base_rows():
            self._peak = max(self._peak, peak_of(reference))
            yield RowChunk(whole or stored_rows(checkpoint, self.module, start, stop), reference)

    def distance(self, fmt: Format) -> tuple[Distance, bool]:
        """Return the distance of the decoded weight from the base, and whether ``max`` calibration
        is defined on it.

        Raises:
            ContentError: a chunk cannot be decoded.
        """
        self.base.checkpoint.expect(self.base_module.parts.values())
        self.candidate.checkpoint.expect(self.module.parts.values())
        self._sliced = _by_rows(fmt, self.module)
        stored = self._stored_amax(fmt) if has_tensor_scale(fmt) else None
        if stored is None or 0 < stored < MOST:
            # One pass, where the weight turns out to be within the range of its tensor scale.
            result = distance(self, fmt, 1.0 if stored is None else stored)
            if _covers(stored, self._peak):
                return result
            amax = self._peak
        else:
            amax = max((peak_of(rows) for _, _, rows in self._base_rows()), default=0.0)
        plausible = stored is not None and stored <= SHARED * amax
        return distance(self, fmt, max(amax, stored or 0.0) if plausible else amax)

    def _stored_amax(self, fmt: Format) -> float:
        """Return the amax that the stored tensor scale stands for: that of all weights that share
        the scale. 0 where no such scale can be read.
        """
        factors = {"weight_scale_2": 6 * 448.0, "weight_global_scale": 6 * 448.0}
        factors |= {"weight_scale": 448.0} if fmt.name == "fp8" else {}
        for leaf, factor in factors.items():
            tensor = self.module.parts.get(leaf)
            if tensor is None or tensor.dtype != "F32" or tensor.elements != 1:
                continue
            scale = float(self.candidate.checkpoint.array(tensor).reshape(()))
            if leaf == "weight_global_scale":
                scale = 1 / scale if scale else 0.0
            return scale * factor
        return 0.0

    def _base_rows(self) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        out, in_ = self.module.dims or (0, 0)
        count = max(1, CHUNK_VALUES // max(1, in_))
        count = max(TILE, count // TILE * TILE) if self._sliced else max(1, out)
        for i, start in enumerate(range(0, out, count)):
            stop = min(out, start + count)
            if i < len(self._held):
                yield start, stop, self._held[i]
                continue
            rows = value_rows(self.base, self.base_module, start, stop)
            if rows is None:
                raise ContentError(f"{self.base_module.name}: its values cannot be decoded")
            if self._holds:
                self._held.append(rows)
            yield start, stop, rows


def stored_rows(checkpoint: Checkpoint, module: Module, start: int, stop: int) -> Parts:
    """Return what decoding some rows of a two-dimensional weight takes, in dtypes and shapes on
    disk.

    Args:
        checkpoint: holds the module.
        module: with a weight of two dimensions.
        start: the first row, a multiple of `TILE`.
        stop: the row after the last.

    Raises:
        ContentError: a scale has neither one value nor one row per row or tile of rows.
    """
    out = module.dims[0] if module.dims else 0
    parts = {}
    for leaf, tensor in module.parts.items():
        if leaf not in _DECODED and leaf != module.signature.weight:
            continue
        if tensor.elements == 1 and leaf in SCALE_LEAVES:
            parts[leaf] = checkpoint.array(tensor)
            continue
        rows = tensor.shape[0] if tensor.shape else 0
        if rows not in (out, -(-out // TILE)) or tensor.dtype not in NUMPY_DTYPES:
            raise ContentError(f"{tensor.name}: {list(tensor.shape)} does not fit {out} rows")
        tile = 1 if rows == out else TILE
        first, last = start // tile, -(-stop // tile)
        size = tensor.nbytes // max(1, rows)
        data = checkpoint.read_range(tensor, first * size, (last - first) * size)
        values = data.view(NUMPY_DTYPES[tensor.dtype])
        parts[leaf] = values.reshape(last - first, *tensor.shape[1:])
    return parts


def _covers(stored: float | None, peak: float) -> bool:
    """Whether the largest magnitude of a weight is one that a stored amax may stand for; any finite
    one where there is none. Zeros are encoded alike under every amax.
    """
    if stored is None or peak == 0:
        return peak < np.inf
    return peak <= stored * ONE_MORE and stored <= SHARED * peak


def _by_rows(fmt: Format, module: Module) -> bool:
    """Whether some rows of a weight are decoded from the same rows of its tensors."""
    return is_sliced(fmt) and "pre_quant_scale" not in module.parts


def value_rows(
    checkpoint: QuantizedCheckpoint, module: Module, start: int, stop: int
) -> npt.NDArray[Any] | None:
    """Return rows of a two-dimensional weight: the bits of BF16 as uint16, anything else decoded or
    widened to float32.

    None where its values cannot be decoded; ``start`` and ``stop`` as in `stored_rows`.
    """
    weight = module.weight
    if weight is None or (not module.quantized and weight.dtype not in FLOATS):
        return None
    fmt = checkpoint.stored_format(module) if module.quantized else None
    if module.quantized and fmt is None:
        return None
    if fmt is not None and not _by_rows(fmt, module):
        values = checkpoint.values(module)
        return values[start:stop] if values is not None else None
    try:
        parts = stored_rows(checkpoint.checkpoint, module, start, stop)
        if fmt is not None:
            return decode(parts, fmt.name)
    except ContentError:
        return None  # the module's tensors do not fit one another: the shape rules report that
    stored = parts[module.signature.weight or ""]
    return stored.view(np.uint16) if weight.dtype == "BF16" else widen(stored)
