"""Tokens to text as they come: no character is cut in two, and nothing that may be the start of a stop string leaves early."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, so tokens; what is still no character after as many is not going to be one


class StopStrings:
    """Finds stop strings in a text that comes in pieces."""

    def __init__(self, stop: tuple[str, ...], *, include: bool = False) -> None:
        self.stop = stop
        self.include = include
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take the next piece. Returns (text that may leave now, the stop string if one is complete).

        Of several stop strings the one that begins first wins, and the longest of those that begin there.
        """
        if not self.stop:
            return text, None
        held = self._held + text
        found = min(((held.find(s), -len(s), s) for s in self.stop if s in held), default=None)
        if found is not None:
            at, _, stop = found
            self._held = ""
            return held[: at + len(stop) if self.include else at], stop
        keep = max((_overlap(held, s) for s in self.stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def flush(self) -> str:
        """What was held back, at the end of a text that no stop string ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class Detokenizer:
    """Incremental decoding: the new text is what a decoding of a short window has more than that of the window before.

    A window ends inside a character if its text ends in U+FFFD; then the text waits for the next token. The window
    begins with the end of the prompt, because some tokenizers drop the space before a text's first token. Special
    tokens have no text.
    """

    def __init__(self, tokenizer: Any, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = prompt_ids[-5:]
        self._prefix = 0
        self._read = len(self._ids)

    def feed(self, token_id: int) -> str:
        """Text that `token_id` completes; "" while a character is incomplete."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if not after.startswith(before):
            # The prompt's last tokens were part of a character, which this token goes on with.
            before = before.rstrip(_REPLACEMENT)
        incomplete = after.endswith(_REPLACEMENT) and len(self._ids) - self._read <= _LONGEST_CHARACTER
        if incomplete or len(after) <= len(before):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte-level alphabet, from character to byte."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(rest)}


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as OpenAI's logprobs show it: its text, or `bytes:\\xe2\\x82` if it is part of a character."""
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if _REPLACEMENT not in text:
        return text
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    if len(token) == 6 and token.startswith("<0x"):  # SentencePiece's byte fallback
        return f"bytes:\\x{token[3:5].lower()}"
    table = _byte_of_char()
    if all(c in table for c in token):
        return "bytes:" + "".join(f"\\x{table[c]:02x}" for c in token)
    return text
