# SPDX-License-Identifier: Apache-2.0
"""Which engine reads which format under which kind of config, with the source of each statement.

`refusal` is what a rule asks: why an engine does not read what a config declares. Only engines that
are in `READS` are known; of others nothing is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from verifier.schemes.declared import Declaration, Scheme

Engine = Literal["vllm", "sglang", "trtllm", "transformers", "mlx"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang", "trtllm", "transformers", "mlx")
ENGINE_NAMES: dict[Engine, str] = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "trtllm": "TensorRT-LLM",
    "transformers": "transformers",
    "mlx": "mlx-lm",
}
ENGINE_VERSIONS: dict[Engine, str] = {
    "vllm": "0.32",
    "sglang": "0.5.23",
    "trtllm": "2edf354d",
    "transformers": "5.23",
    "mlx": "0.32",
}
"""The release, or the commit, that statements about an engine were read from or run with."""
_FP8 = ("fp8", "fp8_per_channel", "fp8_block")


@dataclass(frozen=True, slots=True)
class Reads:
    """What an engine reads under one kind of config.

    Attributes:
        engine: who reads.
        method: `Declaration.method`, or the form of ModelOpt's.
        names: the ``quant_algo`` (ModelOpt), else the names of `FORMATS`; empty for any.
        source: where this is written.
        bits: the widths of integer codes; empty for any.
        symmetric: whether only codes without zero points are read.
        dtypes: the dtypes of the weight's scale, where not all of the format's are read.
        scale_leaf: the only name of the weight's scale that is looked for; '' for any.
        reordered: whether groups of inputs in the order of their activations are read.
        note: what else an engine requires.
    """

    engine: Engine
    method: str
    names: tuple[str, ...]
    source: str
    bits: tuple[int, ...] = ()
    symmetric: bool = False
    dtypes: tuple[str, ...] = ()
    scale_leaf: str = ""
    reordered: bool = True
    note: str = ""


_VLLM_CT = "vLLM 0.32 compressed_tensors.py _get_scheme_from_parts"
READS: tuple[Reads, ...] = (
    Reads(
        "vllm",
        "modelopt",
        (
            "FP8",
            "FP8_PER_CHANNEL_PER_TOKEN",
            "FP8_PB_WO",
            "NVFP4",
            "W4A16_NVFP4",
            "MXFP8",
            "MIXED_PRECISION",
        ),
        "vLLM 0.32 modelopt.py LINEAR_ALGOS",
        note="FP8_BLOCK_SCALES only for experts of MIXED_PRECISION",
    ),
    Reads(
        "sglang",
        "modelopt",
        ("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION"),
        "SGLang 0.5.23 modelopt_quant.py ModelOptFp4Config, ModelOptMixedPrecisionConfig",
    ),
    Reads(
        "trtllm",
        "modelopt",
        (
            "FP8",
            "FP8_PER_CHANNEL_PER_TOKEN",
            "FP8_BLOCK_SCALES",
            "NVFP4",
            "NVFP4_AWQ",
            "MXFP8",
            "W4A8_NVFP4_FP8",
            "W4A8_MXFP4_FP8",
            "W4A16_AWQ",
            "W4A8_AWQ",
            "W8A16",
            "W8A8_SQ_PER_CHANNEL",
            "MIXED_PRECISION",
        ),
        "TensorRT-LLM quantization/mode.py QuantAlgo",
    ),
    Reads(
        "vllm",
        "fp8",
        ("fp8", "fp8_block", "mxfp8_block", "mxfp4", "mxfp8", "nvfp4"),
        "vLLM 0.32 fp8.py, models/deepseek_v4, models/deepseek_v41",
        note="weight_scale_inv for blocks, weight_scale for tensors",
    ),
    Reads("sglang", "fp8", (), "SGLang 0.5.23 fp8.py"),
    Reads("trtllm", "fp8", ("fp8_block",), "TensorRT-LLM model_config.py load_hf_quant_config"),
    Reads("transformers", "fp8", _FP8, "transformers 5.23 quantizers/quantizer_finegrained_fp8.py"),
    Reads(
        "vllm",
        "mxfp8",
        ("mxfp8",),
        "vLLM 0.32 modelopt.py ModelOptMxFp8Config",
        dtypes=("U8",),
        note="casts F8_E8M0 scales by value, to 0",
    ),
    Reads("sglang", "mxfp8", ("mxfp8",), "SGLang 0.5.23 fp8.py"),
    Reads(
        "vllm",
        "compressed-tensors",
        ("nvfp4_ct", "mxfp4", "mxfp8", *_FP8, "int8", "int_packed"),
        _VLLM_CT,
        reordered=False,
        note="no actorder group or dynamic, no sparsity_config",
    ),
    Reads(
        "sglang",
        "compressed-tensors",
        ("nvfp4_ct", "mxfp4", "mxfp8", *_FP8, "int8", "int_packed"),
        "SGLang 0.5.23 compressed_tensors",
    ),
    Reads("transformers", "compressed-tensors", (), "compressed-tensors 0.20 compressors"),
    Reads(
        "mlx",
        "compressed-tensors",
        ("int_packed", "nvfp4_ct", "mxfp4"),
        "mlx-lm 0.32 utils.py",
    ),
    Reads(
        "vllm",
        "gptq",
        ("gptq", "gptq_v2"),
        "vLLM 0.32 auto_gptq.py TYPE_MAP",
        bits=(4, 8),
        symmetric=True,
        reordered=False,
        note="desc_act only with one group",
    ),
    Reads("sglang", "gptq", ("gptq", "gptq_v2"), "SGLang 0.5.23 gptq/gptq.py", bits=(2, 3, 4, 8)),
    Reads("transformers", "gptq", ("gptq", "gptq_v2"), "GPTQModel"),
    Reads("vllm", "awq", ("awq",), "vLLM 0.32 auto_awq.py TYPE_MAP", bits=(4,)),
    Reads("sglang", "awq", ("awq",), "SGLang 0.5.23 awq", bits=(4,)),
    Reads("transformers", "awq", ("awq",), "GPTQModel", bits=(4,)),
    Reads(
        "vllm",
        "auto-round",
        ("gptq", "awq", "mxfp4", "mxfp8", "fp8_block", "nvfp4_ct"),
        "vLLM 0.32 inc/config_parser.py",
    ),
    Reads("sglang", "auto-round", ("gptq", "awq"), "SGLang 0.5.23 auto_round.py"),
    Reads(
        "vllm",
        "quark",
        (
            "mxfp4",
            "mxfp6_e2m3",
            "mxfp6_e3m2",
            "mxfp8",
            "mxfp8_block",
            *_FP8,
            "int8",
            "int4_quark",
            "uint4_quark",
            "int4_quark_order",
            "uint4_quark_order",
            "nvfp4_quark",
            "w4a8_mxfp4_fp8",
        ),
        "vLLM 0.32 quark/quark.py",
        note="requires export",
    ),
    Reads("sglang", "quark", ("mxfp4", "fp8", "fp8_per_channel"), "SGLang 0.5.23 quark"),
    Reads("vllm", "mxfp4", ("mxfp4",), "vLLM 0.32 mxfp4.py", note="experts alone"),
    Reads("sglang", "mxfp4", ("mxfp4",), "SGLang 0.5.23 mxfp4.py"),
    Reads("transformers", "mxfp4", ("mxfp4",), "transformers 5.23 quantizers/quantizer_mxfp4.py"),
    Reads("vllm", "fbgemm_fp8", ("fp8_per_channel",), "vLLM 0.32 fbgemm_fp8.py (deprecated)"),
    Reads("transformers", "fbgemm_fp8", ("fp8_per_channel",), "transformers 5.23 fbgemm_fp8.py"),
    Reads("sglang", "w4afp8", ("w4afp8", "fp8_block"), "SGLang 0.5.23 w4afp8.py"),
    Reads("mlx", "mlx", (), "mlx-lm 0.32 utils.py"),
    Reads("sglang", "bitsandbytes", (), "SGLang 0.5.23 bitsandbytes.py"),
    Reads("transformers", "bitsandbytes", (), "transformers 5.23 quantizer_bnb_4bit.py"),
    Reads("vllm", "torchao", (), "vLLM 0.32 torchao.py"),
    Reads("transformers", "torchao", (), "transformers 5.23 quantizer_torchao.py"),
)


def method_of(declaration: Declaration) -> str:
    """Return the kind of config that `READS` knows a declaration as."""
    return "modelopt" if declaration.form in ("flat", "nested") else declaration.method


def reading(engine: Engine, declaration: Declaration) -> Reads | None:
    """Return what an engine reads under a declaration; None where it does not read such configs."""
    method = method_of(declaration)
    return next((r for r in READS if (r.engine, r.method) == (engine, method)), None)


def refusal(engine: Engine, declaration: Declaration, scheme: Scheme) -> str:
    """Return why an engine does not read a recipe of a declaration, '' where it does or where that
    is not known.
    """
    found = reading(engine, declaration)
    if found is None:
        return f"it does not read quant_method {method_of(declaration)!r}"
    name = _name(found, scheme)
    if found.names and name and name not in found.names:
        return f"it does not read {scheme.algo} ({found.source})"
    fmt = scheme.format
    if fmt is not None and found.bits and fmt.bits not in found.bits:
        return f"it reads {_listed(found.bits)} bits, not {fmt.bits} ({found.source})"
    if scheme.reordered and not found.reordered:
        return f"it reads no groups in the order of activations ({found.source})"
    if found.symmetric and not scheme.symmetric:
        return f"it reads only symmetric weights ({found.source})"
    return ""


def _name(found: Reads, scheme: Scheme) -> str:
    if found.method == "modelopt":
        return scheme.algo
    return scheme.format.name if scheme.format is not None else ""


def _listed(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers))
