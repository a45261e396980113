# SPDX-License-Identifier: Apache-2.0
"""How a weight of the source is read, quantized or not, and which quantized modules are decoded
that a recipe does not select.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from exporter.codecs import BLOCKS, READ_ONLY
from exporter.plan.model import SourceWeight
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError
from verifier.schemes import (
    FLOATS,
    FORMATS,
    Format,
    Module,
    canonical,
    format_of,
    read_declarations,
)

Rest = Literal["keep", "bf16"]
MIXABLE = frozenset({"nvfp4", "w4a16_nvfp4", "mxfp8", "fp8"})
"""The formats that engines read together under MIXED_PRECISION (`quantized_layers`); they read
others alone only."""
NEVER_WRITTEN = frozenset({"nvfp4_ct", "mxfp4"})
"""The formats that ckptgate reads and does not declare."""
_CODES = frozenset(
    {
        "weight",
        "weight_packed",
        "blocks",
        "weight_scale",
        "weight_scale_inv",
        "scales",
        "weight_scale_2",
        "weight_global_scale",
    }
)


class Reader:
    """The modules of a checkpoint as weights that can be read."""

    def __init__(self, ckpt: Checkpoint, modules: Mapping[str, Module]) -> None:
        declaration = read_declarations(ckpt).effective
        known = declaration is not None and declaration.known
        self._declaration = declaration if known else None
        self._ckpt, self._modules = ckpt, modules

    def format(self, name: str) -> Format | None:
        """Return the format of a quantized module, None for an unquantized one.

        Raises:
            PlanError: it is quantized, and its format cannot be inferred or read.
        """
        module = self._modules[name]
        weight = module.weight
        if weight is None or not module.quantized:
            return None
        fmt = format_of(module, self._declaration)
        if fmt is None:
            raise PlanError(
                f"{self._ckpt.uri}: {weight.name} is {weight.dtype}, and its quantization format "
                "cannot be inferred"
            )
        if fmt.name not in (*BLOCKS, *READ_ONLY) or fmt is not FORMATS[fmt.name]:
            raise PlanError(
                f"{self._ckpt.uri}: {weight.name} is stored as {fmt.algo}, which ckptgate does not "
                "re-quantize"
            )
        for sibling in fmt.siblings:
            needed = sibling.required and not _CODES.isdisjoint(sibling.leaves)
            if needed and module.parts.keys().isdisjoint(sibling.leaves):
                raise PlanError(
                    f"{self._ckpt.uri}: {weight.name} is {weight.dtype} and has no "
                    f"{sibling.leaves[0]}"
                )
        if "pre_quant_scale" in module.parts:
            raise PlanError(
                f"{self._ckpt.uri}: {name} has a pre_quant_scale (AWQ); ckptgate does not read "
                "such weights"
            )
        return fmt

    def weight(self, name: str) -> SourceWeight:
        """Return a 2-D weight with the tensors that it is decoded from.

        Raises:
            PlanError: there is none, or its format cannot be inferred.
        """
        module, fmt = self._modules[name], self.format(name)
        tensor, dims = module.weight, module.dims
        if tensor is None or dims is None:
            raise PlanError(f"{self._ckpt.uri}: {name} has no 2-D weight")
        if fmt is None and tensor.dtype not in FLOATS:
            raise PlanError(
                f"{self._ckpt.uri}: {tensor.name} is {tensor.dtype}; only floating-point weights "
                "can be quantized"
            )
        leaves = _CODES if fmt is not None else {"weight"}
        return SourceWeight(
            tensor, {n: t for n, t in module.parts.items() if n in leaves}, fmt, dims
        )

    def plain_name(self, name: str) -> str:
        """Return the unquantized name of a module's weight."""
        tensor = self._modules[name].weight
        return (canonical(tensor.name) if tensor is not None else None) or f"{name}.weight"


def decoded_rest(
    unselected: Mapping[str, Format], written: frozenset[str], rest: Rest | None
) -> dict[str, Format]:
    """Return which quantized modules that the recipe does not select are decoded to BF16; the
    others keep their bytes.

    Formats that no engine reads together with others are decoded, unless ``rest`` says otherwise.

    Args:
        unselected: formats of the quantized modules that the recipe does not select, by name.
        written: names of the formats that the recipe writes.
        rest: ``bf16`` decodes all, ``keep`` none.

    Raises:
        PlanError: ``keep``, and a format among them cannot be declared.
    """
    if rest == "bf16":
        return dict(unselected)
    alone = len({f.name for f in unselected.values()} | written) == 1
    decoded = {
        name: fmt
        for name, fmt in unselected.items()
        if fmt.name in NEVER_WRITTEN or (not alone and fmt.name not in MIXABLE)
    }
    if decoded and rest == "keep":
        name, fmt = next(iter(decoded.items()))
        raise PlanError(
            f"{name} and {len(decoded) - 1:,} more are {fmt.algo}, which engines do not read "
            f"together with {', '.join(sorted(written))}; --rest bf16 decodes what the recipe does "
            "not select; or use a recipe that selects these modules too"
        )
    return decoded
