# SPDX-License-Identifier: Apache-2.0
"""Sound weights take the fast comparison: none is decoded whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.quantized import QuantizedCheckpoint
from verifier.reconstruction.cause import near_base
from verifier.rules.comparing import CheckpointPair
from verifier.rules.context import Context

exporter = pytest.importorskip("exporter", exc_type=ImportError)
pytest.importorskip("torch")

GOLDENS = ("gpt-oss-tiny", "minimax-m3-tiny", "qwen3-moe-tiny")
RECIPES = ("nvfp4_default", "nvfp4_experts_only_mse", "mxfp8_default", "fp8_default")


@pytest.mark.parametrize("golden", GOLDENS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_sound_weight_of_a_golden_is_decoded_whole(
    golden: str, recipe: str, tmp_path: Path
) -> None:
    base = ROOT / "goldens" / golden / "bf16"
    exporter.export(base, tmp_path / "out", recipe=recipe, input_scale="one", engine="none")
    ctx = Context.of(open_checkpoint(tmp_path / "out"), open_checkpoint(base))
    assert isinstance(ctx.base, QuantizedCheckpoint)
    pair = CheckpointPair(ctx.candidate, ctx.base, ctx.payload)
    quantized = ctx.candidate.quantized_modules
    assert len(quantized) > 50
    slow = []
    for module in quantized:
        fmt = ctx.candidate.format_of(module)
        assert fmt is not None
        if near_base(pair, module, fmt) is None:
            slow.append(module.name)
    assert slow == []
