# SPDX-License-Identifier: Apache-2.0
"""What a corruptor is, which checkpoints it suits, and how it picks the tensor that it breaks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from verifier.selftest.edit import CONFIG, QUANT_CONFIG, Folder, Place, Stored

Kind = Literal["nvfp4", "mxfp8", "mixed", "gptq"]
KINDS: frozenset[Kind] = frozenset({"nvfp4", "mxfp8", "mixed"})
NVFP4: frozenset[Kind] = frozenset({"nvfp4", "mixed"})
MXFP8: frozenset[Kind] = frozenset({"mxfp8"})
GPTQ: frozenset[Kind] = frozenset({"gptq"})
UNIFORM: frozenset[Kind] = frozenset({"nvfp4", "mxfp8"})
MIXED: frozenset[Kind] = frozenset({"mixed"})
GATES, UPS, DOWNS = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
LISTS = ("ignore", "exclude_modules", "ignored_layers", "modules_to_not_convert")
_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.([^.]+)$")
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Corruptor:
    """One realistic defect and what a check must say about it.

    ``apply`` breaks the folder in place and returns where, as far as that is known. ``depth`` is
    the least depth that sees it. ``needs`` holds the inputs without which nobody can see it:
    ``base``, ``merged_from``, or ``base|merged_from`` where either will do. ``formats`` and
    ``traits`` say which checkpoints it can be applied to (any of the formats, all of the traits).
    ``also`` are other rules that rightly speak up at error level too, ``instead`` those of which
    one may say it in the rule's place.
    """

    rule: str
    name: str
    apply: Callable[[Path], Place]
    depth: Literal["header", "payload", "load"] = "header"
    needs: tuple[str, ...] = ()
    formats: frozenset[Kind] = KINDS
    traits: frozenset[str] = frozenset()
    severity: Literal["error", "warning", "info"] = "error"
    also: frozenset[str] = frozenset()
    instead: frozenset[str] = frozenset()

    def suits(self, kind: Kind, traits: frozenset[str]) -> bool:
        """Whether a checkpoint of this kind and with these traits can be broken so."""
        return kind in self.formats and self.traits <= traits


def edit(change: Callable[[Folder], Place]) -> Callable[[Path], Place]:
    """Return ``change`` as a function of a path."""
    return lambda path: change(Folder(path))


def ids(text: str) -> frozenset[str]:
    """Return the rule ids in a text: ``ids("402 404")`` is QC402 and QC404."""
    return frozenset(f"QC{number}" for number in text.split())


def kind_of(folder: Folder) -> Kind:
    """Return the kind of a clean checkpoint, from the tensors on disk."""
    dtypes = {parts["weight"].dtype for parts in folder.modules().values() if "weight" in parts}
    if any(name.endswith(".qweight") for name in folder.tensors()):
        return "gptq"
    if {"U8", "F8_E4M3"} <= dtypes:
        return "mixed"
    return "nvfp4" if "U8" in dtypes else "mxfp8"


def traits_of(folder: Folder) -> frozenset[str]:
    """Return what a clean checkpoint has.

    ``index``, ``shards`` (several), ``experts``, ``f32`` (an unquantized weight), ``vision`` (a
    tower), ``mtp``, ``tokenizer``.
    """
    modules = folder.modules()
    found = {
        "index": folder.has_index,
        "shards": len(folder.shards) > 1,
        "experts": any(_EXPERT.match(m) for m in modules),
        "f32": any(m["weight"].dtype == "F32" for m in modules.values() if "weight" in m),
        "vision": any("vision_tower." in m for m in modules),
        "mtp": any(m.startswith("mtp.") for m in modules),
        "tokenizer": (folder.path / "tokenizer.json").is_file(),
    }
    return frozenset(k for k, v in found.items() if v)


def is_expert(module: str) -> bool:
    """Whether a module is a projection of one routed expert."""
    return _EXPERT.match(module) is not None


def expert_of(module: str) -> tuple[str, int, str]:
    """Return container (``….experts``), number and leaf of an expert's projection."""
    match = _EXPERT.match(module)
    if match is None:
        raise ValueError(f"{module}: no expert")
    return match[1], int(match[2]), match[3]


def quantized(folder: Folder) -> list[str]:
    """Return the modules that carry a weight scale, in the order of the files."""
    return [m for m, p in folder.modules().items() if "weight" in p and scale_leaf(p)]


def scale_leaf(parts: dict[str, Stored]) -> str | None:
    """Return the leaf of a module's block scale, or None."""
    return next((leaf for leaf in ("weight_scale", "weight_scale_inv") if leaf in parts), None)


def target(folder: Folder, leaves: tuple[str, ...] = GATES) -> str:
    """Return one quantized projection of such a leaf: an expert's from the middle, or a dense
    layer's.
    """
    found = [m for m in quantized(folder) if m.rpartition(".")[2] in leaves]
    experts = [m for m in found if is_expert(m)]
    return (experts or found)[len(experts or found) // 2]


def block_scale(folder: Folder, module: str) -> str:
    """Return the full name of a module's block scale."""
    return f"{module}.{scale_leaf(folder.modules()[module])}"


def sibling_of(module: str, leaves: tuple[str, ...]) -> str:
    """Return the projection beside a gate, in the spelling of its family: ``w1`` and ``UPS`` give
    ``w3``.
    """
    head, _, leaf = module.rpartition(".")
    spelling = 1 if leaf in (GATES[1], UPS[1], DOWNS[1]) else 0
    return f"{head}.{leaves[spelling]}"


def norm(folder: Folder) -> str:
    """Return the weight of the first layer norm."""
    return next(
        f"{m}.weight"
        for m, p in folder.modules().items()
        if m.endswith("layernorm") and "weight" in p and p["weight"].dtype in _FLOATS
    )


def plain_linear(folder: Folder) -> str:
    """Return an unquantized linear: a router where there is one, else the head."""
    linears = [
        m
        for m, p in folder.modules().items()
        if "weight" in p
        and p["weight"].dtype in _FLOATS
        and len(p["weight"].shape) == 2
        and "embed" not in m
    ]
    return next((m for m in linears if m.endswith(".gate")), linears[0])


def embedding(folder: Folder) -> str:
    """Return the weight of the token embedding."""
    return next(n for n in folder.tensors() if n.endswith("embed_tokens.weight"))


def declarations(folder: Folder, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply a change to both declarations, so that they go on agreeing."""
    folder.edit_json(CONFIG, lambda value: change(value["quantization_config"]))
    if (folder.path / QUANT_CONFIG).exists():
        folder.edit_json(QUANT_CONFIG, lambda value: change(value["quantization"]))


def exclusions(change: Callable[[list[str]], list[str]]) -> Callable[[dict[str, Any]], None]:
    """Return an edit of every exclusion list in a declaration."""

    def apply(body: dict[str, Any]) -> None:
        for key in LISTS:
            if key in body:
                body[key] = change(body[key])

    return apply
