# SPDX-License-Identifier: Apache-2.0
"""Methods that move weights on purpose: what they make of a model, or of the codes of a layer."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.formats.encoders import HALF, INT_GROUP, Linear
from tests.formats.files import Array, Tensors
from tests.formats.models import Model, generator
from tests.formats.numbers import amax, bf16, blocks, f32, integers, pack, pack_rows

LINEARS_AFTER = {
    "input_layernorm": r"self_attn\.[qkv]_proj",
    "post_attention_layernorm": r"mlp\.(gate|(experts\.\d+\.)?(gate|up)_proj)",
}
"""What reads a norm's output, within its layer."""


def _scaled(tensors: Tensors, name: str, factor: Array, axis: int) -> None:
    """Multiply a tensor along an axis."""
    values = tensors[name].astype(np.float32)
    shape = [-1 if a == axis else 1 for a in range(values.ndim)]
    tensors[name] = bf16(values * factor.reshape(shape))


def _layers(model: Model) -> list[str]:
    found = (re.match(r"model\.layers\.\d+", name) for name in model.shapes)
    return list(dict.fromkeys(m[0] for m in found if m))


def folded(model: Model, plain: Tensors, size: float = 0.5) -> Tensors:
    """Scale input channels as AWQ and SmoothQuant do: into the norm, or the layer, before.

    ``size`` is the standard deviation of the factors' binary logarithms.
    """
    tensors = dict(plain)
    for layer in _layers(model):
        for norm, readers in LINEARS_AFTER.items():
            name = f"{layer}.{norm}.weight"
            factor = _factors(name, tensors[name].size, size)
            _scaled(tensors, name, 1 / factor, 0)
            for other in model.shapes:
                if re.fullmatch(re.escape(f"{layer}.") + readers + r"\.weight", other):
                    _scaled(tensors, other, factor, 1)
        for name in [n for n in model.shapes if n.startswith(layer) and "down_proj" in n]:
            factor = _factors(name, tensors[name].shape[1], size)
            _scaled(tensors, name, factor, 1)
            _scaled(tensors, name.replace("down_proj", "up_proj"), 1 / factor, 0)
    return tensors


def _factors(name: str, count: int, size: float) -> Array:
    return np.exp2(generator(f"fold {name}").normal(0, size, count)).astype(np.float32)


def hadamard(size: int) -> Array:
    """Return the orthogonal Hadamard matrix of a size that is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(np.float32(size)))


def rotated(model: Model, plain: Tensors) -> Tensors:
    """Rotate the residual stream and the values of each head, norms folded into what reads them.

    As QuaRot and SpinQuant do without rotations at run time; for the dense model.
    """
    tensors = {name: array.astype(np.float32) for name, array in plain.items()}
    hidden, head = model.config["hidden_size"], model.config["head_dim"]
    turn, turn_head = hadamard(hidden), hadamard(head)

    def read(name: str, norm: str) -> None:
        tensors[name] = tensors[name] * tensors[norm] @ turn

    for layer in _layers(model):
        for norm, readers in LINEARS_AFTER.items():
            for name in model.shapes:
                if re.fullmatch(re.escape(f"{layer}.") + readers + r"\.weight", name):
                    read(name, f"{layer}.{norm}.weight")
        for last in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"{layer}.{last}.weight"
            tensors[name] = turn.T @ tensors[name]
        _turn_heads(tensors, f"{layer}.self_attn", turn_head)
    read("lm_head.weight", "model.norm.weight")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] @ turn
    for name in tensors:
        if "norm" in name:
            tensors[name] = np.ones_like(tensors[name])
    return {name: bf16(values) for name, values in tensors.items()}


def _turn_heads(tensors: Tensors, attention: str, turn: Array) -> None:
    size = len(turn)
    values, outputs = (f"{attention}.{part}.weight" for part in ("v_proj", "o_proj"))
    rows = tensors[values].reshape(-1, size, tensors[values].shape[1])
    tensors[values] = (turn.T @ rows).reshape(tensors[values].shape)
    columns = tensors[outputs].reshape(len(tensors[outputs]), -1, size)
    tensors[outputs] = (columns @ turn).reshape(tensors[outputs].shape)


def trained(model: Model, plain: Tensors, share: float = 0.1) -> Tensors:
    """Move every weight a little, as training with quantization in the loop does."""
    moved = {}
    for name, array in plain.items():
        values = array.astype(np.float32)
        size = share * 0.05 if values.ndim > 1 else 0.01
        moved[name] = bf16(values + generator(f"train {name}").normal(0, size, values.shape))
    return moved


# --- Codes that are not the nearest


def _scales(weight: Array, bits: int) -> Array:
    """Return float16 scales [out, groups] as float32."""
    top = 2 ** (bits - 1)
    scale = amax(blocks(weight, INT_GROUP), -1)[..., 0] / (top - 0.5)
    return f32(scale.astype(HALF))


def feedback(linear: Linear, scale: Array, bits: int) -> Array:
    """Return codes as GPTQ chooses them: each column's error is made good by those that follow."""
    weight = linear.weight.copy()
    width = weight.shape[1]
    rng = generator(f"inputs {linear.name}")
    mix = np.eye(width) + rng.normal(0, 0.5 / np.sqrt(width), (width, width))
    inputs = rng.normal(0, 1, (4 * width, width)) * np.exp2(rng.normal(0, 1, width)) @ mix
    hessian = inputs.T @ inputs
    hessian += np.eye(width) * 0.01 * np.diag(hessian).mean()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    top = 2 ** (bits - 1)
    codes = np.zeros(weight.shape, np.int64)
    for column in range(width):
        step = scale[:, column // INT_GROUP]
        codes[:, column] = integers(weight[:, column] / step, -top, top - 1)
        error = (weight[:, column] - codes[:, column] * step) / upper[column, column]
        weight[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :]).astype(np.float32)
    return codes


def learned(linear: Linear, scale: Array, bits: int) -> Array:
    """Return codes as AutoRound learns them: up or down, not always to the nearest."""
    top = 2 ** (bits - 1)
    quotient = linear.weight / scale.repeat(INT_GROUP, 1)
    shift = generator(f"round {linear.name}").uniform(-0.4, 0.4, quotient.shape)
    return integers(quotient + shift, -top, top - 1)


def gptq_codes(
    choose: Callable[[Linear, Array, int], Array], *, g_idx: bool
) -> Callable[[Linear], Tensors]:
    """Return an encoder of GPTQ, 4 bits, symmetric, whose codes ``choose`` gives."""

    def encoder(linear: Linear) -> Tensors:
        scale = _scales(linear.weight, 4)
        codes = choose(linear, scale, 4) + 8
        parts = {
            "qweight": pack_rows(codes.T, 4, np.int32),
            "qzeros": pack(np.full(scale.T.shape, 7), 4, np.int32),
            "scales": np.ascontiguousarray(scale.T.astype(HALF)),
        }
        if g_idx:
            parts["g_idx"] = (np.arange(linear.weight.shape[1]) // INT_GROUP).astype(np.int32)
        return parts

    return encoder
