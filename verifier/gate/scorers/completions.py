# SPDX-License-Identifier: Apache-2.0
"""How long the completions are that lm-eval lets a model generate, and how they end: lm-eval keeps
only their text, cut at the stop sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

END_TOKEN, STOP_SEQUENCE, CUT_OFF = range(3)
"""How a completion ends: by an end token, by a stop sequence of the task, or at the limit."""


@dataclass(frozen=True)
class Completion:
    """The tokens of a completion, its end token or stop sequence among them, and how it ends."""

    tokens: int
    finish: int


class CompletionRecorder:
    """Records the completions of lm-eval's adapter around a transformers model, by prompt.

    The adapter generates in batches of its own order and reports each answer with its prompt to its
    cache hook, in the order of the rows.
    """

    def __init__(self, adapter: Any) -> None:
        self._adapter, self._generate = adapter, adapter._model_generate
        self._rows: deque[Completion] = deque()
        self._found: dict[str, deque[Completion]] = {}
        adapter._model_generate = self._model_generate
        adapter.set_cache_hook(self)

    def _model_generate(
        self, context: Any, max_length: int, stop: list[str], **options: Any
    ) -> Any:
        output = self._generate(context, max_length=max_length, stop=stop, **options)
        start = context.shape[1]
        for row in output.tolist():
            self._rows.append(self._completion(row[start:], stop))
        return output

    def add_partial(self, kind: str, request: tuple[Any, ...], _answer: Any) -> None:
        """Take an answer to a request, as lm-eval's cache hooks do."""
        if kind == "generate_until" and self._rows:
            self._found.setdefault(request[0], deque()).append(self._rows.popleft())

    def take(self, prompt: str) -> Completion:
        """Return the completion of a prompt; of equal prompts, the next one.

        Raises:
            KeyError: no completion of it was recorded.
        """
        return self._found[prompt].popleft()

    def _completion(self, tokens: Sequence[int], stop: Sequence[str]) -> Completion:
        """Return where the first end token or stop sequence ends; a row is generated on, or padded,
        until all rows of its batch are done.
        """
        ends = self._end_tokens()
        end = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
        finish = CUT_OFF if end is None else END_TOKEN
        count = len(tokens) if end is None else end
        terms = [term for term in stop if term]
        if not self._stops(tokens[:count], terms):
            return Completion(count, finish)
        below, above = 0, count
        while above - below > 1:
            middle = (below + above) // 2
            stops = self._stops(tokens[:middle], terms)
            below, above = (below, middle) if stops else (middle, above)
        return Completion(above, STOP_SEQUENCE)

    def _stops(self, tokens: Sequence[int], terms: Sequence[str]) -> bool:
        text = self._adapter.tok_decode(list(tokens))
        return any(term in text for term in terms)

    def _end_tokens(self) -> set[int]:
        declared = self._adapter.model.generation_config.eos_token_id
        tokens = declared if isinstance(declared, list) else [declared]
        return {token for token in (*tokens, self._adapter.eot_token_id) if token is not None}
