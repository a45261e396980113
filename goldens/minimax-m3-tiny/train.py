# SPDX-License-Identifier: Apache-2.0
"""Train the tiny MiniMax-M3 of this folder and write it as a hub checkpoint.

    python goldens/minimax-m3-tiny/train.py --text wiki.valid.tokens --out goldens/minimax-m3-tiny/bf16

The text is the validation split of WikiText-2 (word level); the test split is never read. The model has every
structural feature of the released MiniMax-M3: a dense first layer, sparse layers with a shared expert and a
lightning indexer, a vision tower and projector, float32 router, correction bias and patch embedding.
transformers' ``save_pretrained`` would recast those three, so this script writes the shards itself.
Routing is balanced with the family's own correction bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig
from transformers.core_model_loading import revert_weight_conversion

VOCAB = 2048
SPECIALS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>"]
FLOAT32 = re.compile(r"block_sparse_moe\.(gate\.weight|e_score_correction_bias)$|patch_embedding\.weight$")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model_config() -> MiniMaxM3VLConfig:
    """Return the tiny configuration; every in-dimension is a multiple of 32."""
    layers = 4
    text = {
        "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 128, "dense_intermediate_size": 256,
        "shared_intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "rotary_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "num_local_experts": 8, "num_experts_per_tok": 2, "routed_scaling_factor": 2.0,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
        "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * (layers - 1),
        "index_n_heads": 2, "index_head_dim": 32, "index_block_size": 32, "index_topk_blocks": 8,
        "index_local_blocks": 2, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 56, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
    }
    return MiniMaxM3VLConfig(
        text_config=text, vision_config=vision, image_token_index=3, video_token_index=4,
        projector_hidden_size=128, architectures=["MiniMaxM3SparseForConditionalGeneration"], dtype="bfloat16",
    )


def train_tokenizer(text: str) -> Tokenizer:
    """Return a byte-level BPE of ``VOCAB`` entries."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tok


def add_dropout(model: torch.nn.Module, p: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Add residual dropout by hooks; the family has none of its own, and the text is small."""

    def hook(module: torch.nn.Module, _args: object, out: object) -> object:
        if not module.training:
            return out
        if isinstance(out, tuple):
            return (torch.nn.functional.dropout(out[0], p), *out[1:])
        return torch.nn.functional.dropout(out, p)

    text = model.model.language_model
    sites = [text.embed_tokens] + [m for layer in text.layers for m in (layer.self_attn, layer.mlp)]
    return [m.register_forward_hook(hook) for m in sites]


def train(model: torch.nn.Module, ids: torch.Tensor, args: argparse.Namespace) -> float:
    """Train in place for ``args.minutes``; return the last smoothed loss in nats a token."""
    generator = torch.Generator().manual_seed(args.seed)
    routers = [m for m in model.modules() if type(m).__name__ == "MiniMaxM3VLTopKRouter"]
    loads = [torch.zeros(r.num_experts) for r in routers]

    def count(i: int):
        def hook(_m: torch.nn.Module, _a: object, out: tuple) -> None:
            loads[i] += torch.bincount(out[2].flatten(), minlength=loads[i].numel())
        return hook

    handles = [r.register_forward_hook(count(i)) for i, r in enumerate(routers)]
    handles += add_dropout(model, args.dropout)
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2 and "vision" not in n and p.requires_grad]
    plain = [p for p in model.parameters() if p.ndim < 2]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
                            lr=args.lr, betas=(0.9, 0.95))
    step, smooth = 0, 0.0
    while step < args.steps:
        warm = min(1.0, (step + 1) / 100)
        lr = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in opt.param_groups:
            group["lr"] = lr
        starts = torch.randint(0, ids.numel() - args.window - 1, (args.batch,), generator=generator)
        x = torch.stack([ids[s : s + args.window] for s in starts.tolist()])
        model.train()
        loss = model(input_ids=x, labels=x).loss
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        with torch.no_grad():
            for router, load in zip(routers, loads, strict=True):
                router.e_score_correction_bias += args.bias_rate * warm * torch.sign(load.mean() - load)
                load.zero_()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step}/{args.steps} loss {smooth:.3f} {time.perf_counter() - args.t0:.0f}s", flush=True)
        step += 1
    for h in handles:
        h.remove()
    return smooth


def hub_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return hub-named tensors in the dtypes of the release: BF16, and float32 where the release has it."""
    state = revert_weight_conversion(model, dict(model.state_dict()))
    return {
        name: t.detach().to(torch.float32 if FLOAT32.search(name) else torch.bfloat16).contiguous().clone()
        for name, t in state.items()
    }


def write(tensors: dict[str, torch.Tensor], config: MiniMaxM3VLConfig, tok: Tokenizer, out: Path) -> None:
    """Write two shards, index, config, tokenizer, generation config and chat template."""
    out.mkdir(parents=True)
    names = sorted(tensors, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])
    total = sum(t.nbytes for t in tensors.values())
    shards: list[list[str]] = [[], []]
    done = 0
    for n in names:
        shards[0 if done < total / 2 else 1].append(n)
        done += tensors[n].nbytes
    weight_map = {}
    for i, members in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: tensors[n] for n in members}, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files = {
        "model.safetensors.index.json": index,
        "config.json": json.loads(config.to_json_string(use_diff=True)),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 1.0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": SPECIALS[0],
            "pad_token": SPECIALS[0], "model_max_length": 2048, "clean_up_tokenization_spaces": False,
        },
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tok.save(str(out / "tokenizer.json"))


def main() -> None:
    """Train and write; print what the manifest records."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seed", type=int, default=20261121)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--batch", type=int, default=6)
    p.add_argument("--window", type=int, default=512)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--weight-decay", type=float, default=0.3)
    p.add_argument("--dropout", type=float, default=0.3)
    p.add_argument("--bias-rate", type=float, default=2e-3)
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    args.t0 = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    text = args.text.read_text(encoding="utf-8").replace(" <unk>", "")
    tok = train_tokenizer(text)
    ids = torch.tensor(tok.encode(text).ids)
    config = model_config()
    config._attn_implementation = "sdpa"
    model = MiniMaxM3SparseForConditionalGeneration(config).float()
    model.set_experts_implementation("grouped_mm")
    for name, prm in model.named_parameters():
        if "vision" in name or "projector" in name or "indexer" in name:
            prm.requires_grad_(False)
    n = sum(q.numel() for q in model.parameters())
    print(f"{n:,} parameters, {ids.numel():,} tokens", flush=True)
    loss = train(model, ids, args)
    write(hub_tensors(model), config, tok, args.out)
    print(json.dumps({"parameters": n, "train_tokens": ids.numel(), "last_loss": loss,
                      "seconds": time.perf_counter() - args.t0, "args": {k: str(v) for k, v in vars(args).items()}}))


if __name__ == "__main__":
    main()
