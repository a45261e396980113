# SPDX-License-Identifier: Apache-2.0
"""How SGLang's own configuration classes resolve modules: JSON lines on stdin and stdout. Run by
path under an interpreter with SGLang; no GPU is needed.

    > {"config": {…}, "packed": {"qkv_proj": […]}, "modules": {"model.layers.0.mlp.experts": "moe"}}
    < {"method": "modelopt_fp4", "modules": {"model.layers.0.mlp.experts": "ModelOptNvFp4…"}}

``config`` is the ``quantization_config`` of config.json; modules are "linear", "moe" or "head".
The classes that would run kernels are named, not made: they ask for a GPU.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from importlib import import_module
from typing import Any

TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
QUANTIZATION = "sglang.srt.layers.quantization"


class Stub:
    """In place of every name of torchvision, which SGLang imports and nothing here runs."""


def _attribute(name: str) -> type[Stub]:
    if name.startswith("__"):
        raise AttributeError(name)
    return Stub


def stub_torchvision() -> None:
    """Provide torchvision's names; transformers decides before that it is not installed."""
    import_module("transformers.utils.import_utils").is_torchvision_available()
    import_module("transformers.image_utils")
    for name in TORCHVISION:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module)["__getattr__"] = _attribute
        sys.modules[name] = module


def without_kernels() -> None:
    """Let the classes of quantization methods be made without a GPU."""
    for name in ("modelopt_quant", "fp8", "unquant"):
        for value in list(vars(import_module(f"{QUANTIZATION}.{name}")).values()):
            if isinstance(value, type) and value.__name__.endswith("Method"):
                value.__init__ = lambda *_, **__: None  # type: ignore[misc]


def resolve(question: dict[str, Any]) -> dict[str, Any]:
    """Return the method of a config and the class of each module, '' where it has none."""
    model_config = import_module("sglang.srt.configs.model_config").ModelConfig
    config = dict(question["config"])
    parsed: Any = config
    if config["quant_method"] == "modelopt":
        parsed = model_config._parse_modelopt_quant_config(None, config)
    if parsed is None:
        raise ValueError(f"no quantization method for {config.get('quant_algo')}")
    method = parsed["quant_method"]
    if method == "mxfp8":
        config = parsed
    config["packed_modules_mapping"] = question["packed"]
    quantization = import_module(QUANTIZATION).get_quantization_config(method).from_config(config)
    layers = {
        "linear": import_module("sglang.srt.layers.linear").LinearBase,
        "moe": import_module("sglang.srt.layers.moe.fused_moe_triton").FusedMoE,
        "head": import_module("sglang.srt.layers.vocab_parallel_embedding").ParallelLMHead,
    }
    classes = {}
    for name, kind in question["modules"].items():
        layer = layers[kind].__new__(layers[kind])
        vars(layer).update(use_triton_kernels=False, use_flashinfer_trtllm_moe=False)
        found = quantization.get_quant_method(layer, name)
        classes[name] = "" if found is None else type(found).__name__
    return {"method": method, "modules": classes}


def main() -> int:
    """Serve until stdin ends."""
    # What SGLang prints goes to stderr: stdout is for the lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path.pop(0)  # the folder of this file, which has a package named vllm
    stub_torchvision()
    without_kernels()
    for line in sys.stdin:
        try:
            answer = resolve(json.loads(line))
        except Exception as error:  # noqa: BLE001  (SGLang raises anything)
            answer = {"refused": f"{type(error).__name__}: {error}"[:300]}
        out.write(json.dumps(answer) + "\n")
        out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
