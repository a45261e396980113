# SPDX-License-Identifier: Apache-2.0
"""Reads the bytes of a checkpoint's tensors for rules, and keeps what several rules ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt

from verifier.checkpoint import NUMPY_DTYPES, Bytes, Checkpoint, Tensor
from verifier.payload.cache import ResultCache
from verifier.payload.pass_through import PassThrough
from verifier.payload.scan import FlawHits, TensorScan, flaws, scan
from verifier.schemes import SCALE_BITS, Module

SMALL = 4096
"""Tensors of at most this many bytes are kept in memory once read."""


class PayloadReader:
    """Bytes of the tensors of one checkpoint.

    Args:
        checkpoint: with the experts of its stacks one by one.
        pass_through: what each scan is compared with; None without a base and an overlay.
        whole: the reader of which this one is a `part`.

    Attributes:
        examined: the names of the tensors whose values rules asked this reader for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pass_through: PassThrough | None = None,
        whole: PayloadReader | None = None,
    ) -> None:
        self.checkpoint, self.pass_through = checkpoint, pass_through
        self.results: ResultCache = whole.results if whole else ResultCache()
        self._small: dict[str, Bytes] = whole._small if whole else {}
        self.examined: set[str] = set()
        self._scans: dict[str, TensorScan] = {}
        self._flaws: dict[str, FlawHits] = {}

    def part(self) -> PayloadReader:
        """Return a reader for some of the modules: its scans are dropped with it, everything else
        is shared.
        """
        return PayloadReader(self.checkpoint, self.pass_through, self)

    def announce(self, modules: Sequence[Module]) -> None:
        """Announce to remote sources what every payload check reads of some modules: scales,
        unquantized tensors, and the tensors that those pass through from.
        """
        # Rules read either scales or unquantized tensors: apart, no fetched range waits for both.
        for part in ([m for m in modules if m.quantized], [m for m in modules if not m.quantized]):
            tensors = [t for m in part for t in scanned_tensors(m)]
            self.checkpoint.expect(tensors)
            if self.pass_through is not None:
                sources = self.pass_through.sources
                origins = [sources[t.name] for t in tensors if t.name in sources]
                self.pass_through.source.checkpoint.expect(origins)

    def bytes_of(self, tensor: Tensor) -> Bytes:
        """Return all bytes of a tensor, uint8, one dimension; use `pieces` for one that may be
        large.
        """
        if tensor.nbytes > SMALL:
            return self.checkpoint.read(tensor)
        data = self._small.get(tensor.name)
        if data is None:
            data = self._small[tensor.name] = self.checkpoint.read(tensor)
            data.flags.writeable = False
        return data

    def array(self, tensor: Tensor) -> npt.NDArray[Any]:
        """Return a whole tensor in its own dtype and shape."""
        self.examined.add(tensor.name)
        dtype = NUMPY_DTYPES.get(tensor.dtype)
        if dtype is None or tensor.nbytes > SMALL:
            return self.checkpoint.array(tensor)
        return self.bytes_of(tensor).view(dtype).reshape(tensor.shape)

    def pieces(self, tensor: Tensor) -> Iterator[tuple[int, Bytes]]:
        """Yield (start, bytes) of a tensor, 1 MiB at a time; each piece overwrites the one before
        it.
        """
        self.examined.add(tensor.name)
        return self.checkpoint.pieces(tensor)

    def scan(self, tensor: Tensor) -> TensorScan:
        """Return the result of one pass over a tensor's bytes, compared with its source's where it
        passes through.
        """
        self.examined.add(tensor.name)
        result = self._scans.get(tensor.name)
        if result is None:
            result = self._scans[tensor.name] = scan(
                tensor.dtype, self._scanned(tensor), self._source_pieces(tensor)
            )
        return result

    def _scanned(self, tensor: Tensor) -> Iterator[tuple[int, Bytes]]:
        if tensor.nbytes > SMALL:
            return self.pieces(tensor)
        data = self.bytes_of(tensor)
        return iter([(0, data)] if data.size else [])

    def _source_pieces(self, tensor: Tensor) -> Iterator[tuple[int, Bytes]] | None:
        if self.pass_through is None:
            return None
        origin = self.pass_through.sources.get(tensor.name)
        return self.pass_through.source.checkpoint.pieces(origin) if origin is not None else None

    def extremes(self, tensor: Tensor) -> tuple[int, int]:
        """Return the smallest and largest byte of a tensor of one-byte values."""
        result = self.scan(tensor)
        return result.low, result.high

    def flaws(self, tensor: Tensor, dtype: str) -> FlawHits:
        """Return the values of a scale tensor that readers cannot use.

        Args:
            tensor: a scale.
            dtype: of its values, a key of `SCALE_BITS`; differs from its own where U8 holds E4M3.
        """
        self.examined.add(tensor.name)
        found = self._flaws.get(tensor.name)
        if found is None:
            pieces = self._scanned(tensor) if self._may_have_flaws(tensor, dtype) else iter(())
            found = self._flaws[tensor.name] = flaws(dtype, pieces)
        return found

    def _may_have_flaws(self, tensor: Tensor, dtype: str) -> bool:
        """Whether the smallest or the largest byte can be one; floats have to be read."""
        bits = SCALE_BITS[dtype]
        if bits.float:
            return True
        low, high = self.extremes(tensor)
        return high >= (bits.huge or bits.nan) or (bits.zero and low == 0)

    def digest(self, tensor: Tensor) -> bytes:
        """Return a 16-byte BLAKE2b digest of a tensor's bytes."""
        return self.results.of_name("digest", tensor.name, lambda: self._digest(tensor))

    def _digest(self, tensor: Tensor) -> bytes:
        return hashlib.blake2b(self.bytes_of(tensor).data, digest_size=16).digest()


def scanned_tensors(module: Module) -> Iterator[Tensor]:
    """Return the tensors that every payload check reads: scales, and all of an unquantized
    module.
    """
    tensors = module.parts.values()
    return (t for t in tensors if not module.quantized or t is not module.weight)
