# SPDX-License-Identifier: Apache-2.0
"""The mutation score over the formats of `tests.formats`: ``python -m tests.mutation.formats``.

Each seed draws a format, a kind of edit, a module and a size, until the edit fits. Every edit does
harm by how it is made: codes of a sixteenth of a tensor and more, factors of two, missing or
misshapen tensors, declarations that say something else. Harmless rewrites are those of
`tests.mutation.harmless` that no dialect of configs gives a meaning.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.formats.corruptions import (
    NotApplicable,
    extra_exclusion,
    lost_exclusion,
    nan,
    recast,
    wrong_group_size,
    wrong_name,
    zero,
)
from tests.formats.files import BF16, E4M3, E8M0, Array, Checkpoint
from tests.formats.formats import Format, build
from tests.formats.matrix import Outcome, check, differs
from tests.formats.table import FORMATS
from tests.mutation import harmless, image

HERE = Path(__file__).parent
RESULTS = HERE / "formats.json"
HARMFUL, HARMLESS, FIRST_HARMLESS, DRAWS = 1000, 250, 100_000, 40
CLEAN = tuple(f for f in FORMATS.values() if not f.known_as and f.model != "gpt_oss")
"""The formats whose values are checked; gpt-oss stacks its experts under names of its own."""
FLOATS = (BF16, np.dtype(np.float16), np.dtype(np.float32))
Rng = np.random.Generator
Knows = Literal["nothing", "base"]


@dataclass(frozen=True)
class Draft:
    """A copy of a clean checkpoint to edit."""

    checkpoint: Checkpoint
    format: Format
    rng: Rng

    def modules(self) -> list[str]:
        """Return the quantized modules."""
        leaf, names = self.format.roles.weight, self.checkpoint.tensors
        found = [n.removesuffix(f".{leaf}") for n in names if n.endswith(f".{leaf}")]
        return [m for m in found if f"{m}.{self.format.roles.scale}" in names]

    def module(self) -> str:
        """Return one of them."""
        modules = self.modules()
        if not modules:
            raise NotApplicable
        return modules[int(self.rng.integers(len(modules)))]

    def pick(self, role: str) -> str:
        """Return a tensor of a role, of any module."""
        leaf = getattr(self.format.roles, role)
        name = f"{self.module()}.{leaf}"
        if not leaf or name not in self.checkpoint.tensors:
            raise NotApplicable
        return name

    def other(self, name: str) -> str:
        """Return a tensor of the same leaf and shape of a different module."""
        leaf, array = name.rpartition(".")[2], self.checkpoint.tensors[name]
        names = [
            n
            for n, t in self.checkpoint.tensors.items()
            if n != name and n.endswith(f".{leaf}") and t.shape == array.shape
        ]
        if not names:
            raise NotApplicable
        return names[int(self.rng.integers(len(names)))]

    def plain(self, rank: int) -> str:
        """Return an unquantized tensor of one rank."""
        quantized = set(self.modules())
        names = [
            n
            for n, t in self.checkpoint.tensors.items()
            if n.endswith(".weight")
            and t.dtype in FLOATS
            and t.ndim == rank
            and n.rpartition(".")[0] not in quantized
        ]
        if not names:
            raise NotApplicable
        return names[int(self.rng.integers(len(names)))]

    def change(self, name: str, values: Array) -> str:
        """Store other values and return the name."""
        self.checkpoint.tensors[name] = np.ascontiguousarray(values)
        return name

    def span(self, size: int, least: float) -> slice:
        """Return a random part of a tensor's elements, at least this share."""
        count = max(1, int(size * self.rng.uniform(least, 1)))
        start = int(self.rng.integers(size - count + 1))
        return slice(start, start + count)


Edit = Callable[[Draft], str]
"""Edits the checkpoint and returns what was edited."""
KINDS: dict[str, tuple[Knows, Edit]] = {}


def kind(knows: Knows) -> Callable[[Edit], Edit]:
    """Register an edit, and what a check needs to catch it."""

    def register(edit: Edit) -> Edit:
        KINDS[edit.__name__.replace("_", "-")] = (knows, edit)
        return edit

    return register


def _in_bytes(draft: Draft, least: float, change: Callable[[Array], Array]) -> str:
    """Change the bytes of a part of a weight."""
    name = draft.pick("weight")
    array = draft.checkpoint.tensors[name].copy()
    flat = array.reshape(-1).view(np.uint8)
    part = draft.span(flat.size, least)
    flat[part] = change(flat[part])
    return draft.change(name, array)


@kind("base")
def codes_shuffled(draft: Draft) -> str:
    """Put the bytes of a sixteenth of a weight or more in a random order."""
    return _in_bytes(draft, 1 / 16, draft.rng.permutation)


@kind("base")
def codes_zeroed(draft: Draft) -> str:
    """Zero the bytes of an eighth of a weight or more."""
    return _in_bytes(draft, 1 / 8, np.zeros_like)


@kind("base")
def signs_flipped(draft: Draft) -> str:
    """Flip the highest bit of the bytes of a quarter of a weight or more."""
    return _in_bytes(draft, 1 / 4, lambda part: part ^ np.uint8(0x80))


@kind("base")
def rows_rolled(draft: Draft) -> str:
    """Shift the rows of a weight."""
    name = draft.pick("weight")
    array = draft.checkpoint.tensors[name]
    axis = array.ndim - 1 if draft.format.roles.weight == "qweight" else 0
    by = int(draft.rng.integers(1, array.shape[axis]))
    return draft.change(name, np.roll(array, by, axis))


@kind("base")
def codes_of_another(draft: Draft) -> str:
    """Overwrite the codes of a weight with those of a different module."""
    name = draft.pick("weight")
    other = draft.other(name)
    draft.change(name, draft.checkpoint.tensors[other])
    return f"{name} from {other}"


def _doubled(array: Array) -> Array:
    if array.dtype == E8M0 or array.dtype == np.uint8:
        return (array.view(np.uint8) + np.uint8(1)).view(array.dtype)
    return np.clip(array.astype(np.float32) * 2, None, 448 if array.dtype == E4M3 else None).astype(
        array.dtype
    )


@kind("base")
def scales_doubled(draft: Draft) -> str:
    """Double a quarter or more of the scales of a weight."""
    name = draft.pick("scale")
    array = draft.checkpoint.tensors[name]
    flat = array.reshape(-1).copy()
    part = draft.span(flat.size, 1 / 4)
    flat[part] = _doubled(flat[part])
    return draft.change(name, flat.reshape(array.shape))


@kind("base")
def tensor_scale_doubled(draft: Draft) -> str:
    """Double the scale of a tensor."""
    name = draft.pick("tensor_scale")
    return draft.change(name, _doubled(draft.checkpoint.tensors[name]))


@kind("base")
def plain_rows_shuffled(draft: Draft) -> str:
    """Put the rows of an unquantized weight in a random order."""
    name = draft.plain(2)
    return draft.change(name, draft.rng.permutation(draft.checkpoint.tensors[name]))


@kind("base")
def norm_scaled(draft: Draft) -> str:
    """Multiply a norm by random factors around 2."""
    name = draft.plain(1)
    array = draft.checkpoint.tensors[name]
    factors = np.exp2(draft.rng.normal(1, 0.5, array.shape))
    return draft.change(name, (array.astype(np.float32) * factors).astype(array.dtype))


@kind("nothing")
def scale_zero(draft: Draft) -> str:
    """Set one scale to zero; of powers of two all of them."""
    name = draft.pick("scale")
    return draft.change(name, zero(draft.checkpoint.tensors[name]))


@kind("nothing")
def scale_nan(draft: Draft) -> str:
    """Set one scale to NaN."""
    name = draft.pick(str(draft.rng.choice(["scale", "tensor_scale", "inputs", "smooth"])))
    return draft.change(name, nan(draft.checkpoint.tensors[name]))


@kind("nothing")
def scale_dtype(draft: Draft) -> str:
    """Store scales in a dtype that no reader expects."""
    name = draft.pick("scale")
    return draft.change(name, recast(draft.checkpoint.tensors[name]))


@kind("nothing")
def tensor_cut(draft: Draft) -> str:
    """Drop the last row of a weight, or of its scales."""
    name = draft.pick(str(draft.rng.choice(["weight", "scale"])))
    array = draft.checkpoint.tensors[name]
    if not array.ndim or array.shape[0] < 2:
        raise NotApplicable
    return draft.change(name, array[:-1])


@kind("nothing")
def tensor_dropped(draft: Draft) -> str:
    """Drop a weight, its scales, or the scale of the tensor."""
    name = draft.pick(str(draft.rng.choice(["weight", "scale", "tensor_scale", "zeros"])))
    del draft.checkpoint.tensors[name]
    return name


@kind("nothing")
def tensor_renamed(draft: Draft) -> str:
    """Give a weight or its scales a name that no reader looks for."""
    name = draft.pick(str(draft.rng.choice(["weight", "scale"])))
    draft.checkpoint.tensors[f"{name}_old"] = draft.checkpoint.tensors.pop(name)
    return name


@kind("nothing")
def norm_dropped(draft: Draft) -> str:
    """Drop a norm."""
    name = draft.plain(1)
    del draft.checkpoint.tensors[name]
    return name


@kind("nothing")
def norm_nan(draft: Draft) -> str:
    """Set one value of a norm to NaN."""
    name = draft.plain(1)
    return draft.change(name, nan(draft.checkpoint.tensors[name]))


@kind("nothing")
def declaration_wrong(draft: Draft) -> str:
    """Declare a different group size or format, or exclude other layers than are plain."""
    edits = (wrong_group_size, wrong_name, extra_exclusion, lost_exclusion)
    edit = edits[int(draft.rng.integers(len(edits)))]
    edit(draft.checkpoint, draft.format)
    return edit.__name__


REWRITES = (
    harmless.reshard,
    harmless.cut_into_shards,
    harmless.one_file,
    harmless.other_order,
    harmless.padding,
    harmless.json_format,
    harmless.other_files,
    harmless.key_order,
    harmless.index_order,
)


# --- Runs


@dataclass(frozen=True)
class Mutation:
    """The result of one seed; ``caught`` with the base and without."""

    seed: int
    kind: str
    knows: str
    format: str
    what: str
    caught: tuple[bool, bool] = (False, False)
    rules: tuple[str, ...] = ()
    crash: str = ""

    @property
    def survived(self) -> bool:
        """Whether a check that could know it missed it."""
        return not self.caught[0] or (self.knows == "nothing" and not self.caught[1])


class Runner:
    """Checks mutations below a directory; clean checkpoints are made once."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.clean = cache(self._clean)

    def _clean(self, name: str) -> tuple[Checkpoint, Path, Path, tuple[Outcome, Outcome]]:
        fmt = FORMATS[name]
        clean, base = build(fmt)
        folder, base_folder = (
            c.write(self.home / name / d) for c, d in ((clean, "c"), (base, "b"))
        )
        return clean, folder, base_folder, self._checked(folder, base_folder, fmt)

    def _checked(self, path: Path, base: Path, fmt: Format) -> tuple[Outcome, Outcome]:
        return check(path, base, weights=fmt.weights), check(path, None)

    def harmful(self, seed: int) -> Mutation:
        """Draw the mutation of a seed until one fits, and check it."""
        name = list(KINDS)[seed % len(KINDS)]
        knows, edit = KINDS[name]
        for draw in range(DRAWS):
            rng = np.random.default_rng((seed, draw))
            fmt = CLEAN[int(rng.integers(len(CLEAN)))]
            clean, _, base, _ = self.clean(fmt.name)
            draft = Draft(clean.copy(), fmt, rng)
            try:
                what = edit(draft)
            except NotApplicable:
                continue
            if differs(draft.checkpoint, clean) and _changes(draft.checkpoint, clean):
                path = draft.checkpoint.write(self.home / "mutant")
                return self._outcome(Mutation(seed, name, knows, fmt.name, what), path, base)
        raise RuntimeError(f"no format fits seed {seed}")

    def harmless(self, seed: int) -> Mutation:
        """Draw the rewrite of a seed until one fits, and check it."""
        for draw in range(DRAWS):
            rng = np.random.default_rng((seed, draw))
            fmt = CLEAN[int(rng.integers(len(CLEAN)))]
            _, folder, base, _ = self.clean(fmt.name)
            mutant = image.read(folder)
            edits = rng.choice(len(REWRITES), int(rng.integers(1, 4)), replace=False)
            try:
                what = "; ".join(REWRITES[i](mutant, rng) for i in edits)
            except image.Unfit:
                continue
            path = mutant.write(self.home / "mutant")
            return self._outcome(Mutation(seed, "harmless", "nobody", fmt.name, what), path, base)
        raise RuntimeError(f"no rewrite fits seed {seed}")

    def _outcome(self, mutation: Mutation, path: Path, base: Path) -> Mutation:
        before = self.clean(mutation.format)[3]
        after = self._checked(path, base, FORMATS[mutation.format])
        shutil.rmtree(path)
        new = [
            _keys(a, mutation.kind) - _keys(b, mutation.kind)
            for a, b in zip(after, before, strict=True)
        ]
        rules = tuple(sorted({key[0] for keys in new for key in keys}))
        crash = next((o.crash for o in after if o.crash), "")
        values = asdict(mutation) | {"rules": rules, "crash": crash}
        return Mutation(**values | {"caught": (bool(new[0]), bool(new[1]))})


def _keys(outcome: Outcome, kind: str) -> set[tuple[str, ...]]:
    """Return what tells findings apart; of a rewrite without the tensor, whose order is new."""
    length = 3 if kind == "harmless" else 4
    keys: set[tuple[str, ...]] = {k[:length] for k in outcome.keys()}
    return keys | {("verdict", outcome.verdict)} if outcome.verdict != "passed" else keys


def _changes(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether some bytes, or the config, differ."""
    if one.json != other.json or one.tensors.keys() != other.tensors.keys():
        return True
    return any(a.tobytes() != other.tensors[n].tobytes() for n, a in one.tensors.items())


def run(seeds: Iterable[int]) -> list[Mutation]:
    """Check some seeds, in order."""
    with tempfile.TemporaryDirectory(prefix="ckptgate-mutation-") as home:
        runner = Runner(Path(home))
        return [runner.harmless(s) if s >= FIRST_HARMLESS else runner.harmful(s) for s in seeds]


def summary(harmful: list[Mutation], quiet: list[Mutation]) -> dict[str, Any]:
    """Return what is committed."""
    kinds = {}
    for name, (knows, edit) in KINDS.items():
        part = [m for m in harmful if m.kind == name]
        kinds[name] = {
            "knows": knows,
            "edit": " ".join((edit.__doc__ or "").split()),
            "n": len(part),
            "caught": sum(m.caught[0] for m in part),
            "caught_without": sum(m.caught[1] for m in part),
        }
    return {
        "command": "python -m tests.mutation.formats --write",
        "formats": sorted({m.format for m in harmful}),
        "n": len(harmful),
        "harmless": len(quiet),
        "kinds": kinds,
        "survivors": [asdict(m) for m in harmful if m.survived],
        "alarms": [asdict(m) for m in quiet if any(m.caught) or m.crash],
        "crashes": [asdict(m) for m in harmful if m.crash],
    }


def main(argv: list[str]) -> int:
    """Run seeds and print, or write the results and their page."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.formats", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", help="these seeds; print what they gave")
    parser.add_argument("--count", type=int, default=HARMFUL, help="the first COUNT harmful seeds")
    parser.add_argument("--write", action="store_true", help="write the results and docs/proof.md")
    options = parser.parse_args(argv)
    if options.seed:
        for mutation in run(options.seed):
            print(json.dumps(asdict(mutation)))
        return 0
    started = time.monotonic()
    quiet = options.count * HARMLESS // HARMFUL
    results = summary(run(range(options.count)), run(range(FIRST_HARMLESS, FIRST_HARMLESS + quiet)))
    if options.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        from tests.mutation import render

        render.PAGE.write_text(render.render(), encoding="utf-8")
    for mutation in (*results["survivors"], *results["alarms"], *results["crashes"]):
        print(json.dumps(mutation))
    print(
        f"{results['n']} mutations, {len(results['survivors'])} survivors, {results['harmless']}"
        f" rewrites, {len(results['alarms'])} alarms, {len(results['crashes'])} crashes,"
        f" {len(results['formats'])} formats, {time.monotonic() - started:.0f} s"
    )
    return bool(results["alarms"] or results["crashes"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
