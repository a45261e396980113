# SPDX-License-Identifier: Apache-2.0
"""The loss of a golden by `--scorer hf`, and by vLLM on a CPU: its `LLM` and its server."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter import export
from tests.engines.environment import with_plugin
from tests.engines.serving import serving
from tests.paths import ROOT
from verifier.cli import run
from verifier.gate.run_file import read_run

GOLDEN = ROOT / "goldens" / "qwen3-moe-tiny"
HERE = Path(__file__).parent
RECIPES = ("", "mxfp8_attention", "nvfp4_attention")
"""The golden itself, and what vLLM can run on a CPU: its experts need Triton."""
SEQ_LEN = 2048
"""The context length of the golden."""


SPECULATION = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'


def scores(python: str, recipe: str, home: Path, documents: int) -> dict[str, Any]:
    """Return the mean nats per token by each scorer, over the first documents of the corpus.

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
    engine = with_plugin(python, home)
    in_process = ["--scorer", "vllm", "--engine-python", engine]
    for option in ("enforce_eager=true", "gpu_memory_utilization=0.2"):  # of the CPU's memory
        in_process += ["--engine-option", option]
    nats = {
        "ours": _score(model, home, documents, ["--activations", rounding]),
        "vllm": _score(model, home, documents, in_process),
    }
    with serving(engine, model) as endpoint:
        server = ["--scorer", "server", "--endpoint", endpoint]
        nats["server"] = _score(model, home, documents, server)
    return {"name": f"{GOLDEN.name}, {recipe or 'BF16'}", **nats}


def refused_speculation(python: str, home: Path) -> str:
    """Return the message of `score` about a server of vLLM that speculates."""
    engine, model = with_plugin(python, home), str(GOLDEN / "bf16")
    command = ["score", model, "--corpus", str(GOLDEN / "corpus.jsonl"), "-o", str(home / "x.run")]
    stderr = io.StringIO()
    with serving(engine, GOLDEN / "bf16", "--speculative-config", SPECULATION) as endpoint:
        with contextlib.redirect_stderr(stderr):
            code = run([*command, "--scorer", "server", "--endpoint", endpoint])
    message = stderr.getvalue().strip().splitlines()[-1]
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1", f"exit code {code}: {message}")


def _score(model: Path, home: Path, documents: int, scorer: Sequence[str]) -> float:
    """Return the mean nats per token of a checkpoint."""
    file = home / "scores.run"
    command = ["score", str(model), "--corpus", str(GOLDEN / "corpus.jsonl"), "--overwrite"]
    command += ["--documents", str(documents), "--seq-len", str(SEQ_LEN), "--workers", "1"]
    code = run([*command, "-o", str(file), *scorer])
    if code != 0:
        raise RuntimeError(f"score ended with exit code {code}")
    return float(read_run(file).arrays["nats"].mean())
