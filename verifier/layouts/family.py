# SPDX-License-Identifier: Apache-2.0
"""Hub layouts as data: which tensors a family has, with which shapes, from its config alone.

The JSON files are written by ``tools/make_families.py`` from what transformers saves. Shapes are
formulas of config values; a value that neither the config nor transformers' defaults give makes
that one shape unknown, nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any

from verifier.errors import ContentError
from verifier.schemes.roles import layer_of

Shape = tuple[int, ...]
_DATA = resources.files("verifier.layouts") / "families"
MAX_LAYERS = 10_000
MAX_TENSORS = 1_000_000


@dataclass(frozen=True)
class Family:
    """One family's layout; ``data`` is its JSON file."""

    model_type: str
    data: Mapping[str, Any]

    def value(self, config: Mapping[str, Any], path: str) -> int | None:
        """Return the whole number at a dotted config path, by its other spellings or default; None
        where unknown.
        """
        for candidate in (path, *self.data["spellings"].get(path, ())):
            node: Any = config
            for part in candidate.split("."):
                node = node.get(part) if isinstance(node, Mapping) else None
            if type(node) is int:
                return node
        default = self.data["defaults"].get(path)
        if type(default) is int:
            return default
        if (
            path.rpartition(".")[2] == "head_dim"
        ):  # what transformers derives where the family sets no default
            text = self.data["text"]
            hidden, heads = (
                self.value(config, f"{text}hidden_size"),
                self.value(config, f"{text}num_attention_heads"),
            )
            if hidden and heads:
                return hidden // heads
        return None

    def shape(self, config: Mapping[str, Any], dims: list[str] | None) -> Shape | None:
        """Return the shape that formulas of config paths give, or None where a value, or the
        formula, is unknown.
        """
        if dims is None:
            return None
        shape = []
        for formula in dims:
            terms = [self._term(config, term) for term in formula.split("+")]
            if None in terms:
                return None
            shape.append(sum(t for t in terms if t is not None))
        return tuple(shape)

    def _term(self, config: Mapping[str, Any], term: str) -> int | None:
        """Return the product of numbers and config paths, where asked over one more; None where it
        is unknown or no whole number.
        """
        product, _, divisor = term.partition("/")
        total = 1
        for factor in product.split("*"):
            value = int(factor) if factor.isdigit() else self.value(config, factor)
            if value is None:
                return None
            total *= value
        by = self.value(config, divisor) if divisor else 1
        return total // by if by and total % by == 0 else None

    def layers(self, config: Mapping[str, Any], kind: str) -> list[int]:
        """Return the text layers of a kind: ``all``, ``dense``, ``sparse``, ``indexer`` or one of
        the family's own.
        """
        return self._layers(config, kind) or []

    def _layers(self, config: Mapping[str, Any], kind: str) -> list[int] | None:
        """Return the text layers of a kind, or None if this config does not determine them."""
        count = min(self._length(config, self.data["ranges"]["layer"]), MAX_LAYERS)
        if kind == "all":
            return list(range(count))
        text = self._text(config)
        rules = self.data.get("kinds", {}).get(kind)
        if rules is not None:
            flags = next((f for r in rules if (f := self._rule(text, r, count)) is not None), None)
            return None if flags is None else [i for i in range(count) if flags[i]]
        flags = (
            _indexer_flags(text, count) if kind == "indexer" else self._sparse_flags(text, count)
        )
        return [i for i in range(count) if flags[i] == (kind != "dense")]

    def _text(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the config of the text model, {} where it has none."""
        node: Any = config
        for part in self.data["text"].split(".")[:-1]:
            node = node.get(part) if isinstance(node, Mapping) else None
        return node if isinstance(node, Mapping) else {}

    def _rule(
        self, text: Mapping[str, Any], rule: Mapping[str, Any], count: int
    ) -> list[bool] | None:
        """Return which layers a rule of the data means, or None where the config has not its keys.

        ``{"list": key, "is": [value, …]}``: one entry a layer, a letter where the value is a
        string. ``{"named": key}``: the numbers of the layers. ``{"from": key}``: from that number
        on. ``{"period": key, "offset": key}``: every so many; ``shift`` is added to the layer's
        number first. ``not`` turns it round.
        """
        turned = bool(rule.get("not"))
        listed = text.get(rule.get("list") or rule.get("named") or "")
        if "list" in rule:
            if not isinstance(listed, list | str) or len(listed) < count:
                return None
            return [(listed[i] in rule["is"]) != turned for i in range(count)]
        if "named" in rule:
            if not isinstance(listed, list):
                return None
            numbers = {n for n in listed if type(n) is int}
            return [(i in numbers) != turned for i in range(count)]
        if "from" in rule:
            first = self._number(text, rule["from"])
            return None if first is None else [(i >= first) != turned for i in range(count)]
        period = self._number(text, rule["period"])
        offset = self._number(text, rule["offset"]) if "offset" in rule else 0
        if not period or offset is None:
            return None
        return [
            ((i + rule.get("shift", 0)) % period == offset % period) != turned for i in range(count)
        ]

    def _number(self, text: Mapping[str, Any], key: str) -> int | None:
        value = text.get(key, self.data["defaults"].get(self.data["text"] + key))
        return value if type(value) is int and value >= 0 else None

    def _sparse_flags(self, text: Mapping[str, Any], count: int) -> list[bool]:
        kinds, freq = text.get("mlp_layer_types"), text.get("moe_layer_freq")
        if isinstance(kinds, list) and len(kinds) >= count:
            return [k == "sparse" for k in kinds]
        if isinstance(freq, list) and len(freq) >= count:
            return [bool(f) for f in freq]
        dense = text.get("mlp_only_layers")
        dense = (
            set(dense) if isinstance(dense, list) and all(type(d) is int for d in dense) else set()
        )
        step = self._stated(text, "decoder_sparse_step") or 1
        first = (
            self._stated(text, "first_k_dense_replace")
            or self._stated(text, "moe_layer_start_index")
            or 0
        )
        return [i not in dense and (i + 1) % step == 0 and i >= first for i in range(count)]

    def _stated(self, text: Mapping[str, Any], key: str) -> int | None:
        """Return a whole number of the text config that decides which layers are sparse, or the
        family's default.
        """
        value = text.get(key, self.data["defaults"].get(self.data["text"] + key))
        return value if type(value) is int and value > 0 else None

    def expected(self, config: Mapping[str, Any]) -> dict[str, Shape | None]:
        """Return every tensor that the hub layout has under this config, with its shape where
        known.

        Raises:
            ContentError: the config declares more layers or experts than any model has.
        """
        found: dict[str, Shape | None] = {}
        tied = self._switch(config, "tie_word_embeddings")
        for entry in self.data["tensors"]:
            if not self._applies(config, entry):
                continue
            if tied and entry["name"].endswith("lm_head.weight"):
                continue
            shape = self.shape(config, entry["shape"])
            if len(found) + self._count(config, entry) > MAX_TENSORS:
                raise ContentError(f"config.json declares more than {MAX_TENSORS:,} tensors")
            for name in self._names(config, entry["name"], entry.get("layers")):
                found[name] = shape
        return found

    def _applies(self, config: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
        """Whether a tensor belongs under this config; null is unset, an absent key has its
        default.
        """
        for word, required in (("if", True), ("unless", False)):
            keys = entry.get(word) or []
            for key in [keys] if isinstance(keys, str) else keys:
                if self._switch(config, key) != required:
                    return False
        return True

    def _switch(self, config: Mapping[str, Any], path: str) -> bool:
        node: Any = config
        for part in path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return bool(self.data["defaults"].get(path))
            node = node[part]
        return bool(node)

    def _count(self, config: Mapping[str, Any], entry: Mapping[str, Any]) -> int:
        """Return an upper bound of the tensors that an entry stands for."""
        paths = [p for k, p in self.data["ranges"].items() if "{" + k + "}" in entry["name"]]
        return math.prod(self._length(config, p) for p in paths)

    def _length(self, config: Mapping[str, Any], path: str) -> int:
        """Return how far a range runs: a whole number of the config, or how many entries a list of
        it has.
        """
        node: Any = config
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return len(node) if isinstance(node, list) else self.value(config, path) or 0

    def _names(
        self, config: Mapping[str, Any], pattern: str, kind: str | None, *, unsure: bool = False
    ) -> Iterator[str]:
        """Yield the names of a pattern; with ``unsure`` those of all layers where the config does
        not determine which.
        """
        ranges: dict[str, list[int]] = {}
        for key, path in self.data["ranges"].items():
            if "{" + key + "}" in pattern:
                count = self._length(config, path)
                if count > MAX_LAYERS:
                    raise ContentError(f"config.json declares {path} = {count:,}")
                ranges[key] = list(range(count))
                if key == "layer":
                    layers = self._layers(config, kind or "all")
                    if unsure == (layers is not None):
                        return
                    ranges[key] = ranges[key] if layers is None else layers
        if unsure and "layer" not in ranges:
            return
        names = [pattern]
        for key, numbers in ranges.items():
            names = [n.replace("{" + key + "}", str(i)) for n in names for i in numbers]
        yield from names

    def possible(self, config: Mapping[str, Any]) -> dict[str, Shape | None]:
        """Return what may be here, with its shape: tensors of some layers only, where the config
        does not determine which.

        Raises:
            ContentError: the config declares more layers or experts than any model has.
        """
        found: dict[str, Shape | None] = {}
        for entry in self.data["tensors"]:
            if entry.get("layers", "all") in self.data.get("kinds", {}) and self._applies(
                config, entry
            ):
                if len(found) + self._count(config, entry) > MAX_TENSORS:
                    raise ContentError(f"config.json declares more than {MAX_TENSORS:,} tensors")
                names = self._names(config, entry["name"], entry["layers"], unsure=True)
                found |= dict.fromkeys(names, self.shape(config, entry["shape"]))
        return found

    def beyond(self, config: Mapping[str, Any], name: str) -> bool:
        """Whether a name is of a layer after the last, where the family puts its
        next-token-prediction layers.
        """
        path = self.data.get("more_layers")
        number, count = layer_of(name), self._length(config, self.data["ranges"]["layer"])
        if not path or number is None:
            return False
        return count <= number < count + (self.value(config, path) or 0)

    def experts(self, config: Mapping[str, Any]) -> int | None:
        """Return the number of routed experts of a sparse layer, or None for a dense family."""
        path = self.data["ranges"].get("expert")
        return self.value(config, path) if path else None

    @cached_property
    def _memory(self) -> re.Pattern[str] | None:
        patterns = [re.sub(r"\\{\w+\\}", r"\\d+", re.escape(p)) for p in self.data["in_memory"]]
        return re.compile("|".join(f"(?:{p})$" for p in patterns)) if patterns else None

    def in_memory(self, name: str) -> bool:
        """Whether a name is one that transformers uses in memory and the hub layout does not."""
        return bool(self._memory and self._memory.match(name))

    def optional(self, name: str) -> bool:
        """Whether a name is one that releases may have beyond what transformers saves (MTP heads,
        a tied head's copy).
        """
        if any(re.search(p, name) for p in self.data["optional"]) or name.endswith(
            ".rotary_emb.inv_freq"
        ):
            return True
        return name.endswith("lm_head.weight") and any(
            t["name"] == name for t in self.data["tensors"]
        )


def _indexer_flags(text: Mapping[str, Any], count: int) -> list[bool]:
    kinds = text.get("layer_types")
    sparse = text.get("sparse_attention_config")
    freq = sparse.get("sparse_attention_freq") if isinstance(sparse, Mapping) else None
    if isinstance(kinds, list) and len(kinds) >= count:
        return [k == "minimax_m3_sparse" for k in kinds]
    if isinstance(freq, list) and len(freq) >= count:
        return [bool(f) for f in freq]
    return [False] * count


@lru_cache(maxsize=1)
def known() -> tuple[str, ...]:
    """Return the model types that have a layout file, sorted."""
    return tuple(
        sorted(f.name.removesuffix(".json") for f in _DATA.iterdir() if f.name.endswith(".json"))
    )


@lru_cache(maxsize=64)
def load(model_type: str | None) -> Family | None:
    """Return the family of a model type, or None where no file describes it."""
    if model_type not in known():
        return None
    data = json.loads((_DATA / f"{model_type}.json").read_text(encoding="utf-8"))
    return Family(str(model_type), data)


def family_of(config: Mapping[str, Any] | None) -> Family | None:
    """Return the family that a config.json belongs to, or None."""
    value = (config or {}).get("model_type")
    return load(value) if isinstance(value, str) else None


__all__ = ["Family", "family_of", "known", "load"]
