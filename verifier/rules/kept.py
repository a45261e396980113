# SPDX-License-Identifier: Apache-2.0
"""Modules that keep the quantization of the base."""

from __future__ import annotations

from verifier.quantized import QuantizedCheckpoint
from verifier.rules.context import Context
from verifier.schemes import Module


def is_kept(ctx: Context, module: Module) -> bool:
    """Whether the base stores a module in the same tensors, by dtype and shape.

    Equal bytes are QC605: such a module is sound, whatever the config says of it, where the base's
    is.
    """
    return stored_alike(ctx.base, module)


def stored_alike(source: QuantizedCheckpoint | None, module: Module) -> bool:
    """Whether another checkpoint stores a module, quantized, in the same tensors, by dtype and
    shape.
    """
    other = source.modules.get(module.name) if source is not None else None
    if other is None or not other.quantized or other.parts.keys() != module.parts.keys():
        return False
    pairs = ((tensor, other.parts[leaf]) for leaf, tensor in module.parts.items())
    return all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
