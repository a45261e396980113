# SPDX-License-Identifier: Apache-2.0
"""results.json, and docs/engines.md from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.engines.loads import ACCEPTED, FAILURES, NOT_CHECKED, REFUSED, SECTIONS, WARNS, Row

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "engines.md"
SGLANG = "sglang"
OURS = ("goldens", "zoo", SGLANG)
"""The sections with exports of ours."""


def read() -> dict[str, Any]:
    """Return the committed results: rows by section, and the engine."""
    results: dict[str, Any] = {"engine": ""}
    if RESULTS.exists():
        results |= json.loads(RESULTS.read_text(encoding="utf-8"))
    for name in (*SECTIONS, SGLANG):
        results[name] = [Row(**row) for row in results.get(name, ())]
    return results


def violations(results: dict[str, Any]) -> list[Row]:
    """Return our exports that `check` passes and that fail in the engine."""
    return [row for name in OURS for row in results.get(name, ()) if row.violates]


def write(results: dict[str, Any]) -> None:
    """Write the results, a line per row, and the page."""
    parts = [f' "engine": {json.dumps(results["engine"])}']
    for name in (*SECTIONS, SGLANG):
        rows = [json.dumps(asdict(row), ensure_ascii=False) for row in results.get(name, ())]
        parts.append(
            f' "{name}": [\n  ' + ",\n  ".join(rows) + "\n ]" if rows else f' "{name}": []'
        )
    more = [name for name in ("scores", "speculation") if name in results]
    parts += [f' "{name}": {json.dumps(results[name])}' for name in more]
    RESULTS.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    PAGE.write_text(render(results), encoding="utf-8")


def render(results: dict[str, Any] | None = None) -> str:
    """Return docs/engines.md."""
    results = results or read()
    sections = [
        INTRODUCTION.format(engine=results["engine"]),
        _summary(results),
        _violations(results),
        "## Goldens\n\n" + _exports(results["goldens"]),
        ZOO + _families(results["zoo"]),
        CLAIMS + _claims(results["claims"]),
        CASES + _cases(results["cases"]),
        SGLANG_TEXT + _exports(results[SGLANG], "SGLang"),
        _scores(results.get("scores", []), results.get("speculation", "")),
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


INTRODUCTION = """\
# Engines

```console
$ ckptgate check ./OUT --base ./BF16 --depth engine --engine-python /opt/vllm/bin/python
```

The checkpoint goes through vLLM's own configuration parsing, name mapping, model construction,
weight loading and post-processing, on a CPU, in a process of the interpreter that you name;
ckptgate need not be installed there. QC601 reports what vLLM rejects, QC602 the parameters that the
checkpoint never writes, and QC603 what is dropped or degraded. The base goes through the same
loader as a control: what also happens to the base is not reported. What cannot be built on a CPU is
not checked, and the verdict is then inconclusive. Where a CPU has no kernel, vLLM's emulation or a
Triton class is selected, and none of them is run: this checks a load, not the numbers of kernels.

A model is built in memory, which takes about {memory} times the bytes of the checkpoint. If that
does not fit, the fewest first layers are built that show every kind of layer, and the report says
so; `--engine-layers N` chooses. `--depth engine` runs the rules of depths header and payload too,
and does not load with transformers.

Everything that depends on vLLM's internals is in `verifier/engines/vllm_worker.py`. The tables
below are from `python -m tests.engines --write` (`tox -e engines`) with {{engine}}. vLLM 0.31.0
gives the same outcomes for the goldens.
""".format(memory="2.5")
ZOO = """\
## Families

Small random models of the classes with fused experts in transformers, in three recipes. "Source"
is the unquantized model: where vLLM does not load it, the exports are not tried. Some classes are
not in vLLM and are loaded through its Transformers backend. config.json is what transformers
writes, with keys that vLLM reads and that releases have (`COMPLETED` in `tests/engines/loads.py`).
vLLM rejects a source for one of these reasons: the transformers of its environment does not know
the class; the tiny config lacks a key or a file that vLLM reads; transformers' own class of the
config drops keys that vLLM reads (Step 3.7); or transformers writes stacks of experts in the other
orientation (Qwen3-VL).

"""
CLAIMS = """\
## What rules say of vLLM

The defects of the self-test for rules that state a severity for vLLM, each in a tiny checkpoint
that vLLM loads. "Stated" is the rule's severity under `--profile vllm`, "seen" what vLLM does.
An error that vLLM accepts is a wrong value that no loader can see, or a refuted statement.

"""
CASES = """\
## Reported checkpoints

The tiny checkpoints rebuilt from public reports, with `check --profile vllm` and with vLLM.

"""
SGLANG_TEXT = """\
## SGLang

SGLang 0.5.23 does not build a model without a GPU: its CUDA libraries are left out of its
environment here, and torchvision is a stub. Its own configuration classes import, parse the
declaration of an export `--for sglang`, and select a class for each module: by the names on disk,
with those of fused projections, and one name for all experts of a layer. "Accepted" is that each
class is the one for the format of the module's tensors. No weight is loaded.

"""


def _summary(results: dict[str, Any]) -> str:
    lines = ["| | checkpoints | " + " | ".join(OUTCOMES) + " |", "| --- |" + " --- |" * 8]
    for name in SECTIONS:
        counts = Counter(row.engine or REFUSED for row in results[name])
        cells = " | ".join(str(counts[o] or "") for o in OUTCOMES)
        lines.append(f"| {name} | {len(results[name])} | {cells} |")
    return "\n".join(lines)


OUTCOMES = (ACCEPTED, WARNS, *FAILURES, NOT_CHECKED, REFUSED)


def _violations(results: dict[str, Any]) -> str:
    rows = violations(results)
    if not rows:
        return (
            "Every export of ours that `check` passes loads in vLLM, or cannot be built on a CPU."
        )
    text = f"{len(rows)} exports of ours pass `check` and fail in an engine:\n\n"
    return text + "\n".join(f"* {row.name}, {row.recipe}: {_why(row)}" for row in rows)


def _why(row: Row) -> str:
    return (
        f"{row.engine}: {row.why}".replace("|", "\\|").replace("<", "&lt;")
        if row.why
        else row.engine
    )


def _exports(rows: Sequence[Row], engine: str = "vLLM") -> str:
    lines = [f"| golden | export | check | {engine} |", "| --- | --- | --- | --- |"]
    for row in rows:
        vllm = _why(row) if row.engine else f"refused by `export`: {row.why}"
        lines.append(f"| {row.name} | {row.recipe} | {row.check} | {vllm} |")
    return "\n".join(lines)


def _families(rows: Sequence[Row]) -> str:
    """Return a row per family: equal outcomes of its recipes are one."""
    lines = ["| family | export | check | vLLM |", "| --- | --- | --- | --- |"]
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        vllm = _why(row) if row.engine else f"refused by `export`: {row.why}"
        recipe = "source" if row.recipe.startswith("as it is") else row.recipe
        groups.setdefault((row.name, row.check, row.engine, vllm), []).append(recipe)
    for (name, check, _, vllm), recipes in groups.items():
        lines.append(f"| {name} | {', '.join(filter(None, recipes))} | {check} | {vllm} |")
    return "\n".join(lines)


def _claims(rows: Sequence[Row]) -> str:
    lines = ["| defect | checkpoint | stated | seen | check |", "| --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: row.name):
        if row.claim:
            cells = (row.name, row.recipe, row.claim, _why(row), row.check)
            lines.append(f"| {' | '.join(cells)} |")
    invalid = [f"{row.recipe} ({_why(row)})" for row in rows if not row.claim]
    if invalid:
        lines += ["", "Valid tiny checkpoints that vLLM does not load: " + "; ".join(invalid) + "."]
    return "\n".join(lines)


def _cases(rows: Sequence[Row]) -> str:
    lines = ["| case | kind | check | vLLM |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.name} | {row.recipe} | {row.check} | {_why(row)} |" for row in rows]
    return "\n".join(lines)


def _scores(scores: Sequence[dict[str, Any]], speculation: str) -> str:
    if not scores:
        return ""
    lines = ["## Scores", "", SCORES, "", "| checkpoint | ours | vLLM | difference | server |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for s in scores:
        numbers = f"{s['ours']:.5f} | {s['vllm']:.5f} | {s['vllm'] - s['ours']:+.5f}"
        lines.append(f"| {s['name']} | {numbers} | {s['server']:.5f} |")
    lines += ["", SPECULATION, "", f"    {speculation}"]
    return "\n".join(lines)


SCORES = """\
Mean nats per token over 8 documents of the corpus of a golden: `score` with its default scorer,
with `--scorer vllm` on a CPU, and with `--scorer server` and vLLM's own server on a CPU. NVFP4 with
`--activations shared`; vLLM emulates MXFP8 by its weights alone, so that row is without
activations. Experts need Triton, so only attention is quantized."""
SPECULATION = """\
The same server with `--speculative-config`, to which `score` says:"""
