# SPDX-License-Identifier: Apache-2.0
"""Sound methods of quantization, and broken twins of what each makes.

A format says how values are stored; a method says which values and scales it chooses. Each method's
checkpoint is checked with its base and, where the method moves weights, with ``--weights``.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from tests.formats import moved
from tests.formats.corruptions import NotApplicable, swapped_codes, zero
from tests.formats.encoders import Encoder, Linear
from tests.formats.files import E4M3, E8M0, Array, Checkpoint, Tensors
from tests.formats.formats import Format, build
from tests.formats.matrix import FAILED, PASSED, check, differs
from tests.formats.models import MODELS, generator
from tests.formats.numbers import amax, blocks, e2m1, e4m3, e8m0_bytes, exp2, f32, nibbles
from tests.formats.table import FORMATS
from verifier.findings import Finding

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@dataclass(frozen=True)
class Method:
    """A method: what it is, the format that it writes, and whether its values are other than the
    nearest throughout, so that one wrong scale among many is too little to see.
    """

    title: str
    format: Format
    is_rough: bool = False

    @property
    def name(self) -> str:
        """Its name, for a table and a test."""
        return self.format.name


@dataclass
class Result:
    """The verdicts on what a method makes: ``rules`` are those with an error."""

    name: str
    verdict: str = ""
    rules: list[str] = field(default_factory=list)
    twins: dict[str, list[str]] = field(default_factory=dict)


# --- How a method chooses the scales of blocks, and the codes


Choice = Callable[[Linear, Array, np.float32], Array]
"""From a layer, its blocks [out, blocks, 16] and the tensor's scale to float32 block scales."""


def nvfp4(choose: Choice, pick: Callable[[Array, str], Array] | None = None) -> Encoder:
    """Return an encoder of NVFP4 whose block scales ``choose`` gives, and whose codes ``pick``
    gives, of quotients, where they are not the nearest.
    """

    def encoder(linear: Linear) -> Tensors:
        tensor_scale = np.float32(linear.joined_amax / 2688)
        parts = blocks(linear.weight, 16)
        scale = e4m3(np.maximum(choose(linear, parts, tensor_scale), 2.0**-9))
        quotient = parts / (scale.astype(np.float32) * tensor_scale)
        codes = e2m1(pick(quotient, linear.name) if pick else quotient)
        return {
            "weight": nibbles(codes.reshape(linear.weight.shape)),
            "weight_scale": scale[..., 0],
            "weight_scale_2": f32(tensor_scale),
            "input_scale": f32(linear.inputs / 2688),
        }

    return encoder


def by_max(_linear: Linear, parts: Array, tensor_scale: np.float32) -> Array:
    """Return scales under which the largest value of a block gets the largest code."""
    return np.asarray(amax(parts, -1) / (6 * tensor_scale))


def rounded_up(linear: Linear, parts: Array, tensor_scale: np.float32) -> Array:
    """Return scales rounded up: no value is clipped."""
    scale = by_max(linear, parts, tensor_scale)
    near = e4m3(scale).astype(np.float32)
    return np.where(near < scale, np.minimum(near * 1.0626, 448), near)


def powers(linear: Linear, parts: Array, tensor_scale: np.float32) -> Array:
    """Return powers of two as scales, none of which clips a value."""
    return np.exp2(np.ceil(np.log2(by_max(linear, parts, tensor_scale))))


def squares(linear: Linear, parts: Array, tensor_scale: np.float32) -> Array:
    """Return one scale for 16x16 values, as NVIDIA trains with."""
    rows, count, _ = parts.shape
    tops = amax(parts.reshape(rows // 16, 16, count, 16), (1, 3))
    tops = np.broadcast_to(tops, (rows // 16, 16, count, 1)).reshape(rows, count, 1)
    return np.asarray(tops / (6 * tensor_scale))


def clipped(share: float) -> Choice:
    """Return a choice that clips the largest values of a block."""

    def choose(linear: Linear, parts: Array, tensor_scale: np.float32) -> Array:
        return share * by_max(linear, parts, tensor_scale)

    return choose


def searched(factors: Array, *, weighted: bool = False) -> Choice:
    """Return a choice of the factor of ``by_max`` with the least squared error, weighted by the
    inputs' energy where asked.
    """

    def choose(linear: Linear, parts: Array, tensor_scale: np.float32) -> Array:
        energy = np.ones(parts.shape[1:], np.float32)
        if weighted:
            energy = np.exp2(generator(f"energy {linear.name}").normal(0, 1, parts.shape[1:]))
        best = by_max(linear, parts, tensor_scale)
        least = np.full(best.shape, np.inf)
        for factor in factors:
            scale = e4m3(np.maximum(factor * by_max(linear, parts, tensor_scale), 2.0**-9))
            step = scale.astype(np.float32) * tensor_scale
            error = ((_nearest(parts / step) * step - parts) ** 2 * energy).sum(-1, keepdims=True)
            best = np.where(error < least, scale.astype(np.float32), best)
            least = np.minimum(error, least)
        return best

    return choose


def _nearest(quotient: Array) -> Array:
    middle = (GRID[1:] + GRID[:-1]) / 2
    return np.asarray(np.sign(quotient) * GRID[np.searchsorted(middle, np.abs(quotient))])


def stochastic(quotient: Array, name: str) -> Array:
    """Round up or down at random, in proportion to the distances."""
    size = np.minimum(np.abs(quotient), 6)
    low = np.clip(np.searchsorted(GRID, size, side="right") - 1, 0, len(GRID) - 2)
    share = (size - GRID[low]) / (GRID[low + 1] - GRID[low])
    up = generator(f"stochastic {name}").uniform(0, 1, size.shape) < share
    return np.asarray(np.sign(quotient) * GRID[low + up])


def mxfp8_floor(linear: Linear) -> Tensors:
    """MXFP8 with the exponent of the OCP specification: the largest value may be clipped."""
    parts = blocks(linear.weight, 32)
    exponent = np.floor(np.log2(amax(parts, -1))).astype(np.int32) - 8
    codes = e4m3(parts / exp2(exponent)).reshape(linear.weight.shape)
    return {"weight": codes, "weight_scale": e8m0_bytes(exponent[..., 0])}


def fp8(change: Callable[[float], float]) -> Encoder:
    """Return an encoder of FP8 with one scale, ``change`` of the largest value's."""

    def encoder(linear: Linear) -> Tensors:
        scale = np.float32(change(linear.joined_amax / 448))
        return {
            "weight": e4m3(linear.weight / scale),
            "weight_scale": f32(scale),
            "input_scale": f32(linear.inputs / 448),
        }

    return encoder


# --- Broken twins


def _rows_axis(fmt: Format) -> int:
    return 1 if fmt.roles.weight == "qweight" else 0


def _weight(checkpoint: Checkpoint, fmt: Format) -> str:
    return f"{fmt.target}.{fmt.roles.weight}"


def rows_swapped(checkpoint: Checkpoint, fmt: Format) -> str:
    """Exchange neighbouring groups of four rows of codes, which keep their scales."""
    name = _weight(checkpoint, fmt)
    axis = _rows_axis(fmt)
    order = np.arange(checkpoint.tensors[name].shape[axis])
    order[:8] = np.roll(order[:8], 4)
    checkpoint.tensors[name] = np.ascontiguousarray(np.take(checkpoint.tensors[name], order, axis))
    return fmt.target


def noise(checkpoint: Checkpoint, fmt: Format) -> str:
    """Replace all codes by those of a random order."""
    name = _weight(checkpoint, fmt)
    array = checkpoint.tensors[name]
    order = generator("noise").permutation(array.size)
    checkpoint.tensors[name] = array.reshape(-1)[order].reshape(array.shape)
    return fmt.target


def scale_zero(checkpoint: Checkpoint, fmt: Format) -> str:
    """Set one scale to zero; of powers of two all of them."""
    name = f"{fmt.target}.{fmt.roles.scale}"
    checkpoint.tensors[name] = zero(checkpoint.tensors[name])
    return fmt.target


def scale_doubled(checkpoint: Checkpoint, fmt: Format) -> str:
    """Double the scale of the tensor, or those of all blocks."""
    name = f"{fmt.target}.{fmt.roles.tensor_scale or fmt.roles.scale}"
    checkpoint.tensors[name] = _doubled(checkpoint.tensors[name])
    return fmt.target


def _doubled(array: Array) -> Array:
    if array.dtype in (np.uint8, E8M0):
        return (array.view(np.uint8) + 1).view(array.dtype)
    if array.dtype == E4M3:
        return e4m3(array.astype(np.float32) * 2)
    return (array.astype(np.float32) * 2).astype(array.dtype)


def block_doubled(checkpoint: Checkpoint, fmt: Format) -> str:
    """Double one scale among many."""
    name = f"{fmt.target}.{fmt.roles.scale}"
    array = checkpoint.tensors[name]
    if array.size == 1:
        raise NotApplicable
    one = np.zeros(array.size, bool)
    one[array.size // 3] = True
    checkpoint.tensors[name] = np.where(one.reshape(array.shape), _doubled(array), array)
    return fmt.target


def fold_lost(checkpoint: Checkpoint, fmt: Format) -> str:
    """Put back the norm that absorbed a scale."""
    if fmt.weights != "folded":
        raise NotApplicable
    name = MODELS[fmt.model].norm
    checkpoint.tensors[name] = build(fmt)[1].tensors[name]
    return name


ONE_BLOCK = "one block's scale doubled"
TWINS: dict[str, Callable[[Checkpoint, Format], str]] = {
    "rows swapped": rows_swapped,
    "codes of another expert": swapped_codes,
    "codes in random order": noise,
    "a zero scale": scale_zero,
    "scale doubled": scale_doubled,
    ONE_BLOCK: block_doubled,
    "fold lost": fold_lost,
}


# --- The table

_NVFP4 = FORMATS["modelopt_nvfp4"]


def _nvfp4(name: str, title: str, encoder: Encoder, *, is_rough: bool = False) -> Method:
    fmt = dataclasses.replace(_NVFP4, name=name, title=title, encode=encoder)
    return Method(title, fmt, is_rough)


def _other(name: str, title: str, fmt: str, encoder: Encoder) -> Method:
    changed = dataclasses.replace(FORMATS[fmt], name=name, title=title, encode=encoder)
    return Method(title, changed)


def _known(name: str, title: str, *, is_rough: bool = False) -> Method:
    return Method(title, FORMATS[name], is_rough)


def _folded(size: float) -> Method:
    title = f"NVFP4, AWQ's scales folded, standard deviation of their logarithms {size:g}"
    fmt = dataclasses.replace(
        FORMATS["nvfp4_folded"],
        name=f"nvfp4_folded_{size:g}",
        move=partial(moved.folded, size=size),
    )
    return Method(title, fmt)


def _trained(share: float) -> Method:
    title = f"NVFP4, quantization-aware training that moved weights by {100 * share:g}%"
    fmt = dataclasses.replace(
        FORMATS["nvfp4_trained"],
        name=f"nvfp4_trained_{100 * share:g}",
        move=partial(moved.trained, share=share),
    )
    return Method(title, fmt, is_rough=True)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        _nvfp4("nvfp4_max", "NVFP4, max", nvfp4(by_max)),
        _nvfp4(
            "nvfp4_four_over_six",
            "NVFP4, four over six",
            nvfp4(searched(np.array([1, 1.5], np.float32))),
        ),
        _nvfp4(
            "nvfp4_mse",
            "NVFP4, scales of the least squared error",
            nvfp4(searched(np.linspace(0.5, 1.5, 41, dtype=np.float32))),
        ),
        _nvfp4(
            "nvfp4_weighted",
            "NVFP4, least error weighted by activations",
            nvfp4(searched(np.linspace(0.6, 1.2, 25, dtype=np.float32), weighted=True)),
        ),
        _nvfp4("nvfp4_clip_95", "NVFP4, largest values clipped at 0.95", nvfp4(clipped(0.95))),
        _nvfp4("nvfp4_clip_90", "NVFP4, largest values clipped at 0.9", nvfp4(clipped(0.9))),
        _nvfp4("nvfp4_16x16", "NVFP4, scales of 16x16 values", nvfp4(squares)),
        _nvfp4("nvfp4_rounded_up", "NVFP4, scales rounded up", nvfp4(rounded_up)),
        _nvfp4("nvfp4_powers", "NVFP4, scales that are powers of two", nvfp4(powers)),
        _nvfp4(
            "nvfp4_stochastic",
            "NVFP4, stochastic rounding",
            nvfp4(by_max, stochastic),
            is_rough=True,
        ),
        _known("modelopt_nvfp4_awq", "NVFP4 with a pre_quant_scale (AWQ)"),
        _known("modelopt_nvfp4_svd", "NVFP4 with a low-rank part (SVDQuant)"),
        _known("modelopt_mxfp8", "MXFP8, no value clipped"),
        _other("mxfp8_floor", "MXFP8, OCP's exponents", "modelopt_mxfp8", mxfp8_floor),
        _known("modelopt_fp8", "FP8, max"),
        _other("fp8_margin", "FP8, a margin of 2", "modelopt_fp8", fp8(lambda s: 2 * s)),
        _other(
            "fp8_power",
            "FP8, a power of two as scale",
            "modelopt_fp8",
            fp8(lambda s: float(np.exp2(np.ceil(np.log2(s))))),
        ),
        _known("gptq_feedback", "GPTQ, 4 bits", is_rough=True),
        _known("autoround_learned", "AutoRound, 4 bits", is_rough=True),
        _known("awq_folded", "AWQ, 4 bits, folded"),
        _folded(0.3),
        _folded(0.8),
        _trained(0.05),
        _trained(0.2),
        _known("ct_rotated", "integers of 4 bits, rotated (QuaRot, SpinQuant)", is_rough=True),
    )
}


def shortfalls(result: Result) -> list[str]:
    """Return what is wrong: ``sound``, and the twins that did not fail and could be seen."""
    wrong = [] if result.verdict == PASSED and not result.rules else ["sound"]
    unseen = {ONE_BLOCK} if METHODS[result.name].is_rough else set()
    return wrong + [
        n for n, words in result.twins.items() if words[0] != FAILED and n not in unseen
    ]


def run(method: Method, home: Path, twins: Collection[str] = TWINS.keys()) -> Result:
    """Check what a method makes, and its broken twins, each with the base."""
    fmt = method.format
    clean, base = build(fmt)
    base_folder = base.write(home / "base")
    outcome = check(clean.write(home / "clean"), base_folder, weights=fmt.weights)
    result = Result(method.name, outcome.verdict, _errors(outcome.findings))
    for name, edit in TWINS.items():
        if name not in twins:
            continue
        copy = clean.copy()
        try:
            edit(copy, fmt)
        except NotApplicable:
            continue
        assert differs(copy, clean), name
        path = copy.write(home / "twin")
        twin = check(path, base_folder, weights=fmt.weights)
        result.twins[name] = [twin.verdict, *_errors(twin.findings)]
        shutil.rmtree(path)
    shutil.rmtree(home / "clean")
    shutil.rmtree(base_folder)
    return result


def _errors(findings: Iterable[Finding]) -> list[str]:
    return sorted({f.rule for f in findings if f.severity == "error"})
