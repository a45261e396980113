# SPDX-License-Identifier: Apache-2.0
"""Layouts: every operation and sibling there and back, blocks cut at their seams, and whole
families.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from exporter import codecs
from exporter.layout import Layout, hf_mapping
from exporter.layout.grids import (
    Grid,
    apply_ops,
    concatenate,
    deinterleave,
    interleave,
    split,
    stack,
    transpose,
    whole,
)
from exporter.layout.grids import Op as Operation
from exporter.layout.hf_mapping import of_model
from tests import sparse
from tests.layouts import to_hub, to_memory
from verifier.errors import UnsupportedConversion

E, F, H = 4, 128, 64


def layout(memory: Mapping[str, Grid], transposed: frozenset[str] = frozenset()) -> Layout:
    """Return a layout whose hub shapes are those that the pieces cover."""
    shapes: dict[str, list[int]] = {}
    for grid in memory.values():
        for p in grid.regions:
            ends = shapes.setdefault(p.hub, [0] * len([a for a in p.axes if a.hub is not None]))
            for a in p.axes:
                if a.hub is not None:
                    ends[a.hub] = max(ends[a.hub], a.hub_start + (a.length - 1) * a.hub_step + 1)
    return Layout("a family", memory, {n: tuple(s) for n, s in shapes.items()}, transposed).prove()


def hub(expert: int, leaf: str) -> str:
    return f"moe.experts.{expert}.{leaf}.weight"


def gates(shape: tuple[int, ...] = (F, H)) -> Grid:
    return concatenate(
        [stack([whole(hub(e, w), shape) for e in range(E)], 0) for w in ("w1", "w3")], 1
    )


def experts() -> Layout:
    """Return gate and up fused and stacked, down stacked: [E, 2I, H] and [E, H, F]."""
    down = stack([whole(hub(e, "w2"), (H, F)) for e in range(E)], 0)
    return layout({"mlp.experts.gate_up_proj": gates(), "mlp.experts.down_proj": down})


def dense() -> Layout:
    halves = [whole(f"mlp.{n}_proj.weight", (F, H)) for n in ("gate", "up")]
    return layout({"mlp.gate_up_proj.weight": concatenate(halves, 0)})


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names, dtypes, shapes and bytes."""

    def raw(t: torch.Tensor) -> tuple[Any, ...]:
        return t.dtype, tuple(t.shape), bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy())

    return {n: raw(t) for n, t in a.items()} == {n: raw(t) for n, t in b.items()}


# operations


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (lambda x, y: stack([x, y], 0), lambda x, y: torch.stack([x, y])),
        (lambda x, y: stack([x, y], 1), lambda x, y: torch.stack([x, y], 1)),
        (lambda x, y: concatenate([x, y], 0), lambda x, y: torch.cat([x, y])),
        (lambda x, y: concatenate([x, y], 1), lambda x, y: torch.cat([x, y], 1)),
        (lambda x, y: transpose(concatenate([x, y], 0), 0, 1), lambda x, y: torch.cat([x, y]).T),
        (
            lambda x, y: interleave(concatenate([x, y], 0), 0),
            lambda x, y: torch.cat([x, y]).view(2, 4, 6).transpose(0, 1).reshape(8, 6),
        ),
        (
            lambda x, y: deinterleave(concatenate([x, y], 0), 0),
            lambda x, y: torch.cat([x, y]).view(4, 2, 6).transpose(0, 1).reshape(8, 6),
        ),
        (
            lambda x, y: deinterleave(interleave(concatenate([x, y], 1), 1), 1),
            lambda x, y: torch.cat([x, y], 1),
        ),
    ],
    ids=[
        "stack",
        "stack-1",
        "cat",
        "cat-1",
        "transpose",
        "interleave",
        "deinterleave",
        "there-and-back",
    ],
)
def test_an_operation_on_shapes_is_the_operation_on_values(made: Any, wanted: Any) -> None:
    values = torch.arange(48.0).view(2, 4, 6)
    x, y = values
    found = layout({"m": made(whole("x", (4, 6)), whole("y", (4, 6)))})
    memory = {"m": wanted(x, y).contiguous()}
    assert same(to_memory(found, {"x": x, "y": y}), memory)
    assert same(to_hub(found, memory), {"x": x, "y": y})


def test_rotary_pairs_are_brought_to_halves_within_each_head() -> None:
    """As Llama's checkpoints were converted: [heads, pairs, 2] to [heads, 2, pairs]."""
    values = torch.arange(72.0).view(24, 3)
    wanted = values.view(3, 4, 2, 3).transpose(1, 2).reshape(24, 3)
    for kind, before, after in (("rotary", values, wanted), ("unrotary", wanted, values)):
        (grid,) = apply_ops([Operation(kind, 0, sizes=(3,))], [[whole("q", (24, 3))]], 1)
        assert same(to_memory(layout({"q_proj": grid}), {"q": before}), {"q_proj": after})
    chosen = apply_ops(
        [Operation("chunk", 0), Operation("rotary", 0, sizes=(2,), only=(0,))],
        [[whole("qv", (16, 3))]],
        2,
    )
    memory = to_memory(layout(dict(zip("qv", chosen, strict=True))), {"qv": values[:16]})
    assert torch.equal(memory["v"], values[8:16])
    assert torch.equal(memory["q"], values[:8].view(2, 2, 2, 3).transpose(1, 2).reshape(8, 3))
    with pytest.raises(ValueError, match="24 rows do not divide into the halves of 5 heads"):
        apply_ops([Operation("rotary", 0, sizes=(5,))], [[whole("q", (24, 3))]], 1)


def test_a_list_of_experts_that_two_stacks_share() -> None:
    """Ernie-VL: the first half of the list are the experts for text, the second those for images,
    which are smaller.
    """
    shapes = [(6, 4), (6, 4), (2, 4), (2, 4)]
    hub_values = {f"{w}.{e}": torch.randn(s) for w in ("gate", "up") for e, s in enumerate(shapes)}
    groups = [[whole(f"{w}.{e}", s) for e, s in enumerate(shapes)] for w in ("gate", "up")]
    text, vision = apply_ops([Operation("share", 0, 1)], groups, 2)
    found = layout({"text": text, "vision": vision})
    memory = to_memory(found, hub_values)
    for name, experts in (("text", (0, 1)), ("vision", (2, 3))):
        rows = [torch.cat([hub_values[f"{w}.{e}"] for w in ("gate", "up")]) for e in experts]
        assert torch.equal(memory[name], torch.stack(rows))
    assert same(to_hub(found, memory), hub_values)


def test_a_fused_hub_tensor_is_cut_for_memory_and_joined_again() -> None:
    parts = split(whole("qkv", (12, 6)), 0, [8, 2, 2])
    found = layout(dict(zip(("q", "k", "v"), parts, strict=True)))
    fused = torch.arange(72.0).view(12, 6)
    memory = to_memory(found, {"qkv": fused})
    assert same(memory, {"q": fused[:8], "k": fused[8:10], "v": fused[10:]})
    assert same(to_hub(found, memory), {"qkv": fused})
    with pytest.raises(UnsupportedConversion, match="qkv: element count"):
        to_hub(found, {n: t for n, t in memory.items() if n != "k"})


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide into 5 parts"):
        apply_ops([Operation("chunk", 0)], [[whole("x", (12, 6))]], 5)
    with pytest.raises(ValueError, match="does not divide into"):
        apply_ops([Operation("split", 0, sizes=(8, 3))], [[whole("x", (12, 6))]], 2)
    assert [
        g.shape
        for g in apply_ops([Operation("split", 0, sizes=(8, 4))], [[whole("x", (12, 6))]], 2)
    ] == [(8, 6), (4, 6)]
    assert [
        g.shape for g in apply_ops([Operation("unstack", 0)], [[whole("x", (3, 4, 6))]], 1)
    ] == [(4, 6)] * 3
    with pytest.raises(ValueError, match="does not divide into halves"):
        interleave(whole("x", (3, 6)), 0)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (Grid((8, 6), whole("x", (4, 6)).regions * 2), "overlap in memory"),
        (Grid((9, 6), whole("x", (8, 6)).regions), "element count"),
        (Grid((4, 6), whole("x", (8, 3)).regions), "bounds"),
    ],
)
def test_a_layout_is_a_bijection_or_none(grid: Grid, said: str) -> None:
    with pytest.raises(UnsupportedConversion, match=said):
        Layout("f", {"m": grid}, {"x": (8, 6)}).prove()


def test_two_tensors_of_one_hub_name() -> None:
    both = Layout("f", {"a": whole("x", (4, 6)), "b": whole("x", (4, 6))}, {"x": (4, 6)})
    with pytest.raises(UnsupportedConversion, match=r"x: element count \(f\)"):
        both.prove()
    with pytest.raises(UnsupportedConversion, match="x: rename"):
        to_hub(both, {"a": torch.zeros(4, 6), "b": torch.zeros(4, 6)})


def test_no_name_is_made_up() -> None:
    with pytest.raises(
        UnsupportedConversion, match=r"mlp\.experts\.gate_proj: rename \(a family\)"
    ):
        to_hub(experts(), {"mlp.experts.gate_proj": torch.zeros(E, F, H)})
    with pytest.raises(UnsupportedConversion, match="the hub layout has no such tensor"):
        to_memory(experts(), {"moe.experts.0.gate_proj.weight": torch.zeros(F, H)})


# siblings


FORMATS = ["nvfp4", "mxfp8", "fp8_per_channel", "fp8"]


def spelled(
    name: str, parts: Mapping[str, torch.Tensor], joint: str = "."
) -> dict[str, torch.Tensor]:
    head = name.removesuffix(".weight")
    return {name if leaf == "weight" else f"{head}{joint}{leaf}": t for leaf, t in parts.items()}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("joint", [".", "_"])
def test_quantize_then_unstack_is_unstack_then_quantize(fmt: str, joint: str) -> None:
    torch.manual_seed(1)
    stacked = torch.randn(E, 2 * F, H, dtype=torch.bfloat16)
    name, found = "mlp.experts.gate_up_proj", experts()
    amax = codecs.amax(stacked, fmt)
    shared = {"amax": amax} if fmt in ("nvfp4", "fp8") else {}
    before = to_hub(found, spelled(name, codecs.encode(stacked, fmt, **shared), joint))
    after: dict[str, torch.Tensor] = {}
    for plain, value in to_hub(found, {name: stacked}).items():
        expert = int(plain.split(".")[2])
        one = {"amax": amax[expert]} if shared else {}
        after |= spelled(plain, codecs.encode(value, fmt, **one))
    assert len(after) == 2 * E * len(codecs.encode(stacked[0], fmt))
    assert same(before, after)
    assert same(to_memory(found, before), spelled(name, codecs.encode(stacked, fmt, **shared), "."))


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantize_then_unfuse_is_unfuse_then_quantize(fmt: str) -> None:
    torch.manual_seed(2)
    fused, found = torch.randn(2 * F, H), dense()
    shared = {"amax": codecs.amax(fused, fmt)} if fmt in ("nvfp4", "fp8") else {}
    parts = codecs.encode(fused, fmt, **shared)
    before = to_hub(found, spelled("mlp.gate_up_proj.weight", parts))
    after: dict[str, torch.Tensor] = {}
    for plain, value in to_hub(found, {"mlp.gate_up_proj.weight": fused}).items():
        after |= spelled(plain, codecs.encode(value, fmt, **shared))
    assert same(before, after)
    assert same(to_memory(found, before), spelled("mlp.gate_up_proj.weight", parts))


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_quantize_then_deinterleave_and_untranspose(fmt: str) -> None:
    """The layout of gpt-oss in memory, against a hub that keeps each expert's projections as [out,
    in].
    """
    torch.manual_seed(3)
    stored = stack(
        [
            interleave(concatenate([whole(hub(e, w), (F, H)) for w in ("w1", "w3")], 0), 0)
            for e in range(E)
        ],
        0,
    )
    name = "mlp.experts.gate_up_proj"
    found = layout({name: transpose(stored, 1, 2)}, frozenset({name}))
    memory = torch.randn(E, H, 2 * F)
    amax = codecs.amax(memory.transpose(1, 2), fmt)
    shared = {"amax": amax} if fmt == "nvfp4" else {}
    encoded = codecs.encode(memory.transpose(1, 2), fmt, **shared)
    quantized = {
        n: t.transpose(1, 2).contiguous() if t.ndim == 3 else t for n, t in encoded.items()
    }
    before = to_hub(found, spelled(name, quantized))
    after: dict[str, torch.Tensor] = {}
    for expert in range(E):
        for first, w in ((0, "w1"), (1, "w3")):
            one = {"amax": amax[expert]} if shared else {}
            plain = memory[expert, :, first::2].T
            after |= spelled(hub(expert, w), codecs.encode(plain, fmt, **one))
    assert same(before, after)
    assert same(to_memory(found, before), spelled(name, quantized))


def test_128_by_128_blocks_are_cut_on_128_only() -> None:
    fused = torch.randn(2 * F, H)
    assert (
        len(to_hub(dense(), spelled("mlp.gate_up_proj.weight", codecs.encode(fused, "fp8_block"))))
        == 4
    )
    odd = layout(
        {
            "g.gate_up_proj.weight": concatenate(
                [whole(f"g.{n}.weight", (192, H)) for n in ("a", "b")], 0
            )
        }
    )
    parts = spelled("g.gate_up_proj.weight", codecs.encode(torch.randn(384, H), "fp8_block"))
    with pytest.raises(UnsupportedConversion, match="seam on out is at 192, inside a block of 128"):
        to_hub(odd, parts)


def test_each_sibling_goes_where_its_axes_say() -> None:
    memory = {
        "mlp.experts.gate_up_proj": torch.randn(E, 2 * F, H),
        "mlp.experts.gate_up_proj_bias": torch.randn(E, 2 * F),
        "mlp.experts.gate_up_proj.pre_quant_scale": torch.randn(H),
        "mlp.experts.gate_up_proj.input_scale": torch.tensor(0.5),
        "mlp.experts.gate_up_proj.weight_scale_2": torch.rand(E),
        "mlp.experts.down_proj.pre_quant_scale": torch.randn(E, F),
        "mlp.experts.down_proj.weight_scale_inv": torch.rand(E, H, F // 32),
    }
    found = to_hub(experts(), memory)
    for e in range(E):
        for w, rows in (("w1", slice(0, F)), ("w3", slice(F, 2 * F))):
            head = f"moe.experts.{e}.{w}"
            assert torch.equal(
                found[f"{head}.bias"], memory["mlp.experts.gate_up_proj_bias"][e, rows]
            )
            assert torch.equal(
                found[f"{head}.pre_quant_scale"], memory["mlp.experts.gate_up_proj.pre_quant_scale"]
            )
            assert found[f"{head}.input_scale"].item() == 0.5
            assert torch.equal(
                found[f"{head}.weight_scale_2"],
                memory["mlp.experts.gate_up_proj.weight_scale_2"][e],
            )
        assert torch.equal(
            found[f"moe.experts.{e}.w2.pre_quant_scale"],
            memory["mlp.experts.down_proj.pre_quant_scale"][e],
        )
        scale = memory["mlp.experts.down_proj.weight_scale_inv"][e]
        assert torch.equal(found[f"moe.experts.{e}.w2.weight_scale_inv"], scale)
    assert len(found) == 2 * E * 5 + 2 * E
    storages = [t.untyped_storage().data_ptr() for t in found.values()]
    assert len(set(storages)) == len(storages), "a copied scalar shares its storage"
    again = to_memory(
        experts(),
        {n: t for n, t in found.items() if not n.endswith(("input_scale", "pre_quant_scale"))},
    )
    alike = {
        n.replace("proj_bias", "proj.bias"): t
        for n, t in memory.items()
        if "input" not in n and "pre_q" not in n
    }
    assert same(again, alike)


def test_parts_that_do_not_agree_are_not_joined() -> None:
    fused = {"weight": torch.zeros(2 * F, H), "weight_scale_2": torch.tensor(1.0)}
    found = to_hub(dense(), {f"mlp.gate_up_proj.{leaf}": t for leaf, t in fused.items()})
    assert set(found) == {
        f"mlp.{n}_proj.{leaf}" for n in ("gate", "up") for leaf in ("weight", "weight_scale_2")
    }
    found["mlp.up_proj.weight_scale_2"] = torch.tensor(2.0)
    with pytest.raises(UnsupportedConversion, match=r"mlp\.gate_up_proj\.weight_scale_2: join"):
        to_memory(dense(), found)
    del found["mlp.up_proj.weight"], found["mlp.up_proj.weight_scale_2"]
    with pytest.raises(UnsupportedConversion, match="1 of its 2 parts are here"):
        to_memory(dense(), found)


def test_kv_scales_stay_with_their_own_projection() -> None:
    sizes = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    found = layout(
        {
            "attn.qkv.weight": concatenate(
                [whole(f"attn.{n}.weight", (s, H)) for n, s in sizes.items()], 0
            )
        }
    )
    memory = {"attn.qkv.weight": torch.zeros(128, H), "attn.qkv.k_scale": torch.tensor(3.0)}
    assert {n for n in to_hub(found, memory) if "scale" in n} == {"attn.k_proj.k_scale"}
    with pytest.raises(UnsupportedConversion, match="none of its parts is called k_proj"):
        to_hub(dense(), {"mlp.gate_up_proj.k_scale": torch.tensor(1.0)})


def test_a_scale_whose_shape_means_nothing_is_refused() -> None:
    with pytest.raises(
        UnsupportedConversion, match=r"mlp.experts.gate_up_proj.weight_scale: axes.*\[3, 5\]"
    ):
        to_hub(experts(), {"mlp.experts.gate_up_proj.weight_scale": torch.zeros(3, 5)})


# whole families


TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
SIGHT = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": TEXT,
    "mixtral": TEXT,
    "qwen2_moe": TEXT,
    "qwen3_moe": TEXT,
    "deepseek_v3": TEXT | LATENT,
    "glm4_moe": TEXT,
    "minimax_m2": TEXT,
    "phimoe": TEXT,
    "olmoe": TEXT,
    "gpt_oss": TEXT,
    "granitemoe": TEXT,
    "aria_text": TEXT,
    "ernie4_5_moe": TEXT,
    "phi3": TEXT,
    "qwen3_vl_moe": {"text_config": TEXT, "vision_config": SIGHT},
}


def build(family: str, given: Mapping[str, Any]) -> Any:
    """Return a tiny model of a family, BF16, every parameter and buffer with values of its own."""
    config = transformers.AutoConfig.for_model(family, **given)
    text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    classes = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if text
        else transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )
    torch.manual_seed(0)
    model = classes[type(config)](config).to(torch.bfloat16)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) * 0.02)
    return model


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_named_as_transformers_saves_it(family: str, tmp_path: Path) -> None:
    model = build(family, FAMILIES[family])
    memory, disk = hf_mapping.saved(model), saved(model, tmp_path)
    found = of_model(model)
    assert same(to_hub(found, memory), disk)
    assert same(to_memory(found, disk), memory)
    by_source = of_model(model, {n: tuple(t.shape) for n, t in disk.items()})
    assert same(to_hub(by_source, memory), disk)


def test_minimax_m3_with_vision_and_indexer(shared_data: Path, tmp_path: Path) -> None:
    raw = json.loads((shared_data / "modelopt" / "src_m3" / "config.json").read_text())
    model = build(
        "minimax_m3_vl",
        {k: v for k, v in raw.items() if k not in ("model_type", "architectures", "dtype")},
    )
    memory, disk = hf_mapping.saved(model), saved(model, tmp_path)
    found = of_model(model)
    assert same(to_hub(found, memory), disk) and same(to_memory(found, disk), memory)
    fused = next(n for n in memory if n.endswith("layers.0.mlp.gate_up_proj.weight"))
    rows, columns = memory[fused].shape
    scale = to_hub(
        found, {fused.replace("weight", "weight_scale"): torch.zeros(rows, columns // 32)}
    )
    assert {n.rpartition("layers.0.")[2] for n in scale} == {
        "mlp.gate_proj.weight_scale",
        "mlp.up_proj.weight_scale",
    }


def test_the_real_minimax_m3_from_its_config_alone() -> None:
    """428 billion parameters on the meta device: the names and shapes of the vendor's checkpoint,
    its scales apart.
    """
    raw = {k: copy.deepcopy(v) for k, v in sparse.m3_config().items() if k != "architectures"}
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(
            transformers.AutoConfig.for_model(**raw)
        )
    wanted = {
        n: tuple(shape) for n, _, shape in sparse.rows() if not n.endswith("weight_scale_inv")
    }
    assert len(wanted) == 23_416
    assert {n: tuple(shape) for n, shape in of_model(model).hub.items()} == wanted


def test_the_source_index_decides_where_the_mapping_is_no_bijection() -> None:
    """qwen3_vl_moe: the released experts are [E, in, out], and transformers saves [E, out, in]."""
    model = build("qwen3_vl_moe", FAMILIES["qwen3_vl_moe"])
    names = hf_mapping.hub_names(model)
    experts_of = [n for n in names if len(names[n]) == 3 and ".experts." in n]
    released = {n: (s[0], s[2], s[1]) if n in experts_of else s for n, s in names.items()}
    assert experts_of
    memory = hf_mapping.saved(model)
    ours, theirs = to_hub(of_model(model), memory), to_hub(of_model(model, released), memory)
    for name in experts_of:
        assert torch.equal(theirs[name], ours[name].transpose(1, 2))
    assert all(torch.equal(theirs[n], ours[n]) for n in names if n not in experts_of)


def test_a_lost_tensor_and_one_that_has_no_place() -> None:
    model = build("mixtral", TEXT)
    names = hf_mapping.hub_names(model)
    more = of_model(model, names | {"model.mtp.norm.weight": (32,)})
    assert more.outside == ("model.mtp.norm.weight",)
    with pytest.raises(UnsupportedConversion, match=r"gate_up_proj.*mixtral"):
        of_model(model, {n: s for n, s in names.items() if ".w3." not in n})
    with pytest.raises(UnsupportedConversion, match=r"model.norm.weight: rename \(mixtral\)"):
        of_model(model, {n: s for n, s in names.items() if n != "model.norm.weight"})


def test_an_operation_that_is_not_known_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Rotate(ConversionOps):
        def convert(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        @property
        def reverse_op(self) -> ConversionOps:
            return self

    model = build("llama", TEXT)
    names = hf_mapping.hub_names(model)
    rotated = WeightConverter("o_proj.weight", "o_proj.weight", operations=[Rotate()])
    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda _model: [rotated]
    )
    with pytest.raises(
        UnsupportedConversion,
        match=r"model\.layers\.0\.self_attn\.o_proj\.weight: Rotate \(llama\)",
    ):
        of_model(model, names)
