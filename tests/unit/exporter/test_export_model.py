# SPDX-License-Identifier: Apache-2.0
"""A model in memory is exported as its checkpoint on disk is: the same bytes under the same
names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import exporter
import verifier
from verifier.errors import PlanError, UnsupportedConversion
from verifier.selftest import CheckpointEditor


def load(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(
        folder, dtype=torch.bfloat16
    )


@pytest.mark.parametrize("with_source", [True, False])
def test_qwen3_moe(kit, nvfp4, with_source: bool, tmp_path: Path) -> None:
    model = load(kit.qwen)
    source = kit.qwen if with_source else None
    out = tmp_path / "out"
    manifest = exporter.export_model(
        model, out, recipe="nvfp4_experts_only", input_scale="one", source=source
    )
    assert kit.read(out) == kit.read(nvfp4.path)
    assert manifest.sources[0].uri == "memory:Qwen3MoeForCausalLM"
    assert verifier.check(str(out), base=str(kit.qwen), depth="payload").verdict == "passed"


def test_minimax_m3(kit, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "modelopt" / "src_m3"
    exporter.export_model(load(source), tmp_path / "held", recipe="mxfp8_default", source=source)
    exporter.export(source, tmp_path / "disk", recipe="mxfp8_default")
    assert kit.read(tmp_path / "held") == kit.read(tmp_path / "disk")
    held, disk = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("held", "disk"))
    assert held == disk


def test_what_a_model_rounds_or_has_no_place_for_comes_from_its_source(kit, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(kit.qwen, base)
    folder = CheckpointEditor(base)
    names = ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
    rng = np.random.default_rng(5)
    for name in names:
        folder.store(
            name, rng.standard_normal(folder.tensors()[name].shape).astype(np.float32) * 0.02
        )
    folder.add("model.mtp.norm.weight", np.ones(128, np.float32))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    model = load(base)
    with torch.no_grad():  # training changed this one
        model.model.layers[1].mlp.gate.weight.mul_(1.5)
    exporter.export_model(
        model, tmp_path / "out", recipe="nvfp4_experts_only", input_scale="one", source=base
    )
    made, was = kit.read(tmp_path / "out"), kit.read(base)
    assert made[names[0]] == was[names[0]]
    assert made["model.mtp.norm.weight"] == was["model.mtp.norm.weight"]
    trained = model.model.layers[1].mlp.gate.weight.detach().view(torch.uint8).numpy().tobytes()
    assert made[names[1]].dtype == "BF16" and made[names[1]].data == trained
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_small_shards_and_pieces_hold_the_same_bytes(
    kit, nvfp4, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("exporter.stream.shards.COPY_BYTES", 1000)
    given = {"recipe": "nvfp4_experts_only", "input_scale": "one", "shard_bytes": 100_000}
    exporter.export_model(load(kit.qwen), tmp_path / "out", **given)
    assert kit.read(tmp_path / "out") == kit.read(nvfp4.path)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_a_model_without_values_and_one_that_lacks_a_tensor(kit, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(kit.qwen)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    given: dict[str, Any] = {"recipe": "nvfp4_experts_only", "input_scale": "one"}
    with pytest.raises(PlanError, match="on the meta device"):
        exporter.export_model(model, tmp_path / "out", **given)
    base = tmp_path / "base"
    shutil.copytree(kit.qwen, base)
    CheckpointEditor(base).drop(["model.norm.weight"])
    with pytest.raises(UnsupportedConversion, match=r"model\.norm\.weight: rename"):
        exporter.export_model(load(kit.qwen), tmp_path / "out", source=base, **given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
