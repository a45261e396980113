# SPDX-License-Identifier: Apache-2.0
"""The codecs and the gate on a CUDA device: the bytes of the CPU, the scores of the CPU within BF16's noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import exporter
import verifier
from exporter import codecs, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GOLDEN = Path(__file__).parents[2] / "goldens" / "minimax-m3-tiny"


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8", "fp8", "fp8_per_channel", "fp8_block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_equal_the_cpu(fmt: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((4, 256, 512)).astype(np.float32)).to(dtype)
    here, there = codecs.encode(x, fmt), codecs.encode(x.cuda(), fmt)
    for leaf, value in here.items():
        assert torch.equal(value.view(torch.uint8), there[leaf].cpu().view(torch.uint8)), leaf
    back = codecs.decode(there, fmt).cpu()
    assert torch.equal(codecs.decode(here, fmt).view(torch.int32), back.view(torch.int32))


@pytest.mark.parametrize("method", weights.METHODS)
def test_searches_equal_the_cpu(method: weights.Method) -> None:
    x = torch.from_numpy(np.random.default_rng(6).standard_t(3, (2, 128, 256)).astype(np.float32))
    here, there = weights.encode(x, "nvfp4", method=method), weights.encode(x.cuda(), "nvfp4", method=method)
    for leaf, value in here.items():
        assert torch.equal(value.view(torch.uint8), there[leaf].cpu().view(torch.uint8)), leaf


def test_the_gate_passes_there_too(tmp_path: Path) -> None:
    exporter.export(GOLDEN / "bf16", tmp_path / "mixed", recipe="nvfp4_experts_only", onto=GOLDEN / "mxfp8")
    corpus = str(GOLDEN / "corpus.jsonl")
    result = verifier.gate.run(tmp_path / "mixed", base=GOLDEN / "bf16", corpus=corpus, device="cuda")
    assert result.outcome == "passed"
