# SPDX-License-Identifier: Apache-2.0
"""Layers that keep the quantization of a quantized base: sound with the base's bytes, and only so.

NVFP4 experts of ModelOpt around attention in the base's FP8 tiles, which the declaration excludes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.formats import declarations as say
from tests.formats import encoders as encode
from tests.formats.corruptions import nan
from tests.formats.files import Checkpoint
from tests.formats.formats import Format, Roles, build
from tests.formats.matrix import FAILED, PASSED, check
from tests.formats.table import ATTENTION, EXPERTS, FORMATS

TILES = encode.fp8_block("weight_scale_inv", kind=np.dtype(np.float32))
KEPT = "model.layers.0.self_attn.q_proj"
CANDIDATE = Format(
    "nvfp4_around_fp8",
    "NVFP4 experts, the rest as the base has it",
    lambda model, plain: say.modelopt("NVFP4", group_size=16, bits=4)(
        model, [*plain, "model.layers.0.self_attn*"]
    ),
    ((EXPERTS, encode.nvfp4), (ATTENTION, TILES)),
    "TensorRT-LLM",
    roles=Roles(tensor_scale="weight_scale_2", inputs="input_scale"),
)


@pytest.fixture
def candidate() -> Checkpoint:
    return build(CANDIDATE)[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Write the model in FP8, from the same weights."""
    return build(FORMATS["deepseek_fp8"])[0].write(tmp_path / "base")


def test_layers_with_the_bytes_of_the_base_are_sound(
    candidate: Checkpoint, base: Path, tmp_path: Path
) -> None:
    outcome = check(candidate.write(tmp_path / "candidate"), base)
    assert (outcome.verdict, outcome.findings) == (PASSED, ())


@pytest.mark.parametrize("edit", ["another byte", "no scale", "NaN scale"])
def test_a_kept_layer_that_differs_is_reported(
    edit: str, candidate: Checkpoint, base: Path, tmp_path: Path
) -> None:
    weight, scale = f"{KEPT}.weight", f"{KEPT}.weight_scale_inv"
    if edit == "another byte":
        changed = candidate.tensors[weight].copy()
        changed.view(np.uint8)[3, 5] ^= 0x41
        candidate.tensors[weight] = changed
    elif edit == "no scale":
        del candidate.tensors[scale]
    else:
        candidate.tensors[scale] = nan(candidate.tensors[scale])
    outcome = check(candidate.write(tmp_path / "candidate"), base)
    assert outcome.verdict == FAILED
    assert any(KEPT in (f.where.tensor or "") for f in outcome.findings)
