# SPDX-License-Identifier: Apache-2.0
"""The drawings of docs/failures.md: what formats put on disk, and how that breaks.

`tools/make_docs.py` writes them to docs/pictures. Numbers are computed: E2M1, E4M3 and E8M0 as in
OCP Microscaling Formats v1.0, section 5.3, by ml_dtypes; NVFP4's scales as ModelOpt 0.47 chooses
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import ml_dtypes
import numpy as np

WIDTH = 960
STYLE = """
svg { --ink: #1b1f24; --soft: #57606a; --line: #b6bec8; --code: #dbeafe; --scale: #fde9c4;
  --bad: #f8d0cc; --badink: #b3261e; --good: #d3ecd9; font: 14px system-ui, sans-serif }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e9ec; --soft: #9aa4ae; --line: #4a525b;
  --code: #17365c; --scale: #4d3a10; --bad: #5b201c; --badink: #ff9d94; --good: #17432a } }
text { fill: var(--ink) } .soft { fill: var(--soft) } .red { fill: var(--badink) }
.mono { font-family: ui-monospace, monospace; font-size: 12px } .head { font-weight: 600 }
rect { stroke: var(--line); fill: none } .code { fill: var(--code) } .scale { fill: var(--scale) }
.bad { fill: var(--bad) } .good { fill: var(--good) }
path { stroke: var(--soft); fill: none } .tick { stroke: var(--ink) }
"""


@dataclass
class Drawing:
    """An SVG of a width of 960, drawn from the top down."""

    height: int
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Write a line at its baseline."""
        place = f'x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place}>{escape(words)}</text>")

    def box(
        self, x: float, y: float, size: tuple[float, float], kind: str = "", words: str = ""
    ) -> None:
        """Draw a rectangle with words in its middle."""
        width, height = size
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>'
        )
        if words:
            self.text(x + width / 2, y + height / 2 + 5, words, "mono", "middle")

    def path(self, steps: str, kind: str = "") -> None:
        """Draw a line."""
        self.parts.append(f'<path d="{steps}" class="{kind}"/>')

    def svg(self, title: str) -> str:
        """Return the file."""
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'role="img">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n'
        )


def _row(
    d: Drawing, y: float, label: str, cells: Sequence[str], kind: str = "", span: int = 1
) -> None:
    """Draw a labelled row of equal cells, each as wide as ``span`` columns."""
    d.text(0, y + 19, label, "soft")
    for i, words in enumerate(cells):
        d.box(150 + i * 50 * span, y, (50 * span, 28), kind, words)


def nvfp4() -> str:
    """Draw a block of NVFP4: values, codes, bytes, scales, decoded values."""
    values = np.random.default_rng(5).normal(0, 0.04, 16).astype(ml_dtypes.bfloat16)
    wide = values.astype(np.float32)
    second = np.float32(0.25 / (6 * 448))  # the tensor's largest weight is 0.25
    ideal = np.abs(wide).max() / (6 * second)
    scale = np.float32(ideal).astype(ml_dtypes.float8_e4m3fn)
    factor = np.float32(scale) * second
    codes = (wide / factor).astype(ml_dtypes.float4_e2m1fn)
    nibbles = codes.view(np.uint8) & 0xF
    packed = nibbles[0::2] | nibbles[1::2] << 4
    d = Drawing(372)
    d.text(0, 18, "16 neighbouring weights of a row share one block scale", "head")
    _row(d, 34, "BF16", [f"{v:.3f}" for v in wide])
    _row(d, 80, "nearest E2M1", [f"{v:g}" for v in codes.astype(np.float32)])
    _row(d, 126, "its code", [f"{n:X}" for n in nibbles], "code")
    _row(d, 172, "bytes on disk", [f"0x{b:02X}" for b in packed], "code", span=2)
    order = f"0x{packed[0]:02X} is {nibbles[0]:X}, then {nibbles[1]:X}"
    d.text(150, 218, f"the even column is the low nibble: {order}", "soft")
    d.box(150, 236, (100, 28), "scale", f"0x{int(scale.view(np.uint8)):02X}")
    d.text(262, 255, f"weight_scale: E4M3, here {float(scale):g}, one byte per 16 weights")
    d.box(150, 276, (100, 28), "scale", f"{second:.2e}")
    d.text(262, 295, "weight_scale_2: float32, one per tensor, the largest weight / (6 x 448)")
    _row(d, 322, "decoded", [f"{v:.3f}" for v in codes.astype(np.float32) * factor], "good")
    d.text(150, 368, "value = E2M1 x weight_scale x weight_scale_2", "soft")
    return d.svg("A block of NVFP4 on disk")


def mxfp8() -> str:
    """Draw a block of MXFP8, and what its scale byte means under two readings."""
    values = np.random.default_rng(8).normal(0, 0.04, 32).astype(np.float32)
    exponent = int(np.ceil(np.log2(np.abs(values).max() / 448)))
    codes = (values / 2.0**exponent).astype(ml_dtypes.float8_e4m3fn)
    shown = [*range(7), *range(24, 32)]
    d = Drawing(302)
    d.text(0, 18, "32 neighbouring weights of a row share one power of two", "head")
    cells = [f"{values[i]:.3f}" for i in shown]
    raw = [f"0x{codes.view(np.uint8)[i]:02X}" for i in shown]
    _row(d, 34, "BF16", [*cells[:7], "…", *cells[7:]])
    _row(d, 80, "bytes on disk", [*raw[:7], "…", *raw[7:]], "code")
    d.text(150, 126, "E4M3, one byte per weight", "soft")
    d.box(150, 144, (100, 28), "scale", f"0x{exponent + 127:02X}")
    d.text(262, 163, f"weight_scale: E8M0, the exponent plus 127: 2^{exponent}")
    d.text(0, 206, "The same scale, stored as a float32 that a loader casts to a byte:", "head")
    d.box(150, 222, (100, 28), "bad", f"{2.0**exponent:.2e}")
    d.text(262, 241, "cast to an integer it is 0, and 0x00 means 2^-127:")
    d.text(262, 263, "every weight of the layer becomes zero, and no loader reports it", "red")
    d.text(150, 294, "value = E4M3 x 2^(byte - 127)", "soft")
    return d.svg("A block of MXFP8 on disk")


def fp8_block() -> str:
    """Draw 128x128 tiles, and a fused parameter whose border is inside one."""
    d = Drawing(300)
    d.text(0, 18, "FP8 in tiles: one float32 per 128 x 128 weights", "head")
    for row in range(3):
        for column in range(4):
            height = 60 if row < 2 else 30
            d.box(20 + 80 * column, 40 + 60 * row, (80, height), "code", f"s{row},{column}")
    d.text(360, 66, "weight: E4M3, out x in")
    d.text(360, 90, "weight_scale_inv: float32, ceil(out/128) x ceil(in/128)")
    d.text(360, 114, "The last row of tiles may be short: 320 rows have 3 rows of scales.", "soft")
    d.text(0, 222, "q_proj and k_proj with 192 rows each, fused by the engine", "head")
    d.box(20, 236, (120, 44), "code", "128")
    d.box(140, 236, (60, 44), "code", "64")
    d.box(200, 236, (60, 44), "bad", "64")
    d.box(260, 236, (120, 44), "good", "128")
    d.path("M200 228 V288", "tick")
    d.text(400, 254, "q_proj ends in the middle of a tile: the fused scales have no row for both,")
    d.text(400, 276, "and the rows after the border get the scale of another tile", "red")
    return d.svg("FP8 with a scale per tile")


def fused() -> str:
    """Draw gate and up of an expert with unequal second scales."""
    d = Drawing(300)
    d.text(0, 18, "Two projections, one parameter in the engine", "head")
    for y, name, scale, kind in (
        (40, "w1 (gate)", "1.0e-4", "code"),
        (104, "w3 (up)", "4.0e-4", "code"),
    ):
        d.text(0, y + 28, name)
        d.box(110, y, (190, 46), kind, "codes, block scales")
        d.box(310, y, (110, 46), "scale", scale)
    d.text(310, 172, "weight_scale_2", "soft")
    d.path("M440 96 H500 M490 90 L500 96 L490 102")
    d.box(520, 40, (190, 55), "good", "w1")
    d.box(520, 95, (190, 55), "bad", "w3")
    d.box(720, 40, (110, 110), "scale", "1.0e-4")
    d.text(520, 172, "w13, with room for one weight_scale_2", "soft")
    d.text(
        0,
        214,
        "The engine keeps the scale of the first part. Every weight of w3 is a quarter of itself;",
        "red",
    )
    d.text(0, 236, "names, shapes and dtypes are right, and the server starts.", "red")
    d.text(
        0,
        270,
        "A sound export quantizes both with one maximum, so that both scales are the same bits.",
    )
    return d.svg("Unequal scales in a fused parameter")


def stack() -> str:
    """Draw experts in a stack and one by one."""
    d = Drawing(300)
    d.text(0, 18, "In memory: one tensor per layer", "head")
    for i in range(4):
        x, y = 40 + 18 * i, 84 - 14 * i
        d.parts.append(f'<rect x="{x}" y="{y}" width="150" height="150" class="code"/>')
    d.path("M94 117 H244")
    d.text(169, 84, "gate", "mono", "middle")
    d.text(169, 160, "up", "mono", "middle")
    d.text(40, 262, "gate_up_proj [experts, 2 x out, in]", "mono soft")
    d.path("M300 130 H380 M368 122 L380 130 L368 138")
    d.text(420, 18, "On the hub: one module per projection", "head")
    names = [f"experts.{e}.{p}" for e in range(2) for p in ("gate_proj", "up_proj", "down_proj")]
    for i, name in enumerate(names):
        d.box(420, 36 + 30 * i, (170, 26), "code")
        d.text(430, 54 + 30 * i, name, "mono")
        d.box(600, 36 + 30 * i, (60, 26), "scale", "scales")
    d.text(420, 240, "…", "mono")
    d.text(690, 60, "What can go wrong on the way:", "head")
    for i, words in enumerate(
        (
            "gate and up change places",
            "interleaved rows taken as halves",
            "a stack stored transposed",
            "expert 7 written as expert 6",
            "a scalar copied to one part only",
            "the stack saved under its own name",
        )
    ):
        d.text(690, 90 + 26 * i, words, "red")
    return d.svg("Stacked experts and modules")


def floor() -> str:
    """Draw the smallest E4M3 numbers, and block scales that fall below them."""
    d = Drawing(200)
    d.text(0, 18, "The smallest block scales that E4M3 has", "head")
    left, unit = 60.0, 100.0
    d.path(f"M{left} 90 H{left + 8 * unit}")
    for i in range(9):
        d.path(f"M{left + i * unit} 82 V98", "tick")
        words = "0" if i == 0 else "2^-9" if i == 1 else f"{i} x 2^-9"
        d.text(left + i * unit, 118, words, "mono", "middle")
    d.box(left, 66, (unit / 2, 16), "bad")
    d.text(left, 56, "rounds to 0: the block is lost", "red")
    d.text(
        left,
        150,
        "A block scale below 2^-10 rounds to 0. Clamped to 2^-9, the block keeps its larger",
        "soft",
    )
    d.text(left, 172, "weights, coarsely, and only the smaller ones become 0.", "soft")
    return d.svg("Block scales near zero")


DRAWINGS = {
    "format-nvfp4": nvfp4,
    "format-mxfp8": mxfp8,
    "format-fp8-block": fp8_block,
    "break-fused": fused,
    "break-stack": stack,
    "break-floor": floor,
}


def drawings() -> dict[str, str]:
    """Return the pictures by the path of their file below docs."""
    return {f"pictures/{name}.svg": draw() for name, draw in DRAWINGS.items()}
