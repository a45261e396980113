# SPDX-License-Identifier: Apache-2.0
"""Modules that keep the quantization of the base."""

from __future__ import annotations

from verifier.rules.context import Context
from verifier.schemes import Module


def is_kept(ctx: Context, module: Module) -> bool:
    """Whether the base stores a module in the same tensors, by dtype and shape.

    Equal bytes are QC605: such a module is sound, whatever the config says of it, where the base's
    is.
    """
    base = ctx.base.modules.get(module.name) if ctx.base is not None else None
    if base is None or not base.quantized or base.parts.keys() != module.parts.keys():
        return False
    pairs = ((tensor, base.parts[leaf]) for leaf, tensor in module.parts.items())
    return all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
