# SPDX-License-Identifier: Apache-2.0
"""The verdict on every checkpoint that ModelOpt wrote for us, as its README states it; needs no
torch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import verifier
from tests.paths import TESTS
from verifier.findings import rules_of

# checkpoint: (base, exit code, error rules without a base, further error rules with one, warning
# rules)
# Checkpoints of MiniMax-M3 have their config in transformers' spelling (QC417); two have a BF16
# indexer next to a quantized q/k/v (QC409).
EXPECTED: dict[str, tuple[str | None, int, set[str], set[str], set[str]]] = {
    "qwen3moe_nvfp4_experts_max": ("src_qwen3moe", 0, set(), set(), set()),
    "llama_mxfp8": ("src_llama", 0, set(), set(), set()),
    "llama_fp8_kvfp8": ("src_llama", 0, set(), set(), set()),
    "llama_nvfp4_tinyamax": ("src_llama", 0, set(), set(), set()),
    "m3_vendor_mxfp8_like": ("m3_bf16_sharded", 0, set(), set(), {"QC401", "QC409", "QC417"}),
    "m3_mixed_example": ("m3_bf16_sharded", 0, set(), set(), {"QC401", "QC409", "QC417"}),
    "m3_nvfp4_experts_max": ("src_m3", 1, {"QC402", "QC404"}, set(), {"QC417"}),
    "m3_mixed_mxfp8_nvfp4_recipe__cpushim": (
        "src_m3",
        0,
        set(),
        set(),
        {"QC406", "QC410", "QC417"},
    ),
    # Beside the zeroed expert, expert 2's gate_proj and layer 0's router are not those of
    # src_qwen3moe.
    "qwen3moe_nvfp4_experts_adversarial": (
        "src_qwen3moe",
        1,
        {"QC501", "QC502"},
        {"QC517", "QC605"},
        set(),
    ),
    "qwen3moe_nvfp4_experts_nocalib": ("src_qwen3moe", 1, {"QC303"}, set(), set()),
    "aria_nvfp4_transposed": ("src_aria", 1, {"QC303"}, {"QC208", "QC515"}, set()),
    "src_llama": (None, 3, set(), set(), set()),
    "src_qwen3moe": (None, 3, set(), set(), set()),
    "src_m3": (None, 3, set(), set(), {"QC417"}),
    "src_aria": (None, 3, set(), set(), set()),
    "m3_bf16_sharded": (None, 3, set(), set(), {"QC417"}),
}
MERGED = {"m3_mixed_example": "m3_vendor_mxfp8_like"}


@pytest.mark.parametrize("name", sorted(EXPECTED))
@pytest.mark.parametrize("with_base", [False, True])
def test_verdict(shared_data: Path, name: str, with_base: bool) -> None:
    root = shared_data / "modelopt"
    base, code, errors, more, warnings = EXPECTED[name]
    if with_base and base is None:
        base = name  # an unquantized checkpoint against itself is still inconclusive
    merged = MERGED.get(name) if with_base else None
    report = verifier.check(
        root / name,
        depth="payload",
        base=root / base if with_base and base else None,
        merged_from=root / merged if merged else None,
    )
    assert rules_of(report.findings, "error") == (errors | more if with_base else errors)
    assert rules_of(report.findings, "warning") == warnings
    assert report.exit_code == code


def test_all_are_covered(shared_data: Path) -> None:
    assert {p.name for p in (shared_data / "modelopt").iterdir() if p.is_dir()} == set(EXPECTED)


def test_the_nan_witness_is_exact(shared_data: Path) -> None:
    report = verifier.check(
        shared_data / "modelopt" / "qwen3moe_nvfp4_experts_adversarial", depth="payload"
    )
    finding = next(f for f in report.by_rule("QC502") if "down_proj" in str(f.where.tensor))
    assert (finding.observed, finding.where.row, finding.where.block, finding.count) == (
        "0xFF",
        0,
        0,
        512,
    )
    shard = shared_data / "modelopt" / "qwen3moe_nvfp4_experts_adversarial" / "model.safetensors"
    assert finding.where.byte is not None
    assert shard.read_bytes()[finding.where.byte] == 0xFF


@pytest.mark.parametrize("depth", ["header", "payload"])
def test_no_torch_is_needed_or_imported(depth: str) -> None:
    data = TESTS / "data" / "modelopt"
    candidate, base = data / "qwen3moe_nvfp4_experts_max", data / "src_qwen3moe"
    arguments = ["check", str(candidate), "--base", str(base), "--depth", depth]
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"from verifier.cli import run\nsys.exit(run({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout
