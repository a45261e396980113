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


def arguments() -> argparse.Namespace:
    """Parse the command line."""
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
    return parser.parse_args()


def write_corpus(
    file: Path, model: torch.nn.Module, tok: Tokenizer, args: argparse.Namespace
) -> None:
    """Sample documents and write them, with the digest of the model's weights."""
    header = {
        "sampled_from": open_checkpoint(args.folder / "bf16").weights_sha256,
        "seed": args.seed,
        "temperature": 1.0,
        "window": 512,
    }
    lines = [json.dumps(header)]
    for ids in sample(model, args.seed, args.documents, args.length):
        text = tok.decode(ids, skip_special_tokens=False)
        lines.append(json.dumps({"ids": ids, "text": text}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def scores_of(folder: Path, own: Corpus, wiki: Corpus, tok: Tokenizer) -> list[Score]:
    """Score the golden on its own corpus, and on WikiText by tokens and by lm-eval."""
    data = Path(os.environ["CKPTGATE_TEST_DATA"]) / "wikitext-2"
    text = (data / "wiki.valid.tokens").read_text(encoding="utf-8").replace(" <unk>", "")
    test_ids = tok.encode("\n".join(wiki.texts)).ids
    baseline = unigram(tok.encode(text).ids, test_ids, tok.get_vocab_size())
    by_tokens = measured(folder, wiki, "tokens")
    return [
        measured(folder, own, "tokens"),
        by_tokens.model_copy(update={"extra": {"unigram_perplexity": baseline}}),
        measured(folder, wiki, "lm-eval"),
    ]


def main() -> None:
    """Sample, measure, write."""
    args = arguments()
    torch.set_num_threads(args.threads)
    folder: Path = args.folder
    model = load_model(str(folder / "bf16")).model
    tok = Tokenizer.from_file(str(folder / "bf16" / "tokenizer.json"))
    file = folder / "corpus.jsonl"
    if not args.keep_corpus:
        write_corpus(file, model, tok, args)
    own, wiki = load_corpus(str(file)), load_corpus(WIKITEXT)
    encoded = tok.encode("\n".join(wiki.texts)).ids
    every_eighth = [(tuple(encoded[i : i + 512]), ()) for i in range(0, len(encoded) - 512, 4096)]
    shares = {
        "corpus.jsonl": routing(model, windows_of(own, None, 512)),
        WIKITEXT: routing(model, every_eighth),
    }
    lowest = min(min(map(min, layers)) for layers in shares.values())
    print("lowest share of an expert:", lowest)
    scores = scores_of(folder, own, wiki, tok)
    for s in scores:
        print(s.corpus, s.protocol["protocol"], round(s.perplexity, 3), s.extra)
    train = json.loads(args.train_log.read_text().splitlines()[-1])
    train["args"] = {k: Path(v).name for k, v in train["args"].items() if k != "t0"}
    checkpoints = {
        name: open_checkpoint(folder / name)
        for name in ("bf16", "mxfp8")
        if (folder / name).is_dir()
    }
    notes = {
        "expert_share_of_token_slots": shares,
        "lowest_expert_share": lowest,
        "weights_sha256": {name: ckpt.weights_sha256 for name, ckpt in checkpoints.items()},
    }
    manifest = manifest_of(folder, list(checkpoints), scores).model_copy(
        update={"options": {"train": train, "sample_seed": args.seed}, "notes": notes}
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n")


def manifest_of(folder: Path, checkpoints: list[str], scores: list[Score]) -> Manifest:
    """Return the manifest of a golden, without options and notes."""
    names = ["corpus.jsonl"]
    for directory in checkpoints:
        names += [str(p.relative_to(folder)) for p in sorted((folder / directory).iterdir())]
    scripts = [s for s in SCRIPTS if (folder / s).is_file() or (folder.parent / s).is_file()]
    base = open_checkpoint(folder / "bf16")
    return Manifest(
        kind="golden",
        name=folder.name,
        made_by={
            "scripts": scripts,
            "python": sys.version.split()[0],
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        },
        sources=[SourceRecord(role="text", uri=TRAINING_TEXT)],
        tensors=len(base.tensors),
        bytes=base.nbytes,
        files={name: digest(folder / name) for name in names},
        scores=scores,
    )


if __name__ == "__main__":
    main()
