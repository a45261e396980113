# SPDX-License-Identifier: Apache-2.0
"""What a format is here, and its clean checkpoint with its base."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.formats import declarations as say
from tests.formats import encoders as encode
from tests.formats.encoders import Encoder, Linear
from tests.formats.files import DTYPE_NAMES, Checkpoint, Tensors
from tests.formats.models import MODELS, Model, fused, generator, weights
from tests.formats.numbers import bf16

Encoders = tuple[tuple[str, Encoder], ...]
"""Encoders with the patterns of the layers that they encode; the first that matches counts."""
KVScales = Callable[[str], Tensors]
"""From an attention module to its KV tensors by full name."""
Move = Callable[[Model, Tensors], Tensors]
"""From a model's BF16 tensors to those that a method quantizes."""


@dataclass(frozen=True)
class Roles:
    """The leaves of a format's tensors by their role; '' where it has none."""

    weight: str = "weight"
    scale: str = "weight_scale"
    tensor_scale: str = ""
    inputs: str = ""
    zeros: str = ""
    smooth: str = ""
    order: str = ""
    shape: str = ""


@dataclass(frozen=True)
class Format:
    """A format as one tool writes it.

    Attributes:
        name: its name here.
        title: what it is, in a line.
        declare: its declaration.
        encode: its encoders.
        readers: the programs that read it.
        roles: its leaves.
        model: the tiny model.
        known_as: for a format that is only recognised, a pattern that its name in a report
            matches; '' for one whose values are checked.
        kept: layers that stay plain besides the model's.
        lost: the exclusion whose loss makes a plain layer a declared one; '' where there is none.
        misnamed: a value of the declaration, and the one of another format.
        symmetric: whether its declaration says that zero points are constant.
        kv: its KV scales.
        move: what it makes of the model's weights before it quantizes them.
        weights: what ``--weights`` states of it; '' where its weights are the base's, rounded.
        unknowable: corruptions that cannot be told from its method.
        finish: what is left to do on the whole checkpoint.
    """

    name: str
    title: str
    declare: say.Declare
    encode: Encoder | Encoders
    readers: str
    roles: Roles = field(default_factory=Roles)
    model: str = "qwen3_moe"
    known_as: str = ""
    kept: tuple[str, ...] = ()
    lost: str | None = None
    misnamed: tuple[str, str] | None = None
    symmetric: bool = False
    kv: KVScales | None = None
    move: Move | None = None
    weights: str = ""
    unknowable: tuple[str, ...] = ()
    finish: Callable[[Checkpoint, list[str]], None] | None = None

    @property
    def encoders(self) -> Encoders:
        """The encoders with their patterns."""
        if callable(self.encode):
            return ((MODELS[self.model].linears, self.encode),)
        return self.encode

    @property
    def plain(self) -> tuple[str, ...]:
        """The exclusions, in order."""
        return (*MODELS[self.model].plain, *self.kept)

    @property
    def exclusion(self) -> str:
        """The exclusion that a corruption takes out; '' where there is none."""
        return MODELS[self.model].router if self.lost is None else self.lost

    @property
    def target(self) -> str:
        """The linear layer that corruptions edit."""
        return MODELS[self.model].target


def build(fmt: Format) -> tuple[Checkpoint, Checkpoint]:
    """Return the clean checkpoint of a format, and its BF16 base."""
    model = MODELS[fmt.model]
    plain = weights(model)
    base = Checkpoint(plain, {"config.json": dict(model.config)})
    if fmt.move:
        plain = fmt.move(model, plain)
    tensors: Tensors = {}
    encoded: list[str] = []
    for name, array in plain.items():
        module = name.removesuffix(".weight")
        encoder = _encoder(fmt, module)
        if encoder is None:
            tensors[name] = array
        elif array.ndim == 3:
            stacked = encode.gpt_oss(array.astype(np.float32).swapaxes(1, 2))
            tensors |= {f"{module}_{leaf}": part for leaf, part in stacked.items()}
        else:
            encoded.append(module)
            parts = encoder(_linear(model, plain, module))
            tensors |= {f"{module}.{leaf}": part for leaf, part in parts.items()}
    for attention in model.attention if fmt.kv else ():
        assert fmt.kv is not None
        tensors |= fmt.kv(attention)
    files = {"config.json": dict(model.config)}
    for name, part in fmt.declare(model, fmt.plain).items():
        files[name] = files.get(name, {}) | part
    clean = Checkpoint(tensors, files)
    if fmt.finish:
        fmt.finish(clean, encoded)
    return clean, base


def _encoder(fmt: Format, module: str) -> Encoder | None:
    if module in fmt.kept:
        return None
    return next((e for pattern, e in fmt.encoders if re.fullmatch(pattern, module)), None)


def _linear(model: Model, plain: Tensors, module: str) -> Linear:
    joined = [n for n in model.quantized() if fused(n) == fused(module)] or [module]
    found = [plain[f"{name}.weight"].astype(np.float32) for name in joined]
    return Linear(module, plain[f"{module}.weight"].astype(np.float32), tuple(found))


OUT, IN = 384, 1280
DIMENSIONS = {
    1: "1",
    4: "experts",
    16: "16",
    OUT: "o",
    OUT // 2: "o/2",
    OUT // 8: "o/8",
    OUT // 4: "o/4",
    OUT // 32: "o/32",
    OUT // 128: "o/128",
    OUT * IN // 2: "o*i/2",
    OUT * IN // 64: "o*i/64",
    IN: "i",
    IN // 2: "i/2",
    IN // 4: "i/4",
    IN // 8: "i/8",
    IN // 16: "i/16",
    IN // 32: "i/32",
    IN // 64: "i/64",
    IN // 128: "i/128",
    3 * IN // 4: "3i/4",
    3 * IN // 32: "3i/32",
}
"""What a dimension of an encoded layer of ``OUT`` by ``IN`` stands for."""


def layout(fmt: Format) -> dict[str, str]:
    """Return dtype and shape of a layer's tensors by leaf, in letters for its dimensions."""
    weight = bf16(generator("layout").normal(0, 0.05, (OUT, IN))).astype(np.float32)
    if fmt.model == "gpt_oss":
        parts = encode.gpt_oss(np.stack([weight] * 4))
    else:
        parts = encoder_of(fmt)(Linear(fmt.target, weight, (weight,)))
    return {leaf: f"{DTYPE_NAMES[a.dtype]} {_letters(a.shape)}" for leaf, a in parts.items()}


def encoder_of(fmt: Format) -> Encoder:
    """Return the encoder of the layer that corruptions edit."""
    encoder = _encoder(fmt, fmt.target)
    assert encoder is not None
    return encoder


def _letters(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(DIMENSIONS.get(n, str(n)) for n in shape)}]"
