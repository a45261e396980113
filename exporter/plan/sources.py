# SPDX-License-Identifier: Apache-2.0
"""How a weight of the source is read, quantized or not, and what becomes of quantized ones that a
recipe leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from exporter.plan.model import Weight
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError
from verifier.schemes import FLOATS, Format, Module, canonical, format_of, read_declarations

Rest = Literal["keep", "bf16"]
MIXABLE = frozenset({"nvfp4", "w4a16_nvfp4", "mxfp8", "fp8"})
"""The formats that engines read side by side under MIXED_PRECISION (`quantized_layers`); others
only alone."""
NEVER_WRITTEN = frozenset({"nvfp4_ct", "mxfp4"})
"""The formats that no declaration of ours names: they are read only."""
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
        found = read_declarations(ckpt).effective
        self._declaration = found if found is not None and found.known else None
        self._ckpt, self._modules = ckpt, modules

    def format(self, name: str) -> Format | None:
        """Return the format of a quantized module, None for an unquantized one.

        Raises:
            PlanError: it is quantized, and its format cannot be told or not be read.
        """
        module = self._modules[name]
        weight = module.weight
        if weight is None or not module.quantized:
            return None
        found = format_of(module, self._declaration)
        if found is None:
            raise PlanError(
                f"{self._ckpt.uri}: {weight.name} is {weight.dtype}, and its format cannot be told"
            )
        for sibling in found.siblings:
            if (
                sibling.required
                and _CODES & set(sibling.leaves)
                and not set(sibling.leaves) & set(module.parts)
            ):
                raise PlanError(
                    f"{self._ckpt.uri}: {weight.name} is {weight.dtype} and has no {sibling.leaves[0]}"
                )
        if "pre_quant_scale" in module.parts:
            raise PlanError(
                f"{self._ckpt.uri}: {name} has a pre_quant_scale (AWQ); such weights are not read"
            )
        return found

    def weight(self, name: str) -> Weight:
        """Return a two-dimensional weight with the tensors that it is decoded from.

        Raises:
            PlanError: there is none, or its format cannot be told.
        """
        module, found = self._modules[name], self.format(name)
        tensor, dims = module.weight, module.dims
        if tensor is None or dims is None:
            raise PlanError(f"{self._ckpt.uri}: {name} has no two-dimensional weight")
        if found is None and tensor.dtype not in FLOATS:
            raise PlanError(
                f"{self._ckpt.uri}: {tensor.name} is {tensor.dtype}; a floating weight is needed to quantize it"
            )
        leaves = _CODES if found is not None else {"weight"}
        return Weight(tensor, {n: t for n, t in module.parts.items() if n in leaves}, found, dims)

    def plain_name(self, name: str) -> str:
        """Return the unquantized name of a module's weight."""
        tensor = self._modules[name].weight
        return (canonical(tensor.name) if tensor is not None else None) or f"{name}.weight"


def rest_of(
    kept: Mapping[str, Format], written: frozenset[str], rest: Rest | None
) -> dict[str, Format]:
    """Return which of the quantized modules that keep their bytes so far are decoded to BF16
    instead.

    Formats that no engine reads beside others are decoded, unless ``rest`` says otherwise.

    Args:
        kept: formats of the quantized modules that the recipe leaves, by name.
        written: names of the formats that the recipe writes.
        rest: ``bf16`` decodes all, ``keep`` none.

    Raises:
        PlanError: ``keep``, and a format among them cannot be declared here.
    """
    if rest == "bf16":
        return dict(kept)
    alone = len({f.name for f in kept.values()} | written) == 1
    lost = {
        n: f
        for n, f in kept.items()
        if f.name in NEVER_WRITTEN or (not alone and f.name not in MIXABLE)
    }
    if lost and rest == "keep":
        name, found = next(iter(lost.items()))
        raise PlanError(
            f"{name} and {len(lost) - 1:,} more are {found.algo}, which cannot stand beside {', '.join(sorted(written))}; "
            "--rest bf16 decodes what the recipe leaves, or a recipe that selects them too"
        )
    return lost
