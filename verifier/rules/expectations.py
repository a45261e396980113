# SPDX-License-Identifier: Apache-2.0
"""What belongs in a checkpoint: by the layout of its family, and by its base."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from verifier.errors import ContentError
from verifier.layouts.expert_stacks import split_shapes
from verifier.layouts.family import Family, family_of
from verifier.layouts.name_differences import Naming, classify, unwrapped
from verifier.quantized import QuantizedCheckpoint, Shape, config_value
from verifier.schemes import Exclusions, layer_of, role, split


class Expectations:
    """Names, shapes and layers that a checkpoint should have, each worked out on first use."""

    def __init__(self, candidate: QuantizedCheckpoint, base: QuantizedCheckpoint | None) -> None:
        self.candidate, self.base = candidate, base

    @cached_property
    def family(self) -> Family | None:
        """The family that config.json names, where its layout is known."""
        return family_of(self.candidate.checkpoint.config)

    @cached_property
    def _layout(self) -> tuple[Mapping[str, Shape | None], str]:
        """The family's names and shapes, or none and the reason."""
        config = self.candidate.checkpoint.config
        if self.family is None or config is None:
            model_type = self.candidate.checkpoint.model_type
            known = f"the layout of the family {model_type!r} is not known"
            absent = "config.json has no model_type"
            return {}, f"{absent if model_type is None else known} and there is no base"
        try:
            return split_shapes(self.family.expected(config), config), ""
        except ContentError as error:
            return {}, str(error)

    @cached_property
    def shapes(self) -> Mapping[str, Shape | None]:
        """Every unquantized name that belongs in the checkpoint, with its logical shape where it is
        known: without a base the family's names, with a base the base's.
        """
        shapes = self._layout[0]
        if self.base is None:
            return shapes
        kept = {name: shape for name, shape in shapes.items() if name in self.base.names}
        return kept | {n: s for n, s in self.base.shapes.items() if kept.get(n) is None}

    @property
    def why_unknown(self) -> str:
        """Why the names cannot be checked, or '' where they can."""
        return "" if self.base else self._layout[1]

    @cached_property
    def naming(self) -> Naming:
        """How the names of the checkpoint differ from those expected."""
        layout, names = self._layout[0], self.candidate.names
        allowed = set(layout)
        if self.base:
            allowed |= self.base.names
        family, config = self.family, self.candidate.checkpoint.config
        if family is not None and config is not None:
            allowed |= {n for n in names - allowed if family.beyond(config, n)}
            if layout:
                allowed |= split_shapes(family.possible(config), config).keys()
        tensors = self.candidate.checkpoint.tensors
        return classify(names, set(self.shapes), allowed, tensors, family, self.is_mtp)

    @cached_property
    def layers(self) -> int | None:
        """The number of text layers by the base's config, or without a base by the candidate's;
        None where it is not known.
        """
        return config_value((self.base or self.candidate).checkpoint.config, "num_hidden_layers")

    def is_mtp(self, name: str) -> bool:
        """Whether a tensor or module belongs to an MTP module: by its name, or because its layer
        follows the last text layer.
        """
        part = role(split(name)[0])
        if part == "mtp" or self.layers is None:
            return part == "mtp"
        layer = layer_of(name)
        return layer is not None and layer >= self.layers and part not in ("vision", "projector")

    @cached_property
    def wrapped_exclusions(self) -> Mapping[str, str]:
        """Exclusions that match no module until the name of a wrapper module is removed from them,
        each with the name that then matches.
        """
        declaration = self.candidate.declaration
        listed = [p for p in declaration.exclude if not p.startswith("re:")] if declaration else []
        names_left = ((pattern, unwrapped(pattern)) for pattern in listed)
        plain = {pattern: name for pattern, name in names_left if name}
        if not plain:
            return {}
        modules = self.candidate.modules
        names = set(modules) | {m.rpartition(".")[0] for m in modules}
        dead = set(Exclusions([*plain, *plain.values()]).dead(names))
        return {p: name for p, name in plain.items() if p in dead and name not in dead}

    @cached_property
    def unrelated_base(self) -> str:
        """Why the base is a different model, as a sentence, or '' where it is not."""
        base = self.base
        if base is None or not self.candidate.names or not base.names:
            return ""
        return self._different_names(base) or self._different_shapes(base)

    def _different_names(self, base: QuantizedCheckpoint) -> str:
        naming = self.naming
        renamed = (naming.prefix, naming.leaf, naming.submodel, naming.wrapped)
        known = len(self.candidate.names & base.names)
        known += sum(map(len, renamed)) + sum(count for _, count in naming.fused)
        same_type = self.candidate.checkpoint.model_type == base.checkpoint.model_type
        least = len(base.names) / (10 if same_type else 2)
        if known >= least:
            return ""
        return f"{known} of {len(base.names)} names are those of the base"

    def _different_shapes(self, base: QuantizedCheckpoint) -> str:
        common = self.candidate.names & base.names
        shapes = ((n, self.candidate.shapes[n], base.shapes[n]) for n in sorted(common))
        different = [name for name, own, other in shapes if own and other and own != other]
        if len(different) * 2 <= len(common):
            return ""
        return (
            f"{len(different)} of {len(common)} common tensors have shapes that differ from the"
            f" base's, {different[0]} first"
        )


def stored_name(candidate: QuantizedCheckpoint, name: str) -> str:
    """Return a missing weight by the name that its format gives it, where siblings are stored
    without it.
    """
    module = candidate.modules.get(name.removesuffix(".weight"))
    if module is None or module.weight is not None or not module.scales:
        return name
    if "qzeros" in module.parts:
        return f"{module.name}.qweight"
    packed = {"weight_global_scale", "weight_shape"} & module.parts.keys()
    return f"{module.name}.weight_packed" if packed else name
