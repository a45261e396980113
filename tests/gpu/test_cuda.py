# SPDX-License-Identifier: Apache-2.0
"""The codecs, calibration and the gate on a CUDA device: the bytes of the CPU; maxima and scores
within BF16's noise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import exporter
import verifier
from exporter import codecs, weights
from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.gate.jobs import Scorer
from verifier.load import rounding as fake
from verifier.load.activations import declared_activations
from verifier.load.model import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8", "fp8", "fp8_per_channel", "fp8_block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_equal_the_cpu(fmt: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(
        np.random.default_rng(5).standard_normal((4, 256, 512)).astype(np.float32)
    ).to(dtype)
    here, there = codecs.encode(x, fmt), codecs.encode(x.cuda(), fmt)
    for leaf, value in here.items():
        assert torch.equal(value.view(torch.uint8), there[leaf].cpu().view(torch.uint8)), leaf
    back = codecs.decode(there, fmt).cpu()
    assert torch.equal(codecs.decode(here, fmt).view(torch.int32), back.view(torch.int32))


@pytest.mark.parametrize("method", weights.METHODS)
def test_searches_equal_the_cpu(method: weights.Method) -> None:
    x = torch.from_numpy(np.random.default_rng(6).standard_t(3, (2, 128, 256)).astype(np.float32))
    here, there = (
        weights.encode(x, "nvfp4", method=method),
        weights.encode(x.cuda(), "nvfp4", method=method),
    )
    for leaf, value in here.items():
        assert torch.equal(value.view(torch.uint8), there[leaf].cpu().view(torch.uint8)), leaf


def test_the_gate_passes_there_too(tmp_path: Path) -> None:
    exporter.export(
        GOLDEN / "bf16", tmp_path / "mixed", recipe="nvfp4_experts_only", onto=GOLDEN / "mxfp8"
    )
    corpus = str(GOLDEN / "corpus.jsonl")
    result = verifier.gate.run(
        tmp_path / "mixed", base=GOLDEN / "bf16", corpus=corpus, device="cuda"
    )
    assert result.outcome == "passed"


def test_calibration_reads_what_it_reads_on_the_cpu(tmp_path: Path) -> None:
    maxima = {}
    for device in ("cpu", "cuda"):
        exporter.calibrate(
            GOLDEN / "bf16",
            tmp_path / device,
            recipe="nvfp4_experts_only",
            texts=[GOLDEN / "corpus.jsonl"],
            samples=[16],
            seq_len=256,
            device=device,
        )
        with safe_open(tmp_path / device, "np") as stats:
            names = [name for name in stats.keys() if name.endswith("amax")]
            maxima[device] = {name: float(stats.get_tensor(name)) for name in names}
    here, there = maxima.values()
    assert here.keys() == there.keys()
    near = [there[name] == pytest.approx(value, rel=0.05) for name, value in here.items()]
    assert sum(near) >= 0.9 * len(near)  # a token may go to another expert there


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cuda") / "mixed"
    exporter.export(GOLDEN / "bf16", out, recipe="nvfp4_experts_only", onto=GOLDEN / "mxfp8")
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_activations_equal_the_cpu(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_t(2, (64, 512)) * 10.0 ** rng.integers(-9, 9, (64, 1))
    x[3, 32:64] = 0
    here = torch.from_numpy(x.astype(np.float32)).to(dtype)
    for rounding in (
        fake.Rounding("nvfp4", 0.013),
        fake.Rounding("mxfp8"),
        fake.Rounding("fp8", 0.21),
        fake.Rounding("fp8_token"),
        fake.Rounding("fp8_group"),
    ):
        assert torch.equal(rounding(here), rounding(here.cuda()).cpu()), rounding


def test_declared_activations_reach_the_experts_there(mixed: Path) -> None:
    ids = torch.arange(2, 66).reshape(2, 32) * 7 % 512
    found = {}
    for device in ("cpu", "cuda"):
        model = load_model(str(mixed), device=device).model
        with torch.inference_mode(), declared_activations(model, open_checkpoint(mixed)) as counts:
            assert set(counts) == {"nvfp4", "mxfp8"}
            found[device] = model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()
    spread = found["cpu"].std()
    assert (found["cpu"] - found["cuda"]).abs().mean() < 0.05 * spread


def test_the_gate_with_declared_activations(mixed: Path) -> None:
    corpus, scorer = str(GOLDEN / "corpus.jsonl"), Scorer(activations="declared")
    here, there = (
        verifier.gate.run(
            mixed, base=GOLDEN / "bf16", corpus=corpus, device=d, scorer=scorer, documents=20
        )
        for d in ("cpu", "cuda")
    )
    assert here.interval is not None
    assert there.interval is not None
    assert there.interval.delta == pytest.approx(here.interval.delta, abs=0.002)
    assert there.environment["device"] != "cpu"


def test_a_run_there_is_unlike_one_here_and_says_so(mixed: Path, tmp_path: Path) -> None:
    from verifier.gate import compare_runs, load_corpus, margin_of, score_run

    corpus = load_corpus(str(GOLDEN / "corpus.jsonl")).head(12)
    here = score_run(open_checkpoint(GOLDEN / "bf16"), corpus, device="cpu")
    there = score_run(open_checkpoint(mixed), corpus, device="cuda")
    assert here is not None
    assert there is not None
    result = compare_runs(here, there, margin_of("8%", []))
    assert any(u.startswith("device cpu and ") for u in result.unlike)
    assert result.outcome == "passed"
