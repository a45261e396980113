# SPDX-License-Identifier: Apache-2.0
"""Stacks of experts read as single linear layers: every sibling cut along its own axes, and tensors
without a meaning left as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import verifier
from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.layouts.expert_stacks import (
    UnstackedCheckpoint,
    expanded,
    restacked,
    split_shapes,
    unstacked,
)
from verifier.schemes import gather, read_declarations

E, H, F = 3, 32, 48
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
NAMES = {
    np.dtype(np.uint8): "U8",
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}
GPT, LLAMA, GRANITE = (
    "model.layers.0.mlp.experts",
    "model.layers.0.feed_forward.experts",
    "model.layers.0.block_sparse_moe",
)


def folder(path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Checkpoint:
    path.mkdir()
    header: dict[str, Any] = {}
    offset = 0
    for name, value in tensors.items():
        places = [offset, offset + value.nbytes]
        header[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": places,
        }
        offset += value.nbytes
    raw = json.dumps(header).encode()
    blob = b"".join(v.tobytes() for v in tensors.values())
    (path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + blob)
    (path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(path)


def some(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    values = np.random.default_rng(sum(shape)).integers(1, 120, shape)
    return values.astype(dtype)


def arrays(found: Checkpoint) -> dict[str, np.ndarray]:
    return {n: found.array(t) for n, t in found.tensors.items()}


def test_every_sibling_of_a_transposed_and_interleaved_stack(tmp_path: Path) -> None:
    stack = {
        "gate_up_proj": some(E, H // 2, 2 * F),
        "gate_up_proj_weight_scale": some(E, H // 16, 2 * F, dtype=E4M3),
        "gate_up_proj_weight_scale_2": np.float32(0.5).reshape(()),
        "gate_up_proj_input_scale": some(E, dtype=np.float32),
        "gate_up_proj_bias": some(E, 2 * F, dtype=BF16),
        "down_proj": some(E, F // 2, H),
        "down_proj_bias": some(E, H, dtype=BF16),
    }
    tensors = {f"{GPT}.{n}": v for n, v in stack.items()} | {
        "model.norm.weight": some(H, dtype=BF16)
    }
    raw = folder(tmp_path / "a", tensors, {"model_type": "gpt_oss"})
    view = unstacked(raw)
    found = arrays(view)
    assert isinstance(view, UnstackedCheckpoint) and view.nbytes == raw.nbytes
    assert len(found) == E * (2 * 5 + 2) + 1
    for e in range(E):
        for k, leaf in enumerate(("gate_proj", "up_proj")):
            head = f"{GPT}.{e}.{leaf}"
            for name, key in (
                ("weight", "gate_up_proj"),
                ("weight_scale", "gate_up_proj_weight_scale"),
            ):
                assert np.array_equal(found[f"{head}.{name}"], stack[key][e][:, k::2].T), name
            assert np.array_equal(found[f"{head}.bias"], stack["gate_up_proj_bias"][e, k::2])
            assert (
                found[f"{head}.weight_scale_2"] == 0.5
                and found[f"{head}.weight_scale_2"].shape == ()
            )
            assert found[f"{head}.input_scale"] == stack["gate_up_proj_input_scale"][e]
        assert np.array_equal(found[f"{GPT}.{e}.down_proj.weight"], stack["down_proj"][e].T)
        assert np.array_equal(found[f"{GPT}.{e}.down_proj.bias"], stack["down_proj_bias"][e])
    module = gather(view.tensors.values())[f"{GPT}.1.up_proj"]
    assert (
        module.dims == (F, H)
        and module.inferred_format is not None
        and module.inferred_format.algo == "NVFP4"
    )
    for name, tensor in view.tensors.items():  # in pieces as rules read them
        chunks = b"".join(p.tobytes() for _, p in view.pieces(tensor, 64))
        assert (
            chunks == found[name].tobytes() == view.read_range(tensor, 0, tensor.nbytes).tobytes()
        )


def test_mxfp4_stacks_are_not_transposed(tmp_path: Path) -> None:
    blocks, scales = some(E, 2 * F, H // 32, 16), some(E, 2 * F, H // 32)
    down, more = some(E, H, 64 // 32, 16), some(E, H, 64 // 32)
    names = {"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales}
    names |= {"down_proj_blocks": down, "down_proj_scales": more}
    short = folder(
        tmp_path / "short", {f"{GPT}.{n}": v for n, v in names.items()}, {"model_type": "gpt_oss"}
    )
    assert unstacked(short) is not short  # one expert at a time, so that rules can compare shapes
    b, s = some(E, 128, 1, 16), some(E, 128, 1)
    names |= {"gate_up_proj_blocks": b, "gate_up_proj_scales": s}
    view = unstacked(
        folder(
            tmp_path / "a", {f"{GPT}.{n}": v for n, v in names.items()}, {"model_type": "gpt_oss"}
        )
    )
    found = arrays(view)
    assert np.array_equal(found[f"{GPT}.2.up_proj.weight_blocks"], b[2, 1::2])
    assert np.array_equal(found[f"{GPT}.2.gate_proj.weight_scales"], s[2, 0::2])
    shown = gather(view.tensors.values())[f"{GPT}.2.down_proj"].inferred_format
    assert shown is not None and shown.algo == "MXFP4"


def test_what_is_one_stretch_of_its_file_is_read_there(tmp_path: Path) -> None:
    names = {
        "input_linear.weight": some(E, 2 * F, H, dtype=BF16),
        "output_linear.weight": some(E, H, F, dtype=BF16),
    }
    raw = folder(
        tmp_path / "a",
        {f"{GRANITE}.{n}": v for n, v in names.items()},
        {"model_type": "granitemoe"},
    )
    view = unstacked(raw)
    whole = raw.tensors[f"{GRANITE}.input_linear.weight"]
    part = view.tensors[f"{GRANITE}.experts.1.w3.weight"]
    assert part.offset == whole.offset + 2 * 3 * F * H and part.file == whole.file
    assert np.array_equal(view.array(part), names["input_linear.weight"][1, F:])


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen3_moe"},
        {f"{LLAMA}.gate_up_proj": (E, 2 * F, H)},  # not transposed
        {f"{LLAMA}.down_proj": (E, F + 1, H)},
        {f"{LLAMA}.down_proj": (E + 1, F, H)},
        {f"{LLAMA}.down_proj": (F, H)},
        {f"{LLAMA}.gate_up_proj": (0, H, 0), f"{LLAMA}.down_proj": (0, 0, H)},
        {f"{LLAMA}.gate_up_proj": (20_000, H, 0), f"{LLAMA}.down_proj": (20_000, 0, H)},
    ],
    ids=["family", "axes", "inner", "experts", "rank", "none", "many"],
)
def test_what_its_family_does_not_have_stays_as_it_is(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    shapes = {f"{LLAMA}.gate_up_proj": (E, H, 2 * F), f"{LLAMA}.down_proj": (E, F, H)}
    shapes |= {k: v for k, v in change.items() if k != "model_type"}
    config = {"model_type": change.get("model_type", "llama4_text")}
    raw = folder(
        tmp_path / "a", {n: np.zeros(s, ml_dtypes.bfloat16) for n, s in shapes.items()}, config
    )
    assert unstacked(raw) is raw
    assert verifier.check(tmp_path / "a").verdict in ("inconclusive", "failed")


def test_a_sibling_without_a_meaning_stays_beside_the_experts(tmp_path: Path) -> None:
    names = {"gate_up_proj": some(E, H, 2 * F, dtype=BF16), "down_proj": some(E, F, H, dtype=BF16)}
    names["down_proj_weight_scale"] = some(E + 2, 5)
    view = unstacked(
        folder(
            tmp_path / "a", {f"{LLAMA}.{n}": v for n, v in names.items()}, {"model_type": "llama4"}
        )
    )
    assert (
        f"{LLAMA}.down_proj_weight_scale" in view.tensors
        and f"{LLAMA}.0.up_proj.weight" in view.tensors
    )


def test_shapes_that_a_layout_expects() -> None:
    expected = {
        f"{GPT}.gate_up_proj": (E, H, 2 * F),
        f"{GPT}.gate_up_proj_bias": (E, 2 * F),
        f"{GPT}.down_proj": None,
        "model.norm.weight": (H,),
    }
    found = split_shapes(expected, {"model_type": "gpt_oss"})
    assert found[f"{GPT}.2.gate_proj.weight"] == (F, H) and found[f"{GPT}.0.up_proj.bias"] == (F,)
    assert len(found) == 4 * E + 1 and "model.norm.weight" in found
    assert split_shapes(expected, {"model_type": "llama"}) == expected
    granite = split_shapes(
        {f"{GRANITE}.input_linear.weight": (E, 2 * F, H)}, {"model_type": "granitemoe"}
    )
    assert set(granite.values()) == {(F, H)} and f"{GRANITE}.experts.0.w3.weight" in granite


def test_what_a_declaration_says_of_a_stack_it_says_of_its_linears(tmp_path: Path) -> None:
    names = {
        f"{LLAMA}.gate_up_proj": some(E, H // 2, 2 * F),
        f"{LLAMA}.down_proj": some(E, F, H, dtype=BF16),
    }
    said = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "ignore": [f"{LLAMA}.down_proj", "lm_head"],
        "quantized_layers": {f"{LLAMA}.gate_up_proj": {"quant_algo": "NVFP4", "group_size": 16}},
    }
    view = unstacked(
        folder(tmp_path / "a", names, {"model_type": "llama4_text", "quantization_config": said})
    )
    found = expanded(read_declarations(view).inline, view)
    assert found is not None and set(found.layers) == {
        f"{LLAMA}.{e}.{p}_proj" for e in range(E) for p in ("gate", "up")
    }
    assert found.exclude == (*(f"{LLAMA}.{e}.down_proj" for e in range(E)), "lm_head")


def test_only_whole_stacks_are_restacked() -> None:
    names = [f"{GPT}.{e}.{p}_proj.weight" for e in range(E) for p in ("gate", "up", "down")]
    config = {"model_type": "gpt_oss"}
    found = {
        s.name: s
        for s in restacked([*names, f"{GPT}.x.up_proj.weight", "model.norm.weight"], config)
    }
    assert set(found) == {f"{GPT}.gate_up_proj", f"{GPT}.down_proj"}
    both = found[f"{GPT}.gate_up_proj"]
    assert both.leaf == "weight" and both.projections == ("gate_proj", "up_proj")
    assert both.parts == tuple(n for n in names if "down" not in n)
    assert [s.name for s in restacked(names[:-1], config)] == [f"{GPT}.gate_up_proj"]
    far = [f"{GPT}.9999999.{p}_proj.weight" for p in ("gate", "up", "down")]
    assert restacked(far, config) == [] == restacked(names, {"model_type": "qwen3_moe"})


def test_one_scale_per_expert_goes_to_each_of_its_projections(tmp_path: Path) -> None:
    tensors = {
        f"{GRANITE}.input_linear.weight": some(E, 2 * F, H, dtype=E4M3),
        f"{GRANITE}.input_linear.weight_scale": some(E, 1, 1, dtype=np.float32),
        f"{GRANITE}.output_linear.weight": some(E, H, F, dtype=E4M3),
        f"{GRANITE}.output_linear.weight_scale": some(E, 1, 1, dtype=np.float32),
    }
    view = unstacked(folder(tmp_path / "a", tensors, {"model_type": "granitemoe"}))
    found = arrays(view)
    scale = tensors[f"{GRANITE}.input_linear.weight_scale"]
    for e in range(E):
        for leaf in ("w1", "w3"):
            assert found[f"{GRANITE}.experts.{e}.{leaf}.weight_scale"] == scale[e]
