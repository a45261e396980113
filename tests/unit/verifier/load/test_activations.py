# SPDX-License-Identifier: Apache-2.0
"""Activations rounded as a checkpoint declares: the oracle's numbers, and every module of a model
reached.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn.functional import linear

pytest.importorskip("transformers")

import exporter
from tests import oracle
from tests.conftest import to_torch
from tests.paths import ROOT, TESTS
from verifier.checkpoint import open_checkpoint
from verifier.errors import ContentError, IncomparableError, UsageError
from verifier.gate.corpora import Corpus
from verifier.gate.jobs import Scorer
from verifier.gate.options import ScoringOptions
from verifier.gate.run_file import require_same_key
from verifier.gate.windows import plan_scoring
from verifier.load import rounding as fake
from verifier.load.activations import EXPERTS, declared_activations, roundings
from verifier.load.model import load_model
from verifier.selftest.editor import CheckpointEditor

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
DATA = TESTS / "data" / "modelopt"


def inputs() -> list[np.ndarray]:
    """Return activations as they come: normal, heavy-tailed, tiny, huge, with empty blocks, on
    ties; float32 and BF16.
    """
    rng = np.random.default_rng(41)
    found = [
        rng.standard_normal((5, 256)),
        rng.standard_t(2, (3, 7, 64)),
        rng.standard_normal((4, 128)) * 1e-6,
    ]
    found += [
        rng.standard_normal((4, 128)) * 1e6,
        rng.integers(-24, 25, (6, 128)) / 4,
        np.zeros((2, 64)),
    ]
    mixed = rng.standard_normal((8, 128)) * 10.0 ** rng.integers(-12, 13, (8, 1))
    mixed[:, 32:64] = 0
    above = np.nextafter(np.float32(448), np.float32(999))
    found += [mixed, 448 * 2.0 ** np.arange(-40, 24).reshape(2, 32), np.full((1, 32), above)]
    wide = [a.astype(np.float32) for a in found]
    return wide + [a.astype(ml_dtypes.bfloat16) for a in wide]


def same(mine: torch.Tensor, wanted: np.ndarray, like: np.ndarray) -> bool:
    return bool(
        (
            mine.float().numpy()
            == np.asarray(wanted, np.float32).astype(like.dtype).astype(np.float32)
        ).all()
    )


@pytest.mark.parametrize("x", inputs(), ids=lambda a: f"{a.dtype}{list(a.shape)}")
def test_numbers_are_the_oracles(x: np.ndarray) -> None:
    t = to_torch(x)
    for scale in (1.0, 0.0123, 3e-7):
        wanted = oracle.nvfp4_decode(oracle.nvfp4_encode(x, scale_2=scale))
        assert same(fake.nvfp4(t, scale), wanted, x), ("nvfp4", scale)
        wanted = oracle.fp8_decode(oracle.fp8_encode(x, "fp8", scale=np.float32(scale)), "fp8")
        assert same(fake.fp8(t, scale), wanted, x), ("fp8", scale)
    assert same(fake.mxfp8(t), oracle.mxfp8_decode(oracle.mxfp8_encode(x)), x)
    assert same(
        fake.fp8_token(t),
        oracle.fp8_decode(oracle.fp8_encode(x, "fp8_per_channel"), "fp8_per_channel"),
        x,
    )
    groups = x.reshape(*x.shape[:-1], -1, 128) if x.shape[-1] % 128 == 0 else x
    wanted = oracle.fp8_decode(oracle.fp8_encode(groups, "fp8_per_channel"), "fp8_per_channel")
    assert same(fake.fp8_group(t), wanted.reshape(x.shape), x)


def test_a_ragged_width_and_what_is_not_finite() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fake.mxfp8(x)[:, :32], fake.mxfp8(x[:, :32]))
    assert fake.mxfp8(x).shape == fake.nvfp4(x, 0.1).shape == x.shape
    x[0, 0] = torch.nan
    for rounded in (
        fake.mxfp8(x),
        fake.nvfp4(x, 0.1),
        fake.fp8(x, 0.1),
        fake.fp8_token(x),
        fake.fp8_group(x),
    ):
        assert rounded[0, 0].isnan()
        assert rounded[1:].isfinite().all()


QWEN = DATA / "qwen3moe_nvfp4_experts_max"
IDS = torch.arange(2, 66).reshape(2, 32) * 7 % 512


def oracle_nvfp4(x: torch.Tensor, scale: float) -> torch.Tensor:
    wanted = oracle.nvfp4_decode(oracle.nvfp4_encode(x.float().numpy(), scale_2=scale))
    return torch.from_numpy(wanted).to(x.dtype)


def near_and_far(found: torch.Tensor, plain: torch.Tensor, wanted: torch.Tensor) -> None:
    # A last bit of BF16 before a rounding can move a value to the next code; what is not rounded at
    # all is far off.
    off, far = (
        float((x.float() - wanted.float()).norm() / wanted.float().norm()) for x in (found, plain)
    )
    assert off < 0.025
    assert far > max(0.05, 4 * off)


def test_fused_experts_see_what_the_oracle_rounds() -> None:
    """Each expert by itself, with its own input_scale, against a loop that knows nothing of the
    implementation.
    """
    ckpt, model = open_checkpoint(QWEN), load_model(str(QWEN)).model
    experts = model.model.layers[1].mlp.experts
    scales = {
        n: float(ckpt.array(t).reshape(-1)[0])
        for n, t in ckpt.tensors.items()
        if n.endswith("input_scale")
    }
    x = torch.randn(24, 128, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    index = torch.stack([torch.arange(24) % 8, (torch.arange(24) + 3) % 8], 1)
    weight = torch.full((24, 2), 0.5, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = experts(x, index, weight)
        with declared_activations(model, ckpt) as counts:
            assert counts == {"nvfp4": 2 * 8 * 3}
            found = experts(x, index, weight)
        assert torch.equal(experts(x, index, weight), plain)  # taken off again
        wanted = torch.zeros_like(x)
        for e in range(8):
            rows = (index == e).any(1)
            prefix = f"model.layers.1.mlp.experts.{e}"
            given = oracle_nvfp4(
                x[rows], max(scales[f"{prefix}.{p}_proj.input_scale"] for p in ("gate", "up"))
            )
            gate, up = linear(given, experts.gate_up_proj[e]).chunk(2, -1)
            between = oracle_nvfp4(
                torch.nn.functional.silu(gate) * up, scales[f"{prefix}.down_proj.input_scale"]
            )
            wanted[rows] += linear(between, experts.down_proj[e]) * 0.5
    near_and_far(found, plain, wanted)


def test_experts_share_the_largest_scale_where_asked() -> None:
    ckpt, model = open_checkpoint(QWEN), load_model(str(QWEN)).model
    experts = model.model.layers[1].mlp.experts
    largest = {
        leaf: max(
            float(ckpt.array(t).reshape(-1)[0])
            for n, t in ckpt.tensors.items()
            if "layers.1." in n and n.endswith(tuple(f"{p}_proj.input_scale" for p in leaves))
        )
        for leaf, leaves in {"gate_up": ("gate", "up"), "down": ("down",)}.items()
    }
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    index, weight = torch.full((4, 1), 5), torch.ones((4, 1), dtype=torch.bfloat16)
    with torch.inference_mode():
        with declared_activations(model, ckpt, shared=True):
            found = experts(x, index, weight)
        plain = experts(x, index, weight)
        rounded = oracle_nvfp4(x, largest["gate_up"])
        gate, up = linear(rounded, experts.gate_up_proj[5]).chunk(2, -1)
        between = oracle_nvfp4(torch.nn.functional.silu(gate) * up, largest["down"])
        near_and_far(found, plain, linear(between, experts.down_proj[5]))


def test_every_quantized_linear_of_the_golden_is_reached() -> None:
    ckpt, model = open_checkpoint(GOLDEN / "mxfp8"), load_model(str(GOLDEN / "mxfp8")).model
    seen: dict[str, torch.Tensor] = {}
    q_proj = model.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    q_proj.register_forward_pre_hook(lambda _m, args: seen.__setitem__("plain", args[0]))
    with torch.inference_mode():
        before = model(input_ids=IDS, use_cache=False).logits
        with declared_activations(model, ckpt) as counts:
            q_proj.register_forward_pre_hook(lambda _m, args: seen.__setitem__("rounded", args[0]))
            rounded = model(input_ids=IDS, use_cache=False).logits
    assert counts == {"mxfp8": len(roundings(ckpt))}
    want = oracle.mxfp8_decode(oracle.mxfp8_encode(seen["plain"].float().numpy()))
    assert torch.equal(seen["rounded"].float(), torch.from_numpy(want).to(torch.bfloat16).float())
    assert not torch.equal(before, rounded)
    assert model.config.get_text_config()._experts_implementation != EXPERTS


def test_what_each_format_declares(tmp_path: Path) -> None:
    kinds = {"w4a16_nvfp4_experts_only": set(), "fp8_default": {"fp8"}, "mxfp8_default": {"mxfp8"}}
    source = DATA / "src_qwen3moe"
    for recipe, wanted in kinds.items():
        exporter.export(source, tmp_path / recipe, recipe=recipe, input_scale="one")
        assert {r.kind for r in roundings(open_checkpoint(tmp_path / recipe)).values()} == wanted, (
            recipe
        )
    assert {r.kind for r in roundings(open_checkpoint(QWEN)).values()} == {"nvfp4"}
    assert roundings(open_checkpoint(source)) == {}


def test_a_scale_that_is_missing_or_none_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.5.down_proj.input_scale"
    for i, change in enumerate(("drop", "zero")):
        path = tmp_path / str(i)
        path.mkdir()
        for file in QWEN.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        folder = CheckpointEditor(path)
        if change == "drop":
            folder.drop([name])
        else:
            folder.store(name, np.zeros((), np.float32))
        with pytest.raises(ContentError, match=r"experts\.5\.down_proj"):
            roundings(open_checkpoint(path))


def test_the_key_refuses_to_mix() -> None:
    corpus, ckpt = Corpus("c", "r", "0" * 64, ids=((1, 2, 3),)), open_checkpoint(QWEN)
    declared, plain, engine = (
        plan_scoring([ckpt], ScoringOptions(corpus, seq_len=8, batch=2, scorer=s)).key
        for s in (
            Scorer(activations="declared"),
            Scorer(),
            Scorer("server", endpoint="http://h/v1"),
        )
    )
    assert (declared["activations"], "activations" in plain, engine["activations"]) == (
        "declared",
        False,
        "engine",
    )
    for one, other in ((declared, plain), (plain, engine), (engine, declared)):
        with pytest.raises(IncomparableError, match="activations is"):
            require_same_key("a", one, "b", other)
    for wrong in (
        Scorer("vllm"),
        Scorer("server"),
        Scorer("vllm", "declared", "/usr/bin/python3"),
        Scorer(endpoint="http://h"),
        Scorer(timeout=0),
        Scorer(options=(("a", 1),)),
    ):
        with pytest.raises(UsageError):
            wrong.check()


def test_stacked_experts_of_gpt_oss_are_reached(tmp_path: Path) -> None:
    """On disk one by one, in memory [expert, in, out] with gate and up interleaved and biases: the
    same rounding.
    """
    import transformers

    config = transformers.AutoConfig.for_model(
        "gpt_oss",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=64,
        num_local_experts=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=128,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.1)
    made.save_pretrained(tmp_path / "plain")
    exporter.export(
        tmp_path / "plain",
        tmp_path / "out",
        recipe="nvfp4_experts_only",
        input_scale="one",
        engine="none",
    )
    ckpt, model = open_checkpoint(tmp_path / "out"), load_model(str(tmp_path / "out")).model
    experts = model.model.layers[1].mlp.experts
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    index, weight = torch.arange(12).reshape(12, 1) % 4, torch.ones((12, 1), dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = experts(x, index, weight)
        with declared_activations(model, ckpt) as counts:
            assert counts == {"nvfp4": 2 * 4 * 3}
            found = experts(x, index, weight)
        wanted = torch.zeros_like(x)
        for e in range(4):
            rows = index[:, 0] == e
            both = linear(
                oracle_nvfp4(x[rows], 1.0),
                experts.gate_up_proj[e].t(),
                experts.gate_up_proj_bias[e],
            )
            between = oracle_nvfp4(experts._apply_gate(both), 1.0)
            wanted[rows] = linear(between, experts.down_proj[e].t(), experts.down_proj_bias[e])
    near_and_far(found, plain, wanted)
