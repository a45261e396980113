# SPDX-License-Identifier: Apache-2.0
"""Rewritings that change nothing for any loader: none may raise a finding."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.mutation.image import CONFIG, Image, Unfit

Rng = np.random.Generator


def _file(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def reshard(image: Image, rng: Rng) -> str:
    """Spread the tensors over two to nine shards, at random."""
    count = int(rng.integers(2, 10))
    _to_shards(image, [int(rng.integers(count)) for _ in image.tensors], count)
    return f"resharded over {count}"


def cut_into_shards(image: Image, rng: Rng) -> str:
    """Cut the tensors in their order into shards."""
    count = int(rng.integers(2, 6))
    size = -(-len(image.tensors) // count)
    _to_shards(image, [i // size for i in range(len(image.tensors))], count)
    return f"cut into {count}"


def _to_shards(image: Image, numbers: list[int], count: int) -> None:
    used = sorted(set(numbers))
    place = {n: i for i, n in enumerate(used)}
    for number, tensor in zip(numbers, image.tensors.values(), strict=True):
        tensor.file = _file(place[number], len(used))
    image.metadata = {f: {"format": "pt"} for f in image.files}
    image.indexed = True
    image.layout.clear()


def one_file(image: Image, rng: Rng) -> str:
    """Put all into model.safetensors, with an index or without."""
    for tensor in image.tensors.values():
        tensor.file = "model.safetensors"
    image.metadata = {"model.safetensors": {"format": "pt"}}
    image.indexed = bool(rng.integers(2))
    image.layout.clear()
    return "one file"


def other_order(image: Image, rng: Rng) -> str:
    """Write the tensors' bytes in a different order."""
    image.layout["order"] = {
        f: _shuffled(rng, [n for n, t in image.tensors.items() if t.file == f]) for f in image.files
    }
    return "tensors in another order"


def other_keys(image: Image, rng: Rng) -> str:
    """Write the header's keys in a different order than the bytes."""
    image.layout["keys"] = {
        f: _shuffled(rng, [n for n, t in image.tensors.items() if t.file == f]) for f in image.files
    }
    return "header keys in another order"


def padding(image: Image, rng: Rng) -> str:
    """Pad the header with more spaces, or with none."""
    image.layout["pad"] = {f: int(rng.choice([0, 1, 8, 4096])) for f in image.files}
    return f"header padding {image.layout['pad']}"


def _shuffled(rng: Rng, names: list[str]) -> list[str]:
    return [names[i] for i in rng.permutation(len(names))]


def json_format(image: Image, rng: Rng) -> str:
    """Write the JSON files compactly, with tabs, with sorted keys."""
    how = int(rng.integers(3))
    ways: list[Callable[[Any], str]] = [
        lambda value: json.dumps(value, separators=(",", ":")),
        lambda value: json.dumps(value, indent="\t") + "\n",
        lambda value: json.dumps(value, sort_keys=True, ensure_ascii=False),
    ]
    image.layout["dump"] = ways[how]
    return f"JSON {('compact', 'with tabs', 'sorted')[how]}"


def _lists(image: Image) -> list[tuple[dict[str, Any], str]]:
    keys = ("ignore", "exclude_modules", "ignored_layers", "modules_to_not_convert")
    found = [(body, key) for body in image.declared() for key in keys if key in body]
    if not found:
        raise Unfit("no exclusions")
    return found


def exclusions_shuffled(image: Image, rng: Rng) -> str:
    """Write the exclusions in a different order."""
    for body, key in _lists(image):
        body[key] = _shuffled(rng, body[key])
    return "exclusions in another order"


def exclusions_twice(image: Image, rng: Rng) -> str:
    """Write an exclusion twice."""
    for body, key in _lists(image):
        body[key] = [*body[key], body[key][0]]
    return "an exclusion twice"


def exclusions_by_glob(image: Image, rng: Rng) -> str:
    """Write the exclusions of a layer's attention as one glob, as ModelOpt does."""
    bodies = _lists(image)
    heads = {
        p.rpartition(".")[0]
        for body, key in bodies
        for p in body[key]
        if p.endswith("self_attn.q_proj")
    }
    modules = image.modules()
    quantized = set(image.quantized())
    fit = [
        h
        for h in sorted(heads)
        if not any(m in quantized for m in modules if m.startswith(h))
        and all(
            {m for m in modules if m.startswith(f"{h}.") and m.endswith("proj")} <= set(b[key])
            for b, key in bodies
        )
    ]
    if not fit:
        raise Unfit("no attention is excluded module by module")
    for body, key in bodies:
        for head in fit:
            body[key] = [*(p for p in body[key] if not p.startswith(f"{head}.")), f"{head}*"]
    return "attention excluded by globs"


def idle_keys(image: Image, rng: Rng) -> str:
    """Change config keys on which no loader acts."""
    image.json[CONFIG]["transformers_version"] = "4.57.1"
    image.json[CONFIG]["use_cache"] = False
    return "idle config keys"


def other_files(image: Image, rng: Rng) -> str:
    """Add files that every repository has."""
    image.other |= {
        "README.md": b"# model\n",
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "LICENSE": b"MIT\n",
    }
    return "README, .gitattributes, LICENSE"


def metadata(image: Image, rng: Rng) -> str:
    """Add to the metadata of the shards."""
    for file in image.files:
        image.metadata[file] = {
            "format": "pt",
            "made_by": "somebody \u00e9",
            "total_parameters": "12",
        }
    return "more metadata"


def key_order(image: Image, rng: Rng) -> str:
    """Write the keys of the configs in a different order."""

    def turned(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        keys = _shuffled(rng, list(value))
        return {k: turned(value[k]) for k in keys}

    image.json = {name: turned(value) for name, value in image.json.items()}
    return "config keys in another order"


def total_as_float(image: Image, rng: Rng) -> str:
    """Write ``total_size`` as a float, as some libraries do."""
    if not image.indexed:
        raise Unfit("no index")
    image.on_index.append(
        lambda value: value["metadata"].update(
            {"total_size": float(value["metadata"]["total_size"])}
        )
    )
    return "total_size a float"


def index_order(image: Image, rng: Rng) -> str:
    """Write the index in a different order, with more metadata."""
    if not image.indexed:
        raise Unfit("no index")

    def change(value: dict[str, Any]) -> None:
        value["weight_map"] = {
            n: value["weight_map"][n] for n in _shuffled(rng, list(value["weight_map"]))
        }
        value["metadata"]["total_parameters"] = 12

    image.on_index.append(change)
    return "index in another order"


REWRITES: tuple[Callable[[Image, Rng], str], ...] = (
    reshard,
    cut_into_shards,
    one_file,
    other_order,
    other_keys,
    padding,
    json_format,
    exclusions_shuffled,
    exclusions_twice,
    exclusions_by_glob,
    idle_keys,
    other_files,
    metadata,
    key_order,
    total_as_float,
    index_order,
)
