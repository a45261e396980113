# SPDX-License-Identifier: Apache-2.0
"""The context of a rule: parts, caches, and the names that attributes had in 0.1.0."""

from __future__ import annotations

import warnings

import pytest

from tests.paths import TESTS
from verifier.checkpoint import open_checkpoint
from verifier.payload.cache import ResultCache, ResultKey
from verifier.rules import Context
from verifier.rules.deprecated import MOVED

CHECKPOINT = TESTS / "data" / "modelopt" / "qwen3moe_nvfp4_experts_max"


@pytest.fixture(scope="module")
def ctx() -> Context:
    return Context.of(
        open_checkpoint(CHECKPOINT), open_checkpoint(CHECKPOINT.with_name("src_qwen3moe"))
    )


def test_each_run_of_a_rule_has_a_tally_of_its_own(ctx: Context) -> None:
    first, second = ctx.for_rule("QC501", "error"), ctx.for_rule("QC502", "warning")
    first.tally.see(3)
    assert (first.tally.checked, second.tally.checked, ctx.tally.checked) == (3, 0, 0)
    finding = second.finding("message", tensor=None)
    assert (finding.rule, finding.severity) == ("QC502", "warning")


def test_a_part_reads_its_own_modules_and_shares_results(ctx: Context) -> None:
    modules = list(ctx.candidate.modules.values())[:5]
    part = ctx.part(modules)
    tensor = next(iter(modules[0].parts.values()))
    assert list(part.candidate.modules) == [m.name for m in modules]
    assert part.expectations is ctx.expectations
    assert part.payload.results is ctx.payload.results
    assert part.payload.digest(tensor) == ctx.payload.digest(tensor)
    assert part.payload.scan(tensor) is part.payload.scan(tensor)
    assert part.payload.scan(tensor) is not ctx.payload.scan(tensor)


def test_the_context_of_a_rule_cannot_be_changed(ctx: Context) -> None:
    with pytest.raises(AttributeError):
        ctx.rule_id = "QC501"  # type: ignore[misc]


def test_results_of_one_module_are_exported_and_those_of_the_checkpoint_are_not() -> None:
    here, there = ResultCache(), ResultCache()
    assert there.of_name("digest", "a", lambda: 1) == 1
    there.of_name("digest", "a", lambda: 1)
    known = len(there)
    there.of_name("digest", "b", lambda: 2)
    there.of_checkpoint("loaded", lambda: 3)
    assert there.exported(known) == {ResultKey("digest", "b"): 2}
    here.imported(there.exported(known))
    assert here.of_name("digest", "b", lambda: pytest.fail("worked out again")) == 2
    assert here.of_checkpoint("loaded", lambda: 4) == 4


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_attribute_of_version_0_1_0_warns(ctx: Context, old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"ctx.{old} is now ctx.{MOVED[old]}"):
        getattr(ctx, old)


def test_an_unknown_attribute_is_an_error(ctx: Context) -> None:
    with warnings.catch_warnings(), pytest.raises(AttributeError, match="'no_such_thing'"):
        warnings.simplefilter("error")
        _ = ctx.no_such_thing  # type: ignore[attr-defined]
