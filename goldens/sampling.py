# SPDX-License-Identifier: Apache-2.0
"""Sample a golden's embedded corpus from the golden itself, measure it, and write the golden's
manifest.

    CKPTGATE_TEST_DATA=… python -m goldens.sampling goldens/qwen3-moe-tiny --train-log LOG

Documents are drawn at temperature 1 in the arithmetic in which they are scored (BF16, float32 where
the file is), so that the mean difference of a candidate on them estimates KL(base || candidate).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

from goldens.common import routers_of
from verifier.checkpoint import open_checkpoint
from verifier.gate.corpora import WIKITEXT, Corpus, load_corpus
from verifier.gate.jobs import Protocol, Window
from verifier.gate.score import score_run
from verifier.gate.statistics import perplexity
from verifier.gate.windows import windows_of
from verifier.load.model import load_model
from verifier.manifest import Manifest, Score, SourceRecord, digest

TRAINING_TEXT = "WikiText-2 v1 validation split (word level), CC BY-SA 3.0; not in this project"
SCRIPTS = ("common.py", "sampling.py", "train.py", "make_vendor.py")


def sample(model: torch.nn.Module, seed: int, documents: int, length: int) -> list[list[int]]:
    """Return ``documents`` sequences of ``length`` ids, each starting with the end-of-text
    token.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = []
    for start in range(0, documents, 8):
        count = min(8, documents - start)
        ids = torch.zeros((count, 1), dtype=torch.long)
        with torch.inference_mode():
            for _ in range(length - 1):
                # Without a cache: every step is the full forward pass that scores it later.
                logits = (
                    model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
                )
                ids = torch.cat(
                    [ids, torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)], 1
                )
        drawn += ids.tolist()
        print(f"sampled {len(drawn)} of {documents}", flush=True)
    return drawn


def routing(model: torch.nn.Module, windows: list[Window]) -> list[list[float]]:
    """Return each expert's share of its layer's token slots over some windows."""
    routers = routers_of(model)
    loads = [torch.zeros(r.num_experts) for r in routers]

    def count(load: torch.Tensor):
        def hook(_module: torch.nn.Module, _args: object, out: tuple) -> None:
            load.add_(torch.bincount(out[2].flatten(), minlength=load.numel()))

        return hook

    handles = [r.register_forward_hook(count(load)) for r, load in zip(routers, loads, strict=True)]
    with torch.inference_mode():
        for ids, _ in windows:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    for h in handles:
        h.remove()
    return [[round(v, 4) for v in (x / x.sum()).tolist()] for x in loads]


def unigram(train_ids: list[int], test_ids: list[int], vocabulary: int) -> float:
    """Return the perplexity of an add-one unigram model of the training text on the test text."""
    counts = torch.bincount(torch.tensor(train_ids), minlength=vocabulary).double() + 1
    nats = -(counts / counts.sum()).log()
    return math.exp(nats[torch.tensor(test_ids)].mean().item())


def measured(folder: Path, corpus: Corpus, protocol: Protocol) -> Score:
    """Score the BF16 golden on a corpus."""
    run = score_run(open_checkpoint(folder / "bf16"), corpus, protocol=protocol, workers=2)
    if run is None:
        raise SystemExit("no run")
    nats, tokens = run.sums.tolist(), run.tokens.tolist()
    return Score(
        corpus=corpus.name,
        protocol=run.header.key,
        documents=list(zip(nats, tokens, strict=True)),
        perplexity=perplexity(nats, tokens),
        extra={},
    )


def main() -> None:
    """Sample, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train-log", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--documents", type=int, default=72)
    parser.add_argument("--length", type=int, default=400, help="tokens per document")
    parser.add_argument(
        "--keep-corpus", action="store_true", help="measure again, with the existing corpus"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder: Path = args.folder
    loaded = load_model(str(folder / "bf16"))
    tok = Tokenizer.from_file(str(folder / "bf16" / "tokenizer.json"))
    ckpt = open_checkpoint(folder / "bf16")
    file = folder / "corpus.jsonl"
    header = {
        "sampled_from": ckpt.weights_sha256,
        "seed": args.seed,
        "temperature": 1.0,
        "window": 512,
    }
    if not args.keep_corpus:
        drawn = sample(loaded.model, args.seed, args.documents, args.length)
        rows = [json.dumps(header)] + [
            json.dumps({"ids": ids, "text": tok.decode(ids, skip_special_tokens=False)})
            for ids in drawn
        ]
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    own, wiki = load_corpus(str(file)), load_corpus(WIKITEXT)
    train = json.loads(args.train_log.read_text().splitlines()[-1])
    train["args"] = {k: Path(v).name for k, v in train["args"].items() if k != "t0"}
    shares = {"corpus.jsonl": routing(loaded.model, windows_of(own, None, 512))}
    encoded = tok.encode("\n".join(wiki.texts)).ids
    pieces = [(tuple(encoded[i : i + 512]), ()) for i in range(0, len(encoded) - 512, 512 * 8)]
    shares[WIKITEXT] = routing(loaded.model, pieces)
    lowest = min(v for layers in shares.values() for layer in layers for v in layer)
    print("lowest share of an expert:", lowest)
    text = (Path(os.environ["CKPTGATE_TEST_DATA"]) / "wikitext-2" / "wiki.valid.tokens").read_text(
        encoding="utf-8"
    )
    scores = [
        measured(folder, own, "tokens"),
        measured(folder, wiki, "tokens"),
        measured(folder, wiki, "lm-eval"),
    ]
    baseline = unigram(tok.encode(text.replace(" <unk>", "")).ids, encoded, tok.get_vocab_size())
    scores[1] = scores[1].model_copy(update={"extra": {"unigram_perplexity": baseline}})
    for s in scores:
        print(s.corpus, s.protocol["protocol"], round(s.perplexity, 3), s.extra)
    checkpoints = [d for d in ("bf16", "mxfp8") if (folder / d).is_dir()]
    names = ["corpus.jsonl"]
    names += [
        str(p.relative_to(folder)) for d in checkpoints for p in sorted((folder / d).iterdir())
    ]
    scripts = [s for s in SCRIPTS if (folder / s).is_file() or (folder.parent / s).is_file()]
    manifest = Manifest(
        kind="golden",
        name=folder.name,
        made_by={
            "scripts": scripts,
            "python": sys.version.split()[0],
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        },
        sources=[
            SourceRecord(
                role="text",
                uri=TRAINING_TEXT,
            )
        ],
        options={"train": train, "sample_seed": args.seed},
        tensors=len(ckpt.tensors),
        bytes=ckpt.nbytes,
        files={n: digest(folder / n) for n in names},
        scores=scores,
        notes={
            "expert_share_of_token_slots": shares,
            "lowest_expert_share": lowest,
            "weights_sha256": {d: open_checkpoint(folder / d).weights_sha256 for d in checkpoints},
        },
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    main()
