# SPDX-License-Identifier: Apache-2.0
"""Shared by the training scripts of all goldens: tokenizer, training loop, routing balance, hub
checkpoint, command line.

A golden's own ``train.py`` describes its model (`Family`) and calls `main`. The text is the
validation split of WikiText-2 (word level); the test split is never read. The same seed, versions
and machine give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

VOCAB = 2048
SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A golden's model.

    ``text``: the module with ``embed_tokens`` and ``layers``. ``balance``: ``bias`` moves the
    family's correction bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), ``loss`` adds a
    balancing loss of each layer (Switch Transformers, arXiv 2101.03961, section 2.2). ``frozen``:
    parts of names of parameters that text does not train. ``float32``: hub names that are float32
    in the release. ``as_released``: makes config.json as the release writes it of transformers'.
    ``attention``, ``experts``: transformers' implementations to train with.
    """

    config: Callable[[], PretrainedConfig]
    model: type[PreTrainedModel]
    text: Callable[[PreTrainedModel], torch.nn.Module]
    balance: Literal["bias", "loss"]
    specials: tuple[str, ...] = SPECIALS
    frozen: tuple[str, ...] = ()
    float32: re.Pattern[str] | None = None
    as_released: Callable[[dict[str, Any]], dict[str, Any]] = dict
    attention: str = "sdpa"
    experts: str = "grouped_mm"


def train_tokenizer(text: str, specials: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE of ``VOCAB`` entries."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tok


def routers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the routers, whose output is (logits, scores, indices [tokens, chosen])."""
    return [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]


def add_dropout(text: torch.nn.Module, p: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Add residual dropout by hooks; the families have none of their own, and the text is small."""

    def hook(module: torch.nn.Module, _args: object, out: object) -> object:
        if not module.training:
            return out
        if isinstance(out, tuple):
            return (torch.nn.functional.dropout(out[0], p), *out[1:])
        return torch.nn.functional.dropout(out, p)

    sites = [text.embed_tokens] + [m for layer in text.layers for m in (layer.self_attn, layer.mlp)]
    return [m.register_forward_hook(hook) for m in sites]


class Balance:
    """Counts the experts that each router chose in a step, and balances them."""

    def __init__(self, family: Family, model: torch.nn.Module, rate: float) -> None:
        self.family, self.rate, self.routers = family, rate, routers_of(model)
        self.loads = [torch.zeros(r.num_experts) for r in self.routers]
        self.losses: list[torch.Tensor] = []
        self.handles = [r.register_forward_hook(self._hook(i)) for i, r in enumerate(self.routers)]

    def _hook(self, i: int) -> Callable[..., None]:
        def hook(router: torch.nn.Module, _args: object, out: tuple[torch.Tensor, ...]) -> None:
            chosen = torch.bincount(out[2].flatten(), minlength=self.loads[i].numel())
            self.loads[i] += chosen
            if self.family.balance == "loss":
                probability = torch.softmax(out[0].float(), -1).mean(0)
                self.losses.append(router.num_experts * (chosen / chosen.sum() * probability).sum())

        return hook

    def loss(self) -> torch.Tensor | float:
        """Return the balancing loss of this step."""
        loss = self.rate * sum(self.losses) if self.losses else 0.0
        self.losses = []
        return loss

    def step(self, warm: float) -> None:
        """Move the correction bias, where the family has one, and reset the counts."""
        with torch.no_grad():
            for router, load in zip(self.routers, self.loads, strict=True):
                if self.family.balance == "bias":
                    router.e_score_correction_bias += (
                        self.rate * warm * torch.sign(load.mean() - load)
                    )
                load.zero_()


def train(
    family: Family, model: PreTrainedModel, ids: torch.Tensor, args: argparse.Namespace
) -> float:
    """Train in place for ``args.steps``; return the last smoothed loss in nats per token."""
    generator = torch.Generator().manual_seed(args.seed)
    balance = Balance(family, model, args.balance_rate)
    handles = balance.handles + add_dropout(family.text(model), args.dropout)
    decay = [
        p
        for n, p in model.named_parameters()
        if p.ndim >= 2 and "vision" not in n and p.requires_grad
    ]
    plain = [p for p in model.parameters() if p.ndim < 2]
    opt = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": args.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    smooth = 0.0
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 100)
        lr = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in opt.param_groups:
            group["lr"] = lr
        starts = torch.randint(0, ids.numel() - args.window - 1, (args.batch,), generator=generator)
        x = torch.stack([ids[s : s + args.window] for s in starts.tolist()])
        model.train()
        loss = model(input_ids=x, labels=x).loss
        opt.zero_grad(set_to_none=True)
        (loss + balance.loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        shares = " ".join(f"{(v / v.sum()).min():.3f}" for v in balance.loads)
        balance.step(warm)
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0:
            seconds = time.perf_counter() - args.t0
            print(
                f"step {step}/{args.steps} loss {smooth:.3f} least share {shares} {seconds:.0f}s",
                flush=True,
            )
    for h in handles:
        h.remove()
    return smooth


def hub_tensors(model: PreTrainedModel, float32: re.Pattern[str] | None) -> dict[str, torch.Tensor]:
    """Return hub-named tensors in the dtypes of the release: BF16, and float32 where the release
    has float32.
    """
    state = revert_weight_conversion(model, dict(model.state_dict()))
    return {
        name: t.detach()
        .to(torch.float32 if float32 is not None and float32.search(name) else torch.bfloat16)
        .contiguous()
        .clone()
        for name, t in state.items()
    }


def config_of(family: Family, config: PretrainedConfig) -> dict[str, Any]:
    """Return the contents of config.json, as the release of the family spells them."""
    return family.as_released(json.loads(config.to_json_string(use_diff=True)))


def write(
    tensors: dict[str, torch.Tensor], config: dict[str, object], tok: Tokenizer, out: Path
) -> None:
    """Write two shards, index, config, tokenizer, generation config and chat template."""
    out.mkdir(parents=True)
    names = sorted(
        tensors, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)]
    )
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
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": 0,
            "eos_token_id": 0,
            "do_sample": True,
            "temperature": 1.0,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIALS[0],
            "eos_token": SPECIALS[0],
            "pad_token": SPECIALS[0],
            "model_max_length": 2048,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tok.save(str(out / "tokenizer.json"))


def arguments(description: str, **defaults: float) -> argparse.Namespace:
    """Parse the command line; ``defaults`` are a golden's own."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seed", type=int, default=20261121)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--batch", type=int, default=6)
    p.add_argument("--window", type=int, default=512)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--weight-decay", type=float, default=0.3)
    p.add_argument("--dropout", type=float, default=0.3)
    p.add_argument(
        "--balance-rate",
        type=float,
        default=2e-3,
        help="of the correction bias, or of the balancing loss",
    )
    p.add_argument("--threads", type=int, default=1)
    p.set_defaults(**defaults)
    args = p.parse_args()
    args.t0 = time.perf_counter()
    return args


def main(family: Family, description: str, **defaults: float) -> None:
    """Train and write; print the fields of the manifest."""
    args = arguments(description, **defaults)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    text = args.text.read_text(encoding="utf-8").replace(" <unk>", "")
    tok = train_tokenizer(text, family.specials)
    ids = torch.tensor(tok.encode(text).ids)
    config = family.config()
    config._attn_implementation = family.attention
    model = family.model(config).float()
    model.set_experts_implementation(family.experts)
    for name, prm in model.named_parameters():
        if any(part in name for part in family.frozen):
            prm.requires_grad_(False)
    n = sum(q.numel() for q in model.parameters())
    print(f"{n:,} parameters, {ids.numel():,} tokens", flush=True)
    loss = train(family, model, ids, args)
    write(hub_tensors(model, family.float32), config_of(family, config), tok, args.out)
    arguments_ = {k: str(v) for k, v in vars(args).items()}
    seconds = time.perf_counter() - args.t0
    print(
        json.dumps(
            {
                "parameters": n,
                "train_tokens": ids.numel(),
                "last_loss": loss,
                "seconds": seconds,
                "args": arguments_,
            }
        )
    )
