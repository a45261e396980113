# SPDX-License-Identifier: Apache-2.0
"""A running server: vLLM's ``prompt_logprobs``, else ``echo`` with ``logprobs`` as OpenAI's
completions have them.
"""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from verifier.errors import ContentError, MachineError, UsageError
from verifier.gate.jobs import Job
from verifier.gate.scorers.engine import (
    BYTES_PER_NUMBER,
    LOWEST,
    WindowScores,
    ranked,
    scores_of,
)

ATTEMPTS = 3
MAX_REQUESTS = 64
_SMALL_ANSWER, _LIST_ANSWER, _METRICS_ANSWER = 1 << 16, 1 << 20, 1 << 24
_DRAFT_COUNTER = b"vllm:spec_decode"
_VLLM_METRICS = b"vllm:"
_SERVER_INFO = ("/get_server_info", "/server_info")
DRAFTED = 8
"""Tokens to generate in the second request to a server that may speculate: drafts need some."""
SAME = 0.1
"""The largest mean difference between two scores of the same tokens, nats per token. Other batches
change BF16 scores by a few hundredths."""
_TOKEN_PREFIX = "token_id:"  # noqa: S105  (not a password)


class ServerEngine:
    """The model that a server with an OpenAI-style endpoint serves.

    Plain ``echo`` names tokens only by their text; then there is no top-1 and no KL, only the loss.
    A server that does not say whether it decodes speculatively scores everything twice.
    """

    def __init__(self, job: Job) -> None:
        """Look for the model and for how the server gives log-probabilities.

        Raises:
            UsageError: the endpoint is not a URL, or the server does not serve the model, decodes
                speculatively, or takes shorter prompts or gives fewer log-probabilities than asked.
            MachineError: the server does not answer.
        """
        self._host, self._port, self._tls, self._path = _endpoint(job.scorer.endpoint)
        self._timeout, self._top_k, self._batch = job.scorer.timeout, job.top_k, job.batch
        self._who = f"the server at {self._host}:{self._port}"
        self._model, entry = self._served(job.scorer.served)
        self._twice = not self._says_no_speculation()
        self._refuse_long_windows(entry.get("max_model_len"), job)
        self._echo = not self._has_prompt_logprobs()
        self.environment = {"engine": self._version(), "device": "of the server"}

    def score(self, windows: Sequence[Sequence[int]]) -> list[WindowScores]:
        """Return the scores of each window, with several requests at a time.

        Raises:
            MachineError: a wrong answer, or other scores the second time.
        """
        scores = self._windows(windows, 1)
        if self._twice:
            self._require_same(scores, self._windows(windows, DRAFTED))
        return scores

    def close(self) -> None:
        """Do nothing: no connection is kept between requests."""

    def _windows(self, windows: Sequence[Sequence[int]], generated: int) -> list[WindowScores]:
        with ThreadPoolExecutor(max(1, min(self._batch, MAX_REQUESTS))) as pool:
            return list(pool.map(lambda window: self._window(window, generated), windows))

    def _require_same(self, first: Sequence[WindowScores], second: Sequence[WindowScores]) -> None:
        one, two = (np.concatenate([w.arrays["nats"] for w in s]) for s in (first, second))
        difference = float(np.abs(one - two).mean())
        if difference > SAME:
            raise MachineError(
                f"{self._who} gives the same tokens other log-probabilities the second time, by "
                f"{difference:.2f} nats per token; if it decodes speculatively, serve it without"
            )

    def _window(self, window: Sequence[int], generated: int) -> WindowScores:
        choice = self._complete(window, max(1, self._top_k), echo=self._echo, generated=generated)
        read = _from_echo if self._echo else _from_prompt_logprobs
        try:
            lists = read(window, choice, self._top_k)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise MachineError(
                f"{self._who}: not an answer with scores ({type(error).__name__})"
            ) from error
        if self._top_k and "top_ids" not in lists:
            raise UsageError(
                f"{self._who} names tokens by their text; --top-k and a KL divergence need ids"
            )
        return scores_of(window, lists, self._top_k, self._who)

    def _complete(
        self, window: Sequence[int], count: int, *, echo: bool, generated: int = 1
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(window),
            "max_tokens": generated,
            "temperature": 0,
        }
        if echo:
            body |= {"echo": True, "logprobs": count, "return_tokens_as_token_ids": True}
        else:
            body |= {"prompt_logprobs": count}
        limit = _SMALL_ANSWER + (len(window) + generated) * (count + 2) * BYTES_PER_NUMBER
        answer = self._request("POST", f"{self._path}/completions", body, limit)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise MachineError(f"{self._who}: an answer without one choice")
        choice: dict[str, Any] = choices[0]
        return choice

    def _has_prompt_logprobs(self) -> bool:
        """Whether the server knows ``prompt_logprobs``.

        Raises:
            UsageError: it does, but does not give as many as asked.
        """
        try:
            answer = self._complete([1, 2], 1, echo=False)
        except ContentError:
            return False  # status 400: the server does not know the field
        known = isinstance(answer.get("prompt_logprobs"), list)
        if known and self._top_k > 1:
            try:
                self._complete([1, 2], self._top_k, echo=False)
            except ContentError as error:
                raise UsageError(f"{error}; serve with --max-logprobs {self._top_k}") from error
        return known

    def _served(self, model: str) -> tuple[str, dict[str, Any]]:
        """Return the model to ask for, as named or else the only one, and the server's entry."""
        listed = self._request("GET", f"{self._path}/models", None, _LIST_ANSWER).get("data")
        entries = listed if isinstance(listed, list) else []
        by_name = {str(entry.get("id")): entry for entry in entries if isinstance(entry, dict)}
        if model and model not in by_name:
            served = ", ".join(name[:80] for name in list(by_name)[:5]) or "nothing"
            raise UsageError(f"{self._who} serves {served}, not {model!r}")
        if not model and len(by_name) != 1:
            raise UsageError(f"{self._who} serves {len(by_name)} models; name one with --served")
        name = model or next(iter(by_name))
        return name, by_name[name]

    def _refuse_long_windows(self, context: object, job: Job) -> None:
        """Refuse windows that leave no room for what the server must generate.

        Raises:
            UsageError: a window is too long.
        """
        room = context - (DRAFTED if self._twice else 1) if isinstance(context, int) else None
        longest = max((len(ids) for ids, _ in job.windows), default=0)
        if room is not None and longest > room:
            raise UsageError(
                f"{self._who} has a context of {context:,} tokens, too short for a window of "
                f"{longest:,} and what it must generate; give --seq-len {room}, or serve with a "
                "larger --max-model-len"
            )

    def _says_no_speculation(self) -> bool:
        """Return whether the server says that it does not decode speculatively.

        Log-probabilities of a server that does may be those of another token, or 0
        (vllm-project/vllm#53488, ggml-org/llama.cpp#27972).

        Raises:
            UsageError: the server speculates.
        """
        answers = [self._speculation_of_vllm(), self._speculation_of_llama_cpp()]
        answers += [self._speculation_of_sglang(target) for target in _SERVER_INFO]
        for how in answers:
            if how:
                raise UsageError(
                    f"{self._who} decodes speculatively ({how}); its log-probabilities are not "
                    "those of the model: serve it without speculation"
                )
        return any(how is not None for how in answers)

    def _speculation_of_vllm(self) -> str | None:
        """Return how the server speculates, "" where it does not, None where it does not say.

        vLLM has the counters of its drafts in ``/metrics`` only where it speculates.
        """
        metrics = self._text_of("/metrics")
        if _DRAFT_COUNTER in metrics:
            return f"its /metrics has {_DRAFT_COUNTER.decode()} counters"
        return "" if _VLLM_METRICS in metrics else None

    def _speculation_of_llama_cpp(self) -> str | None:
        """Return the same of llama.cpp's slots."""
        slots = self._json_of("/slots")
        stated = [
            slot["speculative"]
            for slot in (slots if isinstance(slots, list) else [])
            if isinstance(slot, dict) and isinstance(slot.get("speculative"), bool)
        ]
        if any(stated):
            return "its /slots are speculative"
        return "" if stated else None

    def _speculation_of_sglang(self, target: str) -> str | None:
        """Return the same of SGLang's server information."""
        info = self._json_of(target)
        if not isinstance(info, dict) or "speculative_algorithm" not in info:
            return None
        algorithm = str(info["speculative_algorithm"] or "none")
        return (
            "" if algorithm.upper() == "NONE" else f"its speculative_algorithm is {algorithm[:80]}"
        )

    def _json_of(self, target: str) -> Any:
        try:
            return json.loads(self._text_of(target))
        except (ValueError, RecursionError):
            return None

    def _text_of(self, target: str) -> bytes:
        """Return what the server answers to GET, b"" where it has no answer."""
        try:
            status, raw = self._once("GET", target, None, _METRICS_ANSWER)
        except (OSError, http.client.HTTPException, MachineError):
            return b""
        return raw if status == 200 else b""

    def _version(self) -> str:
        try:
            version = self._request("GET", "/version", None, _SMALL_ANSWER).get("version")
        except (ContentError, MachineError):
            return "server"
        return f"server {version[:80]}" if isinstance(version, str) else "server"

    def _request(
        self, method: str, target: str, body: dict[str, Any] | None, limit: int
    ) -> dict[str, Any]:
        """Return the JSON object that the server answers; a server that is busy is asked again.

        Args:
            method: of HTTP.
            target: the path on the server.
            body: sent as JSON.
            limit: the bytes of the longest answer.

        Raises:
            ContentError: the server refuses the request.
            MachineError: it does not answer, or its answer is not a JSON object.
        """
        sent = json.dumps(body).encode() if body is not None else None
        why = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(attempt)
            try:
                status, raw = self._once(method, target, sent, limit)
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            if status >= 500:
                why = f"status {status}: {_text(raw)}"
                continue
            if status != 200:
                raise ContentError(f"{self._who}: {method} {target}: status {status}: {_text(raw)}")
            return self._object(raw)
        raise MachineError(f"{self._who}: {method} {target} failed {ATTEMPTS} times: {why}")

    def _object(self, raw: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise MachineError(
                f"{self._who}: an answer that is not JSON: {_text(raw)[:80]!r}"
            ) from error
        if not isinstance(answer, dict):
            raise MachineError(f"{self._who}: an answer that is not an object")
        return answer

    def _once(self, method: str, target: str, body: bytes | None, limit: int) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            raw = response.read(limit + 1)
            if len(raw) > limit:
                raise MachineError(f"{self._who}: an answer of more than {limit:,} bytes")
            return response.status, raw
        finally:
            connection.close()


def _endpoint(url: str) -> tuple[str, int, bool, str]:
    """Return host, port, whether TLS is used, and path of an endpoint.

    Raises:
        UsageError: it is not an HTTP URL.
    """
    parts = urlsplit(url)
    http_url = parts.scheme in ("http", "https") and parts.hostname
    if not http_url or parts.username or parts.query or parts.hostname is None:
        raise UsageError(f"--endpoint {url[:200]}: give http://HOST:PORT/v1")
    tls = parts.scheme == "https"
    try:
        port = parts.port or (443 if tls else 80)
    except ValueError as error:
        raise UsageError(f"--endpoint {url[:200]}: {error}") from error
    return parts.hostname, port, tls, parts.path.rstrip("/") or "/v1"


def _text(raw: bytes) -> str:
    return " ".join(raw[:400].decode("utf-8", "replace").split())


def _from_prompt_logprobs(
    window: Sequence[int], choice: dict[str, Any], top_k: int
) -> dict[str, Any]:
    entries = choice["prompt_logprobs"]
    if len(entries) != len(window):
        raise ValueError("length")
    values = [
        {int(token): _logprob(entry["logprob"]) for token, entry in by_token.items()}
        for by_token in entries[1:]
    ]
    own = [logprobs[token] for token, logprobs in zip(window[1:], values, strict=True)]
    return ranked(own, values, top_k)


def _from_echo(window: Sequence[int], choice: dict[str, Any], top_k: int) -> dict[str, Any]:
    logprobs, count = choice["logprobs"], len(window)
    own = [_logprob(value) for value in logprobs["token_logprobs"][1:count]]
    top = (logprobs.get("top_logprobs") or [])[1:count]
    ids = [_token_id(name) for name in (logprobs.get("tokens") or [])[:count]]
    by_id = len(ids) == count and "" not in ids
    if not by_id or len(top) != count - 1 or not all(isinstance(t, dict) for t in top):
        return {"nats": [-logprob for logprob in own]}
    if ids != [str(token) for token in window]:
        raise ValueError("other tokens")
    values = [{int(_token_id(n)): _logprob(value) for n, value in t.items()} for t in top]
    return ranked(own, values, top_k)


def _token_id(name: Any) -> str:
    """Return N of ``token_id:N``, else ''."""
    text = str(name)
    number = text.removeprefix(_TOKEN_PREFIX)
    return number if text.startswith(_TOKEN_PREFIX) and number.isdigit() else ""


def _logprob(value: Any) -> float:
    """Return a log-probability; NaN for null and for what stands for an infinity."""
    number = math.nan if value is None else float(value)
    return number if number > LOWEST else math.nan
