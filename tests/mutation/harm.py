# SPDX-License-Identifier: Apache-2.0
"""Whether an edit does harm: broken contracts of a loader, and changed values (KINDS.md).

It uses nothing from the verifier: containers are read by safetensors' own reader, values are
decoded by ``tests/oracle.py``.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from tests import oracle
from tests.mutation.image import CONFIG, DTYPES, INDEX, NESTED, Array, split

TIMES = 2.0
"""The smallest harmful change, in multiples of the format's own error."""
IGNORED = frozenset(
    {
        "transformers_version",
        "initializer_range",
        "use_cache",
        "producer",
        "_name_or_path",
        "torch_dtype",
        "fmt",
    }
)
"""Config keys on which no loader acts."""
LISTS = ("ignore", "exclude_modules", "ignored_layers", "modules_to_not_convert")


@dataclass
class View:
    """What a loader sees of a checkpoint, and which contracts are ``broken`` in it alone."""

    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    config: Any = None
    nested: Any = None


def view(path: Path) -> View:
    """Return what a loader sees."""
    found = View()
    held: dict[str, list[str]] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            for name, entry in deserialize(file.read_bytes()):
                if name in held:
                    found.broken.append(f"{name} is in two files")
                held.setdefault(name, []).append(file.name)
                found.tensors[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        except (SafetensorError, ValueError) as error:
            found.broken.append(f"{file.name}: {str(error)[:60]}")
    found.tensors = dict(sorted(found.tensors.items()))  # the reader gives them in any order
    found.config = _json(path / CONFIG, found.broken)
    if (path / NESTED).exists():
        found.nested = _json(path / NESTED, found.broken)
    _index(path, held, found.broken)
    return found


def _json(path: Path, broken: list[str]) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        broken.append(f"{path.name}: {type(error).__name__}")
        return None


def _index(path: Path, held: dict[str, list[str]], broken: list[str]) -> None:
    if not (path / INDEX).exists():
        if len(list(path.glob("*.safetensors"))) > 1:
            broken.append("several shards and no index")
        return
    index = _json(path / INDEX, broken)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        broken.append("no weight_map")
        return
    for name, file in weight_map.items():
        if file not in held.get(name, []):
            broken.append(f"the index sends {name} elsewhere")
            return
    for name in held:
        if name not in weight_map:
            broken.append(f"{name} is not in the index")
            return


def harm(clean: View, mutant: View, base: View) -> str:
    """Return why the mutant is harmful, or '' where it is not."""
    if mutant.broken:
        return f"contract: {mutant.broken[0]}"
    if mutant.tensors.keys() != clean.tensors.keys():
        return "contract: other names"
    for name, (dtype, shape, _) in clean.tensors.items():
        if mutant.tensors[name][:2] != (dtype, shape):
            return f"contract: dtype or shape of {name}"
    linears = [split(n)[0] for n, t in clean.tensors.items() if len(t[1]) == 2 and _linear(n)]
    for before, after in ((clean.config, mutant.config), (clean.nested, mutant.nested)):
        if _promise(before, linears) != _promise(after, linears):
            return "contract: config"
    return next(_values(clean, mutant, base), "")


def _linear(name: str) -> bool:
    return name.endswith(".weight") and not any(w in name for w in ("embed", "norm"))


def _promise(config: Any, linears: list[str]) -> Any:
    """Return what a config promises: its keys without the idle ones, exclusions as the modules that
    they name.
    """
    if not isinstance(config, dict):
        return config
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in IGNORED:
            continue
        if key in LISTS and isinstance(value, list) and all(isinstance(v, str) for v in value):
            found["excluded"] = _excluded(value, linears)
            found["substrings"] = sorted(
                m for m in linears if any(v.strip("*") in m for v in value if v.strip("*"))
            )
        elif key == "quantized_layers" or not isinstance(value, dict):
            found[key] = value
        else:
            found[key] = _promise(value, linears)
    return found


def _excluded(patterns: list[str], linears: list[str]) -> list[str]:
    found = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                found |= {m for m in linears if re.match(pattern[3:], m)}
            except re.error:
                found.add(pattern)
        else:
            found |= {m for m in linears if fnmatch.fnmatchcase(m, pattern)}
    return sorted(found)


def _values(clean: View, mutant: View, base: View) -> Iterator[str]:
    touched = [n for n, t in clean.tensors.items() if mutant.tensors[n][2] != t[2]]
    done = set()
    for name in touched:
        module, leaf = split(name)
        if leaf == "input_scale":
            yield from _activation(clean, mutant, name)
            continue
        if module in done:
            continue
        done.add(module)
        before, after = decoded(clean, module), decoded(mutant, module)
        if before is None or after is None:
            if _floats(clean, name).tobytes() != _floats(mutant, name).tobytes():
                yield f"values of {name}"
            continue
        if not np.isfinite(after).all():
            yield f"values of {module}: not finite"
            continue
        source = _floats(base, f"{module}.weight")
        width = 32 if clean.tensors[f"{module}.weight"][0] != "U8" else 16
        changed = np.repeat(_blocks(before != after, width), width, axis=1)[:, : before.shape[1]]
        if not changed.any():
            continue
        own, change = _norm((before - source)[changed]), _norm((after - before)[changed])
        if change > TIMES * own:
            times = change / own if own else np.inf
            yield f"values of {module}: {times:.1f} times the format's error"


def _blocks(mask: Array, width: int) -> Array:
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % width)))
    return padded.reshape(mask.shape[0], -1, width).any(axis=2)


def _activation(clean: View, mutant: View, name: str) -> Iterator[str]:
    before, after = (float(_floats(v, name).reshape(-1)[0]) for v in (clean, mutant))
    if not np.isfinite(after) or after < 1e-30 or not before / TIMES <= after <= before * TIMES:
        yield f"values of {name}: {before:g} became {after:g}"


def _norm(values: Array) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))


def _floats(found: View, name: str) -> Array:
    dtype, shape, data = found.tensors[name]
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape).astype(np.float32)


def decoded(found: View, module: str) -> Array | None:
    """Return a quantized module's values by the oracle, or None where it is not quantized."""
    parts = {
        leaf: found.tensors[n]
        for leaf in ("weight", "weight_scale", "weight_scale_inv", "weight_scale_2")
        if (n := f"{module}.{leaf}") in found.tensors
    }
    scale = parts.get("weight_scale") or parts.get("weight_scale_inv")
    if scale is None or "weight" not in parts:
        return None
    dtype, shape, data = parts["weight"]
    raw = np.frombuffer(data, np.uint8).reshape(shape)
    if dtype == "U8":
        return oracle.nvfp4_decode(
            {
                "weight": raw,
                "weight_scale": np.frombuffer(scale[2], np.uint8).reshape(scale[1]),
                "weight_scale_2": np.frombuffer(parts["weight_scale_2"][2], np.float32).reshape(()),
            }
        )
    if scale[0] in ("U8", "F8_E8M0"):
        return oracle.mxfp8_decode(
            {"weight": raw, "weight_scale": np.frombuffer(scale[2], np.uint8).reshape(scale[1])}
        )
    numbers = np.frombuffer(scale[2], np.float32).reshape(scale[1])
    if numbers.size == 1 and len(scale[1]) < 2:
        return oracle.fp8_decode({"weight": raw, "weight_scale": numbers.reshape(())}, "fp8")
    if len(scale[1]) == 1:
        return oracle.fp8_decode({"weight": raw, "weight_scale": numbers}, "fp8_per_channel")
    return oracle.fp8_decode({"weight": raw, "weight_scale_inv": numbers}, "fp8_block")


__all__ = ["TIMES", "View", "decoded", "harm", "view"]
