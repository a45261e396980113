# SPDX-License-Identifier: Apache-2.0
"""The options of depth eval: what is scored and against which margin, as `ckptgate gate` has
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from verifier.cli.progress import progress_bar
from verifier.errors import UsageError

if TYPE_CHECKING:
    from verifier.checkpoint import Checkpoint
    from verifier.evaluation import Evaluate, Evaluation

Command = TypeVar("Command", bound=Callable[..., Any])
_OPTIONS = {
    "corpus": click.option(
        "--corpus", metavar="NAME|FILE", help="Text for depth eval.  [default: wikitext2-test]"
    ),
    "protocol": click.option(
        "--protocol", metavar="P", help="tokens, lm-eval, or a task of lm-eval.  [default: tokens]"
    ),
    "activations": click.option(
        "--activations",
        type=click.Choice(["bf16", "declared", "shared"]),
        help="As in `gate`.  [default: bf16]",
    ),
    "max_increase": click.option(
        "--max-increase",
        metavar="8%",
        help="Largest tolerated loss over the base.  [default: the budget of the formats]",
    ),
    "drift_against": click.option(
        "--drift-against", metavar="RUN", help="Also test drift against this accepted run."
    ),
    "max_drift": click.option(
        "--max-drift",
        metavar="RATIO|NATS",
        help="Largest tolerated drift, as in `gate`.  [default: 1.15x]",
    ),
    "max_kl": click.option(
        "--max-kl",
        metavar="NATS",
        help="Largest tolerated KL divergence, as in `gate`.",
    ),
    "seq_len": click.option(
        "--seq-len",
        type=click.IntRange(2, 1_000_000),
        help="Context length: tokens in a window.  [default: 512]",
    ),
    "documents": click.option(
        "--documents", type=click.IntRange(min=1), help="Score only the first N documents."
    ),
    "batch": click.option(
        "--batch-size",
        "batch",
        type=click.IntRange(1, 4096),
        help="Windows at a time.  [default: 8]",
    ),
    "cache": click.option(
        "--cache", metavar="DIR", help="Keep the base's run, unfinished work and attempts here."
    ),
    "device": click.option(
        "--device",
        metavar="DEVICE",
        help="Where models run: cpu, cuda, cuda:1 …  [default: cpu]",
    ),
}


EVAL_RENAMED = {"--window": ("--seq-len",), "--batch": ("--batch-size",)}
"""Former spellings of the options of depth eval."""


def _spelled(name: str) -> str:
    """Return the spelling of an option by its parameter."""
    return "batch-size" if name == "batch" else name.replace("_", "-")


def eval_options(command: Command) -> Command:
    """Add the options; `evaluate_of` takes their values out of the command's options."""
    for option in reversed(_OPTIONS.values()):
        command = option(command)
    return command


def evaluate_of(depth: str, base: str | None, options: dict[str, Any]) -> Evaluate | None:
    """Return what scores where the depth is eval, else None.

    Args:
        depth: of the check.
        base: of the check.
        options: of the command; those of depth eval are taken out.

    Raises:
        UsageError: no base, or an option of depth eval at another depth.
        MissingExtra: what scores is not installed.
    """
    values = {name: options.pop(name, None) for name in _OPTIONS}
    used = {name: value for name, value in values.items() if value is not None}
    if depth != "eval":
        if used:
            raise UsageError(
                f"--{_spelled(min(used))} needs --depth eval: no other depth scores text"
            )
        return None
    if base is None:
        raise UsageError("--depth eval needs --base REF: the loss is measured over it")
    # Only this depth needs what scores.
    from verifier.cli.gate import require_device, require_installed, say  # noqa: PLC0415
    from verifier.gate import evaluator  # noqa: PLC0415
    from verifier.gate.corpora import WIKITEXT  # noqa: PLC0415
    from verifier.gate.jobs import Scorer, protocol_of  # noqa: PLC0415

    require_installed("torch", "transformers", "scipy")
    require_device(used.get("device", "cpu"))
    scorer = Scorer(activations=used.pop("activations", "bf16"))
    task = protocol_of(used.get("protocol", "tokens")) == "task"
    corpus = used.pop("corpus", None if task else WIKITEXT)

    def evaluate(candidate: Checkpoint, reference: Checkpoint) -> Evaluation:
        with progress_bar("scoring", unit="document") as progress:
            score = evaluator(corpus, **used, scorer=scorer, say=say, progress=progress)
            return score(candidate, reference)

    return evaluate
