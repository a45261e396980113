# SPDX-License-Identifier: Apache-2.0
"""The loss of a golden by `--scorer hf` and by vLLM's forward pass on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter import export
from tests.engines.environment import with_plugin
from tests.paths import ROOT
from verifier.cli import run
from verifier.gate.run_file import read_run

GOLDEN = ROOT / "goldens" / "qwen3-moe-tiny"
HERE = Path(__file__).parent
RECIPES = ("", "mxfp8_attention", "nvfp4_attention")
"""The golden itself, and what vLLM can run on a CPU: its experts need Triton."""
SEQ_LEN = 2048
"""The context length of the golden."""


def scores(python: str, recipe: str, home: Path, documents: int) -> dict[str, Any]:
    """Return the mean nats per token here and in vLLM, over the first documents of the corpus.

    Args:
        python: an interpreter with vLLM.
        recipe: of the export to score; '' for the golden itself.
        home: an empty folder.
        documents: how many.
    """
    model, rounding = GOLDEN / "bf16", "bf16"
    if recipe:
        model = home / "export"
        export(GOLDEN / "bf16", model, recipe=HERE / f"{recipe}.yaml", input_scale="one")
        # vLLM emulates MXFP8 by its weights alone.
        rounding = "shared" if recipe.startswith("nvfp4") else "bf16"
    engine = ["--scorer", "vllm", "--engine-python", with_plugin(python, home)]
    for option in ("enforce_eager=true", "gpu_memory_utilization=0.2"):  # of the CPU's memory
        engine += ["--engine-option", option]
    nats = {}
    for name, scorer in (("ours", ["--activations", rounding]), ("vllm", engine)):
        file = home / f"{name}.run"
        corpus = ["--corpus", str(GOLDEN / "corpus.jsonl"), "--documents", str(documents)]
        length = ["--seq-len", str(SEQ_LEN), "--workers", "1"]
        code = run(["score", str(model), *corpus, *length, "-o", str(file), *scorer])
        if code != 0:
            raise RuntimeError(f"score ended with exit code {code}")
        nats[name] = float(read_run(file).arrays["nats"].mean())
    return {"name": f"{GOLDEN.name}, {recipe or 'BF16'}", **nats}
