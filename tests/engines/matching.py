# SPDX-License-Identifier: Apache-2.0
"""What SGLang's own configuration classes make of the declarations of our exports, without a GPU:
the class that it selects for each module, against the format of the module's tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter import export
from exporter.recipes import names
from goldens.rebuild import GOLDENS
from goldens.rebuild import HERE as GOLDEN_FOLDER
from tests.engines.loads import ACCEPTED, REFUSED, REJECTED, Row
from tests.zoo.run import quiet
from verifier import check, open_checkpoint
from verifier.engines.process import LineProcess
from verifier.errors import CkptgateError
from verifier.rules import Context
from verifier.schemes import PACKED, Module, expert_key, packed_name, role

WORKER = Path(__file__).with_name("sglang_worker.py")
CLASSES = {
    "NVFP4": ("ModelOptFp4LinearMethod", "ModelOptNvFp4FusedMoEMethod"),
    "W4A16_NVFP4": ("ModelOptNvFp4A16LinearMethod", "ModelOptNvFp4FusedMoEMethod"),
    "MXFP8": ("Fp8LinearMethod", "Fp8MoEMethod"),
    "FP8": ("ModelOptFp8LinearMethod", "ModelOptFp8MoEMethod"),
    "FP8_PB_WO": ("Fp8LinearMethod", "Fp8MoEMethod"),
    "unquantized": ("", "UnquantizedLinearMethod", "UnquantizedFusedMoEMethod"),
}
"""The classes of SGLang 0.5.23 by the format that they load."""
KINDS = {"attention": "linear", "mlp": "linear", "shared_expert": "linear", "router": "linear"}
KINDS |= {"lm_head": "head", "routed_expert": "moe"}


def sglang(python: str, home: Path) -> Iterator[Row]:
    """Yield a row for each golden and recipe that `export --for sglang` writes."""
    worker = LineProcess(python, WORKER, "the SGLang process", 600.0)
    try:
        for golden in GOLDENS:
            source = GOLDEN_FOLDER / golden / "bf16"
            for recipe in names():
                out = home / "export"
                shutil.rmtree(out, ignore_errors=True)
                try:
                    with quiet():
                        export(source, out, recipe=recipe, input_scale="one", engine="sglang")
                except CkptgateError as error:
                    yield Row(golden, recipe, REFUSED, "", str(error))
                    continue
                verdict = check(out, base=source, profile="sglang", depth="payload").verdict
                yield Row(golden, recipe, verdict, *_matched(worker, out))
    finally:
        worker.close()


def _matched(worker: LineProcess, path: Path) -> tuple[str, str]:
    """Return whether SGLang selects the format of each module's tensors, and why not."""
    checkpoint = open_checkpoint(path)
    declaration = (checkpoint.config or {})["quantization_config"]
    asked: dict[str, tuple[str, str]] = {}
    for module in Context.of(checkpoint).candidate.modules.values():
        kind = KINDS.get(role(module.name))
        if kind is not None and module.weight is not None and len(module.weight.shape) > 1:
            asked[_asked_name(module, checkpoint.model_type)] = (kind, _format(module))
    question = {
        "config": declaration,
        "packed": {name: list(members) for name, members in PACKED.items()},
        "modules": {name: kind for name, (kind, _) in asked.items()},
    }
    answer = worker.ask(question, 1 << 24)
    if "refused" in answer:
        return REJECTED, answer["refused"]
    wrong = [
        f"{name}: {answer['modules'][name] or 'no class'} for {fmt}"
        for name, (_, fmt) in asked.items()
        if answer["modules"][name] not in CLASSES.get(fmt, ())
    ]
    text = f"{len(asked)} modules asked for, {answer['method']}"
    return (REJECTED, f"{len(wrong)} of {text}: {wrong[0]}") if wrong else (ACCEPTED, text)


def _asked_name(module: Module, family: str | None) -> str:
    """Return the name by which an engine asks for a module: its fused parameter's, or that of all
    experts of the layer.
    """
    expert = expert_key(module.name)
    if expert is not None:
        return expert.container
    if role(module.name) == "routed_expert":  # a stack
        return module.name.rpartition(".")[0]
    return packed_name(module.name, family) or module.name


def _format(module: Module) -> str:
    fmt: Any = module.inferred_format
    return str(fmt.algo) if module.quantized and fmt is not None else "unquantized"
