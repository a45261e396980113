# SPDX-License-Identifier: Apache-2.0
"""The options of depth eval: what is scored and against which margin, as `ckptgate gate` has
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from verifier.cli.common import progress_bar
from verifier.errors import UsageError

if TYPE_CHECKING:
    from verifier.checkpoint import Checkpoint
    from verifier.evaluation import Evaluate, Evaluation

CORPUS = "wikitext2-test"
_OPTIONS = (
    click.option(
        "--corpus", metavar="NAME|FILE", help="What depth eval scores.  [default: wikitext2-test]"
    ),
    click.option(
        "--protocol", metavar="P", help="tokens, lm-eval, or a task of lm-eval.  [default: tokens]"
    ),
    click.option(
        "--activations",
        type=click.Choice(["bf16", "declared"]),
        help="As in `gate`.  [default: bf16]",
    ),
    click.option(
        "--max-increase",
        metavar="8%",
        help="Its margin over the base; by default the budget of the formats.",
    ),
    click.option(
        "--drift-against", metavar="RUN", help="An accepted run, to judge the drift against it too."
    ),
    click.option("--max-drift", metavar="NATS", help="Its margin; 0.003 nats a token by default."),
    click.option(
        "--window", type=click.IntRange(2, 1_000_000), help="Tokens in a window.  [default: 512]"
    ),
    click.option(
        "--documents", type=click.IntRange(min=1), help="Score the first N documents only."
    ),
    click.option("--batch", type=click.IntRange(1, 4096), help="Windows at a time.  [default: 8]"),
    click.option(
        "--cache", metavar="DIR", help="Keep the base's run, unfinished work and attempts here."
    ),
    click.option(
        "--device", metavar="DEVICE", help="Where models run: cpu, cuda, cuda:1 …  [default: cpu]"
    ),
)
NAMES = (
    "corpus",
    "protocol",
    "activations",
    "max_increase",
    "drift_against",
    "max_drift",
    "window",
    "documents",
    "batch",
    "cache",
    "device",
)


def eval_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; `evaluate_of` takes their values out of what the command is given."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def evaluate_of(depth: str, base: str | None, given: dict[str, Any]) -> Evaluate | None:
    """Return what scores where the depth is eval, else None; the options are taken out of
    ``given``.

    Raises:
        UsageError: no base, or an option of depth eval at another depth.
        MissingExtra: what scores is not installed.
    """
    values = {name: given.pop(name, None) for name in NAMES}
    told = {k: v for k, v in values.items() if v is not None}
    if depth != "eval":
        if told:
            raise UsageError(
                f"--{min(told).replace('_', '-')} needs --depth eval: no other depth scores text"
            )
        return None
    if base is None:
        raise UsageError("--depth eval needs --base REF: the loss is measured over it")
    from verifier.cli.gate import require_installed, say  # noqa: PLC0415  (of use at this depth only)

    require_installed("torch", "transformers", "scipy")
    from verifier.gate import evaluator  # noqa: PLC0415
    from verifier.gate.jobs import Scorer  # noqa: PLC0415
    from verifier.gate.scorers.lm_eval_task import is_task  # noqa: PLC0415

    scorer = Scorer(activations=told.pop("activations", "bf16"))
    corpus = told.pop("corpus", None if is_task(told.get("protocol", "tokens")) else CORPUS)

    def evaluate(candidate: Checkpoint, reference: Checkpoint) -> Evaluation:
        with progress_bar("scoring") as progress:
            return evaluator(corpus, **told, scorer=scorer, say=say, progress=progress)(
                candidate, reference
            )

    return evaluate
