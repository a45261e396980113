# SPDX-License-Identifier: Apache-2.0
"""The formats, as data: what each tool writes, who reads it, and how it is declared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tests.formats import declarations as say
from tests.formats import encoders as encode
from tests.formats import moved
from tests.formats.encoders import BFLOAT, E2M3, E3M2, HALF
from tests.formats.files import Array, Checkpoint, Tensors
from tests.formats.formats import Format, KVScales, Roles
from tests.formats.models import Model, generator
from tests.formats.numbers import bf16, f32

SINGLE = np.dtype(np.float32)
O_PROJ = "model.layers.0.self_attn.o_proj"


# --- What some formats add


def _amax(attention: str, which: str) -> float:
    return float(generator(f"{attention} {which}").uniform(4, 12))


def modelopt_kv(attention: str) -> Tensors:
    """KV scales of ModelOpt: on the projections."""
    return {
        f"{attention}.{kind}_proj.{kind}_scale": f32(_amax(attention, kind) / 448) for kind in "kv"
    }


def modelopt_kv_affine(attention: str) -> Tensors:
    """KV scales and biases of ModelOpt."""
    biases = {
        f"{attention}.{kind}_proj.{kind}_bias": bf16(np.zeros((1, 2, 1, 64))) for kind in "kv"
    }
    return modelopt_kv(attention) | biases


def ct_kv(attention: str) -> Tensors:
    """KV scales of compressed-tensors: on the attention."""
    return {f"{attention}.{kind}_scale": bf16([_amax(attention, kind) / 448]) for kind in "kv"}


def ct_kv_heads(attention: str) -> Tensors:
    """KV scales of compressed-tensors, one per head."""
    factors = np.array([1.0, 0.75], np.float32).reshape(2, 1, 1) / 448
    return {f"{attention}.{kind}_scale": bf16(_amax(attention, kind) * factors) for kind in "kv"}


def output_kv(kind: np.dtype[np.generic], shape: tuple[int, ...]) -> KVScales:
    """Return KV scales as scales of the projections' outputs."""

    def scales(attention: str) -> Tensors:
        return {
            f"{attention}.{k}_proj.output_scale": np.full(
                shape, _amax(attention, k) / 448, np.float32
            ).astype(kind)
            for k in "kv"
        }

    return scales


def torchao_metadata(kind: str) -> Callable[[Checkpoint, list[str]], None]:
    """Return what writes the classes of torchao's tensors into the shard's metadata."""

    def finish(checkpoint: Checkpoint, modules: list[str]) -> None:
        names = [f"{m}.weight" for m in modules]
        names += [n for n in checkpoint.tensors if "._weight_" not in n]
        checkpoint.metadata["tensor_names"] = json.dumps(names)
        for name in names:
            quantized = name.removesuffix(".weight") in modules
            value = {"_type": kind if quantized else "Tensor", "_data": {}}
            checkpoint.metadata[name] = json.dumps(value)

    return finish


def mlx_metadata(checkpoint: Checkpoint, _modules: list[str]) -> None:
    """Write MLX's name into the shard's metadata."""
    checkpoint.metadata["format"] = "mlx"


def mlx_stacks(checkpoint: Checkpoint, modules: list[str]) -> None:
    """Stack the experts as mlx-lm does."""
    mlx_metadata(checkpoint, modules)
    tensors = checkpoint.tensors
    stacks: dict[str, list[Array]] = {}
    for name in list(tensors):
        found = re.fullmatch(r"(.*\.)experts\.\d+\.(.*)", name)
        if found:
            stacks.setdefault(f"{found[1]}switch_mlp.{found[2]}", []).append(tensors.pop(name))
    tensors |= {name: np.stack(parts) for name, parts in stacks.items()}


def ct_preset(_model: Model, plain: Sequence[str]) -> say.Files:
    """Declare NVFP4 of compressed-tensors by the name of a preset."""
    config = say.ct_config([say.group("nvfp4-pack-quantized", say.NVFP4_WEIGHTS)], plain)
    return say.inline(config | {"config_groups": {"NVFP4": ["Linear"]}})


def ct_mixed(_model: Model, plain: Sequence[str]) -> say.Files:
    """Declare NVFP4 experts and FP8 attention of compressed-tensors."""
    experts = say.group(
        "nvfp4-pack-quantized", say.NVFP4_WEIGHTS, say.NVFP4_INPUTS, [r"re:.*mlp\.experts\..*"]
    )
    rest = say.group("float-quantized", say.args(strategy="channel"), say.TOKENS)
    return say.inline(say.ct_config([experts, rest], plain))


def ct_embedding(_model: Model, plain: Sequence[str]) -> say.Files:
    """Declare integers in the linear layers and the embedding."""
    kind = say.group("pack-quantized", say.integers(4), None, ["Linear", "Embedding"])
    return say.inline(say.ct_config([kind], plain))


def modelopt_mixed(model: Model, plain: Sequence[str]) -> say.Files:
    """Declare NVFP4 experts and FP8 attention of ModelOpt, layer by layer."""
    files = say.modelopt("MIXED_PRECISION")(model, plain)
    layers = {
        name: {"quant_algo": "NVFP4", "group_size": 16}
        if ".experts." in name
        else {"quant_algo": "FP8"}
        for name in model.quantized()
    }
    files["config.json"]["quantization_config"]["quantized_layers"] = layers
    files["hf_quant_config.json"]["quantization"]["quantized_layers"] = dict(layers)
    return files


def deepseek_v4_nvfp4(model: Model, plain: Sequence[str]) -> say.Files:
    """Declare NVFP4 experts around DeepSeek-V4's own FP8."""
    ignore = ["*.attn.*", "*.ffn.shared_experts.*", "head"]
    layers = {
        f"layers.{n}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for n in range(2)
    }
    files = say.modelopt("MIXED_PRECISION", group_size=16, bits=4)(model, ignore)
    flat = files["config.json"]["quantization_config"]
    flat |= {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "moe_quant_algo": "NVFP4",
        "group_size": 16,
        "quant_method": "fp8",
        "quantized_layers": layers,
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    files["hf_quant_config.json"]["quantization"]["quantized_layers"] = dict(layers)
    return files


# --- The table

SCALES_2 = Roles(tensor_scale="weight_scale_2", inputs="input_scale")
GLOBAL = Roles("weight_packed", tensor_scale="weight_global_scale", inputs="input_global_scale")
PACKED = Roles("weight_packed", shape="weight_shape")
WORDS = Roles("qweight", "scales", zeros="qzeros", order="g_idx")
TORCHAO = Roles("_weight_qdata", "_weight_scale")
MLX = Roles(scale="scales")
INVERSE = Roles(scale="weight_scale_inv")
STATIC = Roles(inputs="input_scale")
EXPERTS = r".*\.experts\..*_proj"
ATTENTION = r".*\.self_attn\..*_proj"
V4_EXPERTS = r".*\.experts\.\d+\.w[123]"
V4_REST = r".*\.(attn\.w\w+|shared_experts\.w[123])"
ALL_ENGINES = "vLLM, SGLang, TensorRT-LLM"
TWO_ENGINES = "vLLM, SGLang"
FP8_128 = say.vendor("fp8", fmt="e4m3", weight_block_size=[128, 128])

_modelopt = partial(Format, readers=ALL_ENGINES)
_ct = partial(Format, readers="vLLM, SGLang, transformers")
_gptq = partial(
    Format,
    readers="vLLM, SGLang, transformers, MLX",
    roles=WORDS,
    kept=(O_PROJ,),
    lost=O_PROJ,
)
_quark = partial(Format, readers=TWO_ENGINES)
_mlx = partial(
    Format,
    readers="mlx-lm",
    roles=MLX,
    known_as="MLX",
    lost="",
    finish=mlx_metadata,
)

MODELOPT = (
    _modelopt(
        "modelopt_nvfp4",
        "NVFP4 weights and activations",
        say.modelopt("NVFP4", group_size=16, bits=4),
        encode.nvfp4,
        roles=SCALES_2,
        misnamed=("NVFP4", "MXFP8"),
    ),
    _modelopt(
        "modelopt_w4a16_nvfp4",
        "NVFP4 weights",
        say.modelopt("W4A16_NVFP4", group_size=16, bits=4),
        encode.w4a16_nvfp4,
        roles=Roles(tensor_scale="weight_scale_2"),
        misnamed=("W4A16_NVFP4", "MXFP8"),
    ),
    _modelopt(
        "modelopt_nvfp4_awq",
        "NVFP4 of weights divided by a scale per input channel",
        say.modelopt(
            "NVFP4_AWQ", group_size=16, extra={"has_zero_point": False, "pre_quant_scale": True}
        ),
        encode.smoothed(encode.nvfp4),
        readers="TensorRT-LLM",
        roles=Roles(tensor_scale="weight_scale_2", inputs="input_scale", smooth="pre_quant_scale"),
        misnamed=("NVFP4_AWQ", "MXFP8"),
    ),
    _modelopt(
        "modelopt_nvfp4_svd",
        "NVFP4 with a low-rank part",
        say.modelopt(
            "NVFP4_SVD",
            group_size=16,
            bits=4,
            extra={"has_zero_point": False, "pre_quant_scale": True, "lora_rank": 8},
        ),
        encode.nvfp4_svd,
        readers="TensorRT-LLM",
        roles=Roles(tensor_scale="weight_scale_2", inputs="input_scale", smooth="pre_quant_scale"),
        misnamed=("NVFP4_SVD", "MXFP8"),
    ),
    _modelopt(
        "modelopt_w4a8_nvfp4_fp8",
        "NVFP4 weights, FP8 activations",
        say.modelopt("W4A8_NVFP4_FP8", group_size=16),
        encode.w4a8_nvfp4_fp8,
        readers="TensorRT-LLM",
        roles=SCALES_2,
        misnamed=("W4A8_NVFP4_FP8", "MXFP8"),
    ),
    _modelopt(
        "modelopt_w4a8_mxfp4_fp8",
        "MXFP4 weights, FP8 activations",
        say.modelopt("W4A8_MXFP4_FP8", group_size=32),
        encode.w4a8_mxfp4_fp8,
        readers="TensorRT-LLM",
        roles=STATIC,
        misnamed=("W4A8_MXFP4_FP8", "NVFP4"),
    ),
    _modelopt(
        "modelopt_mxfp4_lower",
        "MXFP4, the algorithm in lower case",
        say.modelopt("mxfp4", group_size=32),
        encode.mxfp4("weight"),
        misnamed=("mxfp4", "NVFP4"),
    ),
    _modelopt(
        "modelopt_mxfp8",
        "MXFP8",
        say.modelopt("MXFP8", group_size=32),
        encode.mxfp8,
        misnamed=("MXFP8", "NVFP4"),
    ),
    _modelopt(
        "modelopt_fp8",
        "FP8 with a scale per tensor, static activations",
        say.modelopt("FP8", bits=8),
        encode.fp8_tensor(kind=SINGLE, shape=(), static=True),
        roles=STATIC,
        misnamed=("FP8", "NVFP4"),
    ),
    _modelopt(
        "modelopt_fp8_pc_pt",
        "FP8 with a scale per row, activations per token",
        say.modelopt("FP8_PER_CHANNEL_PER_TOKEN"),
        encode.fp8_channel(kind=SINGLE, column=False),
        misnamed=("FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"),
    ),
    _modelopt(
        "modelopt_fp8_pb_wo",
        "FP8 with a scale per 128x128 tile",
        say.modelopt("FP8_PB_WO", group_size=128),
        encode.modelopt_fp8_block,
        misnamed=("FP8_PB_WO", "NVFP4"),
    ),
    _modelopt(
        "modelopt_fp8_pb_wo_lower",
        "FP8 with a scale per tile, the algorithm in lower case",
        say.modelopt("fp8_pb_wo", group_size=128),
        encode.modelopt_fp8_block,
        misnamed=("fp8_pb_wo", "NVFP4"),
    ),
    _modelopt(
        "modelopt_int4_awq",
        "integers of 4 bits, two rows in a byte, scaled inputs",
        say.modelopt(
            "W4A16_AWQ", group_size=128, extra={"has_zero_point": False, "pre_quant_scale": True}
        ),
        encode.modelopt_int4_awq,
        readers="TensorRT-LLM",
        roles=Roles(smooth="pre_quant_scale"),
        misnamed=("W4A16_AWQ", "NVFP4"),
    ),
    _modelopt(
        "modelopt_w4a8_awq",
        "integers of 4 bits, FP8 activations, scaled inputs",
        say.modelopt(
            "W4A8_AWQ", group_size=128, extra={"has_zero_point": False, "pre_quant_scale": True}
        ),
        encode.modelopt_w4a8_awq,
        readers="TensorRT-LLM",
        roles=Roles(tensor_scale="weight_scale_2", inputs="input_scale", smooth="pre_quant_scale"),
        misnamed=("W4A8_AWQ", "NVFP4"),
    ),
    _modelopt(
        "modelopt_int8_sq",
        "integers of 8 bits, static activations, scaled inputs",
        say.modelopt(
            "W8A8_SQ_PER_CHANNEL", extra={"has_zero_point": False, "pre_quant_scale": True}
        ),
        encode.modelopt_int8_sq,
        readers="TensorRT-LLM",
        roles=Roles(inputs="input_scale", smooth="pre_quant_scale"),
        misnamed=("W8A8_SQ_PER_CHANNEL", "NVFP4"),
    ),
    _modelopt(
        "modelopt_w8a16",
        "integers of 8 bits, weights",
        say.modelopt("W8A16"),
        encode.modelopt_w8a16,
        readers="TensorRT-LLM",
        misnamed=("W8A16", "NVFP4"),
    ),
    _modelopt(
        "modelopt_mixed",
        "MIXED_PRECISION: NVFP4 experts, FP8 attention",
        modelopt_mixed,
        (
            (EXPERTS, encode.nvfp4),
            (ATTENTION, encode.fp8_tensor(kind=SINGLE, shape=(), static=True)),
        ),
        roles=SCALES_2,
        lost="",
    ),
    _modelopt(
        "modelopt_fp8_kv_fp8",
        "FP8 with an FP8 KV cache",
        say.modelopt(
            "FP8",
            bits=8,
            kv="FP8",
            flat_kv={"dynamic": False, "num_bits": 8, "type": "float"},
        ),
        encode.fp8_tensor(kind=SINGLE, shape=(), static=True),
        roles=STATIC,
        model="llama",
        kv=modelopt_kv,
    ),
    _modelopt(
        "modelopt_fp8_kv_int8",
        "FP8 with an INT8 KV cache",
        say.modelopt("FP8", bits=8, kv="INT8", flat_kv="INT8"),
        encode.fp8_tensor(kind=SINGLE, shape=(), static=True),
        roles=STATIC,
        model="llama",
        kv=modelopt_kv,
    ),
    _modelopt(
        "modelopt_nvfp4_kv_nvfp4",
        "NVFP4 with an NVFP4 KV cache",
        say.modelopt("NVFP4", group_size=16, bits=4, kv="NVFP4", flat_kv="NVFP4"),
        encode.nvfp4,
        roles=SCALES_2,
        model="llama",
        kv=modelopt_kv,
    ),
    _modelopt(
        "modelopt_nvfp4_kv_affine",
        "NVFP4 with an affine NVFP4 KV cache",
        say.modelopt("NVFP4", group_size=16, bits=4, kv="NVFP4_AFFINE", flat_kv="NVFP4_AFFINE"),
        encode.nvfp4,
        readers="TensorRT-LLM",
        roles=SCALES_2,
        model="llama",
        kv=modelopt_kv_affine,
    ),
)

FLOAT_CT = "float-quantized"
COMPRESSED_TENSORS = (
    _ct(
        "ct_nvfp4",
        "NVFP4 weights and activations",
        say.compressed_tensors("nvfp4-pack-quantized", say.NVFP4_WEIGHTS, say.NVFP4_INPUTS),
        encode.ct_nvfp4,
        roles=GLOBAL,
        misnamed=("nvfp4-pack-quantized", "pack-quantized"),
    ),
    _ct(
        "ct_nvfp4a16",
        "NVFP4 weights",
        say.compressed_tensors("nvfp4-pack-quantized", say.NVFP4_WEIGHTS),
        encode.ct_nvfp4a16,
        roles=Roles("weight_packed", tensor_scale="weight_global_scale"),
        misnamed=("nvfp4-pack-quantized", "pack-quantized"),
    ),
    _ct(
        "ct_nvfp4_preset",
        "NVFP4 declared by the name of a preset",
        ct_preset,
        encode.ct_nvfp4,
        roles=GLOBAL,
    ),
    _ct(
        "ct_mxfp4",
        "MXFP4",
        say.compressed_tensors("mxfp4-pack-quantized", say.mx(4)),
        encode.mxfp4("weight_packed"),
        roles=Roles("weight_packed"),
        misnamed=("mxfp4-pack-quantized", "nvfp4-pack-quantized"),
    ),
    _ct(
        "ct_mxfp6",
        "MXFP6",
        say.compressed_tensors("mxfp6-pack-quantized", say.mx(6)),
        encode.mxfp6("weight_packed", *E2M3),
        roles=Roles("weight_packed"),
        known_as="MXFP6",
        misnamed=("mxfp6-pack-quantized", "mxfp4-pack-quantized"),
    ),
    _ct(
        "ct_mxfp8",
        "MXFP8",
        say.compressed_tensors("mxfp8-quantized", say.mx(8)),
        encode.mxfp8,
        misnamed=("mxfp8-quantized", FLOAT_CT),
    ),
    _ct(
        "ct_fp8_tensor",
        "FP8 with a scale per tensor, static activations",
        say.compressed_tensors(FLOAT_CT, say.args(), say.STATIC),
        encode.fp8_tensor(kind=BFLOAT, shape=(1,), static=True),
        roles=STATIC,
        misnamed=(FLOAT_CT, "mxfp8-quantized"),
    ),
    _ct(
        "ct_fp8_channel",
        "FP8 with a scale per row, activations per token",
        say.compressed_tensors(FLOAT_CT, say.args(strategy="channel"), say.TOKENS),
        encode.fp8_channel(kind=BFLOAT, column=True),
        misnamed=(FLOAT_CT, "mxfp8-quantized"),
    ),
    _ct(
        "ct_fp8_block",
        "FP8 with a scale per 128x128 tile",
        say.compressed_tensors(
            FLOAT_CT,
            say.args(strategy="block", block_structure=[128, 128]),
            say.args(strategy="group", group_size=128, dynamic=True),
        ),
        encode.fp8_block("weight_scale", kind=BFLOAT),
        misnamed=(FLOAT_CT, "mxfp8-quantized"),
    ),
    _ct(
        "ct_w4a16",
        "integers of 4 bits in groups of 128",
        say.compressed_tensors("pack-quantized", say.integers(4)),
        encode.ct_int(bits=4),
        roles=PACKED,
        misnamed=("pack-quantized", "int-quantized"),
    ),
    _ct(
        "ct_w4a16_asym",
        "integers of 4 bits with zero points",
        say.compressed_tensors(
            "pack-quantized", say.integers(4, symmetric=False, zp_dtype="torch.int8")
        ),
        encode.ct_int(bits=4, symmetric=False),
        roles=Roles("weight_packed", zeros="weight_zero_point", shape="weight_shape"),
        misnamed=("pack-quantized", "int-quantized"),
    ),
    _ct(
        "ct_w4a16_gidx",
        "integers of 4 bits, columns in the order of their activations",
        say.compressed_tensors("pack-quantized", say.integers(4, actorder="group")),
        encode.ct_int(bits=4, ordered=True),
        readers="transformers",
        roles=Roles("weight_packed", shape="weight_shape", order="weight_g_idx"),
        misnamed=("pack-quantized", "int-quantized"),
    ),
    _ct(
        "ct_w4a16_channel",
        "integers of 4 bits with a scale per row",
        say.compressed_tensors("pack-quantized", say.integers(4, None)),
        encode.ct_int(bits=4, group=None),
        roles=PACKED,
        misnamed=("pack-quantized", "int-quantized"),
    ),
    _ct(
        "ct_w4a16_embedding",
        "integers of 4 bits, the embedding too",
        ct_embedding,
        ((r".*_proj|model\.embed_tokens", encode.ct_int(bits=4)),),
        readers="vLLM",
        roles=PACKED,
    ),
    _ct(
        "ct_w4a16_dense",
        "integers of 4 bits in a dense model",
        say.compressed_tensors("pack-quantized", say.integers(4)),
        encode.ct_int(bits=4),
        roles=PACKED,
        model="llama",
    ),
    _ct(
        "ct_w3a16",
        "integers of 3 bits",
        say.compressed_tensors("pack-quantized", say.integers(3)),
        encode.ct_int(bits=3),
        roles=PACKED,
    ),
    _ct(
        "ct_w8a16",
        "integers of 8 bits in groups of 128",
        say.compressed_tensors("pack-quantized", say.integers(8)),
        encode.ct_int(bits=8),
        roles=PACKED,
        misnamed=("pack-quantized", "int-quantized"),
    ),
    _ct(
        "ct_w8a8_int8",
        "integers of 8 bits with a scale per row, activations per token",
        say.compressed_tensors(
            "int-quantized", say.integers(8, None), say.TOKENS | {"type": "int"}
        ),
        encode.ct_int8,
        misnamed=("int-quantized", "pack-quantized"),
    ),
    _ct(
        "ct_w4a8_int",
        "integers of 4 bits, integer activations",
        say.compressed_tensors("pack-quantized", say.integers(4), say.TOKENS | {"type": "int"}),
        encode.ct_int(bits=4),
        roles=PACKED,
    ),
    _ct(
        "ct_w4afp8",
        "integers of 4 bits, FP8 activations",
        say.compressed_tensors("pack-quantized", say.integers(4), say.TOKENS),
        encode.ct_int(bits=4),
        roles=PACKED,
    ),
    _ct(
        "ct_mixed",
        "mixed-precision: NVFP4 experts, FP8 attention",
        ct_mixed,
        ((EXPERTS, encode.ct_nvfp4), (ATTENTION, encode.fp8_channel(kind=BFLOAT, column=True))),
        roles=GLOBAL,
    ),
    _ct(
        "ct_fp8_kv",
        "FP8 with an FP8 KV cache",
        say.compressed_tensors(FLOAT_CT, say.args(), say.STATIC, say.KV_TENSOR),
        encode.fp8_tensor(kind=BFLOAT, shape=(1,), static=True),
        roles=STATIC,
        model="llama",
        kv=ct_kv,
    ),
    _ct(
        "ct_fp8_kv_heads",
        "FP8 with an FP8 KV cache, a scale per head",
        say.compressed_tensors(FLOAT_CT, say.args(), say.STATIC, say.KV_HEAD),
        encode.fp8_tensor(kind=BFLOAT, shape=(1,), static=True),
        roles=STATIC,
        model="llama",
        kv=ct_kv_heads,
    ),
    _ct(
        "ct_fp8_kv_outputs",
        "FP8 with an FP8 KV cache, its scales on the outputs",
        say.compressed_tensors(FLOAT_CT, say.args(), say.STATIC, say.KV_TENSOR),
        encode.fp8_tensor(kind=BFLOAT, shape=(1,), static=True),
        roles=STATIC,
        model="llama",
        kv=output_kv(BFLOAT, (1,)),
    ),
    _ct(
        "kimi_k2_int4",
        "Kimi K2: integers of 4 bits in groups of 32, routed experts",
        say.kimi(""),
        encode.ct_int(bits=4, group=32),
        readers=TWO_ENGINES,
        roles=PACKED,
        model="kimi_k2",
        misnamed=("pack-quantized", "int-quantized"),
    ),
    _ct(
        "kimi_k25_int4",
        "Kimi K2.5: the same in a model with vision",
        say.kimi("text_config"),
        encode.ct_int(bits=4, group=32),
        readers=TWO_ENGINES,
        roles=PACKED,
        model="kimi_k25",
        misnamed=("pack-quantized", "int-quantized"),
    ),
)

AR = "auto_round:"
INTEGERS = (
    _gptq(
        "gptq",
        "GPTQ, zero points less one (v1)",
        say.gptq(),
        encode.gptq(),
        misnamed=("gptq", "awq"),
        symmetric=True,
    ),
    _gptq(
        "gptq_v2",
        "GPTQ, zero points as they are (v2)",
        say.gptq(form="gptq_v2"),
        encode.gptq(offset=0),
        readers="vLLM, SGLang, transformers",
        misnamed=("gptq", "awq"),
        symmetric=True,
    ),
    _gptq(
        "gptq_desc_act",
        "GPTQ, columns in the order of their activations",
        say.gptq(desc_act=True),
        encode.gptq(ordered=True),
        readers="SGLang, transformers",
        misnamed=("gptq", "awq"),
        symmetric=True,
    ),
    _gptq(
        "gptq_asym",
        "GPTQ with zero points of their own",
        say.gptq(sym=False),
        encode.gptq(symmetric=False),
        readers="transformers",
        misnamed=("gptq", "awq"),
    ),
    _gptq(
        "gptq_8bit",
        "GPTQ of 8 bits",
        say.gptq(8),
        encode.gptq(bits=8),
        misnamed=("gptq", "awq"),
        symmetric=True,
    ),
    _gptq(
        "awq",
        "AWQ, version gemm",
        say.awq,
        encode.awq,
        roles=Roles("qweight", "scales", zeros="qzeros"),
        misnamed=("awq", "gptq"),
    ),
    _gptq(
        "awq_dense",
        "AWQ in a dense model",
        say.awq,
        encode.awq,
        roles=Roles("qweight", "scales", zeros="qzeros"),
        model="llama",
    ),
    _gptq(
        "autoround_gptq",
        "AutoRound, packed as GPTQ without g_idx",
        say.auto_round(f"{AR}auto_gptq"),
        encode.gptq(g_idx=False),
        readers="vLLM, SGLang, transformers",
        roles=Roles("qweight", "scales", zeros="qzeros"),
        misnamed=(f"{AR}auto_gptq", f"{AR}auto_awq"),
        symmetric=True,
    ),
    _gptq(
        "autoround_awq",
        "AutoRound, packed as AWQ",
        say.auto_round(f"{AR}auto_awq", sym=False),
        encode.awq,
        readers="vLLM, SGLang, transformers",
        roles=Roles("qweight", "scales", zeros="qzeros"),
        misnamed=(f"{AR}auto_awq", f"{AR}auto_gptq"),
    ),
    _gptq(
        "autoround_nvfp4",
        "AutoRound, NVFP4 in the names of compressed-tensors",
        say.auto_round(
            f"{AR}llm_compressor",
            data_type="nv_fp",
            group_size=16,
            act_bits=4,
            act_data_type="nv_fp4_with_static_gs",
            act_group_size=16,
            act_dynamic=True,
            act_sym=True,
        ),
        encode.ct_nvfp4,
        readers="vLLM",
        roles=GLOBAL,
    ),
    _gptq(
        "autoround_mxfp4",
        "AutoRound, MXFP4 in the names of compressed-tensors",
        say.auto_round(
            f"{AR}llm_compressor",
            data_type="mx_fp",
            group_size=32,
            act_bits=4,
            act_data_type="mx_fp",
            act_group_size=32,
            act_dynamic=True,
            act_sym=True,
        ),
        encode.mxfp4("weight_packed"),
        readers="vLLM",
        roles=Roles("weight_packed"),
    ),
    _gptq(
        "autoround_mxfp8",
        "AutoRound, MXFP8 in the names of compressed-tensors",
        say.auto_round(
            f"{AR}llm_compressor",
            bits=8,
            data_type="mx_fp",
            group_size=32,
            act_bits=8,
            act_data_type="mx_fp",
            act_group_size=32,
            act_dynamic=True,
            act_sym=True,
        ),
        encode.mxfp8,
        readers="vLLM",
        roles=Roles(),
    ),
    _gptq(
        "autoround_fp8_block",
        "AutoRound, FP8 with a scale per 128x128 tile",
        say.auto_round(
            f"{AR}fp8",
            bits=8,
            data_type="fp",
            group_size=[128, 128],
            act_bits=8,
            act_data_type="fp",
            act_dynamic=True,
        ),
        encode.fp8_block("weight_scale_inv", kind=SINGLE),
        readers="vLLM, SGLang",
        roles=INVERSE,
    ),
    _gptq(
        "autoround_fp8_static",
        "AutoRound, FP8 with a scale per tensor, static activations",
        say.auto_round(
            f"{AR}fp8",
            bits=8,
            data_type="fp",
            group_size=-1,
            act_bits=8,
            act_data_type="fp",
            act_dynamic=False,
            act_group_size=0,
        ),
        encode.fp8_tensor(kind=BFLOAT, shape=(1,), static=True),
        readers="vLLM",
        roles=STATIC,
    ),
)

VENDORS = (
    Format(
        "hf_fp8_static",
        "FP8 with a scale per tensor, static activations",
        say.vendor("fp8", activation_scheme="static"),
        encode.fp8_tensor(kind=SINGLE, shape=(), static=True),
        TWO_ENGINES,
        roles=STATIC,
        misnamed=("fp8", "mxfp8"),
    ),
    Format(
        "deepseek_fp8",
        "FP8 with a float32 scale per 128x128 tile",
        FP8_128,
        encode.fp8_block("weight_scale_inv", kind=SINGLE),
        "vLLM, SGLang, transformers",
        roles=INVERSE,
        misnamed=("fp8", "mxfp8"),
    ),
    Format(
        "deepseek_fp8_bf16scale",
        "the same with BF16 scales, as Qwen ships",
        FP8_128,
        encode.fp8_block("weight_scale_inv", kind=BFLOAT),
        "vLLM, SGLang, transformers",
        roles=INVERSE,
        misnamed=("fp8", "mxfp8"),
    ),
    Format(
        "deepseek_fp8_f16scale",
        "the same with F16 scales",
        FP8_128,
        encode.fp8_block("weight_scale_inv", kind=HALF),
        "vLLM, SGLang, transformers",
        roles=INVERSE,
        misnamed=("fp8", "mxfp8"),
    ),
    Format(
        "deepseek_v31_ue8m0_f32",
        "the same with scales that are powers of two",
        say.vendor("fp8", fmt="e4m3", weight_block_size=[128, 128], scale_fmt="ue8m0"),
        encode.fp8_block_powers("weight_scale_inv", byte=False),
        "vLLM, SGLang, transformers",
        roles=INVERSE,
        misnamed=("fp8", "mxfp8"),
    ),
    Format(
        "fp8_block_e8m0_scale",
        "the same with powers of two as E8M0",
        say.vendor("fp8", fmt="e4m3", weight_block_size=[128, 128], scale_fmt="ue8m0"),
        encode.fp8_block_powers("weight_scale_inv", byte=True),
        "transformers",
        roles=INVERSE,
        misnamed=("fp8", "mxfp8"),
    ),
    Format(
        "fp8_block_32",
        "FP8 with an E8M0 scale per 32x32 tile, as DeepSeek-V4.1 ships",
        say.vendor("fp8", fmt="e4m3", weight_block_size=[32, 32], scale_fmt="ue8m0"),
        encode.fp8_block_powers("scale", byte=True, size=32),
        "vLLM, MLX",
        roles=Roles(scale="scale"),
        misnamed=("fp8", "mxfp8"),
    ),
    Format(
        "mxfp8_vendor",
        "MXFP8, as MiniMax ships",
        say.vendor("mxfp8", weight_block_size=[1, 32]),
        partial(encode.mxfp8, leaf="weight_scale_inv"),
        TWO_ENGINES,
        roles=INVERSE,
    ),
    Format(
        "deepseek_v4",
        "DeepSeek-V4: MXFP4 experts, the rest FP8 tiles",
        say.vendor("fp8", fmt="e4m3", weight_block_size=[128, 128], scale_fmt="ue8m0"),
        (
            (V4_EXPERTS, encode.deepseek_mxfp4),
            (V4_REST, encode.fp8_block_powers("scale", byte=True)),
        ),
        "vLLM, transformers",
        roles=Roles(scale="scale"),
        model="deepseek_v4",
        lost="",
    ),
    Format(
        "deepseek_v4_nvfp4",
        "DeepSeek-V4 with NVFP4 experts, as ModelOpt exports it",
        deepseek_v4_nvfp4,
        (
            (V4_EXPERTS, encode.nvfp4),
            (V4_REST, encode.fp8_block_powers("scale", byte=True)),
        ),
        "vLLM, TensorRT-LLM",
        roles=SCALES_2,
        model="deepseek_v4",
        lost="",
    ),
    Format(
        "gpt_oss_mxfp4",
        "gpt-oss: stacked MXFP4 experts",
        say.mxfp4,
        encode.mxfp4("blocks"),
        "vLLM, SGLang, transformers",
        roles=Roles("blocks", "scales"),
        model="gpt_oss",
        lost="",
    ),
    Format(
        "fbgemm_fp8",
        "FP8 of FBGEMM with a scale per row",
        say.fbgemm,
        encode.fp8_channel(kind=SINGLE, column=True),
        "vLLM, transformers",
        known_as="FBGEMM",
    ),
    Format(
        "w4afp8",
        "SGLang's w4afp8: integers of 4 bits in the experts, the rest FP8 tiles",
        say.vendor(
            "w4afp8",
            weight_block_size=[128, 128],
            group_size=128,
            is_checkpoint_w4afp8_serialized=True,
            moe_activation_scheme="static",
        ),
        (
            (EXPERTS, encode.w4afp8),
            (ATTENTION, encode.fp8_block("weight_scale_inv", kind=SINGLE)),
        ),
        "SGLang",
        roles=Roles(scale="weight_scale_inv", inputs="input_scale"),
        known_as="W4AFP8",
    ),
)

FP4_INPUTS = say.mx_spec("fp4", is_dynamic=True)
FP8_SPEC = say.spec("fp8_e4m3", "per_tensor")
QUARK = (
    _quark(
        "quark_mxfp4",
        "MXFP4 weights and activations",
        say.quark(say.mx_spec("fp4"), FP4_INPUTS),
        encode.mxfp4("weight"),
        misnamed=("fp4", "fp8_e4m3"),
    ),
    _quark(
        "quark_mxfp6",
        "MXFP6 (E3M2)",
        say.quark(say.mx_spec("fp6_e3m2"), say.mx_spec("fp6_e3m2", is_dynamic=True)),
        encode.mxfp6("weight", *E3M2),
        known_as="MXFP6",
        misnamed=("fp6_e3m2", "fp4"),
    ),
    _quark(
        "quark_mxfp8",
        "MXFP8",
        say.quark(say.mx_spec("fp8_e4m3"), say.mx_spec("fp8_e4m3", is_dynamic=True)),
        encode.mxfp8,
    ),
    _quark(
        "quark_fp8",
        "FP8 with a scale per tensor, static activations",
        say.quark(FP8_SPEC, FP8_SPEC),
        encode.fp8_tensor(kind=SINGLE, shape=(), static=True),
        roles=STATIC,
        misnamed=("fp8_e4m3", "fp4"),
    ),
    _quark(
        "quark_fp8_ptpc",
        "FP8 with a scale per row, activations per token",
        say.quark(
            say.spec("fp8_e4m3", "per_channel", ch_axis=0),
            say.spec("fp8_e4m3", "per_channel", ch_axis=1, is_dynamic=True),
        ),
        encode.fp8_channel(kind=SINGLE, column=False),
        misnamed=("fp8_e4m3", "fp4"),
    ),
    _quark(
        "quark_fp8_block",
        "FP8 with a scale per 128x128 tile",
        say.quark(
            say.spec("fp8_e4m3", "per_block", block_size=[128, 128]),
            say.spec("fp8_e4m3", "per_group", ch_axis=-1, group_size=128, is_dynamic=True),
        ),
        encode.fp8_block("weight_scale", kind=SINGLE),
        readers="vLLM",
    ),
    _quark(
        "quark_int4",
        "integers of 4 bits in AWQ's order",
        say.quark(say.spec("int4", "per_group", ch_axis=1, group_size=128)),
        encode.quark_int4,
        roles=Roles(zeros="weight_zero_point"),
        symmetric=True,
        misnamed=("int4", "fp4"),
        unknowable=("zeros_missing",),  # all zero: a reader of two's complement needs none
    ),
    _quark(
        "quark_int8",
        "integers of 8 bits with a scale per row",
        say.quark(say.spec("int8", "per_channel", ch_axis=0)),
        encode.modelopt_w8a16,
    ),
    _quark(
        "quark_nvfp4",
        "NVFP4 with a tensor scale of the inputs",
        say.quark(
            [
                say.spec("fp4", "per_group", ch_axis=-1, group_size=16, scale_format="e4m3"),
                say.spec("fp8_e4m3", "per_tensor", is_scale_quant=True),
            ],
            [
                say.spec(
                    "fp4",
                    "per_group",
                    ch_axis=-1,
                    group_size=16,
                    scale_format="e4m3",
                    is_dynamic=True,
                ),
                say.spec("fp8_e4m3", "per_tensor", is_scale_quant=True),
            ],
        ),
        encode.quark_nvfp4,
        roles=Roles(tensor_scale="weight_scale_2", inputs="input_scale_2"),
        readers="vLLM",
        misnamed=("fp4", "int4"),
    ),
    _quark(
        "quark_fp8_kv",
        "FP8 with an FP8 KV cache",
        say.quark(FP8_SPEC, FP8_SPEC, FP8_SPEC),
        encode.fp8_tensor(kind=SINGLE, shape=(), static=True),
        roles=STATIC,
        model="llama",
        kv=output_kv(SINGLE, ()),
    ),
)

OTHERS = (
    Format(
        "bnb_nf4",
        "NF4 of bitsandbytes",
        say.bitsandbytes(4),
        encode.bnb_nf4,
        "transformers, SGLang",
        roles=Roles(scale="weight.absmax"),
        known_as="bitsandbytes",
    ),
    Format(
        "bnb_int8",
        "LLM.int8 of bitsandbytes",
        say.bitsandbytes(8),
        encode.bnb_int8,
        "transformers",
        roles=Roles(scale="SCB"),
        known_as="bitsandbytes",
    ),
    Format(
        "torchao_fp8",
        "FP8 of torchao with a scale per row",
        say.torchao("Float8DynamicActivationFloat8WeightConfig"),
        encode.torchao_fp8,
        "transformers, vLLM",
        roles=TORCHAO,
        known_as="torchao",
        finish=torchao_metadata("Float8Tensor"),
    ),
    Format(
        "torchao_int4",
        "integers of 4 bits of torchao",
        say.torchao("Int4WeightOnlyConfig"),
        encode.torchao_int4,
        "transformers, vLLM",
        roles=TORCHAO,
        known_as="torchao",
        finish=torchao_metadata("Int4Tensor"),
    ),
    _mlx(
        "mlx_4bit",
        "affine integers of 4 bits",
        say.mlx(group_size=64, bits=4, mode="affine"),
        encode.mlx_affine,
        readers="mlx-lm, transformers",
    ),
    _mlx(
        "mlx_4bit_stacks",
        "the same, experts in stacks",
        say.mlx(group_size=64, bits=4, mode="affine"),
        encode.mlx_affine,
        finish=mlx_stacks,
    ),
    _mlx("mlx_mxfp4", "MXFP4", say.mlx(group_size=32, bits=4, mode="mxfp4"), encode.mlx_mxfp4),
    _mlx("mlx_nvfp4", "NVFP4", say.mlx(group_size=16, bits=4, mode="nvfp4"), encode.mlx_nvfp4),
)

_moved = partial(Format, readers="as the format")
TURNS = {
    "R1": (256, [("re:.*embed_tokens$", "weight_output"), ("re:.*[qkv]_proj$", "weight_input")]),
    "R2": (64, [("re:.*v_proj$", "weight_output"), ("re:.*o_proj$", "weight_input")]),
}


def ct_rotated(_model: Model, plain: Sequence[str]) -> say.Files:
    """Declare integers of 4 bits, and rotations that are part of the weights."""
    rotations = {}
    for name, (size, places) in TURNS.items():
        rotations[name] = {
            "apply": [
                {"targets": [target], "location": place, "inverse": False, "ignore": []}
                for target, place in places
            ],
            "block_size": size,
            "head_dim": None,
            "precision": "torch.float64",
            "randomize": False,
            "requires_grad": False,
            "type": "hadamard",
        }
    kind = say.group("pack-quantized", say.integers(4))
    turned = {"config_groups": rotations}
    return say.inline(say.ct_config([kind], plain, transform_config=turned))


MOVED = (
    _moved(
        "gptq_feedback",
        "GPTQ's own rounding, which moves codes",
        say.gptq(),
        moved.gptq_codes(moved.feedback, g_idx=True),
        roles=WORDS,
        kept=(O_PROJ,),
        lost=O_PROJ,
        symmetric=True,
    ),
    _moved(
        "autoround_learned",
        "AutoRound's rounding, up or down",
        say.auto_round(f"{AR}auto_gptq"),
        moved.gptq_codes(moved.learned, g_idx=False),
        roles=Roles("qweight", "scales", zeros="qzeros"),
        kept=(O_PROJ,),
        lost=O_PROJ,
        symmetric=True,
    ),
    _moved(
        "awq_folded",
        "AWQ with its scales folded into norms and layers",
        say.awq,
        encode.awq,
        roles=Roles("qweight", "scales", zeros="qzeros"),
        kept=(O_PROJ,),
        lost=O_PROJ,
        weights="folded",
        move=moved.folded,
    ),
    _moved(
        "nvfp4_folded",
        "NVFP4 of ModelOpt after smoothing, folded",
        say.modelopt("NVFP4", group_size=16, bits=4),
        encode.nvfp4,
        roles=SCALES_2,
        weights="folded",
        move=moved.folded,
    ),
    _moved(
        "nvfp4_trained",
        "NVFP4 of ModelOpt after training with quantization",
        say.modelopt("NVFP4", group_size=16, bits=4),
        encode.nvfp4,
        roles=SCALES_2,
        weights="moved",
        move=moved.trained,
    ),
    _moved(
        "ct_rotated",
        "compressed-tensors, weights rotated",
        ct_rotated,
        encode.ct_int(bits=4),
        roles=PACKED,
        model="llama",
        weights="rotated",
        move=moved.rotated,
    ),
)

GROUPS = {
    "ModelOpt": MODELOPT,
    "compressed-tensors": COMPRESSED_TENSORS,
    "GPTQ, AWQ, AutoRound": INTEGERS,
    "Vendors": VENDORS,
    "Quark": QUARK,
    "Other tools": OTHERS,
    "Moved weights": MOVED,
}
FORMATS = {fmt.name: fmt for formats in GROUPS.values() for fmt in formats}
