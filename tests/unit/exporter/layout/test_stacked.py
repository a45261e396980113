# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose hub layout holds experts in stacks: exported one by one or as stacks, judged,
and loaded again.

What each expert's weights are is read from transformers' model in memory, as `exporter.detect` says
that it computes with them; neither table of layouts is asked.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

import exporter
import verifier
from exporter import codecs
from exporter.detect import detect
from exporter.recipes import Recipe
from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.cli.main import run
from verifier.errors import EncodeError, PlanError, UnsupportedConversion, UsageError
from verifier.inspect.stats import stats
from verifier.layouts.expert_stacks import stack_layouts
from verifier.load.model import decoded_tensors, load_model

export = partial(exporter.export, engine="none")
export_model = partial(exporter.export_model, engine="none")
E, H, F = 4, 64, 96
TEXT: dict[str, Any] = {
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
SIGHT = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": H,
    "patch_size": 4,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
STEP = TEXT | {
    "n_routed_experts": E,
    "moe_intermediate_size": F,
    "mlp_layer_types": ["sparse"] * 2,
    "sliding_window": 32,
    "layer_types": ["full_attention"] * 2,
    "share_expert_dim": 64,
}
VIEW = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GRANITE = TEXT | {"num_local_experts": E}
CONFIGS: dict[str, dict[str, Any]] = {
    "aria_text": TEXT | {"moe_num_experts": E, "moe_topk": 2},
    "gemma4_text": {k: v for k, v in TEXT.items() if k != "num_experts_per_tok"}
    | {
        "num_experts": E,
        "moe_intermediate_size": F,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "sliding_window": 32,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_oss": TEXT | {"num_local_experts": E},
    "granitemoe": GRANITE,
    "granitemoe_swa": GRANITE
    | {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoeshared": GRANITE | {"shared_intermediate_size": 64},
    "granitemoehybrid": GRANITE
    | {
        "shared_intermediate_size": 64,
        "layers_block_type": ["attention"] * 2,
        "position_embedding_type": "rope",
        "time_step_limit": [0.0, 1.0],
    },
    "llama4_text": TEXT
    | {"num_local_experts": E, "intermediate_size_mlp": F, "moe_layers": [0, 1]},
    "mistral4": TEXT
    | {
        "n_routed_experts": E,
        "moe_intermediate_size": F,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 0,
    },
    "openai_privacy_filter": TEXT | {"num_local_experts": E},
    "qwen3_vl_moe": {
        "text_config": TEXT
        | {"num_experts": E, "num_local_experts": E, "moe_intermediate_size": F},
        "vision_config": SIGHT,
    },
    "step3p7": {"text_config": STEP, "vision_config": VIEW},
}
TRANSPOSED = "qwen3_vl_moe, transposed"


def only(*names: str) -> list[Any]:
    """Return families as parameters, those that this transformers does not have as skips."""
    found = []
    for name in names:
        absent = name.partition(",")[0] not in transformers.CONFIG_MAPPING
        skip = pytest.mark.skipif(
            absent, reason=f"transformers {transformers.__version__} has no {name}"
        )
        found.append(pytest.param(name, marks=skip))
    return found


def families_but(*names: str) -> list[Any]:
    """Return all families but these."""
    return only(*(f for f in (*CONFIGS, TRANSPOSED) if f not in names))


def needs(*names: str) -> pytest.MarkDecorator:
    absent = [n for n in names if n not in transformers.CONFIG_MAPPING]
    return pytest.mark.skipif(
        bool(absent), reason=f"transformers {transformers.__version__} has no {', '.join(absent)}"
    )


EXPERTS = "nvfp4_experts_only"
Linears = dict[tuple[int, int, str], torch.Tensor]


def model_of(family: str) -> Any:
    """Return a tiny model, BF16; the experts' weights are large beside the others, so that logits
    depend on them.
    """
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    maps = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    )
    cls = next(m[type(config)] for m in maps if type(config) in m)
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) * (0.25 if "experts." in name else 0.05))
    return model.eval()


def linears(model: Any) -> Linears:
    """Return each expert's weights [out, in] by layer, expert and projection, as the model computes
    with them.
    """
    found: Linears = {}
    state = model.state_dict()
    for stack in detect(model).stacks:
        layer = int(re.findall(r"layers\.(\d+)\.", stack.path)[-1])
        first, down = (state[f"{stack.path}.{n}"] for n in (stack.first, stack.down))
        for e in range(stack.experts):
            both, last = (t[e].T if stack.transposed else t[e] for t in (first, down))
            gate, up = (both[0::2], both[1::2]) if stack.interleaved else both.chunk(2)
            found |= {(layer, e, "gate"): gate, (layer, e, "up"): up, (layer, e, "down"): last}
    if not found:
        pytest.skip(
            f"transformers {transformers.__version__} has other experts in {type(model).__name__}"
        )
    return found


class Zoo:
    """The models, what they are saved as, and their exports, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, Any] = {}

    def model(self, family: str) -> Any:
        family = family.partition(",")[0]
        if family not in self._models:
            self._models[family] = model_of(family)
        return self._models[family]

    def source(self, family: str) -> Path:
        family = family.partition(",")[0]
        path = self._folder / family
        if not path.exists():
            self.model(family).save_pretrained(path)
        return path

    def export(
        self, kit: Any, family: str, layout: str | None, recipe: str | Recipe = EXPERTS
    ) -> Path:
        name = recipe if isinstance(recipe, str) else recipe.name
        out = self._folder / f"{family}-{layout}-{name}"
        if not out.exists():
            source = transposed(kit, self) if family == TRANSPOSED else self.source(family)
            export(source, out, recipe=recipe, input_scale="one", expert_layout=layout)
        return out


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("stacked"))


def transposed(kit: Any, zoo: Zoo) -> Path:
    """Return qwen3_vl_moe as it is released: experts [E, in, out]; transformers saves [E, out,
    in].
    """
    path = zoo.source("qwen3_vl_moe").with_name(TRANSPOSED)
    if not path.exists():

        def transpose(tensors: dict[str, Any]) -> None:
            for name in [n for n in tensors if ".experts." in n]:
                tensors[name] = kit.raw(
                    np.ascontiguousarray(tensors[name].array().transpose(0, 2, 1))
                )

        kit.edit(zoo.source("qwen3_vl_moe"), path, transpose)
    return path


def source_of(kit: Any, zoo: Zoo, family: str) -> Path:
    return transposed(kit, zoo) if family == TRANSPOSED else zoo.source(family)


PROJECTIONS = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
SINGLE = re.compile(r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.(\w+)$")


def singles(tensors: Mapping[str, Any]) -> dict[tuple[int, int, str, str], Any]:
    """Return the tensors of single experts by layer, expert, projection and leaf."""
    found = {}
    for name, tensor in tensors.items():
        if match := SINGLE.search(name):
            found[int(match[1]), int(match[2]), PROJECTIONS[match[3]], match[4]] = tensor
    return found


def recipe_of(fmt: str) -> Recipe:
    return Recipe.model_validate(
        {"name": fmt, "rules": [{"roles": ["routed_expert"], "format": fmt}]}
    )


def data(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# one by one


@pytest.mark.parametrize("family", families_but())
def test_unstacked_then_quantized_is_what_each_expert_gives_alone(
    kit, zoo: Zoo, family: str
) -> None:
    made = singles(kit.read(zoo.export(kit, family, "per-expert")))
    wanted = linears(zoo.model(family))
    assert len(wanted) == 2 * E * 3
    assert {k[:3] for k in made} == set(wanted)
    for (layer, e, what), weight in wanted.items():
        partner = {"gate": "up", "up": "gate"}.get(what, what)
        amax = torch.maximum(weight.abs().max(), wanted[layer, e, partner].abs().max())
        parts = codecs.encode(weight, "nvfp4", amax=amax)
        for leaf, value in parts.items():
            found = made[layer, e, what, leaf]
            assert (found.data, found.shape) == (data(value), tuple(value.shape)), (
                layer,
                e,
                what,
                leaf,
            )
        assert made[layer, e, what, "input_scale"].array() == 1.0


@pytest.mark.parametrize("family", families_but())
@pytest.mark.parametrize("layout", ["per-expert", "hub"])
def test_both_layouts_pass_the_check(kit, zoo: Zoo, family: str, layout: str) -> None:
    out = zoo.export(kit, family, layout)
    report = verifier.check(out, base=source_of(kit, zoo, family), depth="payload")
    assert report.verdict == "passed", report.findings
    assert {f.severity for f in report.findings} <= {"info"}
    assert report.summary.contents.formats == {"NVFP4": 2 * E * 3}
    covered = {c.rule: (c.checked, c.of) for c in report.coverage}
    assert covered["QC515"] == (24, 24)
    names = {n for n, t in kit.read(out).items() if t.dtype == "U8"}
    assert len(names) == (24 if layout == "per-expert" else 6 if family == "step3p7" else 4)
    manifest = json.loads((out / "ckptgate_manifest.json").read_text())
    assert manifest["notes"]["linears"] == {"NVFP4": [24, 24, 16]}
    assert manifest["options"]["expert_layout"] == layout


@pytest.mark.parametrize("family", only("gpt_oss", "openai_privacy_filter"))
def test_biases_go_to_their_own_projection(kit, zoo: Zoo, family: str) -> None:
    model, made = zoo.model(family), singles(kit.read(zoo.export(kit, family, "per-expert")))
    experts = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.experts"))
    first = experts.gate_up_proj_bias[2].detach()
    halves = (first[0::2], first[1::2]) if family == "gpt_oss" else first.chunk(2)
    for what, value in zip(
        ("gate", "up", "down"), (*halves, experts.down_proj_bias[2].detach()), strict=True
    ):
        assert made[1, 2, what, "bias"].data == data(value)
    stacked = kit.read(zoo.export(kit, family, "hub"))
    name = next(n for n in stacked if n.endswith("layers.1.mlp.experts.gate_up_proj_bias"))
    assert stacked[name].data == data(experts.gate_up_proj_bias.detach())


# as stacks


def rows_of(family: str, leaf: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Put gate and up of an expert together as the family's stacks hold them."""
    if leaf in ("weight_scale_2", "input_scale"):
        assert gate == up
        return gate
    if family == "gpt_oss":
        return np.stack([gate, up], 1).reshape(-1, *gate.shape[1:])
    return np.concatenate([gate, up])


@pytest.mark.parametrize("family", families_but("gpt_oss", "llama4_text", "openai_privacy_filter"))
def test_stacks_hold_the_bytes_of_single_experts(kit, zoo: Zoo, family: str) -> None:
    made, single = (
        kit.read(zoo.export(kit, family, "hub")),
        singles(kit.read(zoo.export(kit, family, "per-expert"))),
    )
    row = next(f for f in stack_layouts() if family.partition(",")[0] in f.model_types)
    axes = (0, 2, 1) if family in ("aria_text", TRANSPOSED) else (0, 1, 2)
    seen = 0
    for suffix, leaves in row.stacks.items():
        for key in [n for n in made if n.endswith(f"layers.1.{suffix}")]:
            for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                beside = (
                    f"{key.removesuffix('.weight')}.{leaf}"
                    if key.endswith(".weight")
                    else f"{key}_{leaf}"
                )
                found = made[key if leaf == "weight" else beside].array()
                each = [
                    [single[1, e, PROJECTIONS[x], leaf].array() for x in leaves] for e in range(E)
                ]
                wanted = np.stack(
                    [rows_of(family, leaf, *x) if len(x) == 2 else x[0] for x in each]
                )
                wanted = wanted.transpose(axes) if wanted.ndim == 3 else wanted
                assert found.shape == wanted.shape and found.tobytes() == wanted.tobytes(), (
                    key,
                    leaf,
                )
                seen += 1
    assert seen == 4 * len(row.stacks)


@pytest.mark.parametrize("family", only("gpt_oss", "llama4_text", "openai_privacy_filter"))
def test_a_stack_with_one_scale_is_encoded_under_it(kit, zoo: Zoo, family: str) -> None:
    made, wanted = kit.read(zoo.export(kit, family, "hub")), linears(zoo.model(family))
    for stack, kinds in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        container = "feed_forward" if "llama" in family else "mlp"
        (key,) = [n for n in made if n.endswith(f"layers.0.{container}.experts.{stack}")]
        assert made[f"{key}_weight_scale_2"].shape == made[f"{key}_input_scale"].shape == ()
        amax = max(
            w.abs().max() for (layer, _, what), w in wanted.items() if layer == 0 and what in kinds
        )
        for e in range(E):
            each = [codecs.encode(wanted[0, e, what], "nvfp4", amax=amax) for what in kinds]
            for leaf, name in (("weight", key), ("weight_scale", f"{key}_weight_scale")):
                parts = [p[leaf].view(torch.uint8).numpy() for p in each]
                rows = rows_of(family, leaf, *parts) if len(parts) == 2 else parts[0]
                found = np.frombuffer(made[name].data, np.uint8).reshape(made[name].shape)[e]
                assert np.array_equal(found, rows.T), (name, e)
            assert made[f"{key}_weight_scale_2"].data == data(each[0]["weight_scale_2"])


@pytest.mark.parametrize("fmt", ["mxfp8", "fp8", "fp8_per_channel", "w4a16_nvfp4"])
@pytest.mark.parametrize("family", only("gpt_oss", "granitemoe", TRANSPOSED, "step3p7"))
def test_other_formats(kit, zoo: Zoo, family: str, fmt: str) -> None:
    """Decoded by the verifier, single experts and stacks hold the same values, but for tensor
    scales that are shared.
    """
    source = source_of(kit, zoo, family)
    values = {}
    for layout in ("per-expert", "hub"):
        out = zoo.export(kit, family, layout, recipe_of(fmt))
        report = verifier.check(out, base=source, depth="payload")
        assert report.verdict == "passed", (layout, report.findings)
        loaded = linears(load_model(str(out)).model)
        values[layout] = loaded
        for key, weight in linears(zoo.model(family)).items():
            off = float((loaded[key].float() - weight.float()).norm() / weight.float().norm())
            assert off < (0.12 if "nvfp4" in fmt else 0.04), (layout, key, off)
    if fmt in ("mxfp8", "fp8_per_channel"):
        assert all(torch.equal(v, values["hub"][k]) for k, v in values["per-expert"].items())


def test_tiles_are_cut_where_gate_and_up_meet_on_128_only(kit, zoo: Zoo, tmp_path: Path) -> None:
    given: dict[str, Any] = {"recipe": recipe_of("fp8_block")}
    for family, said in (("granitemoe", "meet at row 96"), ("gpt_oss", "alternate row by row")):
        with pytest.raises(
            PlanError, match=f"{said}, inside a block of 128 x 128; --expert-layout per-expert"
        ):
            export(zoo.source(family), tmp_path / "out", expert_layout="hub", **given)
        export(zoo.source(family), tmp_path / family, expert_layout="per-expert", **given)
        assert (
            verifier.check(tmp_path / family, base=zoo.source(family), depth="payload").verdict
            == "passed"
        )


@needs("step3p7")
def test_a_stack_in_small_chunks_and_small_shards_holds_the_same_bytes(
    kit, zoo: Zoo, tmp_path: Path, monkeypatch
) -> None:
    wanted = {f: kit.read(zoo.export(kit, f, "hub")) for f in ("gpt_oss", "step3p7")}
    monkeypatch.setattr("exporter.stream.stacks.CHUNK", 1)
    monkeypatch.setattr("exporter.stream.shards.COPY_BYTES", 1000)
    for family, tensors in wanted.items():
        out = tmp_path / family
        export(
            zoo.source(family),
            out,
            recipe=EXPERTS,
            input_scale="one",
            expert_layout="hub",
            shard_bytes=50_000,
        )
        assert kit.read(out) == tensors
        assert len(list(out.glob("*.safetensors"))) > 1


# from memory


@pytest.mark.parametrize(
    "family", families_but("granitemoeshared", "granitemoehybrid", "granitemoe_swa", "step3p7")
)
@pytest.mark.parametrize("layout", ["per-expert", "hub"])
def test_a_model_in_memory_gives_its_checkpoints_bytes(
    kit, zoo: Zoo, family: str, layout: str, tmp_path: Path
) -> None:
    source = source_of(kit, zoo, family)
    export_model(
        zoo.model(family),
        tmp_path / "out",
        recipe=EXPERTS,
        input_scale="one",
        source=source,
        expert_layout=layout,
    )
    assert kit.read(tmp_path / "out") == kit.read(zoo.export(kit, family, layout))


@needs("step3p7")
def test_a_model_whose_vision_tower_is_permuted(kit, zoo: Zoo, tmp_path: Path) -> None:
    """Its rotary rows are permuted at load: that is undone, or refused by name."""
    given: dict[str, Any] = {
        "recipe": EXPERTS,
        "input_scale": "one",
        "source": zoo.source("step3p7"),
    }
    try:
        export_model(zoo.model("step3p7"), tmp_path / "out", **given)
    except UnsupportedConversion as error:
        assert "vision_model" in str(error) and "PermuteForRope (step3p7)" in str(error)
    else:
        assert kit.read(tmp_path / "out") == kit.read(zoo.export(kit, "step3p7", None))


@needs("gemma4_text")
def test_a_model_without_a_source(kit, zoo: Zoo, tmp_path: Path) -> None:
    for family in ("gpt_oss", "gemma4_text"):
        export_model(zoo.model(family), tmp_path / family, recipe=EXPERTS, input_scale="one")
        assert kit.read(tmp_path / family) == kit.read(zoo.export(kit, family, None))


# loaded again


@pytest.mark.parametrize("family", families_but("granitemoeshared", "granitemoehybrid"))
@pytest.mark.parametrize("layout", ["per-expert", "hub"])
def test_transformers_computes_with_what_was_written(
    kit, zoo: Zoo, family: str, layout: str
) -> None:
    shapes = {n: t.shape for n, t in kit.read(source_of(kit, zoo, family)).items()}
    state = decoded_tensors(open_checkpoint(zoo.export(kit, family, layout)))
    stacks = {n: t for n, t in state.items() if len(shapes.get(n, ())) == 3}
    assert state.keys() == shapes.keys() and len(stacks) in (4, 6)
    wanted = {
        n: s if family != TRANSPOSED else (s[0], s[2], s[1])
        for n, s in shapes.items()
        if n in stacks
    }
    assert (
        {n: tuple(t[...].shape) for n, t in stacks.items()}
        == {n: t.shape for n, t in stacks.items()}
        == wanted
    )
    loaded = load_model(str(zoo.export(kit, family, layout)), attention="eager")
    assert loaded.unexpected == ()
    before, after = linears(zoo.model(family)), linears(loaded.model)
    for key, weight in before.items():
        off = float((after[key].float() - weight.float()).norm() / weight.float().norm())
        assert off < 0.12, (key, off)


@pytest.mark.parametrize(
    "family", families_but("mistral4", "granitemoeshared")
)  # its rotary dimensions do not scale down
def test_logits_stay_close(kit, zoo: Zoo, family: str) -> None:
    ids = torch.arange(3, 19)[None]
    out = zoo.export(kit, family, None, recipe_of("mxfp8"))
    with torch.no_grad():
        wanted, source, found = (
            m(input_ids=ids).logits.float()
            for m in (
                zoo.model(family),
                *(load_model(str(p), attention="eager").model for p in (zoo.source(family), out)),
            )
        )
    assert float((source - wanted).norm() / wanted.norm()) < 0.005
    off = float((found - wanted).norm() / wanted.norm())
    assert 0 < off < 0.2, off


# MXFP4


def mxfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return blocks [..., in/32, 16], scales [..., in/32] and what they mean."""
    blocks = w.astype(np.float32).reshape(*w.shape[:-1], -1, 32)
    power = np.ceil(np.log2(np.abs(blocks).max(-1) / 6)).astype(np.int32)
    wide = np.ldexp(np.float32(1), power)[..., None].astype(np.float32)
    code = (blocks / wide).astype(ml_dtypes.float4_e2m1fn)
    nibble = code.view(np.uint8)
    values = (code.astype(np.float32) * wide).reshape(w.shape)
    return nibble[..., 0::2] | (nibble[..., 1::2] << 4), (power + 127).astype(np.uint8), values


@pytest.fixture(scope="module")
def packed(kit, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write gpt-oss as it is released, in MXFP4 [E, out, in], and the values of that in BF16 [E,
    in, out].
    """
    folder = tmp_path_factory.mktemp("mxfp4")
    plain = kit.read(zoo.source("gpt_oss"))
    quantized = dict(plain)
    for name in [
        n for n in plain if n.endswith("experts.gate_up_proj") or n.endswith("experts.down_proj")
    ]:
        blocks, scales, values = mxfp4(plain[name].array().transpose(0, 2, 1))
        del quantized[name]
        quantized |= {f"{name}_blocks": kit.raw(blocks), f"{name}_scales": kit.raw(scales)}
        plain[name] = kit.raw(
            np.ascontiguousarray(values.transpose(0, 2, 1)).astype(ml_dtypes.bfloat16)
        )
    config = kit.config(zoo.source("gpt_oss"))
    said = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    kit.folder(folder / "packed", quantized, config | {"quantization_config": said})
    kit.folder(folder / "plain", plain, config)
    return folder / "packed", folder / "plain"


@pytest.mark.parametrize("layout", ["per-expert", "hub"])
def test_mxfp4_stacks_become_nvfp4_without_loss(
    kit, packed: tuple[Path, Path], layout: str, tmp_path: Path
) -> None:
    source, plain = packed
    out = tmp_path / "out"
    manifest = export(source, out, recipe=EXPERTS, input_scale="one", expert_layout=layout)
    assert manifest.notes["requantized"] == {"MXFP4 to NVFP4": 24}
    blocks = 2 * E * 3 * H * F // 16
    assert manifest.notes["mxfp4_blocks"] == {"NVFP4": [blocks, blocks]}
    for base in packed:
        report = verifier.check(out, base=base, depth="payload")
        assert report.verdict == "passed", report.findings
    after, before = (linears(load_model(str(p)).model) for p in (out, plain))
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_mxfp4_stacks_in_chunks_share_their_exponent(
    kit, packed: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    given: dict[str, Any] = {"recipe": EXPERTS, "input_scale": "one", "expert_layout": "hub"}

    def grow(tensors: dict[str, Any]) -> None:  # one expert's scales are 2^3 larger
        for name in [n for n in tensors if n.endswith("_scales")]:
            values = tensors[name].array().copy()
            values[2] += 3
            tensors[name] = kit.raw(values)

    source = kit.edit(packed[0], tmp_path / "source", grow)
    export(source, tmp_path / "whole", **given)
    monkeypatch.setattr("exporter.stream.stacks.CHUNK", 1)
    export(source, tmp_path / "chunks", **given)
    assert kit.read(tmp_path / "chunks") == kit.read(tmp_path / "whole")
    assert verifier.check(tmp_path / "whole", base=source, depth="payload").verdict == "passed"


def test_mxfp4_stacks_to_other_formats_are_decoded(
    kit, packed: tuple[Path, Path], tmp_path: Path
) -> None:
    source, plain = packed
    for layout in ("per-expert", "hub"):
        for name, base in (("a", source), ("b", plain)):
            export(
                base, tmp_path / f"{layout}-{name}", recipe=recipe_of("mxfp8"), expert_layout=layout
            )
        assert kit.read(tmp_path / f"{layout}-a") == kit.read(tmp_path / f"{layout}-b")


@pytest.mark.parametrize("layout", ["per-expert", "hub"])
def test_mxfp4_stacks_that_a_recipe_leaves_are_decoded(
    kit, packed: tuple[Path, Path], layout: str, tmp_path: Path
) -> None:
    attention = Recipe.model_validate(
        {"name": "attention", "rules": [{"roles": ["attention"], "format": "mxfp8"}]}
    )
    source, plain = packed
    export(source, tmp_path / "out", recipe=attention, expert_layout=layout)
    made, wanted = kit.read(tmp_path / "out"), kit.read(plain)
    if layout == "hub":
        stacks = [n for n in wanted if ".experts." in n]
        assert stacks and all(made[n] == wanted[n] for n in stacks)
    after, before = (linears(load_model(str(p)).model) for p in (tmp_path / "out", plain))
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert verifier.check(tmp_path / "out", base=source, depth="payload").verdict == "passed"


@needs("step3p7")
@pytest.mark.parametrize("layout", ["per-expert", "hub"])
def test_128_by_128_fp8_stacks_are_decoded(kit, zoo: Zoo, layout: str, tmp_path: Path) -> None:
    """Step is released so: a stack of codes, and one of scales for tiles of 128 x 128."""
    plain = kit.read(zoo.source("step3p7"))
    quantized = dict(plain)
    for name in [n for n in plain if ".moe." in n and len(plain[n].shape) == 3]:
        values = plain[name].array().astype(np.float32)
        scale = (np.abs(values).max((1, 2), keepdims=True) / np.float32(448)).astype(np.float32)
        code = (values / scale).astype(ml_dtypes.float8_e4m3fn)
        quantized |= {name: kit.raw(code), f"{name}_scale_inv": kit.raw(scale)}
        plain[name] = kit.raw(code.astype(np.float32) * scale)
    config = kit.config(zoo.source("step3p7"))
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    skipped = [
        n.removesuffix(".weight")
        for n, t in quantized.items()
        if len(t.shape) == 2 and t.dtype == "BF16"
    ]
    source = kit.folder(
        tmp_path / "fp8",
        quantized,
        config | {"quantization_config": said | {"modules_to_not_convert": skipped}},
    )
    base = kit.folder(tmp_path / "plain", plain, config)
    given: dict[str, Any] = {"recipe": EXPERTS, "input_scale": "one", "expert_layout": layout}
    manifest = export(source, tmp_path / "out", **given)
    assert manifest.notes["requantized"] == {"FP8_PB_WO to NVFP4": 24}
    export(base, tmp_path / "wanted", **given)
    assert kit.read(tmp_path / "out") == kit.read(tmp_path / "wanted")
    report = verifier.check(tmp_path / "out", base=source, depth="payload")
    assert report.verdict == "passed", report.findings


@needs("gemma4_text")
def test_stacks_that_nothing_is_wanted_of_keep_their_bytes(kit, zoo: Zoo, tmp_path: Path) -> None:
    attention = Recipe.model_validate(
        {"name": "attention", "rules": [{"roles": ["attention"], "format": "mxfp8"}]}
    )
    for layout in ("per-expert", "hub"):
        out = tmp_path / layout
        export(zoo.source("gemma4_text"), out, recipe=attention, expert_layout=layout)
        made, wanted = kit.read(out), kit.read(zoo.source("gemma4_text"))
        assert all(made[n] == t for n, t in wanted.items() if "experts" in n)
        assert (
            "model.layers.0.experts.gate_up_proj"
            in kit.config(out)["quantization_config"]["ignore"]
        )
        assert (
            verifier.check(out, base=zoo.source("gemma4_text"), depth="payload").verdict == "passed"
        )


# written in stacks before


def test_a_quantized_stack_is_taken_apart_without_quantizing(kit, zoo: Zoo, tmp_path: Path) -> None:
    """What is written is a recipe for attention; the experts' codes are those of the stacks."""
    rules = [{"roles": [r], "format": "nvfp4"} for r in ("routed_expert", "attention")]
    attention = Recipe.model_validate({"name": "both", "rules": rules})
    source = zoo.export(kit, "granitemoe", "hub")
    export(source, tmp_path / "hub", recipe=attention, input_scale="one", expert_layout="hub")
    made, was = kit.read(tmp_path / "hub"), kit.read(source)
    assert all(made[n] == t for n, t in was.items() if "linear" in n)
    with pytest.raises(PlanError, match="all 24 modules that it selects are nvfp4 already"):
        export(source, tmp_path / "again", recipe=EXPERTS, input_scale="one")


# calibrated


def test_inputs_are_read_expert_by_expert(
    kit, zoo: Zoo, packed: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = np.random.default_rng(1).integers(3, 64, (4, 24)).tolist()
    texts = tmp_path / "ids.jsonl"
    texts.write_text("".join(json.dumps({"ids": r}) + "\n" for r in rows))
    for family, source in (("gpt_oss", packed[0]), ("granitemoe", zoo.source("granitemoe"))):
        linears(zoo.model(family))
        folder = tmp_path / f"{family} stats"
        folder.mkdir()
        stats = folder / "stats.safetensors"
        exporter.calibrate(source, stats, recipe=EXPERTS, texts=[texts], samples=[4], seq_len=24)
        single = {
            k[:3]: float(t.array())
            for k, t in singles(kit.read(folder)).items()
            if k[3] == "input_amax"
        }
        assert len(single) == 24
        assert all(single[layer, e, "gate"] == single[layer, e, "up"] for layer, e, _ in single)
        seen = {}

        def note(module: Any, args: tuple[Any, ...], seen: dict[int, float] = seen) -> None:
            seen[id(module)] = max(seen.get(id(module), 0.0), float(args[0].abs().max()))

        model = load_model(str(source)).model
        modules = [m for n, m in model.named_modules() if n.endswith(".experts")]
        hooks = [m.register_forward_pre_hook(note) for m in modules]
        with torch.no_grad():
            model(input_ids=torch.tensor(rows))
        assert len(hooks) == 2
        for layer, module in enumerate(modules):
            assert max(single[layer, e, "gate"] for e in range(E)) == pytest.approx(
                seen[id(module)]
            )
        for layout in ("per-expert", "hub"):
            out = tmp_path / f"{family}-{layout}"
            export(source, out, recipe=EXPERTS, stats=stats, expert_layout=layout)
            scales = {n: t.array() for n, t in kit.read(out).items() if n.endswith("input_scale")}
            if layout == "per-expert":
                wanted = singles(scales)
                assert all(
                    wanted[*k, "input_scale"] == np.float32(v / 2688) for k, v in single.items()
                )
            elif family == "gpt_oss":
                name = next(n for n in scales if "layers.1.mlp.experts.down" in n)
                assert scales[name] == np.float32(
                    max(single[1, e, "down"] for e in range(E)) / 2688
                )
            else:
                name = next(n for n in scales if "layers.1.block_sparse_moe.output" in n)
                assert scales[name].tolist() == [
                    np.float32(single[1, e, "down"] / 2688) for e in range(E)
                ]


# repaired


@pytest.mark.parametrize("family", only("aria_text", "gpt_oss", "granitemoe"))
def test_single_experts_are_repaired_under_a_stacked_base(
    kit, zoo: Zoo, family: str, tmp_path: Path
) -> None:
    spelled = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    spelled |= {v: k for k, v in spelled.items()}
    whole = zoo.export(kit, family, "per-expert")

    def respell(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if SINGLE.search(n)]:
            head, leaf, last = name.rsplit(".", 2)
            tensors[f"{head}.{spelled[leaf]}.{last}"] = tensors.pop(name)

    exporter.repair(
        kit.edit(whole, tmp_path / "broken", respell), tmp_path / "out", base=zoo.source(family)
    )
    assert kit.read(tmp_path / "out") == kit.read(whole)

    def swap(tensors: dict[str, Any]) -> None:
        respell(tensors)
        made = singles(tensors)
        for leaf in ("weight", "weight_scale"):
            a, b = (
                next(n for n, t in tensors.items() if t is made[1, 2, x, leaf])
                for x in ("gate", "up")
            )
            tensors[a], tensors[b] = tensors[b], tensors[a]

    swapped = kit.edit(whole, tmp_path / "swapped", swap)
    with pytest.raises(PlanError, match="its values are not those of the base's"):
        exporter.repair(swapped, tmp_path / "not", base=zoo.source(family))


@pytest.mark.parametrize("family", only("gpt_oss", "granitemoe"))
@pytest.mark.parametrize("layout", ["per-expert", "hub"])
def test_depth_load(kit, zoo: Zoo, family: str, layout: str) -> None:
    report = verifier.check(zoo.export(kit, family, layout), base=zoo.source(family), depth="load")
    assert report.verdict == "passed", report.findings
    covered = {c.rule: (c.checked, c.of) for c in report.coverage}
    assert covered["QC608"][0] == covered["QC608"][1] > 0 and covered["QC604"][0] > 0


# what is refused


def test_a_part_of_a_stack_is_not_written_as_a_stack(zoo: Zoo, tmp_path: Path) -> None:
    gates = {"name": "some", "rules": [{"modules": ["*.experts.[0-1].*"], "format": "mxfp8"}]}
    given: dict[str, Any] = {"recipe": Recipe.model_validate(gates)}
    with pytest.raises(
        PlanError,
        match=r"feed_forward.experts.gate_up_proj: a stack is written as a whole.*per-expert",
    ):
        export(zoo.source("llama4_text"), tmp_path / "out", expert_layout="hub", **given)
    assert export(zoo.source("llama4_text"), tmp_path / "out", **given).formats == {"MXFP8": 12}


def test_layouts_that_are_not_there(kit, zoo: Zoo, tmp_path: Path) -> None:
    given: dict[str, Any] = {"recipe": EXPERTS, "input_scale": "one"}
    with pytest.raises(UsageError, match="holds no stacks of experts"):
        export(kit.qwen, tmp_path / "out", expert_layout="hub", **given)
    with pytest.raises(
        UsageError, match="--expert-layout per-expert writes the experts individually"
    ):
        export(zoo.source("gpt_oss"), tmp_path / "out", recipe=EXPERTS, onto=zoo.source("gpt_oss"))


def test_stacks_are_not_merged(zoo: Zoo, kit, tmp_path: Path) -> None:
    experts = zoo.export(kit, "gpt_oss", "hub")
    with pytest.raises(
        PlanError,
        match="only individual experts are merged; export --expert-layout per-expert writes them",
    ):
        exporter.merge(experts, tmp_path / "out", onto=zoo.source("gpt_oss"))


def test_a_vendors_stacks_are_taken_apart_for_single_experts(kit, zoo: Zoo, tmp_path: Path) -> None:
    """A mix: the vendor's attention in MXFP8, its experts in BF16 stacks; ours are written over
    them one by one.
    """
    attention = Recipe.model_validate(
        {"name": "attention", "rules": [{"roles": ["attention"], "format": "mxfp8"}]}
    )
    vendor = zoo.export(kit, "granitemoe", None, attention)
    export(zoo.source("granitemoe"), tmp_path / "out", recipe=EXPERTS, onto=vendor)
    made, single = kit.read(tmp_path / "out"), kit.read(zoo.export(kit, "granitemoe", "per-expert"))
    assert all(made[n] == t for n, t in single.items() if ".experts." in n)
    assert all(made[n] == t for n, t in kit.read(vendor).items() if "linear" not in n)
    report = verifier.check(
        tmp_path / "out", base=zoo.source("granitemoe"), merged_from=vendor, depth="payload"
    )
    assert report.verdict == "passed", report.findings
    assert report.summary.contents.formats == {"NVFP4": 24, "MXFP8": 8}


SMALL = {"hidden_size": 64, "vocab_size": 64}
REFUSED: dict[str, tuple[str, tuple[int, ...]]] = {
    "dbrx": ("transformer.blocks.0.ffn.experts.mlp.w1", (256, 64)),
    "jetmoe": ("model.layers.0.mlp.input_linear.weight", (4, 96, 64)),
    "inkling_mm_model": ("model.llm.layers.0.mlp.experts.w13_weight", (4, 96, 64)),
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_refused_say_why(kit, family: str, tmp_path: Path) -> None:
    name, shape = REFUSED[family]
    tensors = {name: kit.bf16(*shape), "model.layers.0.self_attn.q_proj.weight": kit.bf16(64, 64)}
    source = kit.folder(tmp_path / "source", tensors, {"model_type": family} | SMALL)
    row = next(f for f in stack_layouts() if family in f.model_types)
    with pytest.raises(
        PlanError, match=re.escape(f"{name}: {row.name} cannot be exported: {row.refused}")
    ):
        export(source, tmp_path / "out", recipe="mxfp8_default")


def test_stacks_that_are_not_what_the_family_has(kit, zoo: Zoo, tmp_path: Path) -> None:
    given: dict[str, Any] = {"recipe": EXPERTS, "input_scale": "one"}
    key = "model.layers.1.mlp.experts.gate_up_proj"

    def transpose(tensors: dict[str, Any]) -> None:
        tensors[key] = kit.raw(np.ascontiguousarray(tensors[key].array().transpose(0, 2, 1)))

    odd = kit.edit(zoo.source("gpt_oss"), tmp_path / "transposed", transpose)
    with pytest.raises(
        PlanError,
        match=r"gate_up_proj \[4, 192, 64\].* are not stacks \[experts, in, out\], "
        r"which gpt_oss has",
    ):
        export(odd, tmp_path / "out", **given)
    lost = kit.edit(zoo.source("gpt_oss"), tmp_path / "lost", lambda tensors: tensors.pop(key))
    with pytest.raises(PlanError, match=rf"{key} is missing next to"):
        export(lost, tmp_path / "out", **given)

    def spoil(tensors: dict[str, Any]) -> None:
        values = tensors[key].array().copy()
        values[3, 5, 7] = np.nan
        tensors[key] = kit.raw(values)

    spoilt = kit.edit(zoo.source("gpt_oss"), tmp_path / "nan", spoil)
    with pytest.raises(EncodeError, match=rf"{key} \[experts 0 to 3\]: NaN at index \[3, 7, 5\]"):
        export(spoilt, tmp_path / "out", **given)
    with pytest.raises(EncodeError, match=r"experts\.3\.up_proj"):
        export(spoilt, tmp_path / "out", expert_layout="per-expert", **given)
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_experts_are_written(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        str(zoo.source("gpt_oss")),
        str(tmp_path / "out"),
        "--recipe",
        EXPERTS,
        "--input-scale",
        "one",
        "--for",
        "sglang",
    ]
    assert run(["export", *words, "--dry-run"]) == 0
    assert "experts   in stacks, as on the hub" in capsys.readouterr().out
    individually = [*words[:-1], "none", "--expert-layout", "per-expert"]
    assert run(["export", *individually, "--dry-run"]) == 0
    assert "experts   individually" in capsys.readouterr().out
    assert run(["export", *words]) == 0
    text = capsys.readouterr().out
    assert (
        "24 of 24 linear layers (16 after fusing), scale search: max" in text
        and "verdict: PASSED" in text
    )


def test_stats_and_show_speak_of_the_linears_in_a_stack(
    kit, zoo: Zoo, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in ("gpt_oss", "granitemoe"):
        found = stats(zoo.export(kit, family, "hub"), depth="payload")
        experts = next(r for r in found.rows if r.role == "routed_expert")
        assert (experts.format, experts.modules, experts.parameters) == (
            "NVFP4",
            24,
            2 * E * 3 * H * F,
        )
        assert (
            found.tensors == len(kit.read(zoo.export(kit, family, "hub"))) and found.skipped == ()
        )
    capsys.readouterr()
    out, single = (str(zoo.export(kit, "granitemoe", layout)) for layout in ("hub", "per-expert"))
    texts = []
    for folder in (out, single):
        words = [
            "model.layers.1.block_sparse_moe.experts.2.w3.weight",
            "--row",
            "5",
            "--block",
            "1",
        ]
        assert run(["show", folder, *words, "--base", str(zoo.source("granitemoe"))]) == 0
        texts.append([line for line in capsys.readouterr().out.splitlines() if "0x" in line])
    values = [
        [" ".join(line.split()[:3]) for line in lines if line.split()[0].isdecimal()]
        for lines in texts
    ]
    assert values[0] == values[1] and len(values[0]) == 16
    whole = str(zoo.export(kit, "gpt_oss", "hub"))
    assert run(["show", whole, "model.layers.0.mlp.experts.0.up_proj.weight"]) == 1
    assert (
        "is a part of model.layers.0.mlp.experts.gate_up_proj and not contiguous"
        in capsys.readouterr().err
    )


def test_the_page_is_made_of_the_table() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "make_layouts.py"))
    assert (ROOT / "docs" / "expert-layouts.md").read_text(encoding="utf-8") == tool["page"]()


def test_every_row_names_what_it_was_read_from() -> None:
    kinds = [t for f in stack_layouts() for t in f.model_types]
    assert len(kinds) == len(set(kinds))
    for row in stack_layouts():
        assert bool(row.refused) != bool(row.stacks), row.name
        assert row.refused or (row.why and row.source and "{expert}" in row.linear), row.name
        assert bool(row.refused) == bool(row.refused_names), row.name


# what a check of an export finds


def test_swapped_gate_and_up_of_single_experts_are_found_under_a_stacked_base(
    kit, zoo: Zoo, tmp_path: Path
) -> None:
    for family in ("gpt_oss", "granitemoe"):
        names = ("gate_proj", "up_proj") if family == "gpt_oss" else ("w1", "w3")

        def swap(tensors: dict[str, Any], names: tuple[str, str] = names) -> None:
            for leaf in ("weight", "weight_scale"):
                a, b = (
                    next(
                        n
                        for n in tensors
                        if "layers.1." in n and n.endswith(f"experts.2.{x}.{leaf}")
                    )
                    for x in names
                )
                tensors[a], tensors[b] = tensors[b], tensors[a]

        broken = kit.edit(zoo.export(kit, family, "per-expert"), tmp_path / family, swap)
        report = verifier.check(broken, base=zoo.source(family), depth="payload")
        assert {f.rule for f in report.findings if f.severity == "error"} == {"QC511"}


def test_an_interleaving_that_was_not_undone_is_found(kit, zoo: Zoo, tmp_path: Path) -> None:
    def halves(tensors: dict[str, Any]) -> None:
        for leaf in ("weight", "weight_scale"):
            a, b = (f"model.layers.0.mlp.experts.1.{n}_proj.{leaf}" for n in ("gate", "up"))
            rows = np.stack([tensors[a].array(), tensors[b].array()], 1).reshape(2 * F, -1)
            tensors[a], tensors[b] = kit.raw(rows[:F].copy()), kit.raw(rows[F:].copy())

    broken = kit.edit(zoo.export(kit, "gpt_oss", "per-expert"), tmp_path / "out", halves)
    report = verifier.check(broken, base=zoo.source("gpt_oss"), depth="payload")
    assert {f.rule for f in report.findings if f.severity == "error"} == {"QC511"}


@pytest.mark.parametrize("family", only("gpt_oss", "qwen3_vl_moe", "step3p7"))
def test_a_zero_scale_inside_a_stack_and_a_lost_expert(
    kit, zoo: Zoo, family: str, tmp_path: Path
) -> None:
    source = zoo.export(kit, family, "hub")

    def zero(tensors: dict[str, Any]) -> None:
        name = next(
            n
            for n in tensors
            if n.endswith("_scale") and ".layers.1." in n and tensors[n].dtype == "F8_E4M3"
        )
        values = tensors[name].array().copy()
        values[3, 5, 1] = 0
        tensors[name] = kit.raw(values)

    base = source_of(kit, zoo, family)
    report = verifier.check(kit.edit(source, tmp_path / "zero", zero), base=base, depth="payload")
    (found,) = [f for f in report.findings if f.rule == "QC501"]
    assert (
        ".experts.3." in str(found.where.tensor)
        and "(stored in model." in found.observed
        and found.count == 1
    )
    apart = zoo.export(kit, family, "per-expert")

    def lose(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if ".layers.1." in n and "experts.2.down_proj." in n]:
            del tensors[name]

    report = verifier.check(kit.edit(apart, tmp_path / "lost", lose), base=base)
    assert "QC207" in {f.rule for f in report.findings}
