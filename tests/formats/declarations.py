# SPDX-License-Identifier: Apache-2.0
"""How each tool declares its quantization: the JSON files' parts, as the tool writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.formats.models import Model

Config = dict[str, Any]
Files = dict[str, Config]
"""What is added to JSON files by their names."""
Declare = Callable[[Model, Sequence[str]], Files]
"""From a model and its excluded layers to the declaration."""


def inline(config: Config) -> Files:
    """Return a declaration that stands in config.json alone."""
    return {"config.json": {"quantization_config": config}}


# --- ModelOpt


def modelopt(
    algo: str,
    *,
    group_size: int | None = None,
    kv: str | None = None,
    flat_kv: Any = None,
    bits: int | None = None,
    extra: Config | None = None,
) -> Declare:
    """Return what ModelOpt writes: the flat form in config.json, the nested one in a file.

    ``bits`` are those of ``config_groups``, which it writes for some algorithms only.
    """

    def declare(_model: Model, plain: Sequence[str]) -> Files:
        producer = {"name": "modelopt", "version": "0.47.0"}
        nested: Config = {"quant_algo": algo, "kv_cache_quant_algo": kv}
        if group_size is not None:
            nested["group_size"] = group_size
        nested |= {"exclude_modules": list(plain), **(extra or {})}
        flat: Config = {}
        if bits is not None:
            part = {"dynamic": False, "num_bits": bits, "type": "float"}
            if group_size is not None:
                part["group_size"] = group_size
            groups = {"weights": part, "targets": ["Linear"]}
            if not algo.startswith("W4A16"):
                groups = {"input_activations": dict(part), **groups}
            flat["config_groups"] = {"group_0": groups}
        flat |= {"ignore": list(plain), "quant_algo": algo}
        if flat_kv is not None:
            flat["kv_cache_scheme"] = flat_kv
        flat |= {"producer": producer, "quant_method": "modelopt"}
        return {
            "config.json": {"quantization_config": flat},
            "hf_quant_config.json": {"producer": producer, "quantization": nested},
        }

    return declare


# --- compressed-tensors


def args(**values: Any) -> Config:
    """Return quantization arguments of compressed-tensors with its defaults."""
    defaults: Config = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "tensor",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }
    return defaults | values


def group(
    kind: str, weights: Config, inputs: Config | None = None, targets: Sequence[str] = ("Linear",)
) -> Config:
    """Return one config group of compressed-tensors."""
    return {
        "format": kind,
        "input_activations": inputs,
        "output_activations": None,
        "targets": list(targets),
        "weights": weights,
    }


def ct_config(
    groups: Sequence[Config], ignore: Sequence[str], kv: Config | None = None, **more: Any
) -> Config:
    """Return a whole config of compressed-tensors."""
    kinds = {g["format"] for g in groups}
    return {
        "config_groups": {f"group_{number}": g for number, g in enumerate(groups)},
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": kv,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.1",
    } | more


def compressed_tensors(
    kind: str, weights: Config, inputs: Config | None = None, kv: Config | None = None
) -> Declare:
    """Return what llm-compressor writes with one group."""
    return lambda _model, plain: inline(ct_config([group(kind, weights, inputs)], plain, kv))


NVFP4_WEIGHTS = args(
    num_bits=4,
    group_size=16,
    strategy="tensor_group",
    scale_dtype="torch.float8_e4m3fn",
    zp_dtype="torch.float8_e4m3fn",
)
NVFP4_INPUTS = args(num_bits=4, group_size=16, strategy="tensor_group", dynamic="local")
TOKENS = args(strategy="token", dynamic=True, observer=None)
STATIC = args(strategy="tensor")
KV_TENSOR = args(strategy="tensor")
KV_HEAD = args(strategy="attn_head")


def mx(bits: int) -> Config:
    """Return the arguments of a microscaling format."""
    return args(num_bits=bits, group_size=32, strategy="group", scale_dtype="torch.uint8")


def integers(bits: int, group_size: int | None = 128, **values: Any) -> Config:
    """Return the arguments of integers in groups, or per row where ``group_size`` is None."""
    strategy = "channel" if group_size is None else "group"
    return args(num_bits=bits, group_size=group_size, strategy=strategy, type="int", **values)


def kimi(where: str) -> Declare:
    """Return what Kimi's releases declare, in config.json itself or in its text config."""

    def declare(model: Model, plain: Sequence[str]) -> Files:
        config: Config = {
            "config_groups": {
                "group_0": {
                    "input_activations": None,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "actorder": None,
                        "block_structure": None,
                        "dynamic": False,
                        "group_size": 32,
                        "num_bits": 4,
                        "observer": "minmax",
                        "observer_kwargs": {},
                        "strategy": "group",
                        "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "format": "pack-quantized",
            "ignore": list(plain),
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }
        if not where:
            return inline(config)
        text = model.config[where] | {"quantization_config": config}
        return {"config.json": {where: text}}

    return declare


# --- GPTQ, AWQ, AutoRound


def gptq(bits: int = 4, *, sym: bool = True, desc_act: bool = False, form: str = "gptq") -> Declare:
    """Return what GPTQModel writes, in config.json and in a file of its own."""

    def declare(_model: Model, plain: Sequence[str]) -> Files:
        shared = {
            "bits": bits,
            "group_size": 128,
            "desc_act": desc_act,
            "sym": sym,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": form,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["gptqmodel:7.7.0"]},
            "dynamic": {f"-:{_regex(name)}$": {} for name in plain if name != "lm_head"},
        }
        return inline(shared) | {"quantize_config.json": dict(shared)}

    return declare


def _regex(name: str) -> str:
    return name.replace(".", r"\.")


def awq(_model: Model, plain: Sequence[str]) -> Files:
    """Return what AutoAWQ writes."""
    return inline(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [n for n in plain if n != "lm_head"],
        }
    )


def auto_round(packing: str, **values: Any) -> Declare:
    """Return what AutoRound writes; layers that stay plain have 16 bits in ``extra_config``."""

    def declare(_model: Model, plain: Sequence[str]) -> Files:
        config = {
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "data_type": "int",
            "autoround_version": "0.16.1",
            "block_name_to_quantize": "model.layers",
            "quant_method": "auto-round",
            "packing_format": packing,
            "extra_config": {
                name: {"bits": 16, "data_type": "fp"} for name in plain if name != "lm_head"
            },
        }
        return inline(config | values)

    return declare


# --- FP8 without a tool's name


def vendor(method: str, **values: Any) -> Declare:
    """Return what the vendors' FP8 and MX releases declare."""

    def declare(_model: Model, plain: Sequence[str]) -> Files:
        config = {"activation_scheme": "dynamic", "quant_method": method} | values
        return inline(config | ({"modules_to_not_convert": list(plain)} if plain else {}))

    return declare


def fbgemm(_model: Model, plain: Sequence[str]) -> Files:
    """Return what transformers writes for FBGEMM's FP8."""
    return inline(
        {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": list(plain),
        }
    )


def mxfp4(_model: Model, plain: Sequence[str]) -> Files:
    """Return what gpt-oss declares."""
    return inline({"quant_method": "mxfp4", "modules_to_not_convert": list(plain)})


# --- Quark


def spec(dtype: str, scheme: str, **values: Any) -> Config:
    """Return the specification of one kind of tensor."""
    defaults: Config = {
        "ch_axis": None,
        "dtype": dtype,
        "group_size": None,
        "is_dynamic": False,
        "is_scale_quant": False,
        "mx_element_dtype": None,
        "observer_cls": "PerTensorMinMaxObserver",
        "qscheme": scheme,
        "round_method": "half_even",
        "scale_calculation_mode": None,
        "scale_format": None,
        "scale_type": "float",
        "symmetric": True,
    }
    return defaults | values


def mx_spec(dtype: str, **values: Any) -> Config:
    """Return the specification of a microscaling format."""
    return spec(dtype, "per_group", ch_axis=-1, group_size=32, scale_format="e8m0", **values)


def quark(
    weight: Config | list[Config],
    inputs: Config | list[Config] | None = None,
    kv: Config | None = None,
) -> Declare:
    """Return what Quark writes; a KV scheme is a specification of outputs per layer."""

    def declare(_model: Model, plain: Sequence[str]) -> Files:
        whole = {
            "bias": None,
            "input_tensors": inputs,
            "output_tensors": None,
            "target_device": None,
            "weight": weight,
        }
        layers = {} if kv is None else {"*k_proj": whole | {"output_tensors": kv}}
        if kv is not None:
            layers["*v_proj"] = dict(layers["*k_proj"])
        return inline(
            {
                "algo_config": None,
                "exclude": list(plain),
                "export": {
                    "kv_cache_group": [] if kv is None else ["*k_proj", "*v_proj"],
                    "min_kv_scale": 0.0,
                    "pack_method": "reorder",
                    "weight_format": "real_quantized",
                    "weight_merge_groups": None,
                },
                "global_quant_config": whole,
                "layer_quant_config": layers,
                "layer_type_quant_config": {},
                "quant_method": "quark",
                "quant_mode": "eager_mode",
                "softmax_quant_spec": None,
                "version": "0.13",
            }
        )

    return declare


# --- Other tools


def bitsandbytes(bits: int) -> Declare:
    """Return what transformers writes for bitsandbytes."""

    def declare(_model: Model, plain: Sequence[str]) -> Files:
        return inline(
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": bits == 4,
                "load_in_8bit": bits == 8,
                "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": False,
                "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_has_fp16_weight": False,
                "llm_int8_skip_modules": list(plain),
                "llm_int8_threshold": 6.0,
            }
        )

    return declare


def torchao(kind: str) -> Declare:
    """Return what transformers writes for torchao."""

    def declare(_model: Model, plain: Sequence[str]) -> Files:
        return inline(
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": kind, "_version": 2, "_data": {}}},
                "include_input_output_embeddings": False,
                "modules_to_not_convert": list(plain),
                "untie_embedding_weights": False,
            }
        )

    return declare


def mlx(**values: Any) -> Declare:
    """Return what mlx-lm writes, twice; layers that stay plain are false."""

    def declare(_model: Model, plain: Sequence[str]) -> Files:
        config: Config = values | {name: False for name in plain} | {"model.embed_tokens": False}
        return {"config.json": {"quantization": config, "quantization_config": dict(config)}}

    return declare
