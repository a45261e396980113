# SPDX-License-Identifier: Apache-2.0
"""Write ``verifier/families/*.json``: the hub layout of each family, from what transformers itself saves.

    python tools/make_families.py [--check]

For each family two small models with different, telling dimensions are saved by ``save_pretrained``; names become
patterns, and each dimension the shortest product of config values that explains both. ``--check`` writes nothing and
fails where a committed file differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

OUT = Path(__file__).parent.parent / "verifier" / "families"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LAYER_KINDS = {"all", "sparse", "dense", "indexer"}


NUMBERS = {
    "vocab_size": (331, 337), "hidden_size": (114, 130), "intermediate_size": (208, 232), "num_attention_heads": (6, 10),
    "num_key_value_heads": (2, 5), "num_local_experts": (7, 9), "num_experts": (7, 9), "n_routed_experts": (14, 18),
    "moe_num_experts": (7, 9), "moe_intermediate_size": (40, 56), "shared_expert_intermediate_size": (88, 136),
    "n_shared_experts": (3, 2), "moe_num_shared_experts": (3, 2), "q_lora_rank": (34, 38), "kv_lora_rank": (22, 26),
    "qk_nope_head_dim": (44, 46), "qk_rope_head_dim": (12, 20), "v_head_dim": (52, 58), "num_experts_per_tok": (2, 2),
    "moe_k": (2, 2), "n_group": (2, 2), "topk_group": (1, 1),
}  # fmt: skip
"""Two telling values for each config key that decides a shape."""


def text_model(model_type: str, *, own_head_dim: bool = True, **more: Any) -> Any:
    """Return the config function of a text family: `NUMBERS` where its config has the key, and ``more``.

    ``own_head_dim`` says whether its classes take a ``head_dim`` that is not hidden size / heads.
    """

    def config(v: int) -> Any:
        base = transformers.AutoConfig.for_model(model_type)
        given: dict[str, Any] = {k: n[v] for k, n in NUMBERS.items() if hasattr(base, k)}
        if own_head_dim and "kv_lora_rank" not in given:
            given["head_dim"] = (24, 28)[v]  # classes without the key take it all the same
        given |= {k: 0 for k in ("pad_token_id", "bos_token_id", "eos_token_id") if hasattr(base, k)}
        given |= {"num_hidden_layers": 3, "tie_word_embeddings": False} | more
        return transformers.AutoConfig.for_model(model_type, **given)

    return config


def llama(v: int) -> Any:
    """Return a Llama config; ``v`` chooses between two sets of dimensions."""
    return transformers.LlamaConfig(
        vocab_size=(331, 337)[v], hidden_size=(114, 130)[v], intermediate_size=(208, 232)[v], num_hidden_layers=3,
        num_attention_heads=(6, 10)[v], num_key_value_heads=(2, 5)[v], head_dim=(24, 28)[v], tie_word_embeddings=False,
    )


def mixtral(v: int) -> Any:
    """Return a Mixtral config."""
    return transformers.MixtralConfig(
        vocab_size=(331, 337)[v], hidden_size=(114, 130)[v], intermediate_size=(208, 232)[v], num_hidden_layers=3,
        num_attention_heads=(6, 10)[v], num_key_value_heads=(2, 5)[v], head_dim=(24, 28)[v], num_local_experts=(7, 9)[v],
        tie_word_embeddings=False,
    )


def qwen3_moe(v: int) -> Any:
    """Return a Qwen3-MoE config with a dense layer."""
    return transformers.Qwen3MoeConfig(
        vocab_size=(331, 337)[v], hidden_size=(114, 130)[v], intermediate_size=(208, 232)[v], num_hidden_layers=3,
        num_attention_heads=(6, 10)[v], num_key_value_heads=(2, 5)[v], head_dim=(24, 28)[v], num_experts=(7, 9)[v],
        moe_intermediate_size=(40, 56)[v], mlp_only_layers=[1], decoder_sparse_step=1, tie_word_embeddings=False,
    )


def minimax_m3_vl(v: int) -> Any:
    """Return a MiniMax-M3 config: dense first layer, one sparse layer without an indexer, one with."""
    text = {
        "vocab_size": (331, 337)[v], "hidden_size": (114, 130)[v], "intermediate_size": (40, 56)[v],
        "dense_intermediate_size": (208, 232)[v], "shared_intermediate_size": (88, 136)[v], "num_hidden_layers": 3,
        "num_attention_heads": (6, 10)[v], "num_key_value_heads": (2, 5)[v], "head_dim": (24, 28)[v], "rotary_dim": 8,
        "num_local_experts": (7, 9)[v], "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "full_attention", "minimax_m3_sparse"], "index_n_heads": (3, 4)[v],
        "index_head_dim": (23, 29)[v], "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    vision = {"image_size": 84, "patch_size": 7, "temporal_patch_size": (2, 3)[v], "spatial_merge_size": (3, 2)[v],
              "hidden_size": (72, 84)[v], "intermediate_size": (152, 184)[v], "num_hidden_layers": 2,
              "num_attention_heads": (3, 6)[v], "num_channels": (5, 4)[v]}  # fmt: skip
    return transformers.MiniMaxM3VLConfig(
        text_config=text, vision_config=vision, image_token_index=3, video_token_index=4,
        projector_hidden_size=(116, 124)[v],
    )


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"config": llama, "model": "LlamaForCausalLM", "flags": ["attention_bias", "mlp_bias"]},
    "mixtral": {"config": mixtral, "model": "MixtralForCausalLM", "flags": []},
    "qwen3_moe": {"config": qwen3_moe, "model": "Qwen3MoeForCausalLM", "flags": ["attention_bias"]},
    "qwen3": {"config": text_model("qwen3"), "model": "Qwen3ForCausalLM", "flags": ["attention_bias"]},
    "qwen2": {"config": text_model("qwen2"), "model": "Qwen2ForCausalLM", "flags": []},
    "qwen2_moe": {"config": text_model("qwen2_moe", mlp_only_layers=[1]), "model": "Qwen2MoeForCausalLM", "flags": []},
    "mistral": {"config": text_model("mistral"), "model": "MistralForCausalLM", "flags": []},
    "minimax_m2": {"config": text_model("minimax_m2"), "model": "MiniMaxM2ForCausalLM", "flags": []},
    "olmoe": {"config": text_model("olmoe", own_head_dim=False), "model": "OlmoeForCausalLM", "flags": ["attention_bias"]},
    "phimoe": {
        "config": text_model("phimoe"), "model": "PhimoeForCausalLM", "flags": ["attention_bias", "lm_head_bias"],
    },
    "deepseek_v3": {
        "config": text_model("deepseek_v3", first_k_dense_replace=1), "model": "DeepseekV3ForCausalLM",
        "flags": ["attention_bias"], "nullable": ["q_lora_rank"], "more_layers": "num_nextn_predict_layers",
    },
    "glm4_moe": {
        "config": text_model("glm4_moe", first_k_dense_replace=1), "model": "Glm4MoeForCausalLM",
        "flags": ["attention_bias", "use_qk_norm"], "more_layers": "num_nextn_predict_layers",
    },
    "dots1": {
        "config": text_model("dots1", first_k_dense_replace=1), "model": "Dots1ForCausalLM", "flags": ["attention_bias"],
    },
    "ernie4_5_moe": {
        "config": text_model("ernie4_5_moe", mlp_layer_types=["dense", "sparse", "sparse"]),
        "model": "Ernie4_5_MoeForCausalLM", "flags": ["use_bias"], "optional": ["^model\\.mtp_"],
    },
    "minimax_m3_vl": {
        "config": minimax_m3_vl, "model": "MiniMaxM3SparseForConditionalGeneration", "flags": [],
        "optional": ["^mtp\\."],
    },
}  # fmt: skip
SPELLINGS = {
    "num_local_experts": ["num_experts", "n_routed_experts"],
    "num_experts": ["num_local_experts"],
    "n_routed_experts": ["num_experts", "num_local_experts"],
    "text_config.index_n_heads": ["text_config.sparse_attention_config.sparse_num_index_heads"],
    "text_config.index_head_dim": ["text_config.sparse_attention_config.sparse_index_dim"],
    "vision_config.spatial_merge_size": ["vision_config.img_token_compression_config.spatial_merge_size"],
    "vision_config.temporal_patch_size": ["vision_config.img_token_compression_config.temporal_patch_size"],
}


def saved(config: Any, model: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return names and shapes as saved, and as in memory."""
    torch.manual_seed(0)
    built = getattr(transformers, model)(config)
    memory = {n: tuple(t.shape) for n, t in built.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(folder)
        names = {}
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, "pt") as handle:
                names |= {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}
    return names, memory


def pattern(name: str) -> str:
    """Return a name with its numbers replaced by the range that they run over."""
    name = re.sub(r"(\.experts)\.\d+\.", r"\1.{expert}.", name)
    if "vision" in name:
        return re.sub(r"(layers)\.\d+\.", r"\1.{vision_layer}.", name)
    return re.sub(r"(layers)\.\d+\.", r"\1.{layer}.", name)


def values(config: Any) -> dict[str, int]:
    """Return the whole numbers of a config by dotted path."""
    found: dict[str, int] = {}

    def walk(prefix: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            if type(value) is int and value > 1:
                found[prefix + key] = value
            elif isinstance(value, dict):
                walk(f"{prefix}{key}.", value)

    walk("", config.to_dict())
    if "qk_rope_head_dim" in found:
        found.pop("head_dim", None)  # transformers' own, derived
    elif "head_dim" not in found and {"hidden_size", "num_attention_heads"} <= found.keys():
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    skip = re.compile(
        r"(_token_id|_token_index|rotary_dim|max_position|merged_hidden|topk|block|per_tok|image_size|window|"
        r"num_hidden_layers|qk_head_dim|n_group|window_layers|num_nextn)"
    )
    return {k: v for k, v in found.items() if not skip.search(k)}


def explain(dims: tuple[int, int], tables: list[dict[str, int]]) -> str:
    """Return the shortest product of config paths that gives both observed sizes."""
    paths = sorted(set(tables[0]) & set(tables[1]), key=lambda p: (p.count("."), len(p)))
    for count in (1, 2, 3):
        for combo in itertools.combinations_with_replacement(paths, count):
            if all(_product(t, combo) == d for t, d in zip(tables, dims, strict=True)):
                return "*".join(combo)
    if dims[0] == dims[1]:
        return str(dims[0])
    for numbers in ((2,), (3,)):
        for path in paths:
            if all(numbers[0] * t[path] == d for t, d in zip(tables, dims, strict=True)):
                return f"{numbers[0]}*{path}"
    pairs = [c for n in (1, 2) for c in itertools.combinations_with_replacement(paths, n)]
    sums = {tuple(_product(t, c) for t in tables): "*".join(c) for c in reversed(pairs)}
    for first, name in reversed(sums.items()):
        second = sums.get(tuple(d - f for d, f in zip(dims, first, strict=True)))
        if second is not None:
            return f"{name}+{second}"
    raise SystemExit(f"no product of config values explains {dims}")


def _product(table: dict[str, int], paths: tuple[str, ...]) -> int:
    total = 1
    for p in paths:
        total *= table[p]
    return total


def layer_kind(name: str, layers: set[int], config: Any) -> str:
    """Return which layers of the text model hold a tensor."""
    text = getattr(config, "text_config", config)
    everything = set(range(text.num_hidden_layers))
    mlp = getattr(text, "mlp_layer_types", None)
    if mlp is None:
        dense = set(getattr(text, "mlp_only_layers", None) or range(getattr(text, "first_k_dense_replace", 0)))
    else:
        dense = {i for i, k in enumerate(mlp) if k == "dense"}
    kinds = {"all": everything, "dense": dense, "sparse": everything - dense}
    kinds["indexer"] = {i for i, k in enumerate(getattr(text, "layer_types", None) or []) if "sparse" in k}
    for kind, members in kinds.items():
        if members and members == layers:
            return kind
    raise SystemExit(f"{name}: no kind of layer explains {sorted(layers)}")


def make(model_type: str) -> dict[str, Any]:
    """Return the family data of one model type."""
    spec = FAMILIES[model_type]
    configs = [spec["config"](0), spec["config"](1)]
    observed = [saved(c, spec["model"]) for c in configs]
    tables = [values(c) for c in configs]
    tensors, seen = [], {}
    for name in observed[0][0]:
        seen.setdefault(pattern(name), []).append(name)
    shapes_1 = {pattern(n): s for n, s in observed[1][0].items()}
    for pat, names in seen.items():
        shape = [explain((a, b), tables) for a, b in zip(observed[0][0][names[0]], shapes_1[pat], strict=True)]
        entry: dict[str, Any] = {"name": pat, "shape": shape}
        if "{layer}" in pat:
            entry["layers"] = layer_kind(pat, {int(re.search(r"layers\.(\d+)", n)[1]) for n in names}, configs[0])
        tensors.append(entry)
    for flag in spec["flags"]:
        tensors += _flagged(spec, flag, seen, tables)
    for key in spec.get("nullable", []):
        tensors = _nullable(spec, key, tensors, tables)
    memory = sorted({pattern(n) for n in observed[0][1]} - set(seen))
    used = {p for t in tensors for d in t["shape"] for p in re.split(r"[*+]", d) if not p.isdigit()}
    text = "text_config." if hasattr(configs[0], "text_config") else ""
    experts = next((p for p in EXPERTS if text + p in tables[0]), None)
    ranges = {"layer": text + "num_hidden_layers"}
    if experts:
        ranges["expert"] = text + experts
    if any("{vision_layer}" in p for p in seen):
        ranges["vision_layer"] = "vision_config.num_hidden_layers"
    deciding = {text + k for k in ("first_k_dense_replace", "moe_layer_start_index", "decoder_sparse_step")}
    defaults = _defaults(type(configs[0]), used | set(ranges.values()) | deciding)
    return {
        "model_type": model_type,
        "made_by": f"tools/make_families.py, transformers {transformers.__version__}, {spec['model']}",
        "text": text, "ranges": ranges, "defaults": defaults,
        "spellings": {p: SPELLINGS[p] for p in sorted(used | set(ranges.values())) if p in SPELLINGS},
        "optional": spec.get("optional", []), "more_layers": spec.get("more_layers", ""),
        "tensors": sorted(tensors, key=lambda t: t["name"]),
        "in_memory": memory,
    }  # fmt: skip


def _flagged(spec: dict[str, Any], flag: str, seen: dict[str, Any], tables: list[dict[str, int]]) -> list[dict[str, Any]]:
    config = [spec["config"](0), spec["config"](1)]
    for c in config:
        setattr(c, flag, True)
    found = [saved(c, spec["model"])[0] for c in config]
    one = {pattern(n): s for n, s in found[1].items()}
    more: dict[str, Any] = {}
    for name, shape in found[0].items():
        pat = pattern(name)
        if pat in seen:
            continue
        dims = [explain((a, b), tables) for a, b in zip(shape, one[pat], strict=True)]
        entry = more.setdefault(pat, {"name": pat, "shape": dims, "if": flag, "at": set()})
        entry["at"] |= {int(i) for i in re.findall(r"layers\.(\d+)", name)}
    for entry in more.values():
        at = entry.pop("at")
        if at:
            entry["layers"] = layer_kind(entry["name"], at, config[0])
    return list(more.values())


def _nullable(
    spec: dict[str, Any], key: str, tensors: list[dict[str, Any]], tables: list[dict[str, int]]
) -> list[dict[str, Any]]:
    """Return the tensors with those that only belong where a config value is set, or is null, marked so."""
    config = [spec["config"](0), spec["config"](1)]
    for c in config:
        setattr(c, key, None)
    found = [{pattern(n): s for n, s in saved(c, spec["model"])[0].items()} for c in config]
    known = {t["name"] for t in tensors}
    marked = [t if t["name"] in found[0] or t.get("if") else t | {"if": key} for t in tensors]
    for name, shape in found[0].items():
        if name not in known:
            dims = [explain((a, b), tables) for a, b in zip(shape, found[1][name], strict=True)]
            marked.append({"name": name, "shape": dims, "unless": key, "layers": "all"})
    return marked


def _defaults(cls: type, paths: set[str]) -> dict[str, int]:
    table = cls().to_dict()
    found: dict[str, int] = {}
    for path in sorted(paths):
        node: Any = table
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if type(node) is int:
            found[path] = node
    for path in [p for p in found if p.endswith("head_dim") and "index" not in p]:
        text = path.removesuffix("head_dim")
        hidden, heads = found.get(f"{text}hidden_size"), found.get(f"{text}num_attention_heads")
        if hidden and heads and hidden // heads == found[path] and not text:
            other = cls(hidden_size=2 * hidden).to_dict().get("head_dim")
            if other != found[path]:
                del found[path]  # transformers derives it
    return found


def main() -> int:
    """Write or compare every family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for model_type in FAMILIES:
        text = json.dumps(make(model_type), indent=1) + "\n"
        file = OUT / f"{model_type}.json"
        if args.check:
            old = json.loads(file.read_text())
            new = json.loads(text)
            old.pop("made_by"), new.pop("made_by")
            if old != new:
                stale.append(file.name)
        else:
            file.write_text(text)
            print(file.name, len(text), "bytes")
    if stale:
        print("differ from what transformers saves:", ", ".join(stale))
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
