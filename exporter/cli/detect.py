# SPDX-License-Identifier: Apache-2.0
"""``ckptgate detect``."""

from __future__ import annotations

import json
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from verifier.cli.progress import progress_bar
from verifier.errors import CkptgateError, MissingExtra, PlanError, UsageError
from verifier.text import counted

if TYPE_CHECKING:
    from exporter.detect import Detection
    from verifier.schemes import Module

LISTED = 20


@click.command(short_help="Show fused experts and what each recipe would quantize.")
@click.argument("path", metavar="CONFIG_OR_DIR")
@click.option(
    "--plugin",
    metavar="FILE.py",
    multiple=True,
    help="Run a Python file that registers readers for further experts classes.",
)
@click.pass_context
def detect(ctx: click.Context, path: str, plugin: tuple[str, ...]) -> None:
    """Show which modules hold fused experts, in which layout, and what each recipe would quantize.

    The model is built from the config alone, without memory for its weights. Exit 0: every module
    is understood. 1: one is refused.
    """
    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            raise MissingExtra("detect", "load")
    from exporter.detect import detect_config  # noqa: PLC0415  (torch and transformers cost seconds)

    for file in plugin:
        _run_plugin(file)
    with progress_bar("building the model from its config"):
        detection = detect_config(path)
        lines = [*_describe(detection), *_recipes(path)]
    click.echo("\n".join(lines))
    ctx.exit(1 if detection.refused else 0)


def _run_plugin(file: str) -> None:
    """Run a plugin, which registers its readers.

    Raises:
        UsageError: no such file, or it fails.
    """
    if not Path(file).is_file():
        raise UsageError(f"--plugin {file}: no such file")
    try:
        runpy.run_path(file)
    except CkptgateError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"--plugin {file}: {type(error).__name__}: {error}") from error


def _describe(detection: Detection) -> list[str]:
    lines = [
        f"{detection.model_type}: {counted(detection.linears, 'linear layer')} of routed experts "
        f"in {counted(len(detection.stacks), 'layer')}"
    ]
    lines += [f"  stacked   {n:,} x {text}" for text, n in detection.layouts().items()]
    if detection.fused:
        first = detection.fused[0].path
        lines.append(f"  fused     {len(detection.fused):,} dense gate_up_proj ({first} first)")
    refused = detection.refused
    lines += [f"  refused   {r.path} ({r.cls}): {r.reason}" for r in refused[:LISTED]]
    if len(refused) > LISTED:
        lines.append(f"  refused   and {len(refused) - LISTED:,} more")
    return lines


def _recipes(path: str) -> list[str]:
    """Return what each recipe would quantize, by the hub names of the checkpoint, or of the
    family's layout.
    """
    from exporter.plan.select import select  # noqa: PLC0415  (numpy and torch)
    from exporter.recipes import load, names  # noqa: PLC0415

    modules = _modules(path)
    if modules is None:
        return [
            "  recipes   unknown: no layout file for this model_type, and no weights next to the "
            "config"
        ]
    lines = []
    for name in names():
        try:
            text = counted(len(select(modules, load(name), None)), "linear layer")
        except PlanError as error:
            text = str(error).removeprefix(f"recipe {name}: ")
        lines.append(f"  recipe    {name:25} {text}")
    return lines


def _modules(path: str) -> dict[str, Module] | None:
    """Return the modules of a checkpoint, or of its family where there is only a config; None for
    an unknown family.
    """
    from exporter.layout import unstacked  # noqa: PLC0415  (torch)
    from verifier.checkpoint import Tensor, open_checkpoint  # noqa: PLC0415  (numpy)
    from verifier.checkpoint.address import is_local  # noqa: PLC0415
    from verifier.layouts.expert_stacks import split_shapes  # noqa: PLC0415
    from verifier.layouts.family import family_of  # noqa: PLC0415
    from verifier.schemes import gather  # noqa: PLC0415

    folder = Path(path) if Path(path).is_dir() else None
    if not is_local(path) or (folder is not None and any(folder.glob("*.safetensors"))):
        return gather(unstacked(open_checkpoint(path)).tensors.values())
    file = folder / "config.json" if folder is not None else Path(path)
    config = json.loads(file.read_text(encoding="utf-8"))
    family = family_of(config)
    if family is None:
        return None
    shapes = split_shapes(family.expected(config), config)
    return gather(Tensor(n, "BF16", s, "", 0, 0) for n, s in shapes.items() if s is not None)
