# SPDX-License-Identifier: Apache-2.0
"""Models from quantized checkpoints: MXFP4 stacks as gpt-oss ships them, against the same values in
BF16.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from tests.paths import TESTS  # noqa: E402
from verifier.checkpoint import open_checkpoint  # noqa: E402
from verifier.errors import ContentError  # noqa: E402
from verifier.load.activations import roundings  # noqa: E402
from verifier.load.model import decoded_tensors, load_model  # noqa: E402

MODELOPT = TESTS / "data" / "modelopt"


def mxfp4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode [..., in] by numpy alone; return blocks, scales and what they mean."""
    grouped = values.reshape(*values.shape[:-1], -1, 32)
    power = np.ceil(np.log2(np.abs(grouped).max(-1) / 6)).astype(np.int32)
    wide = np.ldexp(np.float32(1), power)[..., None]
    code = (grouped / wide).astype(ml_dtypes.float4_e2m1fn)
    nibble = code.view(np.uint8)
    means = (code.astype(np.float32) * wide).reshape(values.shape)
    return nibble[..., 0::2] | (nibble[..., 1::2] << 4), (power + 127).astype(np.uint8), means


def test_gpt_oss_in_mxfp4_is_the_model_of_its_values(tmp_path: Path) -> None:
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
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    model.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    packed, decoded = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = decoded[name] = tensor
            continue
        # On disk the stack is [expert, out, in], so that blocks run along the input.
        blocks, scales, means = mxfp4(tensor.float().numpy().swapaxes(1, 2).copy())
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = (
            torch.from_numpy(blocks),
            torch.from_numpy(scales),
        )
        decoded[name] = torch.from_numpy(means.swapaxes(1, 2).copy()).to(torch.bfloat16)
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    for folder, state, extra in (
        ("decoded", decoded, {}),
        ("packed", packed, {"quantization_config": {"quant_method": "mxfp4"}}),
    ):
        (tmp_path / folder).mkdir()
        save_file(state, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / folder / "config.json").write_text(json.dumps(raw | extra))
    ids = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        found, wanted = (
            load_model(str(tmp_path / f)).model(input_ids=ids).logits for f in ("packed", "decoded")
        )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["src_llama", "src_qwen3moe"])
def test_a_float32_checkpoint_runs_as_bf16(tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(MODELOPT / name, tmp_path / name)
    tensors = {k: t.float() for k, t in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected = load_model(str(MODELOPT / name)).model(input_ids=ids).logits
        assert torch.equal(load_model(str(copy)).model(input_ids=ids).logits, expected)


def test_a_pre_quant_scale_is_part_of_the_weight(tmp_path: Path) -> None:
    """AWQ multiplies inputs by it: the weight is what the layer multiplies its inputs with."""
    copy = shutil.copytree(MODELOPT / "llama_mxfp8", tmp_path / "awq")
    module = "model.layers.0.mlp.down_proj"
    tensors = load_file(copy / "model.safetensors")
    plain = decoded_tensors(open_checkpoint(copy))[f"{module}.weight"][...]
    factors = torch.linspace(0.5, 2, plain.shape[1]).to(torch.bfloat16)
    tensors[f"{module}.pre_quant_scale"] = factors
    save_file(tensors, copy / "model.safetensors")
    scaled = decoded_tensors(open_checkpoint(copy))[f"{module}.weight"][...]
    assert torch.equal(scaled, (plain.float() * factors.float()).to(torch.bfloat16))
    with pytest.raises(ContentError, match=f"{module}: its input is scaled by a pre_quant_scale"):
        roundings(open_checkpoint(copy))


def test_transforms_of_activations_are_refused_by_name(tmp_path: Path) -> None:
    copy = shutil.copytree(MODELOPT / "src_llama", tmp_path / "rotated")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "transform_config": {"config_groups": {"R1": {"type": "hadamard", "apply": []}}},
    }
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContentError, match=r"transforms of activations \(R1: hadamard\)"):
        load_model(str(copy))
