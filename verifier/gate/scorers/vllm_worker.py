# SPDX-License-Identifier: Apache-2.0
"""Score windows of token ids with vLLM: JSON lines on stdin and stdout. Run by path under vLLM's
own interpreter.

It imports the standard library and vLLM only, so ckptgate need not be installed there. Lines in,
lines out:

    {"ckptgate": 1, "model": PATH, "window": 512, "top_k": 64, "options": {…}}    → {"ready":
    {"engine": …, "device": …}} {"id": 0, "windows": [[1, 2, 3], …]}
    → {"id": 0, "scores": [{…}, …]}

A score has, for each token of its window but the first, ``nats``, the likeliest token ``top1`` and
its log-probability ``sure``, and with ``top_k`` the likeliest ``top_ids`` and ``top_logprobs``. A
number that is not finite is null. A failure is {"error": …}, and the end. The end of stdin ends it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any


def score_of(prompt: list[int], entries: list[Any], top_k: int) -> dict[str, list[Any]]:
    """Return what vLLM's prompt_logprobs of one window mean."""
    found: dict[str, list[Any]] = {"nats": [], "top1": [], "sure": []}
    if top_k:
        found |= {"top_ids": [], "top_logprobs": []}
    for token, entry in zip(prompt[1:], entries[1:], strict=True):
        values = {int(i): float(x.logprob) for i, x in entry.items()}
        ranked = sorted(
            values.items(), key=lambda item: (-item[1] if item[1] == item[1] else math.inf, item[0])
        )
        found["nats"].append(_finite(-values[token]))
        found["top1"].append(ranked[0][0])
        found["sure"].append(_finite(ranked[0][1]))
        if top_k:
            found["top_ids"].append([i for i, _ in ranked[:top_k]])
            found["top_logprobs"].append([_finite(x) for _, x in ranked[:top_k]])
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main() -> int:
    """Serve until stdin ends."""
    # What vLLM prints must not stand among the lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        out.write(json.dumps(value, separators=(",", ":")) + "\n")
        out.flush()

    try:
        hello = json.loads(sys.stdin.readline())
        if hello.get("ckptgate") != 1:
            raise ValueError(f"speaks version {hello.get('ckptgate')!r}, this is 1")
        import vllm  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415  (seconds; only here)

        top_k = int(hello["top_k"])
        count = max(1, top_k)
        given = {
            "max_model_len": int(hello["window"]) + 1,
            "max_logprobs": count,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            **hello["options"],
        }
        model = vllm.LLM(model=hello["model"], trust_remote_code=False, **given)
        params = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=count, detokenize=False
        )
        say({"ready": {"engine": f"vllm {vllm.__version__}", "device": _device()}})
        for line in sys.stdin:
            asked = json.loads(line)
            prompts = [{"prompt_token_ids": w} for w in asked["windows"]]
            answers = model.generate(prompts, params, use_tqdm=False)
            scores = [
                score_of(w, a.prompt_logprobs, top_k)
                for w, a in zip(asked["windows"], answers, strict=True)
            ]
            say({"id": asked["id"], "scores": scores})
    except Exception as error:  # noqa: BLE001  (the process's surface: whatever it was must reach the other side)
        say({"error": f"{type(error).__name__}: {error}"[:2000]})
        return 1
    return 0


def _device() -> str:
    torch: Any = sys.modules.get("torch")  # vLLM imported it
    if torch is None:
        return "unknown"
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
