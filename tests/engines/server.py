# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-style server with made-up log-probabilities: python server.py MODE; prints its port.

``vllm`` knows prompt_logprobs and states its context; ``ids`` and ``text`` know echo only, and name
tokens by number or by text; ``busy`` fails twice before each answer; ``broken`` answers no JSON;
``slow`` never answers; ``long`` answers too much; ``short`` leaves a token out; ``drafts``,
``eagle`` and ``slots`` speculate, as vLLM's counters, SGLang's server information and llama.cpp's
slots have it; ``zeros`` answers 0 for every token. ``wavers`` answers 0 for every other token where
it may generate more than one, and does not say whether it speculates; ``denies`` is the same with
slots that do not.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any, ClassVar

from formula import row  # type: ignore[import-not-found]

MODE = sys.argv[1]
CONTEXT, MAX_LOGPROBS = 600, 20


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, *_: Any) -> None:
        return

    def answer(self, status: int, value: Any) -> None:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            names = ["one", "two"] if MODE == "text" else ["one"]
            limit = {"max_model_len": CONTEXT} if MODE == "vllm" else {}
            self.answer(200, {"data": [{"id": n} | limit for n in names]})
        elif self.path == "/version" and MODE == "vllm":
            self.answer(200, {"version": "0.0-stand-in"})
        elif self.path == "/metrics" and MODE in ("vllm", "drafts"):
            name = "spec_decode_num_drafts" if MODE == "drafts" else "num_requests_running"
            self.answer(200, f"# TYPE vllm:{name} counter\nvllm:{name} 0.0\n".encode())
        elif self.path == "/get_server_info" and MODE in ("ids", "eagle"):
            algorithm = "EAGLE3" if MODE == "eagle" else None
            self.answer(200, {"speculative_algorithm": algorithm})
        elif self.path == "/slots" and MODE in ("slots", "denies"):
            self.answer(200, [{"id": i, "speculative": MODE == "slots"} for i in range(2)])
        else:
            self.answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = body["prompt"]
        if MODE == "busy":
            Handler.asked[str(ids)] += 1
            if Handler.asked[str(ids)] < 3:
                self.answer(503, {"error": "try again"})
                return
            del Handler.asked[str(ids)]  # each window's own count: windows are asked for at once
        if MODE == "slow":
            time.sleep(60)
        if MODE == "broken":
            self.answer(200, b"<html>")
            return
        if MODE == "long":
            self.answer(200, b" " * (64 << 20))
            return
        if "prompt_logprobs" in body and MODE not in ("ids", "text"):
            count = body["prompt_logprobs"]
            if count > MAX_LOGPROBS:
                self.answer(400, {"error": f"greater than max allowed: {MAX_LOGPROBS}"})
                return
            entries = [None, *(self.entry(a, b, count) for a, b in pairwise(ids))]
            if MODE in ("wavers", "denies") and body["max_tokens"] > 1:
                entries[1::2] = [
                    {i: {"logprob": 0.0} for i in entry or {}} for entry in entries[1::2]
                ]
            self.answer(
                200,
                {"choices": [{"prompt_logprobs": entries[:-1] if MODE == "short" else entries}]},
            )
        elif "prompt_logprobs" in body and MODE == "ids":
            self.answer(400, {"error": "unknown field prompt_logprobs"})
        elif not body.get("echo"):
            self.answer(200, {"choices": [{"text": "x", "logprobs": None}]})
        else:
            name = (lambda i: f"token_id:{i}") if MODE == "ids" else (lambda i: f" w{i}")
            rows = [row(i) for i in ids]
            top = [
                None,
                *({name(i): r[i] for i in self.ranked(r)[: body["logprobs"]]} for r in rows),
            ]
            own = [None, *(r[i] for r, i in zip(rows, ids[1:], strict=False)), -0.5]
            self.answer(
                200,
                {
                    "choices": [
                        {
                            "logprobs": {
                                "tokens": [name(i) for i in [*ids, 5]],
                                "token_logprobs": own,
                                "top_logprobs": top,
                            }
                        }
                    ]
                },
            )

    @staticmethod
    def ranked(values: list[float]) -> list[int]:
        return sorted(range(len(values)), key=lambda i: (-values[i], i))

    def entry(self, previous: int, token: int, count: int) -> dict[str, Any]:
        values = [0.0] * len(row(previous)) if MODE == "zeros" else row(previous)
        if token == 13:
            values = [-9999.0] * len(values)  # as vLLM's server writes an infinity
        ranked = self.ranked(values)
        return {
            str(i): {"logprob": values[i], "rank": ranked.index(i) + 1}
            for i in {*ranked[:count], token}
        }


assert math.isfinite(row(0)[0])
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_port, flush=True)
server.serve_forever()
