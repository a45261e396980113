# SPDX-License-Identifier: Apache-2.0
"""A quantized weight against the base's: how far it is, and the one cause that explains it.

Several rules ask of every weight and exactly one of them speaks: QC507 (duplicate), QC509
(inverted), QC510 (nibbles), QC511 (order), QC512 (e8m0), QC517 (part), QC515 (the rest; what was
moved on purpose, for information). A weight is compared once for all of them, in pieces of rows;
only one that is not as near as its format allows is decoded whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.checkpoint import Tensor
from verifier.decoding import Float32, decode, max_scales, nearest
from verifier.errors import ContentError
from verifier.reconstruction.distance import CHUNK, along, beyond, block_norms2
from verifier.reconstruction.rows import WeightPieces
from verifier.rules.context import Context
from verifier.schemes import Format, Module, expert_key

Cause = Literal[
    "",
    "unjudged",
    "bad scale",
    "zero base",
    "nan codes",
    "lost",
    "weak",
    "inverted",
    "nibbles",
    "order",
    "e8m0",
    "duplicate",
    "part",
    "moved",
]
WEAK = 1.25
LOST = 0.5
FOUND = 0.2
"""An explanation holds where it brings the relative error below this, or to 1.5 times what ``max``
gives."""
COARSE = 0.05
"""Where more of the blocks are somewhat off, the codes are coarse throughout."""
MOVED = 0.1
"""Where more of the other blocks have codes that are clearly not the nearest, the method moves
weights."""
BIAS = 0.03
"""A weight whose values are off by more than this as a whole has scales beside those of its codes:
minimizing the squared error leaves the square of the relative error (0.01 for NVFP4), and one step
of an E4M3 scale is 0.06 to 0.12."""
FACTOR = 0.12
"""A block whose values are off by a common factor beyond this has a scale that is not that of its
codes."""
E8M0_WIDESPREAD = 0.1
NVFP4_RANGE = 2688.0
"""A tensor's maximum is this many times its global scale."""
_PARTNERS = {
    "gate_proj": "up_proj",
    "up_proj": "gate_proj",
    "w1": "w3",
    "w3": "w1",
    "k_proj": "v_proj",
    "v_proj": "k_proj",
}


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What a comparison found: relative errors (of what is stored, of the best codes, of ``max``),
    and its cause.

    ``bias``: by how much the values are too large as a whole, where that is more than a format
    leaves; else 0.
    """

    cause: Cause
    reason: str = ""
    relative: float = 0.0
    best: float = 0.0
    by_max: float = 0.0
    detail: str = ""
    place: tuple[int, int] | None = None
    count: int = 1
    bias: float = 0.0

    @property
    def as_a_whole(self) -> str:
        """The bias in words, to be put behind the relative error."""
        return f", values {1 + self.bias:.3f} of the base's as a whole" if self.bias else ""


def reconstruction(ctx: Context, module: Module) -> Reconstruction:
    """Return the comparison of a quantized weight with the base's; cause ``unjudged`` where there
    is none to make.
    """
    return ctx.once(("reconstruction", module.name), lambda: _reconstruct(ctx, module))


def compared(
    ctx: Context, modules: Iterable[Module]
) -> Iterator[tuple[Tensor, Format, Reconstruction]]:
    """Yield weight, format and comparison of each module, counting it for the rule that asks; what
    is unjudged is missed.
    """
    for module in modules:
        weight, found, r = module.weight, ctx.format_of(module), reconstruction(ctx, module)
        if r.cause == "unjudged" or weight is None or found is None:
            ctx.tally.miss(1, r.reason)
            continue
        ctx.tally.see()
        yield weight, found, r


def e8m0_zeros(ctx: Context, module: Module) -> tuple[int, int, int] | None:
    """Return (blocks whose exponent byte is 0 and whose codes are not, first of them, blocks); None
    without any.
    """
    scale, weight = module.scale, module.weight
    if (
        scale is None
        or weight is None
        or scale.dtype not in ("U8", "F8_E8M0")
        or weight.dtype != "F8_E4M3"
    ):
        return None
    return ctx.once(("e8m0", module.name), lambda: _e8m0_zeros(ctx, module))


def _e8m0_zeros(ctx: Context, module: Module) -> tuple[int, int, int] | None:
    scale, weight = module.scale, module.weight
    if scale is None or weight is None or ctx.extremes(scale)[0] != 0:
        return None
    flat = ctx.bytes_of(scale)
    zero = np.flatnonzero(flat == 0)
    rows, width = weight.shape[0], scale.elements // max(1, weight.shape[0])
    if (
        len(weight.shape) != 2
        or scale.elements != rows * width
        or width != -(-weight.shape[1] // 32)
    ):
        return None
    codes = ctx.bytes_of(weight).reshape(rows, weight.shape[1]) & 0x7F
    used = np.zeros((rows, width), bool)
    for start in range(0, rows, 1024):
        padded = np.pad(
            codes[start : start + 1024] != 0, ((0, 0), (0, width * 32 - weight.shape[1]))
        )
        used[start : start + 1024] = padded.reshape(-1, width, 32).any(axis=2)
    lost = zero[used.reshape(-1)[zero]]
    return (int(lost.size), int(lost[0]), int(used.sum())) if lost.size else None


def inverse(parts: Mapping[str, npt.NDArray[Any]], found: Format) -> dict[str, npt.NDArray[Any]]:
    """Return the parts with the tensor's scale read by the opposite convention: 1/x, or 2^-e for
    E8M0.
    """
    result = dict(parts)
    leaves = (
        ("weight_scale_2", "weight_global_scale")
        if found.packed
        else ("weight_scale", "weight_scale_inv")
    )
    for leaf in leaves:
        if leaf in parts:
            if found.name == "mxfp8":
                result[leaf] = np.maximum(
                    254 - parts[leaf].view(np.uint8).astype(np.int16), 0
                ).astype(np.uint8)
            else:
                with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                    result[leaf] = np.asarray(np.float32(1) / parts[leaf], np.float32)
    return result


def _reconstruct(ctx: Context, module: Module) -> Reconstruction:
    base = ctx.base
    if base is None or ctx.unrelated_base:
        return Reconstruction("unjudged", "the base is another model")
    source = base.modules.get(module.name)
    found = ctx.format_of(module)
    if module.weight is None or source is None or found is None:
        return Reconstruction("unjudged", "the base has no such weight, or the format is not known")
    if "pre_quant_scale" in module.parts:
        return Reconstruction("unjudged", "the weight is scaled by its pre_quant_scale (AWQ)")
    try:
        quick = _quick(WeightPieces(ctx, module, base, source), found)
    except ContentError:
        return Reconstruction(
            "unjudged", "the values cannot be decoded"
        )  # the shape rules name why
    if quick is not None:
        return quick
    wanted = base.values(source)
    parts = {leaf: ctx.array(t) for leaf, t in module.parts.items()}
    try:
        got = decode(parts, found.name)
    except ContentError:
        got = None  # its parts do not fit one another: the shape rules name that
    if wanted is None or got is None or wanted.shape != got.shape:
        return Reconstruction("unjudged", "the values cannot be decoded")
    if not found.packed:
        bad = np.flatnonzero((parts["weight"].view(np.uint8).reshape(-1) & 0x7F) == 0x7F)
        if bad.size:
            return Reconstruction("nan codes", place=(int(bad[0]), 0), count=int(bad.size))
    size = _norm(wanted)
    if not np.isfinite(size) or not np.isfinite(got).all() or _negative(parts):
        return Reconstruction("bad scale")  # QC502 and QC508 name those
    error = _norm(got - wanted)
    if size == 0:
        return Reconstruction("zero base" if error > 0 else "")
    if error / size < 1e-3:
        return Reconstruction("", relative=error / size)
    return _judge(ctx, module, found, parts, wanted, got)


def _quick(pieces: WeightPieces, found: Format) -> Reconstruction | None:
    """Return the comparison of a weight that is as near as its format allows in every block, None
    for any other.

    Raises:
        ContentError: the two do not fit one another, or cannot be decoded.
    """
    if not pieces.fit:
        raise ContentError(f"{pieces.module.name}: the base's weight has another shape")
    measured, defined = pieces.distance(found)
    if (
        not (np.isfinite(measured.error) and np.isfinite(measured.size))
        or measured.size == 0
        or not defined
    ):
        return None
    relative, by_max = (float(np.sqrt(v / measured.size)) for v in (measured.error, measured.plain))
    if relative >= 1e-3 and (
        measured.suspect or relative > WEAK * by_max or abs(measured.along) > BIAS * measured.size
    ):
        return None
    return Reconstruction("", relative=relative, best=by_max, by_max=by_max)


def _negative(parts: Mapping[str, npt.NDArray[Any]]) -> bool:
    for leaf, values in parts.items():
        if (
            leaf.startswith("weight_")
            and leaf != "weight_packed"
            and values.dtype in (np.float32, ml_dtypes.float8_e4m3fn)
        ):
            # A sign bit that is set: a negative zero is QC501's.
            bits, top = (
                (values.view(np.uint32), 1 << 31)
                if values.dtype == np.float32
                else (values.view(np.uint8), 0x80)
            )
            if values.size and int(bits.max()) > top:
                return True
    return False


def _judge(
    ctx: Context,
    module: Module,
    found: Format,
    parts: Mapping[str, npt.NDArray[Any]],
    wanted: Float32,
    got: Float32,
) -> Reconstruction:
    size, width = _norm(wanted), found.group_size or CHUNK
    relative = _norm(got - wanted) / size
    plain = max_scales(wanted, found.name)
    usual = nearest(wanted, plain, found.name) if plain is not None else None
    by_max = _norm(usual - wanted) / size if usual is not None else None
    ideal = nearest(wanted, parts, found.name)
    possible = _norm(ideal - wanted) / size
    by_max = possible if by_max is None else by_max
    best = max(min(possible, 4 * by_max), by_max)
    bias = along(got, wanted) / size**2
    # Blocks at the format's least scale, and values that no code is near, are off whatever the
    # codes.
    least = max(abs(along(v, wanted)) / size**2 for v in (ideal, usual) if v is not None)
    bias = bias if abs(bias) > BIAS + least and relative > 1.1 * by_max else 0.0
    known = Reconstruction("", relative=relative, best=best, by_max=by_max, bias=bias)
    lost, enough = relative > max(LOST, 2 * by_max), max(FOUND, 1.5 * by_max)
    cause, detail = _explain(ctx, module, found, parts, wanted, got, enough) if lost else ("", "")
    if cause:
        return replace(known, cause=cause, detail=detail)
    half = wanted.size / min(width, CHUNK) / 2
    foreign, place = _foreign(wanted, got, ideal, min(width, CHUNK))
    if not foreign and usual is not None:
        detail = "other scales"
        foreign, place = _rescaled(
            wanted, got, usual, _sound(parts, found, wanted, got), min(width, CHUNK)
        )
        foreign = 0 if lost and foreign > half else foreign
        if not foreign and not lost and not found.rowwise:
            foreign, place = _shared_scale_off(wanted, got, usual, found)
    if foreign:
        return replace(known, cause="part", place=place, count=foreign, detail=detail)
    if lost:
        return _another(ctx, module, got, known, enough)
    if bias:
        return replace(known, cause="weak")
    if relative <= WEAK * best:
        return known
    return replace(
        known,
        cause="moved" if relative <= 4 * best and _moved(wanted, got, ideal, width) else "weak",
    )


def _explain(
    ctx: Context,
    module: Module,
    found: Format,
    parts: Mapping[str, npt.NDArray[Any]],
    wanted: Float32,
    got: Float32,
    enough: float,
) -> tuple[Cause, str]:
    """Return the defect that explains a lost weight, or ''."""
    size = _norm(wanted)

    def is_it(values: Float32, target: Float32 = wanted) -> bool:
        return values.shape == target.shape and _far(values, target) <= enough

    zeros = e8m0_zeros(ctx, module)
    if zeros is not None and zeros[0] > E8M0_WIDESPREAD * zeros[2]:
        return "e8m0", ""
    if is_it(decode(inverse(parts, found), found.name)):
        return "inverted", ""
    if found.packed:
        leaf = "weight_packed" if "weight_packed" in parts else "weight"
        codes = parts[leaf].view(np.uint8)
        if is_it(decode({**parts, leaf: (codes << 4) | (codes >> 4)}, found.name)):
            return "nibbles", ""
    if size > 0:
        for detail, target in _orders(ctx, module, wanted):
            if is_it(got, target):
                return "order", detail
    return "", ""


def _orders(ctx: Context, module: Module, wanted: Float32) -> Iterator[tuple[str, Float32]]:
    """Yield what a wrong split of a fused projection would have put here."""
    head, _, leaf = module.name.rpartition(".")
    partner = _PARTNERS.get(leaf)
    base = ctx.base
    source = base.modules.get(f"{head}.{partner}") if base is not None and partner else None
    other = base.values(source) if base is not None and source is not None else None
    if other is None or other.shape != wanted.shape:
        return
    yield f"the values are those of {partner}", other
    if leaf in ("k_proj", "v_proj"):
        return
    first, second = (wanted, other) if leaf in ("gate_proj", "w1") else (other, wanted)
    rows = len(wanted)
    joined = np.concatenate([first, second])
    yield (
        "every second row of gate and up behind one another: split as if interleaved",
        joined[0::2],
    )
    yield (
        "every second row of gate and up behind one another: split as if interleaved",
        joined[1::2],
    )
    woven = np.stack([first, second], axis=1).reshape(2 * rows, -1)
    yield "rows of gate and up in turn: interleaved, and split in halves", woven[:rows]
    yield "rows of gate and up in turn: interleaved, and split in halves", woven[rows:]


def _another(
    ctx: Context, module: Module, got: Float32, known: Reconstruction, enough: float
) -> Reconstruction:
    """Return a loss with the expert of the same layer whose base weight begins with this one's
    first row.

    Where that expert holds the same bytes here, the one is the other's copy.
    """
    lost, key, base = replace(known, cause="lost"), expert_key(module.name), ctx.base
    if key is None or base is None or not len(got) or not np.any(got[0]):
        return lost
    rows: dict[str, dict[str, Float32]] = ctx.once("first rows", dict)
    kind = f"{key.container}.*.{key.leaf}"
    found = rows.get(kind)
    if found is None:
        rows.clear()  # of one layer at a time: modules come in the order of the files
        found = rows[kind] = {
            m.name: values[0].copy()
            for m in base.modules.values()
            if (k := expert_key(m.name))
            and (k.container, k.leaf) == (key.container, key.leaf)
            and (values := base.values(m)) is not None
            and len(values)
        }
    errors = {
        n: _far(got[0], row)
        for n, row in found.items()
        if row.shape == got[0].shape and n != module.name
    }
    best = min(errors, key=errors.__getitem__, default="")
    if not best or errors[best] > enough:
        return lost
    same = all(
        (other := ctx.checkpoint.tensors.get(f"{best}{t.name.removeprefix(module.name)}"))
        is not None
        and ctx.digest(other) == ctx.digest(t)
        for t in (module.weight, module.scale)
        if t is not None
    )
    return replace(lost, cause="duplicate" if same else "lost", detail=best)


def _foreign(
    wanted: Float32, got: Float32, ideal: Float32, width: int
) -> tuple[int, tuple[int, int] | None]:
    """Return (blocks that are not the base's though the scales could hold it, the first of them).

    A foreign block is off by half as much again as its scale allows. A method that compensates
    errors (GPTQ) has codes beside the nearest all over the tensor; where it does, no block is
    called foreign. Nor is one where many are somewhat off and none is another's altogether: the
    codes are coarse, and the weight as a whole is judged.
    """
    far, near, size = (block_norms2(x, width) for x in (got - wanted, ideal - wanted, wanted))
    foreign = beyond(far, near, size)
    count = int(foreign.sum())
    another = foreign & (far > 0.25 * np.maximum(size, 0.25 * float(size.mean())))
    if (
        not count
        or count > foreign.size / 2
        or (count > COARSE * foreign.size and not another.any())
    ):
        return 0, None
    others = block_norms2(_beside(wanted, got, ideal).astype(np.float32), width)[~foreign]
    return (0, None) if others.size == 0 or (others > 0).mean() > MOVED else _first(foreign)


def _rescaled(
    wanted: Float32, got: Float32, usual: Float32, sound: npt.NDArray[np.bool_] | None, width: int
) -> tuple[int, tuple[int, int] | None]:
    """Return (blocks that one factor makes right: their codes belong to another scale, the first of
    them).

    What compensates errors (GPTQ) or clips moves the values of a block in different directions; no
    factor mends that. A block at the format's least scale may be anything, and one that holds what
    ``max`` gives under the stored tensor scale, which a fused group or a stack shares, is right.
    """
    got_, far, best, size = (
        block_norms2(x, width) for x in (got, got - wanted, usual - wanted, wanted)
    )
    found = _factor_mends(got_, far, best, size, least=FACTOR)
    if sound is not None and sound.shape == found.shape:
        found &= ~sound
    return _first(found)


def _shared_scale_off(
    wanted: Float32, got: Float32, usual: Float32, found: Format
) -> tuple[int, tuple[int, int] | None]:
    """Return (scales of rows, of tiles or of the tensor that one factor makes right, row and
    `CHUNK` of the first).

    So many values share such a scale that no chance makes one factor explain their errors: however
    small it is, it counts where it takes three quarters of the squared error away.
    """
    rows, cols = found.block or (
        (1, wanted.shape[1]) if found.name == "fp8_per_channel" else wanted.shape
    )
    down, across = (
        np.arange(0, wanted.shape[0], rows),
        np.arange(0, -(-wanted.shape[1] // CHUNK), -(-cols // CHUNK)),
    )

    def shared(values: Float32) -> Float32:
        by_row = np.add.reduceat(block_norms2(values, CHUNK).astype(np.float64), down, axis=0)
        return np.asarray(np.add.reduceat(by_row, across, axis=1), np.float32)

    off = _factor_mends(
        shared(got), shared(got - wanted), shared(usual - wanted), shared(wanted), least=0
    )
    count, place = _first(off)
    return count, (int(down[place[0]]), int(across[place[1]])) if place is not None else None


def _factor_mends(
    got: Float32, far: Float32, best: Float32, size: Float32, *, least: float
) -> npt.NDArray[np.bool_]:
    """Return which blocks are beyond what ``max`` leaves and, divided by one factor, are not.

    Args:
        got: sum of squares of each block as decoded.
        far: its squared distance from the base's.
        best: that of ``max``.
        size: sum of squares of the base's.
        least: how far from 1 the factor has to be.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        dot = (got + size - far) / 2
        factor = dot / size
        # What is left of got / factor - wanted.
        left = got / np.square(factor) - 2 * dot / factor + size
        mended = (np.abs(factor - 1) > least) & (factor > 0) & np.isfinite(left)
        mended &= (left < 0.25 * far / np.maximum(np.square(factor), 1)) & ~beyond(
            np.asarray(left, np.float32), best, size
        )
        # So small a factor that nothing is left to mend.
        found: npt.NDArray[np.bool_] = beyond(far, best, size) & (
            mended | ((got > 0) & (got < np.float32(2**-12) * size))
        )
    return found


def _first(found: npt.NDArray[np.bool_]) -> tuple[int, tuple[int, int] | None]:
    """Return how many blocks are marked, and row and block of the first."""
    count = int(found.sum())
    if not count:
        return 0, None
    row, block = np.unravel_index(int(np.argmax(found)), found.shape)
    return count, (int(row), int(block))


def _sound(
    parts: Mapping[str, npt.NDArray[Any]], found: Format, wanted: Float32, got: Float32
) -> npt.NDArray[np.bool_] | None:
    """Return which blocks no factor may be looked for in, [rows, blocks]; None for formats without
    block scales.
    """
    floor, scale_2 = _at_floor(parts, found), parts.get("weight_scale_2")
    if floor is None or scale_2 is None or scale_2.size != 1:
        return floor
    shared = max_scales(wanted, found.name, float(scale_2.reshape(-1)[0]) * NVFP4_RANGE)
    if shared is None:
        return floor
    width = found.group_size or CHUNK
    far, size = (
        block_norms2(x, width) for x in (got - nearest(wanted, shared, found.name), wanted)
    )
    return floor | (far <= np.float32(1e-9) * size) if far.shape == floor.shape else floor


def _at_floor(parts: Mapping[str, npt.NDArray[Any]], found: Format) -> npt.NDArray[np.bool_] | None:
    """Return which blocks have the least scale of their format, [rows, blocks]; None for formats
    without block scales.
    """
    scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
    if scale is None or scale.dtype.itemsize != 1 or scale.ndim != 2:
        return None
    least: npt.NDArray[np.bool_] = (
        (scale.view(np.uint8) & 0x7F) <= 1 if found.packed else scale.view(np.uint8) == 0
    )
    return least


def _beside(wanted: Float32, got: Float32, ideal: Float32) -> npt.NDArray[np.bool_]:
    """Return where a code is clearly not the nearest: 2^-6 is four times what dividing in BF16 can
    do.
    """
    result: npt.NDArray[np.bool_] = np.abs(got - wanted) - np.abs(ideal - wanted) > np.abs(
        wanted
    ) * np.float32(2**-6)
    return result


def _moved(wanted: Float32, got: Float32, ideal: Float32, width: int) -> bool:
    """Whether codes are beside the nearest all over the tensor, and as often above it as below.

    That is what error compensation does (simulated for NVFP4 and MXFP8: 0.36 to 1.0 of the blocks,
    0.40 to 0.57 above); truncation and coarse grids go one way.
    """
    beside = _beside(wanted, got, ideal)
    blocks = float((block_norms2(beside.astype(np.float32), width) > 0).mean())
    known = beside & (ideal != 0)
    if blocks < 0.3 or not known.any():
        return False
    above = float((np.abs(got[known]) > np.abs(ideal[known])).mean())
    return 0.3 <= above <= 0.7


def _far(values: Float32, target: Float32) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        size, error = _norm(target), _norm(values - target)
    return error / size if size > 0 and np.isfinite(error) else float("inf")


def _norm(values: Float32) -> float:
    # Not a dot product: that would start BLAS threads beside the others.
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))
