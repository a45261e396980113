# SPDX-License-Identifier: Apache-2.0
"""What a quantization config says, in one shape whatever its dialect.

A `Declaration` is one config; a `Scheme` is one recipe in it; a `Group` gives a recipe to some
modules by name or class; a `DeclaredFormat` is the answer for one module. What was read and not
understood is in `Declaration.unclear`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from verifier.schemes.exclusions import Exclusions
from verifier.schemes.formats import FORMAT_OF_ALGO, FORMATS, Format, Sibling
from verifier.schemes.patterns import Names
from verifier.schemes.roles import role

Inputs = Literal["none", "dynamic", "local", "static", "unknown"]
"""How activations are quantized: not, by their own range, by block under a stored global scale, or
by a stored scale; ``unknown`` where the config does not say."""
Via = Literal[
    "uniform", "exact", "container", "packed", "excluded", "unlisted", "group", "class", "implied"
]
"""How a declaration refers to a module. ``uniform``: of all that is not excluded. ``exact``,
``container``, ``packed``: an entry for it, for what holds it, for the engine's fused name.
``excluded``: an exclusion. ``unlisted``: nothing does, so it is unquantized. ``group``: a target
that is its name or a pattern. ``class``: a target that is its class. ``implied``: readers take a
module as quantized where its tensors are."""


class Entry(NamedTuple):
    """One entry of ``quantized_layers``."""

    algo: str
    group_size: int | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """One recipe: how weights and activations are quantized.

    Attributes:
        algo: what the config calls it.
        format: its format, with the parameters that the config states; None where it is not known.
        inputs: how activations are quantized.
        symmetric: whether weights have no zero point.
        group_size: as stated; None where it is not.
        scale_leaf: the name of the weight scale that readers of this config look for; '' for any.
        bits: the stated width of a code; 0 where none is stated.
        kind: ``int`` or ``float``, as stated; '' where neither is.
        reordered: whether groups are of inputs in the order of their activations (GPTQ's
            ``desc_act``, compressed-tensors' ``actorder`` group).
    """

    algo: str
    format: Format | None = None
    inputs: Inputs = "unknown"
    symmetric: bool = True
    group_size: int | None = None
    scale_leaf: str = ""
    bits: int = 0
    kind: str = ""
    reordered: bool = False


class DeclaredFormat(NamedTuple):
    """What the declaration says about one module: its algorithm (None: unquantized) and how it says
    so. ``entry`` is the entry, target or exclusion that does; '' for an entry of the module's name.
    """

    algo: str | None
    via: Via
    entry: str = ""
    group_size: int | None = None
    scheme: Scheme | None = None

    @property
    def format(self) -> Format | None:
        """The format of the algorithm, where it is known."""
        if self.scheme is not None:
            return self.scheme.format
        return FORMATS.get(FORMAT_OF_ALGO.get(self.algo or "", ""))

    @property
    def kind(self) -> tuple[object, ...]:
        """What modules that a declaration says the same about have in common."""
        stated = (self.algo, self.via, self.group_size)
        s = self.scheme
        return stated if s is None else (*stated, s.format, s.inputs, s.symmetric)


def required_siblings(fmt: Format, scheme: Scheme | None) -> tuple[Sibling, ...]:
    """Return the siblings that have to stand next to a weight of a format.

    Args:
        fmt: the format of its tensors.
        scheme: what is declared for it; without one only what the format always has is required.
    """
    conditions = {"always"}
    if scheme is not None and scheme.inputs in ("static", "local"):
        conditions.add("static inputs")
    if scheme is not None and not scheme.symmetric:
        conditions.add("asymmetric")
    siblings = (s for s in fmt.siblings if s.when in conditions)
    if scheme is not None and scheme.inputs in ("none", "dynamic"):
        siblings = (s for s in siblings if s.role != "input")
    return tuple(siblings)


@dataclass(frozen=True)
class Group:
    """A recipe for the modules that its targets match: names, classes, ``re:`` and a pattern."""

    name: str
    targets: tuple[str, ...]
    scheme: Scheme

    @cached_property
    def names(self) -> Names:
        """The targets, compiled."""
        return Names(self.targets)


class Dialect:
    """How one family of configs refers to modules; the base is ModelOpt's exclusion list."""

    explicit = True
    """Whether readers build as quantized every linear layer that is declared so; otherwise they
    look at the tensors."""

    def exclusions(self, patterns: Iterable[str]) -> Exclusions:
        """Return exclusion patterns as this dialect reads them."""
        return Exclusions(patterns)

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return what a declaration says about a module, strictly read."""
        if declaration.exclusions.strict(module):
            return DeclaredFormat(None, "excluded")
        return DeclaredFormat(
            declaration.algo, "uniform", "", declaration.group_size, declaration.scheme
        )

    def expects(self, declaration: Declaration, module: str) -> bool:
        """Whether all readers build the module as quantized, however they read exclusions."""
        if not self.explicit or declaration.exclusions.loose(module):
            return False
        return declaration.declared_for(module).algo is not None


PLAIN = Dialect()


@dataclass(frozen=True)
class Declaration:
    """A quantization config, normalised.

    Attributes:
        file: the file that holds it.
        form: ``flat`` or ``nested`` (ModelOpt's two), ``vendor`` (FP8 and MXFP8 by themselves), the
            dialect's name, or ``foreign`` for a method that is not known.
        method: its ``quant_method``.
        algo: the algorithm; None where the file names none or several.
        group_size: as stated.
        exclude: exclusion patterns.
        layers: entries for single modules.
        kv: how the KV cache is quantized; None where it is not.
        problems: what is malformed.
        groups: recipes with targets, the first that matches counts.
        scheme: the recipe of what no group or layer names.
        dialect: how names are matched.
        unclear: what was read and not understood, so that the declaration as a whole was not.
        conflicts: statements of the config that contradict one another.
        transforms: transforms of activations that a reader applies, as part of what the weights
            mean (compressed-tensors' ``transform_config``).
    """

    file: str
    form: str
    method: str
    algo: str | None
    group_size: int | None = None
    exclude: tuple[str, ...] = ()
    layers: Mapping[str, Entry] = field(default_factory=dict)
    kv: str | None = None
    problems: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    scheme: Scheme | None = None
    dialect: Dialect = field(default=PLAIN, compare=False)
    unclear: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether its method is one whose configs are read."""
        return self.form != "foreign"

    @property
    def understood(self) -> bool:
        """Whether every group, target and exclusion in it was understood."""
        return self.known and not self.unclear and not self.problems

    @property
    def modelopt(self) -> bool:
        """Whether it is ModelOpt's, or FP8 or MXFP8 by themselves: what this project writes."""
        return self.form in ("flat", "nested", "vendor")

    @property
    def mixed(self) -> bool:
        """Whether ModelOpt declares modules one by one; then a module without an entry is
        unquantized.
        """
        return self.algo == "MIXED_PRECISION"

    @cached_property
    def exclusions(self) -> Exclusions:
        """The exclusion patterns, compiled."""
        return self.dialect.exclusions(self.exclude)

    def declared_for(self, module: str) -> DeclaredFormat:
        """Return what the declaration says about a module on disk, strictly read."""
        found = self._covers.get(module)
        if found is None:
            found = self._covers[module] = self.dialect.cover(self, module)
        return found

    def expects(self, module: str) -> bool:
        """Whether readers build a linear layer as quantized, whichever way they read exclusions."""
        return self.dialect.expects(self, module)

    def schemes(self) -> tuple[Scheme, ...]:
        """Return every recipe that it states."""
        found = [g.scheme for g in self.groups]
        return tuple(dict.fromkeys([*found, self.scheme] if self.scheme else found))

    @cached_property
    def _covers(self) -> dict[str, DeclaredFormat]:
        """Answers already given: every rule asks about every module."""
        return {}


@dataclass(frozen=True, slots=True)
class Declarations:
    """Both files' declarations. Engines differ in which they read first; `effective` is
    config.json's, else the other.
    """

    inline: Declaration | None
    file: Declaration | None

    @property
    def effective(self) -> Declaration | None:
        """The declaration that vLLM and SGLang act on."""
        return self.inline or self.file


_EMBEDDING_NAME = ("embed", "embedding", "embeddings", "wte", "wpe")


def classes_of(module: str) -> tuple[str, ...]:
    """Return the class names by which a config may target a module, derived from its name."""
    kind = role(module)
    leaf = module.rpartition(".")[2]
    if kind == "embedding" or leaf.endswith(_EMBEDDING_NAME):
        return ("Embedding", "VocabParallelEmbedding")
    if kind == "norm":
        return ()
    if kind == "lm_head":
        return ("Linear", "ParallelLMHead")
    if kind == "routed_expert":
        return ("Linear", "RoutedExperts", "FusedMoE")
    return ("Linear",)
