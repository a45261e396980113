# SPDX-License-Identifier: Apache-2.0
"""As much of vLLM as scoring calls, with made-up log-probabilities; it prints on stdout, as vLLM
does.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from formula import row  # type: ignore[import-not-found]

__version__ = "0.0-stand-in"


@dataclass
class SamplingParams:
    max_tokens: int
    temperature: float
    prompt_logprobs: int
    detokenize: bool


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class Output:
    prompt_logprobs: list[dict[int, Logprob] | None]


class LLM:
    def __init__(self, model: str, **options: Any) -> None:
        print("INFO engine starts", model)
        if options.pop("fail", False):
            raise RuntimeError("no kernel for this format on this card")
        if options.pop("hide", False):
            os.write(
                2, b"(EngineCore pid=7) ERROR 11-29 23:02:14 [core.py:1120] ValueError: no room\n"
            )
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        if options.pop("die", False):
            os.write(2, b"CUDA error: out of memory\n")
            os._exit(7)
        self.mode = options.pop("mode", "")
        speculative = object() if self.mode == "speculates" else None
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(speculative_config=speculative)
        )
        known = {
            "max_model_len",
            "max_logprobs",
            "enable_prefix_caching",
            "skip_tokenizer_init",
            "disable_log_stats",
            "trust_remote_code",
        }
        assert set(options) == known
        self.longest = options["max_model_len"]

    def generate(
        self, prompts: list[dict[str, list[int]]], params: SamplingParams, *, use_tqdm: bool
    ) -> list[Output]:
        print("INFO generating")
        if self.mode == "hang":
            time.sleep(60)
        if self.mode == "short":
            prompts = prompts[1:]
        return [
            Output([None, *(self._entry(a, b, params.prompt_logprobs) for a, b in pairwise(p))])
            for p in (x["prompt_token_ids"] for x in prompts)
        ]

    def _entry(self, previous: int, token: int, count: int) -> dict[int, Logprob]:
        values = row(previous)
        if self.mode == "nan" and token == 13:
            values = [math.nan] * len(values)
        ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
        return {i: Logprob(values[i], ranked.index(i) + 1) for i in {*ranked[:count], token}}
