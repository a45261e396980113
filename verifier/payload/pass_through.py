# SPDX-License-Identifier: Apache-2.0
"""Pass-through tensors: those that an export takes from another checkpoint without changing
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from verifier.checkpoint import Tensor
from verifier.quantized import QuantizedCheckpoint
from verifier.schemes import Module


class PassThrough:
    """The tensors of a checkpoint that must equal those of its source.

    Args:
        candidate: the whole checkpoint.
        source: the overlay checkpoint (``--merged-from``) or the base.
        overlay: whether ``source`` is the overlay: then quantized tensors of the same format pass
            through too, of a base only unquantized ones do.
    """

    def __init__(
        self, candidate: QuantizedCheckpoint, source: QuantizedCheckpoint, *, overlay: bool
    ) -> None:
        self.candidate, self.source, self.overlay = candidate, source, overlay

    def pairs(self, modules: Iterable[Module]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (tensor, tensor of the source) for each pass-through tensor of some modules."""
        for module in modules:
            origin = self.source.modules.get(module.name)
            if origin is None:
                continue
            all_leaves = self._all_pass(module, origin)
            for leaf, tensor in module.parts.items():
                if leaf in origin.parts and (all_leaves or leaf == "bias"):
                    yield tensor, origin.parts[leaf]

    def _all_pass(self, module: Module, origin: Module) -> bool:
        """Whether all tensors of a module pass through, and not its bias alone."""
        if not (module.quantized or origin.quantized):
            return True
        formats = self.candidate.stored_format(module), self.source.stored_format(origin)
        return self.overlay and formats[0] is formats[1]

    @cached_property
    def sources(self) -> Mapping[str, Tensor]:
        """The source's tensor by name, where dtype and shape are equal."""
        pairs = self.pairs(self.candidate.modules.values())
        return {a.name: b for a, b in pairs if (a.dtype, a.shape) == (b.dtype, b.shape)}
