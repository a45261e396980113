# SPDX-License-Identifier: Apache-2.0
"""Render docs/goldens.md and the damage table of docs/gate.md from committed results;
`tools/make_docs.py` calls it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "minimax-m3-tiny": "MiniMax-M3: vision tower, indexer, shared expert, float32 router; a vendor "
    "MXFP8 next to the BF16",
    "qwen3-moe-tiny": "Qwen3-MoE: every layer sparse, 16 narrow experts of which 4 are chosen, no "
    "shared expert",
    "gpt-oss-tiny": "gpt-oss: experts stacked, transposed, gate and up interleaved, with biases; "
    "sinks, sliding windows",
}
FORMATS = {
    "vendor_mxfp8": "MXFP8 as the vendor writes it",
    "mxfp8": "MXFP8",
    "nvfp4_experts": "NVFP4 experts, max",
    "nvfp4_experts_mse": "NVFP4 experts, MSE",
    "mixed": "NVFP4 experts over the vendor's MXFP8, max",
    "mixed_mse": "NVFP4 experts over the vendor's MXFP8, MSE",
    "merged": "merge of NVFP4 experts onto the vendor's MXFP8",
    "nvfp4_default": "NVFP4 everywhere, max",
    "nvfp4_default_mse": "NVFP4 everywhere, MSE",
    "fp8_default": "FP8, per-tensor scale",
}
INTRO = """# Goldens

Three small trained models, of three families, with an accepted record for each format. Exporter
changes are regression-tested against them: `python -m goldens.rebuild` (`tox -e goldens`) remakes
every export, checks it with its base, scores it on the golden's own corpus, and compares it with
its record.

Rendered from `goldens/results.json` by `tools/make_docs.py`.
"""
RECORDS = """## Records

`goldens/records/GOLDEN.FORMAT.golden.json` keeps no weights: the digest of the headers and one of
all tensors, the statistics of the scales (counts by power of two, at the floor, zero, at the
largest; ends of the float32 ones), base and candidate sums of each document, and when and why it
was accepted.

| rebuilt | with the versions of the record | with other versions of torch, transformers, numpy |
| --- | --- | --- |
| bytes equal, sums equal or within the drift margin | agrees | agrees, and names the versions |
| bytes differ, drift within 0.003 nats per token | fails: the code now writes different bytes \
| agrees, and reports the difference |
| other names, dtypes or shapes; a different base; drift beyond | fails | fails |

After an intentional change, on your own machine (CI never accepts records):

    python -m goldens.rebuild --write                 # pending records
    ckptgate goldens review -d goldens/records
    ckptgate goldens accept 'qwen3-moe-tiny.*' -d goldens/records --reason "…"
    python -m goldens.rebuild --results && python tools/make_docs.py

One export by hand, compared with its record:

    ckptgate export goldens/qwen3-moe-tiny/bf16 OUT --recipe nvfp4_experts_only --input-scale one
    ckptgate gate OUT --base goldens/qwen3-moe-tiny/bf16 \\
        --corpus goldens/qwen3-moe-tiny/corpus.jsonl \\
        --golden goldens/records/qwen3-moe-tiny.nvfp4_experts.golden.json
"""
MODEL_COLUMNS = (
    "golden",
    "model",
    "parameters",
    "training",
    "perplexity, WikiText-2 test",
    "unigram",
    "smallest expert load",
)
DAMAGE_COLUMNS = (
    "damage",
    "loss",
    "absolute",
    "drift [90%]",
    "by the loss",
    "KL ratio [98%]",
    "by the KL ratio",
    "KL",
    "top-1",
    "worst",
    "check",
)


def page() -> str:
    """Return docs/goldens.md."""
    results = json.loads((ROOT / "goldens" / "results.json").read_text(encoding="utf-8"))
    lines = [INTRO, *_head(MODEL_COLUMNS)]
    for name, golden in results["goldens"].items():
        minutes = golden["training_seconds"] / 60
        cells = (
            f"`{name}`",
            MODELS[name],
            f"{golden['parameters']:,}",
            f"{golden['steps']:,} steps, {minutes:.0f} min on one thread",
            f"{golden['wikitext_perplexity']:.1f}",
            f"{golden['unigram_perplexity']:.1f}",
            f"{golden['lowest_expert_share']:.1%}",
        )
        lines.append(_row(cells))
    lines += [
        "",
        "Perplexity is over the models' own tokens (2,048 byte-level BPE);",
        "[goldens/README.md](../goldens/README.md) documents the origin of text and corpora.",
        "",
    ]
    for name, golden in results["goldens"].items():
        lines += verdicts(name, golden)
    return "\n".join([*lines, _command(results), "", RECORDS])


def verdicts(name: str, golden: dict[str, Any]) -> list[str]:
    """Return one golden's table of verdicts, and the commands that make its exports."""
    made = [x for x in golden["formats"] if "refused" not in x]
    refused = [x for x in golden["formats"] if "refused" in x]
    lines = [f"## {name}", ""]
    if made:
        lines += _verdict_table(made, golden["perplexity"])
    if refused:
        names = ", ".join(FORMATS[x["format"]] for x in refused)
        lines += [
            f"Not exported in this version ({names}); `ckptgate export` refuses it, exit 1:",
            "",
        ]
        lines += [f"    {reason}" for reason in sorted({x["refused"] for x in refused})] + [""]
    if made:
        lines += ["The exports:", ""]
        for x in made:
            lines.append("    " + re.sub(r" OUT(?= |$)", f" OUT.{x['format']}", x["command"]))
        lines.append("")
    return lines


def _verdict_table(made: list[dict[str, Any]], perplexity: float) -> list[str]:
    documents, tokens = made[0]["documents"], made[0]["tokens"]
    lines = [
        f"Loss over the BF16 model, nats per token, on {documents} documents sampled from it",
        f"({tokens:,} tokens, perplexity {perplexity:.2f}), with a 90% interval over documents,",
        "and the format's default margin.",
        "",
        *_head(("format", "loss [90%]", "of perplexity", "KL", "margin", "verdict", "size")),
    ]
    for x in made:
        cells = (
            FORMATS[x["format"]],
            f"{x['loss']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}]",
            f"{math.expm1(x['loss']):+.2%}",
            f"{x['kl']:.5f}" if x.get("kl") is not None else "",
            f"{x['margin']:.4f}",
            x["verdict"],
            f"{x['share_of_base']:.0%}",
        )
        lines.append(_row(cells))
    note = [
        "The text was sampled from the BF16 model, so the loss estimates KL(base || candidate)."
    ]
    if any(x.get("kl") is not None for x in made):
        note += [
            "KL is that divergence itself, nats per token (a lower bound, from the top 64 tokens):",
            "it has the same expectation and far less variance. It shows that the scales of `mse`",
            "are better than those of `max`, which the loss does not show on every golden.",
        ]
    return [*lines, "", *note, ""]


def damage_lines() -> list[str]:
    """Return the results of the gate's measures and of the check on damaged exports."""
    file = ROOT / "benchmarks" / "results" / "damage.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    lines: list[str] = []
    for golden in results["goldens"]:
        more = golden["wikitext"]
        lines += [
            f"`{golden['golden']}`, {golden['export']}; layer {golden['layer']}, "
            f"{golden['documents']} documents of its own text, {golden['tokens']:,} tokens.",
            "",
            *_head(DAMAGE_COLUMNS),
            _row((*_undamaged(golden), "", "", "", _rules(golden["good"]["check"]))),
            *(_row((*_decided(x), *_seen(x))) for x in golden["rows"]),
            "",
            f"The same on {more['corpus']}: {more['documents']} documents, {more['tokens']:,} "
            "tokens.",
            "",
            *_head(DAMAGE_COLUMNS[:7]),
            _row(_undamaged(more)),
            *(_row(_decided(x)) for x in more["rows"]),
            "",
        ]
    lines += [
        "Drift and KL ratio are over the undamaged export, each decided together with the absolute",
        "margin. KL and top-1 compare with the undamaged export (KL: the lower bound from the top",
        "64 tokens); worst: outlier documents; check: the rules that find it at depth payload with",
        "`--base` (and `--merged-from`).",
        "",
    ]
    return [*lines, _command(results)]


def _command(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    return f"`{results['command']}`; {versions}."


def _head(columns: Sequence[str]) -> list[str]:
    return [_row(columns), "| --- " * len(columns) + "|"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _undamaged(text: dict[str, Any]) -> tuple[str, ...]:
    """Return the first cells of the undamaged export on a text."""
    good = text["good"]
    return "none", f"{good['loss']:+.4f}", good["absolute"], "", "", "", ""


def _decided(x: dict[str, Any]) -> tuple[str, ...]:
    """Return what each margin decides of a damage."""
    middle, low, high = x["drift"]
    ratio, ratio_low, ratio_high = x["kl_ratio"]
    lists = ", lists the expert" if x["unreached"] else ""
    return (
        x["damage"],
        f"{x['loss']:+.4f}",
        x["absolute"],
        f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]",
        x["with_drift"] + lists,
        f"{ratio:.3f} [{ratio_low:.3f}, {ratio_high:.3f}]",
        x["with_kl"] + lists,
    )


def _seen(x: dict[str, Any]) -> tuple[str, ...]:
    """Return what else is seen of a damage."""
    worst = "none" if not x["beyond"] else str(x["beyond"])
    return f"{x['kl_to_good']:.4f}", f"{x['top1_to_good']:.1%}", worst, _rules(x["check"])


def _rules(rules: list[str]) -> str:
    return ", ".join(rules) or "nothing"
