# SPDX-License-Identifier: Apache-2.0
"""The cost of scoring over the plain forward pass of the same models on the same windows.

    python benchmarks/gate.py [--rounds 5] [--out benchmarks/results/gate.json]
    python benchmarks/gate.py --parameters 1e8 --documents 2
    python benchmarks/gate.py --device cuda --parameters 1e9

The golden and its own corpus, or with ``--parameters`` a Qwen3-MoE of at least so many parameters
with random weights, and random ids: they serve for speed, not for numbers. Models are loaded once;
each round measures in turn: the forward pass of base and candidate alone, scoring them in lockstep
(exact KL), with the top 64 tokens, with activations rounded as declared, and lm-eval's own
scoring of the same windows. On CPU: one thread, and seconds of processor time, which a shared
machine disturbs little; on a GPU: wall time. Loading and the noise floor are not included. Exits
with 3 if the device does not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import exporter
from verifier.checkpoint import open_checkpoint
from verifier.gate.corpora import load_corpus
from verifier.gate.jobs import Job, Unit, Window
from verifier.gate.scorers.expert_counts import counting
from verifier.gate.scorers.transformers import score_windows
from verifier.gate.windows import units_of, windows_of
from verifier.load.activations import declared_activations
from verifier.load.model import load_model

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
DOCUMENTS, WINDOW, BATCH, SEED = 16, 512, 8, 7


def random_model(folder: Path, parameters: float) -> int:
    """Write a Qwen3-MoE with at least so many random BF16 parameters; return how many it has."""
    import transformers

    layers, hidden = (24, 1024) if parameters >= 1e8 else (2, 128)
    wide = 0
    size = 0.0
    while size < parameters or not wide:
        wide += 64
        config = transformers.AutoConfig.for_model(
            "qwen3_moe",
            hidden_size=hidden,
            num_hidden_layers=layers,
            moe_intermediate_size=wide,
            intermediate_size=wide,
            num_experts=16,
            num_experts_per_tok=4,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            head_dim=64,
            vocab_size=32_768,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            size = sum(
                p.numel()
                for p in transformers.AutoModelForCausalLM.from_config(config).parameters()
            )
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def random_windows(words: int, documents: int) -> list[Window]:
    """Return one window of random ids for each document."""
    ids = torch.randint(
        0, words, (documents, WINDOW), generator=torch.Generator().manual_seed(SEED)
    )
    return [(tuple(row), (d,) * WINDOW) for d, row in enumerate(ids.tolist())]


def forward(models: list[Any], units: list[Unit], device: str) -> None:
    """Run the models over the units."""
    for unit in units:
        width = max(len(ids) for ids, _ in unit.windows)
        ids = torch.tensor(
            [list(ids) + [0] * (width - len(ids)) for ids, _ in unit.windows], device=device
        )
        for model in models:
            model(input_ids=ids, use_cache=False)


def scored(models: list[Any], units: list[Unit], job: Job, *, lockstep: bool) -> None:
    """Score the units as a worker does."""
    pairs = [(models[1], models[0])] if lockstep else [(m, None) for m in models]
    for model, base in pairs:
        with counting(model) as experts:
            for unit in units:
                score_windows(model, base, job, unit, experts)
                experts.take()


def declared(models: list[Any], folders: list[Path], units: list[Unit], job: Job) -> None:
    """Score the units with activations rounded as the checkpoints declare."""
    with contextlib.ExitStack() as stack:
        for model, folder in zip(models, folders, strict=True):
            stack.enter_context(declared_activations(model, open_checkpoint(folder)))
        scored(models, units, job, lockstep=True)


def by_lm_eval(adapters: list[Any], units: list[Unit]) -> None:
    """Have lm-eval score the same windows: each but its first token, given the first."""
    windows = [ids for unit in units for ids, _ in unit.windows]
    requests = [(("", ""), list(ids[:1]), list(ids[1:])) for ids in windows if len(ids) > 1]
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        for adapter in adapters:
            adapter._loglikelihood_tokens(requests, disable_tqdm=True)


def adapters_of(models: list[Any]) -> list[Any]:
    """Return lm-eval's adapters around the models; none if it is not installed."""
    if find_spec("lm_eval") is None:
        return []
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "bf16")  # unused: ids are scored
    return [
        HFLM(pretrained=m, tokenizer=tokenizer, max_length=WINDOW, batch_size=BATCH) for m in models
    ]


def measured(
    ways: dict[str, Callable[[], None]], rounds: int, device: str
) -> list[dict[str, float]]:
    """Return the seconds of each way in each round, after a warm-up round."""
    clock = time.process_time if device == "cpu" else time.perf_counter

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return clock()

    rows = []
    for _ in range(rounds + 1):
        row = {}
        for name, way in ways.items():
            started = now()
            way()
            row[name] = round(now() - started, 4)
        rows.append(row)
    return rows[1:]


def arguments() -> argparse.Namespace:
    """Parse the command line; exit with 3 if the device does not exist."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--parameters", type=float, help="of a model with random weights, instead of the golden"
    )
    parser.add_argument(
        "--documents", type=int, default=DOCUMENTS, help="of random ids, one window each"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("gate.py: no CUDA device; nothing was measured", file=sys.stderr)
        sys.exit(3)
    if args.out is None:
        name = "gate-cuda" if args.device != "cpu" else "gate-wide" if args.parameters else "gate"
        args.out = ROOT / "benchmarks" / "results" / f"{name}.json"
    return args


def main() -> None:
    """Measure and write."""
    args = arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source, out = GOLDEN / "bf16", Path(folder) / "out"
        if args.parameters:
            source = Path(folder) / "source"
            size = random_model(source, args.parameters)
            exporter.export(source, out, recipe="nvfp4_experts_only", input_scale="one")
            windows = random_windows(32_768, args.documents)
        else:
            size = 0
            exporter.export(source, out, recipe="nvfp4_experts_only", onto=GOLDEN / "mxfp8")
            windows = windows_of(load_corpus(str(GOLDEN / "corpus.jsonl")), None, WINDOW)
        models = [load_model(str(p), device=args.device).model for p in (source, out)]
        units = units_of(windows, BATCH)
        job = Job("", args.device, "tokens", BATCH, WINDOW)
        top = replace(job, top_k=64)
        adapters = adapters_of(models)
        ways: dict[str, Callable[[], None]] = {
            "forward": lambda: forward(models, units, args.device),
            "lockstep": lambda: scored(models, units, job, lockstep=True),
            "top_k": lambda: scored(models, units, top, lockstep=False),
            "declared": lambda: declared(models, [source, out], units, job),
        }
        if adapters:
            ways["lm_eval"] = lambda: by_lm_eval(adapters, units)
        with torch.inference_mode():
            rounds = measured(ways, args.rounds, args.device)
    report(args, ways, rounds, sum(len(ids) for ids, _ in windows), size)


def report(
    args: argparse.Namespace,
    ways: dict[str, Any],
    rounds: list[dict[str, float]],
    tokens: int,
    size: int,
) -> None:
    """Write the result and print its ratios."""
    ratios = {n: round(statistics.median(r[n] / r["forward"] for r in rounds), 3) for n in ways}
    seconds = {n: statistics.median(r[n] for r in rounds) for n in ways}
    cuda = args.device != "cpu"
    options = f" --device {args.device}" * cuda
    if args.parameters:
        options += f" --parameters {args.parameters:g} --documents {args.documents}"
    result = {
        "command": f"python benchmarks/gate.py{options}",
        "rounds": rounds,
        "tokens": tokens,
        "parameters": size,
        "ratio_to_forward": ratios,
        "tokens_per_second": {n: round(2 * tokens / s) for n, s in seconds.items()},
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers", "numpy")},
        },
        "machine": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()}, one thread of {os.cpu_count()} processors, shared",
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(ratios), json.dumps(result["tokens_per_second"]))


if __name__ == "__main__":
    main()
