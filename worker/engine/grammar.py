"""Output that fits a JSON schema: which tokens may come next, from llguidance. torch and numpy only for the mask."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer

from service.errors import Invalid

_TOKENIZERS = 8  # kept: making one takes about a second
# One line, spaced as json.dumps does it. Free white space is something a small model may never stop writing.
_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_BITS = torch.arange(32, dtype=torch.int32)


class Grammar:
    """The state of one completion. Used by the engine's thread alone, once it is made."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> torch.Tensor | None:
        """The tokens that may come next, bool [vocabulary] on the CPU; None if the grammar failed."""
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        if self._matcher.is_error():
            return None
        bits = (words[:, None] >> _BITS) & 1
        return bits.reshape(-1)[: self._vocab_size].bool()

    def accept(self, token: int) -> tuple[bool, str]:
        """Take a token in. Returns whether the text is complete, so that only an end token could follow, and what failed."""
        self._matcher.consume_token(token)
        fault = self._matcher.get_error().strip().splitlines() if self._matcher.is_error() else []
        return self._matcher.is_stopped(), fault[0] if fault else ""


class Grammars:
    """Makes grammars for the tokenizers in use. Thread-safe; `compile` may take a second and is not for the event loop."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._tokenizers: OrderedDict[tuple[int, frozenset[int]], tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, schema: dict[str, Any] | bool, tokenizer: Any, ends: frozenset[int], count: int) -> list[Grammar]:
        """`count` grammars of one schema; `ends` are the tokens that may end the text. Raises Invalid (response_format)."""
        try:
            text = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_LAYOUT)
            first = LLMatcher(self._tokenizer(tokenizer, ends), text, log_level=0)
            fault = first.get_error() if first.is_error() else ""
        except ValueError as error:
            fault = str(error)
        if fault:
            raise Invalid(
                f"response_format: the schema cannot be followed: {fault.strip().splitlines()[0]}",
                param="response_format",
                code="invalid_schema",
            )
        return [Grammar(first if i == 0 else first.deep_copy(), self._vocab_size) for i in range(count)]

    def _tokenizer(self, tokenizer: Any, ends: frozenset[int]) -> Any:
        key = (id(tokenizer), ends)
        with self._lock:
            if key not in self._tokenizers:
                backend = tokenizer.backend_tokenizer.to_str()
                # The tokenizer is kept beside its own form, so that its id stays taken.
                made = LLTokenizer(backend, n_vocab=self._vocab_size, eos_token=sorted(ends) or None)
                self._tokenizers[key] = (tokenizer, made)
            self._tokenizers.move_to_end(key)
            while len(self._tokenizers) > _TOKENIZERS:
                self._tokenizers.popitem(last=False)
            return self._tokenizers[key][1]
