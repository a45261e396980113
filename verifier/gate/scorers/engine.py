# SPDX-License-Identifier: Apache-2.0
"""Scores of an engine that runs elsewhere: vLLM in its own interpreter, or a server with an
OpenAI-style endpoint.

Every engine gives the same: for each window of token ids the arrays of `Scores`. What comes back is
bounded, checked for its lengths, and an answer that does not come in time ends the run. No engine
was run where this project is built: the adapters are tested against other processes that speak the
same lines.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from verifier.errors import ContentError, MachineError, UsageError
from verifier.gate.jobs import Array, Job, Piece, Scorer, Unit

WORKER = Path(__file__).with_name("vllm_worker.py")
LOWEST = -9999.0
"""vLLM's server writes an infinite log-probability as this, JSON having no infinity."""
ATTEMPTS = 3
STOP_SECONDS = 2.0
_TAIL = 4096
_BYTES_A_NUMBER = 400


class Engine(Protocol):
    """Scores windows of token ids: ``score(windows)`` gives per-token arrays, whatever the engine
    is.
    """

    environment: dict[str, str]

    def score(self, windows: Sequence[Sequence[int]]) -> list[Scores]:
        """Return the scores of each window; a window has at least two tokens."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...


@dataclass(frozen=True)
class Scores:
    """One window of n tokens: ``nats`` float32 [n - 1], and where the engine names tokens ``top1``
    int32 and ``sure`` float32 [n - 1], ``top_ids`` int32 and ``top_logprobs`` float32 [n - 1, k];
    ``finite`` bool [n - 1].
    """

    arrays: dict[str, Array]
    finite: Array


def score_by_engine(job: Job, emit: Callable[[Piece], None]) -> dict[str, str]:
    """Score a job by its engine, give each finished unit to ``emit``, and return the environment.

    Raises:
        UsageError: the interpreter or the endpoint is not there.
        MachineError: the engine fails, does not answer in time, or answers what it was not asked.
    """
    if job.protocol != "tokens":
        raise UsageError(f"--scorer {job.scorer.name} is for the protocol tokens")
    engine = open_engine(job)
    try:
        for unit in job.units:
            emit(_piece(unit, engine))
        return engine.environment | {"batch": str(job.batch)}
    finally:
        engine.close()


def open_engine(job: Job) -> Engine:
    """Return the engine that a job asks for, ready to score."""
    if job.scorer.name == "vllm":
        return VllmEngine(job.scorer, job.model, job.window, job.top_k)
    return ServerEngine(job.scorer, job.batch, job.top_k)


def _piece(unit: Unit, engine: Engine) -> Piece:
    part = [w for w in unit.windows if len(w[0]) > 1]
    scores = engine.score([ids for ids, _ in part]) if part else []
    bad = {
        d
        for (_, owner), s in zip(part, scores, strict=True)
        for d, fine in zip(owner[1:], s.finite.tolist(), strict=True)
        if not fine
    }
    names = scores[0].arrays if scores else {}
    if any(s.arrays.keys() != names.keys() for s in scores):
        raise MachineError("the engine names the likeliest tokens of some windows only")
    try:
        arrays = {k: np.concatenate([s.arrays[k] for s in scores]) for k in names}
    except ValueError:
        raise MachineError("the engine gives unlike numbers of likeliest tokens") from None
    return Piece(unit.number, arrays, sorted(bad))


def scores_of(window: Sequence[int], given: Any, top_k: int, who: str) -> Scores:
    """Return one window's scores from an engine's lists, checked.

    Raises:
        MachineError: lengths or values that no scores of this window have.
    """
    count = len(window) - 1
    try:
        raw = {
            k: given[k]
            for k in ("nats", "top1", "sure", "top_ids", "top_logprobs")
            if given.get(k) is not None
        }
        arrays = {
            k: np.array(
                [[math.nan if x is None else x for x in row] for row in v]
                if "top_" in k
                else [math.nan if x is None else x for x in v],
                np.float64,
            )
            for k, v in raw.items()
        }
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise MachineError(
            f"{who}: an answer that is no scores ({type(error).__name__})"
        ) from error
    wide = {"top_ids", "top_logprobs"} if top_k else set()
    if (
        "nats" not in arrays
        or not wide <= arrays.keys()
        or ("top1" in arrays) != ("sure" in arrays)
    ):
        raise MachineError(
            f"{who}: an answer without {'the likeliest tokens' if 'nats' in arrays else 'log-probabilities'}"
        )
    arrays = {k: v for k, v in arrays.items() if k in wide or "top_" not in k}
    for name, values in arrays.items():
        if len(values) != count or (name in wide and (values.ndim != 2 or values.shape[1] > top_k)):
            raise MachineError(
                f"{who}: {name} is {list(values.shape)} for a window of {count + 1} tokens"
            )
    finite = np.isfinite(arrays["nats"]) & (arrays["nats"] < -LOWEST)
    for name in ("sure", "top_logprobs"):
        if name in arrays:
            finite &= np.isfinite(arrays[name].reshape(count, -1)).all(1) if count else finite
    if (arrays["nats"][finite] < -1e-3).any() or any(
        (arrays[n][finite] > 1e-3).any() for n in ("sure",) if n in arrays
    ):
        raise MachineError(f"{who}: a probability above one")
    return Scores(_typed(arrays, finite), finite)


def _typed(arrays: dict[str, Array], finite: Array) -> dict[str, Array]:
    found = {}
    for name, values in arrays.items():
        kept = np.where(finite if values.ndim == 1 else finite[:, None], values, 0.0)
        if name in ("top1", "top_ids"):
            found[name] = kept.astype(np.int32)
        else:
            found[name] = (
                np.maximum(kept, 0.0) if name == "nats" else np.minimum(kept, 0.0)
            ).astype(np.float32)
    return found


class VllmEngine:
    """vLLM in a process of its own interpreter, spoken to in JSON lines (`vllm_worker`)."""

    def __init__(self, scorer: Scorer, model: str, window: int, top_k: int) -> None:
        self._timeout, self._top_k, self._number = scorer.timeout, top_k, 0
        self._tail, self._answered = bytearray(), True
        try:
            self._process = subprocess.Popen(  # noqa: S603  (the interpreter that the user named)
                [scorer.python, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise UsageError(
                f"--engine-python {scorer.python}: {error.strerror or error}"
            ) from error
        self._drainer = threading.Thread(target=self._drain, daemon=True)
        self._drainer.start()
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        if self._process.stdout is not None:
            self._selector.register(self._process.stdout, selectors.EVENT_READ)
        try:
            hello = {
                "ckptgate": 1,
                "model": model,
                "window": window,
                "top_k": top_k,
                "options": dict(scorer.options),
            }
            ready = self._ask(hello, 1 << 16).get("ready")
            if not isinstance(ready, dict):
                raise MachineError(f"{self._who}: did not say that it is ready")
        except BaseException:
            self.close()
            raise
        self.environment = {
            str(k)[:80]: str(v)[:400] for k, v in ready.items() if k in ("engine", "device")
        }

    @property
    def _who(self) -> str:
        return "the vLLM process"

    def score(self, windows: Sequence[Sequence[int]]) -> list[Scores]:
        """Return the scores of each window."""
        self._number += 1
        numbers = sum(len(w) for w in windows) * (2 * self._top_k + 3)
        answer = self._ask(
            {"id": self._number, "windows": [list(w) for w in windows]},
            4096 + numbers * _BYTES_A_NUMBER,
        )
        scores = answer.get("scores")
        if (
            answer.get("id") != self._number
            or not isinstance(scores, list)
            or len(scores) != len(windows)
        ):
            raise MachineError(f"{self._who}: answered what it was not asked")
        return [
            scores_of(w, s, self._top_k, self._who) for w, s in zip(windows, scores, strict=True)
        ]

    def close(self) -> None:
        """End the process and what it started."""
        self._selector.close()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it is gone, and what was not flushed with it
                self._process.stdin.close()
        if self._answered:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._drainer.join(STOP_SECONDS)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _ask(self, value: dict[str, Any], limit: int) -> dict[str, Any]:
        stdin, self._answered = self._process.stdin, False
        try:
            if stdin is not None:
                stdin.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
                stdin.flush()
        except OSError as error:
            raise MachineError(f"{self._who} ended: {self._last()}") from error
        line = self._line(limit)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MachineError(f"{self._who}: a line that is no JSON: {line[:80]!r}") from error
        if not isinstance(answer, dict):
            raise MachineError(f"{self._who}: a line that is no object")
        if "error" in answer:
            raise MachineError(f"{self._who} failed: {str(answer['error'])[:400]}")
        self._answered = True
        return answer

    def _line(self, limit: int) -> bytes:
        end = time.monotonic() + self._timeout
        while b"\n" not in self._buffer:
            if len(self._buffer) > limit:
                raise MachineError(f"{self._who}: an answer of more than {limit:,} bytes")
            if not self._selector.select(max(0.0, end - time.monotonic())):
                raise MachineError(
                    f"{self._who} did not answer within {self._timeout:g} s (--engine-timeout)"
                )
            stdout = self._process.stdout
            more = os.read(stdout.fileno(), 1 << 20) if stdout is not None else b""
            if not more:
                raise MachineError(f"{self._who} ended: {self._last()}")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _drain(self) -> None:
        stderr = self._process.stderr
        while stderr is not None and (more := stderr.read1(1 << 16)):  # type: ignore[attr-defined]
            self._tail += more
            del self._tail[:-_TAIL]

    def _last(self) -> str:
        """Return what it wrote last, for a person."""
        time.sleep(0.1)  # the thread that reads it may be behind
        lines = bytes(self._tail).decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:400] if lines else "it wrote nothing"


class ServerEngine:
    """A running server: vLLM's ``prompt_logprobs``, else ``echo`` with ``logprobs`` as OpenAI's
    completions have them.

    Plain ``echo`` names tokens by their text only: then there is no top-1 and no KL, only the loss.
    """

    def __init__(self, scorer: Scorer, batch: int, top_k: int) -> None:
        parts = urlsplit(scorer.endpoint)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.username
            or parts.query
        ):
            raise UsageError(f"--endpoint {scorer.endpoint[:200]}: give http://HOST:PORT/v1")
        try:
            self._host, self._port, self._tls = parts.hostname, parts.port, parts.scheme == "https"
        except ValueError as error:
            raise UsageError(f"--endpoint {scorer.endpoint[:200]}: {error}") from error
        self._path = parts.path.rstrip("/") or "/v1"
        self._timeout, self._top_k, self._batch = scorer.timeout, top_k, batch
        self._who = f"the server at {self._host}:{self._port or (443 if self._tls else 80)}"
        self._model = self._served(scorer.served)
        self._echo = not self._has_prompt_logprobs()
        self.environment = {"engine": self._version(), "device": "of the server"}

    def score(self, windows: Sequence[Sequence[int]]) -> list[Scores]:
        """Return the scores of each window, some windows at a time."""
        with ThreadPoolExecutor(max(1, min(self._batch, 64))) as pool:
            return list(pool.map(self._window, windows))

    def close(self) -> None:
        """Nothing is held between requests."""

    def _window(self, window: Sequence[int]) -> Scores:
        choice = self._complete(window)
        try:
            given = (_echoed if self._echo else _prompt_logprobs)(window, choice, self._top_k)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise MachineError(
                f"{self._who}: an answer that is no scores ({type(error).__name__})"
            ) from error
        if self._top_k and "top_ids" not in given:
            raise UsageError(
                f"{self._who} names tokens by their text; --top-k and a KL divergence need their numbers"
            )
        return scores_of(window, given, self._top_k, self._who)

    def _complete(self, window: Sequence[int]) -> dict[str, Any]:
        count = max(1, self._top_k)
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(window),
            "max_tokens": 1,
            "temperature": 0,
        }
        if self._echo:
            body |= {"echo": True, "logprobs": count, "return_tokens_as_token_ids": True}
        else:
            body |= {"prompt_logprobs": count}
        answer = self._request(
            "POST", "/completions", body, (1 << 16) + len(window) * (count + 2) * _BYTES_A_NUMBER
        )
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise MachineError(f"{self._who}: an answer without its one choice")
        found: dict[str, Any] = choices[0]
        return found

    def _has_prompt_logprobs(self) -> bool:
        self._echo = False
        try:
            return isinstance(self._complete([1, 2]).get("prompt_logprobs"), list)
        except ContentError:
            return False  # a server that knows no such field says so with 400; echo is tried then

    def _served(self, wanted: str) -> str:
        listed = self._request("GET", "/models", None, 1 << 20).get("data")
        names = (
            [str(m.get("id")) for m in listed if isinstance(m, dict)]
            if isinstance(listed, list)
            else []
        )
        if wanted and wanted not in names:
            raise UsageError(
                f"{self._who} serves {', '.join(n[:80] for n in names[:5]) or 'nothing'}, not {wanted!r}"
            )
        if not wanted and len(names) != 1:
            raise UsageError(f"{self._who} serves {len(names)} models; name one with --served")
        return wanted or names[0]

    def _version(self) -> str:
        try:
            found = self._request("GET", None, None, 1 << 16).get("version")
        except (ContentError, MachineError):
            return "server"
        return f"server {str(found)[:80]}" if isinstance(found, str) else "server"

    def _request(
        self, method: str, path: str | None, body: dict[str, Any] | None, limit: int
    ) -> dict[str, Any]:
        """Return the JSON object that a path below the endpoint answers; without a path, vLLM's
        ``/version``.
        """
        target = "/version" if path is None else f"{self._path}{path}"
        text = json.dumps(body).encode() if body is not None else None
        why = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(attempt)
            try:
                status, raw = self._once(method, target, text, limit)
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            if status >= 500:
                why = f"status {status}: {_text(raw)}"
                continue
            if status != 200:
                raise ContentError(f"{self._who}: {method} {target}: status {status}: {_text(raw)}")
            try:
                answer = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise MachineError(
                    f"{self._who}: an answer that is no JSON: {_text(raw)[:80]!r}"
                ) from error
            if not isinstance(answer, dict):
                raise MachineError(f"{self._who}: an answer that is no object")
            return answer
        raise MachineError(f"{self._who}: {method} {target} failed {ATTEMPTS} times: {why}")

    def _once(self, method: str, target: str, body: bytes | None, limit: int) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        try:
            connection.request(
                method,
                target,
                body,
                {"Content-Type": "application/json"} if body is not None else {},
            )
            response = connection.getresponse()
            raw = response.read(limit + 1)
            if len(raw) > limit:
                raise MachineError(f"{self._who}: an answer of more than {limit:,} bytes")
            return response.status, raw
        finally:
            connection.close()


def _text(raw: bytes) -> str:
    return " ".join(raw[:400].decode("utf-8", "replace").split())


def _prompt_logprobs(window: Sequence[int], choice: dict[str, Any], top_k: int) -> dict[str, Any]:
    entries = choice["prompt_logprobs"]
    if len(entries) != len(window):
        raise ValueError("length")
    values = [{int(i): _number(x["logprob"]) for i, x in e.items()} for e in entries[1:]]
    return _ranked([v[t] for t, v in zip(window[1:], values, strict=True)], values, top_k)


def _echoed(window: Sequence[int], choice: dict[str, Any], top_k: int) -> dict[str, Any]:
    found = choice["logprobs"]
    own = [_number(x) for x in found["token_logprobs"][1 : len(window)]]
    top = found.get("top_logprobs") or []
    names = found.get("tokens") or []
    numbered = len(names) >= len(window) and all(_numbered(n) for n in names[: len(window)])
    if (
        not numbered
        or len(top) < len(window)
        or any(not isinstance(t, dict) for t in top[1 : len(window)])
    ):
        return {"nats": [-x for x in own]}
    if [_numbered(n) for n in names[: len(window)]] != [str(i) for i in window]:
        raise ValueError("other tokens")
    values = [{int(_numbered(n)): _number(x) for n, x in t.items()} for t in top[1 : len(window)]]
    return _ranked(own, values, top_k)


def _numbered(name: Any) -> str:
    """Return N of ``token_id:N``, else ''."""
    text = str(name)
    return (
        text.removeprefix("token_id:")
        if text.startswith("token_id:") and text[9:].isdigit()
        else ""
    )


def _number(value: Any) -> float:
    """Return a log-probability; NaN for null and for what stands for an infinity."""
    found = math.nan if value is None else float(value)
    return found if found > LOWEST else math.nan


def _ranked(own: list[float], values: list[dict[int, float]], top_k: int) -> dict[str, Any]:
    found: dict[str, Any] = {"nats": [-x for x in own], "top1": [], "sure": []}
    rows = [
        sorted(v.items(), key=lambda item: (-item[1] if item[1] == item[1] else math.inf, item[0]))
        for v in values
    ]
    found["top1"], found["sure"] = [r[0][0] for r in rows], [r[0][1] for r in rows]
    if top_k:
        found["top_ids"] = [[i for i, _ in r[:top_k]] for r in rows]
        found["top_logprobs"] = [[x for _, x in r[:top_k]] for r in rows]
    return found
