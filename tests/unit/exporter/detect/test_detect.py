# SPDX-License-Identifier: Apache-2.0
"""Detection of fused experts: flags, shapes, what is refused, what is none, and the real MiniMax-M3
without memory.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from exporter.detect import READERS, detect, detect_config, register
from verifier.cli.main import run
from verifier.errors import ContentError, UsageError

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "vocab_size": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
}


def meta(model_type: str, **more: Any) -> Any:
    base = transformers.AutoConfig.for_model(model_type)
    given = {k: v for k, v in SMALL.items() if hasattr(base, k)} | {"pad_token_id": 0} | more
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **given)
        )


@pytest.mark.parametrize(
    ("model_type", "more", "layout", "linears"),
    [
        ("mixtral", {}, (True, False, False, False, "flags"), 24),
        ("qwen3_moe", {}, (True, False, False, False, "flags"), 24),
        ("gpt_oss", {}, (True, True, True, True, "flags"), 24),
        (
            "nemotron_h",
            {"layers_block_type": ["moe", "moe"]},
            (False, False, False, False, "flags"),
            16,
        ),
        ("llama4_text", {"moe_layers": [0, 1]}, (True, True, False, False, "class"), 24),
        ("granitemoe", {}, (True, False, False, False, "flags"), 24),
        (
            "longcat_flash",
            {"zero_expert_num": 2, "expert_ffn_hidden_size": 48},
            (True, False, False, False, "class"),
            12,
        ),
    ],
)
def test_layouts_of_families(
    model_type: str, more: dict[str, Any], layout: tuple[object, ...], linears: int
) -> None:
    found = detect(meta(model_type, **more))
    assert found.refused == () and found.linears == linears
    stack = found.stacks[0]
    assert (stack.gated, stack.transposed, stack.interleaved, stack.bias, stack.by) == layout
    assert stack.experts == 4 and stack.hidden == 64


DBRX: dict[str, Any] = {
    "d_model": 64,
    "n_heads": 2,
    "n_layers": 1,
    "vocab_size": 64,
    "attn_config": {"rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("model_type", "more", "cls"),
    [("dbrx", DBRX, "DbrxExpertGLU"), ("jetmoe", {}, "JetMoeParallelExperts")],
)
def test_families_that_are_refused_by_name(model_type: str, more: dict[str, Any], cls: str) -> None:
    found = detect(meta(model_type, **more))
    assert found.stacks == () and {r.cls for r in found.refused} == {cls}


def test_a_model_without_experts() -> None:
    found = detect(meta("llama"))
    assert (found.stacks, found.refused, found.fused, found.linears) == ((), (), (), 0)


# Modules of nobody's making: what shapes alone can tell.


class Holder(torch.nn.Module):
    """A model of one module under ``mlp.experts``."""

    def __init__(self, inner: torch.nn.Module, hidden: int = 64) -> None:
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.experts = inner
        text = SimpleNamespace(hidden_size=hidden)
        self.config = SimpleNamespace(model_type="mine", get_text_config=lambda: text)


class Stack(torch.nn.Module):
    """Stacked parameters, an expert count, and nothing else: no act_fn, no flags."""

    def __init__(self, count: int | None = 4, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        if count is not None:
            self.num_experts = count
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, device="meta")))


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        ({"gate_up_proj": (4, 96, 64), "down_proj": (4, 64, 48)}, (True, False)),
        ({"gate_up_proj": (4, 64, 96), "down_proj": (4, 48, 64)}, (True, True)),
        ({"up_proj": (4, 48, 64), "down_proj": (4, 64, 48)}, (False, False)),
        ({"up_proj": (4, 64, 48), "down_proj": (4, 48, 64)}, (False, True)),
    ],
)
def test_shapes_that_admit_one_reading(
    shapes: dict[str, tuple[int, ...]], layout: tuple[bool, bool]
) -> None:
    with_act = Stack(**shapes)
    with_act.act_fn = torch.nn.SiLU()
    for module in (Stack(**shapes), with_act):
        (stack,) = detect(Holder(module)).stacks
        assert (stack.gated, stack.transposed, stack.hidden, stack.intermediate, stack.by) == (
            *layout,
            64,
            48,
            "shapes",
        )


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Stack(gate_up_proj=(4, 64, 64), down_proj=(4, 64, 64)), "fit no known layout"),
        (Stack(up_proj=(4, 64, 64), down_proj=(4, 64, 64)), "are ambiguous"),
        (Stack(gate_up_proj=(4, 96, 60), down_proj=(4, 64, 48)), "fit no known layout"),
        (
            Stack(None, gate_up_proj=(4, 96, 64), down_proj=(4, 64, 48)),
            "without a matching expert count",
        ),
        (
            Stack(8, gate_up_proj=(4, 96, 64), down_proj=(4, 64, 48)),
            "without a matching expert count",
        ),
        (
            Stack(w13=(4, 96, 64), w2=(4, 64, 48)),
            r"the layout of w13 \[4, 96, 64\], w2 \[4, 64, 48\]",
        ),
    ],
)
def test_what_shapes_cannot_tell_is_refused(module: torch.nn.Module, said: str) -> None:
    found = detect(Holder(module))
    assert found.stacks == () and len(found.refused) == 1
    assert found.refused[0].path == "mlp.experts"
    assert re.search(said, found.refused[0].reason)


def test_an_ambiguous_square_of_hidden_and_twice_intermediate() -> None:
    """2 * intermediate = hidden: gate_up is square, and only down tells the axes apart."""
    (stack,) = detect(Holder(Stack(gate_up_proj=(4, 64, 64), down_proj=(4, 64, 32)))).stacks
    assert not stack.transposed and stack.intermediate == 32
    (stack,) = detect(Holder(Stack(gate_up_proj=(4, 64, 64), down_proj=(4, 32, 64)))).stacks
    assert stack.transposed and stack.intermediate == 32


def test_three_dimensions_that_are_no_experts() -> None:
    model = Holder(torch.nn.Conv1d(4, 4, 3, device="meta"))
    model.mlp.convolution = model.mlp.experts
    del model.mlp.experts
    model.slopes = Stack(slope_rate=(4, 1, 1))
    assert detect(model) == detect(model) and detect(model).refused == ()


def test_flags_that_its_shapes_contradict() -> None:
    module = Stack(gate_up_proj=(4, 96, 64), down_proj=(4, 64, 48))
    for flag, value in {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": True,
        "is_concatenated": True,
    }.items():
        setattr(module, flag, value)
    (refused,) = detect(Holder(module)).refused
    assert "its shapes contradict its flags (transposed True)" in refused.reason


# Configs, the command, and readers of other packages.


def test_the_real_minimax_m3_takes_no_memory(shared_data: Path) -> None:
    raw = json.loads((shared_data / "configs" / "nvidia--MiniMax-M3-NVFP4_config.json").read_text())
    found = detect_config(shared_data / "configs" / "nvidia--MiniMax-M3-NVFP4_config.json")
    assert raw["architectures"] == ["MiniMaxM3SparseForConditionalGeneration"]
    assert (len(found.stacks), found.linears, len(found.fused), found.refused) == (
        57,
        21_888,
        60,
        (),
    )


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (None, UsageError, "no config.json"),
        ("{", ContentError, "not JSON"),
        ("[]", ContentError, "not a JSON object"),
        ('{"model_type": "nobodys"}', ContentError, "does not know the model_type"),
        ('{"model_type": ["x"]}', ContentError, "does not know the model_type"),
        (
            '{"model_type": "mixtral", "hidden_size": "wide"}',
            ContentError,
            "cannot read config.json",
        ),
    ],
)
def test_configs_that_are_wrong(
    text: str | None, error: type[Exception], said: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=said):
        detect_config(tmp_path)


def test_the_command_counts_what_recipes_would_take(
    kit, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["detect", str(kit.qwen)]) == 0
    text = capsys.readouterr().out
    assert "qwen3_moe: 48 linear layers of routed experts in 2 layers" in text
    assert (
        "nvfp4_experts_only        48 linear layers" in text
        and "nvfp4_default             56 linear layers" in text
    )
    alone = tmp_path / "config.json"
    alone.write_text((kit.qwen / "config.json").read_text())
    assert run(["detect", str(alone)]) == 0
    assert capsys.readouterr().out == text
    assert run(["detect", str(kit.llama)]) == 0
    assert "nothing matches routed_expert" in capsys.readouterr().out


PLUGIN = """
from exporter.detect import ExpertStack, register

@register("DbrxExpertGLU")
def mine(path, module):
    rows, hidden = module.w1.shape
    return ExpertStack(
        path, "DbrxExpertGLU", 4, "w1", "w2", hidden, rows // 4, True, False, False, False, "plugin"
    )
"""


def test_a_reader_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.detect.registry.READERS", READERS)
    before = dict(READERS)
    meta_config = transformers.AutoConfig.for_model("dbrx", **DBRX)
    meta_config.save_pretrained(tmp_path)
    file = tmp_path / "mine.py"
    try:
        assert run(["detect", str(tmp_path)]) == 1
        assert "DbrxExpertGLU): its experts are rows" in capsys.readouterr().out
        file.write_text(PLUGIN)
        assert run(["detect", str(tmp_path), "--plugin", str(file)]) == 2
        assert "DbrxExpertGLU is registered twice" in capsys.readouterr().err
        del READERS["DbrxExpertGLU"]
        assert run(["detect", str(tmp_path), "--plugin", str(file)]) == 0
        assert "12 linear layers of routed experts in 1 layer" in capsys.readouterr().out
        file.write_text("1 / 0")
        assert run(["detect", str(tmp_path), "--plugin", str(file)]) == 2
        assert "mine.py: ZeroDivisionError: division by zero" in capsys.readouterr().err
    finally:
        READERS.clear()
        READERS.update(before)
    with pytest.raises(UsageError, match="registered twice"):
        register("DbrxExpertGLU")(READERS["DbrxExpertGLU"])
