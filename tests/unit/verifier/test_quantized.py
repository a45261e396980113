# SPDX-License-Identifier: Apache-2.0
"""Shortcuts of the header check say what the long way says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.paths import TESTS
from verifier.checkpoint import open_checkpoint, strict_json
from verifier.checkpoint.header import _contiguous, _from_entries
from verifier.quantized import QuantizedCheckpoint
from verifier.schemes import Exclusions, Module, canonical, format_of, gather, role
from verifier.schemes.roles import _PATTERNS

MODELOPT = TESTS / "data" / "modelopt"
FOLDERS = sorted(p.name for p in MODELOPT.iterdir() if any(p.glob("*.safetensors")))
PARTS = st.sampled_from(
    ["a", "layers", "0", "1", "21", "12", "mlp", "gate", "w1", "norm2", "experts", "lm_head", "1x"]
)
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
PATTERNS = st.one_of(
    NAMES,
    NAMES.map(lambda n: f"*{n}"),
    NAMES.map(lambda n: f"{n}*"),
    NAMES.map(lambda n: f"re:.*{re.escape(n)}"),
    st.text("lay21.0gate*?[]", min_size=1, max_size=6),
    NAMES.flatmap(lambda n: st.integers(0, len(n)).map(lambda i: n[i:] or n)),
)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_modules_of_a_group_are_equal(name: str) -> None:
    checkpoint = QuantizedCheckpoint(open_checkpoint(MODELOPT / name))
    grouped = [m for g in checkpoint.module_groups for m in g.modules]
    assert sorted(m.name for m in grouped) == sorted(m.name for m in checkpoint.quantized_modules)
    for group in checkpoint.module_groups:
        shapes = {n: (t.dtype, t.shape) for n, t in group.first.parts.items()}
        for module in group.modules:
            assert group.format is format_of(module, checkpoint.declaration)
            assert group.format is checkpoint.format_of(module)
            declared = checkpoint.declared_for(module)
            assert declared is None or declared._replace(entry="") == group.declared._replace(
                entry=""
            )
            assert shapes == {n: (t.dtype, t.shape) for n, t in module.parts.items()}
    names = map(canonical, checkpoint.checkpoint.tensors)
    assert checkpoint.names == {n for n in names if n is not None}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_part_has_its_own_modules_and_what_the_whole_says(name: str) -> None:
    whole = QuantizedCheckpoint(open_checkpoint(MODELOPT / name))
    modules = list(whole.modules.values())
    first, second = whole.part(modules[::2]), whole.part(modules[1::2])
    assert [*first.modules, *second.modules] == [m.name for m in modules[::2] + modules[1::2]]
    for part in (first, second, first.part(modules[:1])):
        assert part.names is whole.names
        assert part.shapes is whole.shapes
        assert part.declarations is whole.declarations
        assert part.declaration is whole.declaration
        assert all(part.format_of(m) is whole.format_of(m) for m in modules)
    assert {*first.formatted, *second.formatted} == set(whole.formatted)
    assert {*first.linears, *second.linears} == set(whole.linears)
    assert len(first.scales) + len(second.scales) == len(whole.scales)
    assert len([*first.tensors, *second.tensors]) == len([*whole.tensors])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_module_shows_the_same_alone_as_among_others(name: str) -> None:
    for module in gather(open_checkpoint(MODELOPT / name).tensors.values()).values():
        alone = Module(module.name, module.parts)
        for what in ("weight", "scale", "scales", "quantized", "dims", "inferred_format"):
            assert getattr(alone, what) == getattr(module, what)


@given(st.lists(PATTERNS, max_size=4), st.lists(NAMES, min_size=1, max_size=4))
def test_exclusions_are_read_as_written(patterns: list[str], names: list[str]) -> None:
    found = Exclusions(patterns)
    for name in names:
        plain = [p.strip("*") for p in patterns if not p.startswith("re:") and p.strip("*")]
        parts = Exclusions([p for p in patterns if "." not in p and not p.startswith("re:")])
        expected = (
            found.strict(name)
            or any(p in name for p in plain)
            or any(parts.strict(p) for p in name.split("."))
        )
        assert (
            found.loose(name) == expected == Exclusions(patterns).loose(name) == found.loose(name)
        )
    assert found.dead(names) == [
        p for p in patterns if not any(Exclusions([p]).loose(n) for n in names)
    ]


@given(NAMES)
def test_a_role_does_not_depend_on_numbers(name: str) -> None:
    assert role(name) == next((r for r, pattern in _PATTERNS if pattern.search(name)), "other")


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(':"\\{}a ', max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(':"a\\', max_size=3), inner, max_size=3),
    ),
    max_leaves=12,
)


@given(VALUES, st.sampled_from([None, 1]))
def test_json_without_duplicates_is_read(value: Any, indent: int | None) -> None:
    assert strict_json(json.dumps(value, indent=indent)) == value


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 1}',
        '{"a":1,"a" :1}',
        '{"a":{":":1,"b":2,"b":3}}',
        '[{"x":[{"k":1,"k":2}]}]',
        '{"\\u0061":1,"a":1}',
        '{":":":","a":1,"a":1}',
        '{"a:b":1,"a":{},"a":":::"}',
    ],
)
def test_a_duplicate_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        strict_json(text)


GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 3.0]},
        {"shape": [True, 6]},
        {"shape": [2, -3]},
        {"shape": "23"},
        {"shape": [[2, 3]]},
        {"dtype": "F99"},
        {"dtype": ["F32"]},
        {"data_offsets": [0, 24.0]},
        {"data_offsets": [False, 24]},
        {"data_offsets": [0, 25]},
        {"data_offsets": [0]},
        {"data_offsets": "ab"},
        {"data_offsets": [0, 12, 24]},
        {"extra": 1},
        {"data_offsets": [4, 28]},
        {"shape": [1] * 17 + [6]},
        {"shape": [2**57, 0]},
        {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]},
    ],
)
def test_a_header_that_is_not_plain_takes_the_long_way(change: dict[str, Any]) -> None:
    assert _contiguous("f", 8, {"a": GOOD}) is not None
    assert _contiguous("f", 8, {"a": {**GOOD, **change}}) is None
    assert (
        _contiguous(
            "f",
            8,
            {"z": {**GOOD, "shape": [2, 3]}, "a": {**GOOD, "data_offsets": [24, 48], **change}},
        )
        is None
    )
    assert _from_entries("f", 32, 8, {"a": {**GOOD, **change}}).problems


@pytest.mark.parametrize("entry", [1, [], "abc", None, {}, {"dtype": "F32"}])
def test_an_entry_that_is_none_takes_the_long_way(entry: Any) -> None:
    assert _contiguous("f", 8, {"a": GOOD, "b": entry}) is None


def test_a_plain_header_is_read_the_same_either_way() -> None:
    entries = {"b": GOOD, "a": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]}}
    short = _from_entries("f", 34, 8, dict(entries))
    turned = _from_entries("f", 34, 8, dict(reversed(entries.items())))
    assert not short.problems
    assert short.tensors == turned.tensors
    assert _from_entries("f", 40, 8, dict(entries)).problems[0].kind == "trailing"
    assert _from_entries("f", 30, 8, dict(entries)).problems[0].kind == "truncated"
