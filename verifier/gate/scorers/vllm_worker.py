# SPDX-License-Identifier: Apache-2.0
"""Score windows of token ids with vLLM: JSON lines on stdin and stdout. Run by path under vLLM's
own interpreter.

It imports only the standard library and vLLM, so ckptgate need not be installed there. Lines in
(>) and out (<):

    > {"ckptgate": 1, "model": PATH, "window": 512, "top_k": 64, "options": {…}}
    < {"ready": {"engine": …, "device": …}}
    > {"id": 1, "windows": [[1, 2, 3], …]}
    < {"id": 1, "scores": [{…}, …]}

A score has, for each token of its window but the first, ``nats``, the top token ``top1`` and its
log-probability ``sure``, and with ``top_k`` the top ``top_ids`` and ``top_logprobs``. A
number that is not finite is null. A failure is {"error": …}, after which the process ends, as it
does at the end of stdin.
"""

from __future__ import annotations

import os
import sys

# A file that is run by path has its own directory first on sys.path, and this one holds modules
# named vllm and transformers. (python -P leaves it out, but Python 3.10 has no such option.)
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _HERE]

import json  # noqa: E402
import math  # noqa: E402
from typing import Any  # noqa: E402


def score_of(prompt: list[int], entries: list[Any], top_k: int) -> dict[str, list[Any]]:
    """Return the scores of one window.

    Args:
        prompt: its token ids.
        entries: vLLM's ``prompt_logprobs``: at each token, log-probabilities by token id.
        top_k: how many top tokens to keep.
    """
    lists: dict[str, list[Any]] = {"nats": [], "top1": [], "sure": []}
    if top_k:
        lists |= {"top_ids": [], "top_logprobs": []}
    for token, entry in zip(prompt[1:], entries[1:], strict=True):
        logprobs = {int(i): float(x.logprob) for i, x in entry.items()}
        ranked = sorted(logprobs.items(), key=_top_first)
        lists["nats"].append(_finite(-logprobs[token]))
        lists["top1"].append(ranked[0][0])
        lists["sure"].append(_finite(ranked[0][1]))
        if top_k:
            lists["top_ids"].append([i for i, _ in ranked[:top_k]])
            lists["top_logprobs"].append([_finite(logprob) for _, logprob in ranked[:top_k]])
    return lists


def _top_first(item: tuple[int, float]) -> tuple[float, int]:
    token, logprob = item
    return (math.inf if math.isnan(logprob) else -logprob, token)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def context_length(model: str) -> int | None:
    """Return the context length of a local model, if its config.json has it."""
    try:
        with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return None
    text = config.get("text_config") or config
    length = text.get("max_position_embeddings") if isinstance(text, dict) else None
    return length if isinstance(length, int) else None


def main() -> int:
    """Serve until stdin ends."""
    # What vLLM prints goes to stderr: stdout is for the lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        out.write(json.dumps(value, separators=(",", ":")) + "\n")
        out.flush()

    try:
        hello = json.loads(sys.stdin.readline())
        if hello.get("ckptgate") != 1:
            raise ValueError(f"expected protocol version 1, got {hello.get('ckptgate')!r}")
        window, top_k = int(hello["window"]), int(hello["top_k"])
        if window == context_length(hello["model"]):
            # vLLM counts the token that it must generate, which is never read.
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        import vllm  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415  (takes seconds)

        count = max(1, top_k)
        options = {
            "max_model_len": window + 1,
            "max_logprobs": count,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            **hello["options"],
        }
        model = vllm.LLM(model=hello["model"], trust_remote_code=False, **options)
        if model.llm_engine.vllm_config.speculative_config is not None:
            raise ValueError("vLLM speculates with a draft model here; score without it")
        params = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=count, detokenize=False
        )
        answer({"ready": {"engine": f"vllm {vllm.__version__}", "device": _device()}})
        for line in sys.stdin:
            question = json.loads(line)
            windows = question["windows"]
            prompts = [{"prompt_token_ids": window} for window in windows]
            outputs = model.generate(prompts, params, use_tqdm=False)
            scores = [
                score_of(window, output.prompt_logprobs, top_k)
                for window, output in zip(windows, outputs, strict=True)
            ]
            answer({"id": question["id"], "scores": scores})
    except Exception as error:  # noqa: BLE001  (whatever it was must reach the other process)
        answer({"error": f"{type(error).__name__}: {error}"[:2000]})
        return 1
    return 0


def _device() -> str:
    torch: Any = sys.modules.get("torch")  # vLLM imported it
    if torch is None:
        return "unknown"
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
