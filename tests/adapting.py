# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the adapters' tests, what they decode to by numpy alone, and one rank of the
two-process test.

``python -m tests.adapting FOLDER RANK`` is that rank: it loads FOLDER/m3 and FOLDER/qwen through
distributed checkpointing in several shardings and writes what it saw to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests import oracle
from tests.paths import ROOT, TESTS

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
QWEN = TESTS / "data" / "modelopt" / "src_qwen3moe"
State = dict[str, torch.Tensor]


def read(folder: Path) -> State:
    """Return every tensor of a folder, each with memory of its own."""
    found: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json."""
    return json.loads((folder / "config.json").read_text())


def codes(out: int, in_: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random finite E4M3 codes [out, in] and scale bytes [out, ceil(in/32)] that differ from
    block to block.
    """
    rng = np.random.default_rng(seed)
    code = rng.integers(0, 127, (out, in_), np.uint8) | (
        rng.integers(0, 2, (out, in_), np.uint8) << 7
    )
    scale = rng.integers(100, 127, (out, -(-in_ // 32)), np.uint8)
    return torch.from_numpy(code).view(torch.float8_e4m3fn), torch.from_numpy(scale)


def values(
    code: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Return what MXFP8 stands for, by the oracle."""
    found = oracle.mxfp8_decode(
        {"weight": code.view(torch.uint8).numpy(), "weight_scale": scale.numpy()}
    )
    return torch.from_numpy(found).to(dtype)


def plain(state: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> State:
    """Return a hub state dict with its MXFP8 weights decoded and its scales gone."""
    found: State = {}
    for name, tensor in state.items():
        scale = next((state[s] for s in (f"{name}_scale_inv", f"{name}_scale") if s in state), None)
        if not name.endswith(("_scale_inv", "_scale")):
            found[name] = tensor if scale is None else values(tensor, scale, dtype)
    return found


def with_mtp(state: State) -> State:
    """Return the golden with a top-level MTP module: layer 2 once more, and what joins it to the
    trunk, as released.
    """
    hidden = state["language_model.model.norm.weight"].shape[0]
    head = "language_model.model.layers.2."
    found = dict(state)
    for name, tensor in state.items():
        if name.startswith(head):
            found[f"mtp.layers.0.transformer_layer.{name.removeprefix(head)}"] = tensor.clone()
    for leaf in ("enorm", "hnorm", "final_layernorm"):
        found[f"mtp.layers.0.{leaf}.weight"] = torch.randn(hidden).bfloat16()
    code, scale = codes(hidden, 2 * hidden, seed=3)
    found |= {"mtp.layers.0.eh_proj.weight": code, "mtp.layers.0.eh_proj.weight_scale_inv": scale}
    return found


def mtp_config() -> dict[str, Any]:
    """Return the config of the MXFP8 golden with one MTP module."""
    config = config_of(GOLDEN / "mxfp8")
    config["text_config"]["num_mtp_modules"] = 1
    return config


def ragged() -> tuple[dict[str, Any], State]:
    """Return a Qwen3-MoE in ModelOpt's MXFP8, of widths that neither 32 nor a rank's share
    divides.
    """
    config = config_of(QWEN) | {
        "hidden_size": 80,
        "moe_intermediate_size": 48,
        "num_local_experts": 4,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "MXFP8",
            "ignore": ["lm_head", "*.mlp.gate"],
        },
    }
    head = "model.layers.0."
    shapes = {f"{head}self_attn.{p}_proj": (64, 80) for p in "kv"} | {
        f"{head}self_attn.q_proj": (128, 80),
        f"{head}self_attn.o_proj": (80, 128),
        **{f"{head}mlp.experts.{e}.{p}_proj": (48, 80) for e in range(4) for p in ("gate", "up")},
        **{f"{head}mlp.experts.{e}.down_proj": (80, 48) for e in range(4)},
    }
    state: State = {}
    for i, (module, (out, in_)) in enumerate(shapes.items()):
        state[f"{module}.weight"], state[f"{module}.weight_scale"] = codes(out, in_, seed=i)
    generator = torch.Generator().manual_seed(5)
    rest = {
        "model.embed_tokens": (64, 80),
        "lm_head": (64, 80),
        f"{head}mlp.gate": (4, 80),
        "model.norm": (80,),
    }
    rest |= {f"{head}{n}": (80,) for n in ("input_layernorm", "post_attention_layernorm")}
    rest |= {f"{head}self_attn.{n}": (32,) for n in ("q_norm", "k_norm")}
    for module, shape in rest.items():
        state[f"{module}.weight"] = torch.randn(shape, generator=generator).bfloat16()
    return config, state


def write(folder: Path, config: Mapping[str, Any], state: State) -> Path:
    """Write a checkpoint of one file."""
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- one rank


def main(folder: Path, rank: int) -> None:
    """Run every sharding and write what was seen."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    line = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    experts = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    tall, wide = (init_device_mesh("cpu", s, mesh_dim_names=("a", "b")) for s in ((2, 1), (1, 2)))
    crossed = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    from torch.distributed.tensor import Replicate, Shard

    shardings: dict[str, tuple[Any, ...]] = {
        # name: mesh and placements of weights, mesh and placements of stacks, device_mesh
        "dim0": (line, [Shard(0)], experts, [Shard(0)], experts),
        "dim1": (line, [Shard(1)], line, [Shard(1)], None),
        "both_tall": (tall, [Shard(0), Shard(1)], tall, [Shard(1), Replicate()], None),
        "both_wide": (wide, [Shard(0), Shard(1)], wide, [Replicate(), Shard(1)], None),
        "crossed": (crossed, [Shard(1), Shard(0)], crossed, [Shard(1), Shard(0)], crossed),
    }
    seen = {}
    for which in ("m3", "qwen"):
        for name, sharding in shardings.items():
            seen[f"{which}-{name}"] = _one(
                folder / which, folder / "saved" / f"{which}-{name}", sharding
            )
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def _one(source: Path, saved: Path, sharding: tuple[Any, ...]) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor

    from exporter.adapters import StateDictAdapter

    mesh, placements, stack_mesh, stack_placements, device_mesh = sharding
    expected = native_of(source)
    adapter = StateDictAdapter(config_of(source))

    def empty(name: str, value: torch.Tensor) -> torch.Tensor:
        zero = torch.full_like(value, 3)  # what is not overwritten shows
        if value.ndim == 3:
            return shard(zero, stack_mesh, stack_placements)
        return shard(zero, mesh, placements) if value.ndim == 2 else zero

    model = {n: empty(n, v) for n, v in expected.items()}
    hub = adapter.to_hf(model, quantization=True)
    asked: list[str] = []
    dcp.load(
        hub, storage_reader=dcp.HuggingFaceStorageReader(str(source)), planner=planner(asked.extend)
    )
    scales = {n: t for n, t in hub.items() if "_scale" in n}
    lost = {n: t for n, t in hub.items() if n not in scales}
    loaded = adapter.from_hf(hub, device_mesh)
    again = {n: (torch.zeros_like(t)) for n, t in adapter.to_hf(loaded).items()}
    dcp.save(adapter.to_hf(loaded), storage_writer=dcp.FileSystemWriter(str(saved)))
    dcp.load(again, storage_reader=dcp.FileSystemReader(str(saved)))
    returned = adapter.from_hf(again, device_mesh)
    return {
        "left": sorted(hub),
        "names": sorted(loaded) == sorted(expected),
        "wrong": [n for n, v in loaded.items() if not same(full(v), expected[n])],
        "changed": [n for n, v in returned.items() if not same(full(v), expected[n])],
        "unlike": [n for n, v in loaded.items() if laid_out(v) != laid_out(model[n])],
        "sharded": sum(
            isinstance(v, DTensor) and v.to_local().numel() < v.numel() for v in loaded.values()
        ),
        "asked": sorted(n for n in asked if "_scale" in n),
        "placeholders": all(type(t) is torch.Tensor for t in scales.values()),
        "shapes": {n: list(t.shape) for n, t in scales.items()},
        "without_scales": refusal(lambda: adapter.from_hf(lost, device_mesh)),
    }


def native_of(folder: Path) -> State:
    """Return a checkpoint in the framework's names, decoded by numpy, stacked here and not by the
    adapter.
    """
    names = {
        "w1": "gate",
        "w3": "up",
        "w2": "down",
        "gate_proj": "gate",
        "up_proj": "up",
        "down_proj": "down",
    }
    found: State = {}
    stacks: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, tensor in plain(read(folder)).items():
        parts = name.split(".")
        if "experts" in parts:
            at = parts.index("experts")
            head = ".".join(parts[: at - 1])
            stacks.setdefault(head, {}).setdefault(names[parts[at + 2]], {})[int(parts[at + 1])] = (
                tensor
            )
        else:
            found[native_name(name)] = tensor
    for head, by in stacks.items():
        order = sorted(by["gate"])
        native = native_name(f"{head}.mlp.experts")
        found[f"{native}.gate_and_up_projs"] = torch.stack(
            [torch.cat([by["gate"][e], by["up"][e]]).t() for e in order]
        )
        found[f"{native}.down_projs"] = torch.stack([by["down"][e].t() for e in order])
    return {n: t.contiguous() for n, t in found.items()}


def native_name(hub: str) -> str:
    """Return a tensor's name in the framework, by the published list of NeMo AutoModel's."""
    name = hub.replace("language_model.", "", 1) if hub.startswith("language_model.") else hub
    if name.startswith("mtp."):
        name = f"model.{name}"
    if name.startswith(("multi_modal_projector.", "patch_merge_mlp.")):
        return f"vision_tower.{name}"
    for a, b in (
        (".block_sparse_moe.gate.", ".mlp.gate."),
        (".block_sparse_moe.e_score", ".mlp.gate.e_score"),
        (".block_sparse_moe.shared_experts.", ".shared_experts."),
        (".self_attn.index_", ".self_attn.indexer.index_"),
    ):
        name = name.replace(a, b)
    return name


def shard(value: torch.Tensor, mesh: Any, placements: Any) -> torch.Tensor:
    """Return a DTensor of a tensor that every rank has, without communication."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def full(value: torch.Tensor) -> torch.Tensor:
    """Return the whole of a DTensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def laid_out(value: torch.Tensor) -> tuple[str, list[int]]:
    """Return the placements of a DTensor, and its global shape."""
    return str(getattr(value, "placements", None)), list(value.shape)


def planner(tell: Callable[[list[str]], None]) -> Any:
    """Return a load planner that tells which tensors it asks for."""
    from torch.distributed.checkpoint import DefaultLoadPlanner

    class Telling(DefaultLoadPlanner):
        def create_local_plan(self) -> Any:
            plan = super().create_local_plan()
            tell([item.dest_index.fqn for item in plan.items])
            return plan

    return Telling()


def refusal(call: Callable[[], object]) -> str:
    """Return the message of the error that a call ends with, or nothing."""
    from verifier.errors import CkptgateError

    try:
        call()
    except CkptgateError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
