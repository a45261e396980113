# SPDX-License-Identifier: Apache-2.0
"""The commands that are killed: each writes one OUT from small inputs, in shards of some kB."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import exporter
from tests.paths import ROOT
from verifier.cli import run
from verifier.selftest import CORRUPTORS

GOLDEN = ROOT / "goldens" / "qwen3-moe-tiny"
SOURCE = GOLDEN / "bf16"
SHARD = 200_000
TEXT = ("--corpus", str(GOLDEN / "corpus.jsonl"), "--documents", "8")


@dataclass(frozen=True)
class Inputs:
    """What the commands read.

    Attributes:
        experts: NVFP4 experts, the rest as in the golden.
        vendor: the golden in MXFP8.
        renamed: ``experts`` under names that the family does not have.
        texts: documents to calibrate on.
    """

    experts: Path
    vendor: Path
    renamed: Path
    texts: Path


@dataclass(frozen=True)
class Command:
    """``run`` writes the OUT that it is given, or takes up what a killed run left."""

    name: str
    run: Callable[[Inputs, Path], object]


def make_inputs(folder: Path) -> Inputs:
    """Write the inputs of all commands into an empty folder."""
    inputs = Inputs(folder / "experts", folder / "vendor", folder / "renamed", folder / "texts.txt")
    one = {"input_scale": "one"}
    exporter.export(SOURCE, inputs.experts, recipe="nvfp4_experts_only", **one)
    exporter.export(SOURCE, inputs.vendor, recipe="mxfp8_default")
    shutil.copytree(inputs.experts, inputs.renamed)
    next(c for c in CORRUPTORS if c.name == "expert-leaves").apply(inputs.renamed)
    inputs.texts.write_text("One line of text for each sequence.\n" * 200)
    _calibrate(inputs, folder / "stats")  # imports what every fork then has
    return inputs


def _export(_inputs: Inputs, out: Path) -> None:
    exporter.export(
        SOURCE, out, recipe="nvfp4_experts_only", input_scale="one", shard_bytes=SHARD, workers=2
    )


def _overwrite(inputs: Inputs, out: Path) -> None:
    if not out.exists() and not list(out.parent.iterdir()):
        # A kill may come here, too: what is to be overwritten is whole when it gets its name.
        old = inputs.vendor.with_name("old")
        shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(inputs.vendor, old)
        old.rename(out)
    exporter.export(
        SOURCE,
        out,
        recipe="nvfp4_experts_only",
        input_scale="one",
        shard_bytes=SHARD,
        overwrite=True,
        workers=2,
    )


def _merge(inputs: Inputs, out: Path) -> None:
    exporter.merge(inputs.experts, out, onto=inputs.vendor, shard_bytes=SHARD, workers=2)


def _repair(inputs: Inputs, out: Path) -> None:
    exporter.repair(inputs.renamed, out, base=SOURCE, shard_bytes=SHARD, workers=2)


def _score(inputs: Inputs, out: Path) -> None:
    _succeed(
        "score", str(inputs.experts), *TEXT, "-o", str(out), "--workers", "1", "--batch-size", "2"
    )


def _calibrate(inputs: Inputs, out: Path) -> None:
    exporter.calibrate(
        SOURCE, out, recipe="nvfp4_experts_only", texts=[inputs.texts], samples=[4], seq_len=32
    )


def _succeed(*argv: str) -> None:
    code = run([*argv, "--progress", "none"])
    if code:
        raise SystemExit(code)


COMMANDS = tuple(
    Command(name, function)
    for name, function in (
        ("export", _export),
        ("export --overwrite", _overwrite),
        ("merge", _merge),
        ("repair", _repair),
        ("score", _score),
        ("calibrate", _calibrate),
    )
)
