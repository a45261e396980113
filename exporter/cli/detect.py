# SPDX-License-Identifier: Apache-2.0
"""``ckptgate detect``."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from verifier.errors import CkptgateError, MissingExtra, UsageError

if TYPE_CHECKING:
    from exporter.detect import Detection


@click.command()
@click.argument("path", metavar="CONFIG_OR_DIR")
@click.option(
    "--plugin",
    metavar="FILE.py",
    multiple=True,
    help="A Python file that registers readers of its own.",
)
@click.pass_context
def detect(ctx: click.Context, path: str, plugin: tuple[str, ...]) -> None:
    """Print which modules hold fused experts, in which layout, and what each recipe would quantize.

    The model is built without memory, from the config alone. Exit 0: every module is understood. 1:
    one is refused.
    """
    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            raise MissingExtra("detect", "load")
    from exporter.detect import detect_config  # noqa: PLC0415  (torch and transformers cost seconds)

    for file in plugin:
        _run(file)
    found = detect_config(path)
    click.echo("\n".join([*_lines(found), *_recipes(path)]))
    ctx.exit(1 if found.refused else 0)


def _run(file: str) -> None:
    """Run a plugin; it registers what it has.

    Raises:
        UsageError: no such file, or it fails.
    """
    if not Path(file).is_file():
        raise UsageError(f"--plugin {file}: no such file")
    try:
        runpy.run_path(file)
    except CkptgateError:
        raise
    except Exception as error:  # a foreign file: its message is all that can be said
        raise UsageError(f"--plugin {file}: {type(error).__name__}: {error}") from error


def _lines(found: Detection) -> list[str]:
    lines = [
        f"{found.model_type}: {found.linears:,} linears of routed experts in {len(found.stacks):,} layers"
    ]
    lines += [f"  stacked   {count:,} x {words}" for words, count in found.layouts().items()]
    if found.fused:
        paths = f"{found.fused[0].path} first"
        lines.append(f"  fused     {len(found.fused):,} dense gate_up_proj ({paths})")
    lines += [f"  refused   {r.path} ({r.cls}): {r.reason}" for r in found.refused[:20]]
    if len(found.refused) > 20:
        lines.append(f"  refused   and {len(found.refused) - 20:,} more")
    return lines


def _recipes(path: str) -> list[str]:
    """Return what each recipe would quantize, by the hub names of the checkpoint, or of the
    family's layout.
    """
    from exporter.layout import unstacked  # noqa: PLC0415
    from exporter.plan.select import select  # noqa: PLC0415
    from exporter.recipes import load, names  # noqa: PLC0415
    from verifier.checkpoint import Tensor, open_checkpoint  # noqa: PLC0415
    from verifier.checkpoint.address import is_local  # noqa: PLC0415
    from verifier.errors import PlanError  # noqa: PLC0415
    from verifier.layouts.expert_stacks import split_shapes  # noqa: PLC0415
    from verifier.layouts.family import family_of  # noqa: PLC0415
    from verifier.schemes import gather  # noqa: PLC0415

    folder = Path(path) if Path(path).is_dir() else None
    stored = not is_local(path) or (folder is not None and any(folder.glob("*.safetensors")))
    if stored:
        tensors = list(unstacked(open_checkpoint(path)).tensors.values())
    else:
        config = _config(Path(path) / "config.json" if folder is not None else Path(path))
        family = family_of(config)
        if family is None:
            return [
                f"  recipes   not known: no layout of {config.get('model_type')!r}, and no weights beside the config"
            ]
        shapes = split_shapes(family.expected(config), config)
        tensors = [Tensor(n, "BF16", s, "", 0, 0) for n, s in shapes.items() if s is not None]
    modules = gather(tensors)
    lines = []
    for name in names():
        try:
            count = f"{len(select(modules, load(name), None)):,} linears"
        except PlanError as error:
            count = str(error).removeprefix(f"recipe {name}: ")
        lines.append(f"  recipe    {name:25} {count}")
    return lines


def _config(file: Path) -> dict[str, object]:
    import json  # noqa: PLC0415

    found: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    return found
