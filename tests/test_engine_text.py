"""Tokens to text: characters stay whole, stop strings are found across tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from service.openai.wire import token_bytes
from worker.engine.detokenize import Detokenizer, StopStrings, token_text

TEXTS = [
    "plain ascii, twice over",
    "한국어 문장입니다. 그리고 하나 더!",
    "emoji 👩‍👩‍👧‍👦 and 🇰🇷, é and é",
    "日本語とРусский mixed\n\n\ttabs",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_none_holds_half_a_character(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text.split())
    detokenizer = Detokenizer(tokenizer, tokenizer("a prompt")["input_ids"])
    pieces = [detokenizer.feed(i) for i in ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_begun_in_the_prompt_is_completed(tokenizer: Any) -> None:
    ids = tokenizer("ab한", add_special_tokens=False)["input_ids"]
    assert len(ids) >= 4, "the character is three tokens"
    detokenizer = Detokenizer(tokenizer, ids[:-1])
    assert detokenizer.feed(ids[-1]) == "한"
    assert detokenizer.feed(tokenizer("c", add_special_tokens=False)["input_ids"][0]) == "c"


def test_an_incomplete_character_at_the_end_has_no_text(tokenizer: Any) -> None:
    ids = tokenizer("x한", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, ids[:1])
    assert [detokenizer.feed(i) for i in ids[1:-1]] == ["", ""]


def test_bytes_that_are_no_character_do_not_hold_the_text_back_for_ever(tokenizer: Any) -> None:
    (invalid,) = tokenizer.convert_tokens_to_ids(["ÿ"])  # byte 0xff
    assert token_text(tokenizer, invalid) == "bytes:\\xff"
    detokenizer = Detokenizer(tokenizer, [10])
    pieces = [detokenizer.feed(invalid) for _ in range(50)]
    assert sum(map(len, pieces)) > 40


def test_special_tokens_have_no_text(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, [10])
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert [detokenizer.feed(i) for i in (tokenizer.eos_token_id, *ids)] == ["", "a"]


def test_a_token_that_is_part_of_a_character_is_told_by_its_bytes(tokenizer: Any) -> None:
    ids = tokenizer("한", add_special_tokens=False)["input_ids"]
    texts = [token_text(tokenizer, i) for i in ids]
    assert texts == ["bytes:\\xed", "bytes:\\x95", "bytes:\\x9c"]
    assert bytes(b for t in texts for b in token_bytes(t)).decode() == "한"
    assert token_bytes("한 a") == list("한 a".encode())


def feed_all(stops: StopStrings, pieces: list[str]) -> tuple[list[str], str | None]:
    out: list[str] = []
    for piece in pieces:
        text, stop = stops.feed(piece)
        out.append(text)
        if stop is not None:
            return out, stop
    return [*out, stops.flush()], None


def test_text_that_may_begin_a_stop_string_waits() -> None:
    assert feed_all(StopStrings(("###",)), ["ab#", "#", "c#", "##", "d"]) == (["ab", "", "##c", ""], "###")


def test_what_was_held_back_leaves_when_no_stop_string_comes() -> None:
    assert feed_all(StopStrings(("END",)), ["the EN"]) == (["the ", "EN"], None)


def test_the_stop_string_that_begins_first_ends_the_text() -> None:
    assert feed_all(StopStrings(("b", "ab", "abc")), ["xabc"]) == (["x"], "abc")


def test_a_stop_string_can_stay_in_the_text() -> None:
    assert feed_all(StopStrings((".\n",), include=True), ["One.", "\nTwo"]) == (["One", ".\n"], ".\n")


@pytest.mark.parametrize("seed", range(50))
def test_any_split_of_a_text_gives_the_same_end(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abc") for _ in range(60))
    stop = tuple("".join(rng.choice("abc") for _ in range(rng.randint(2, 5))) for _ in range(2))
    cuts = sorted(rng.sample(range(1, 60), 25))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 60], strict=True)]
    out, hit = feed_all(StopStrings(stop), pieces)
    places = [text.find(s) for s in stop if s in text]
    # A shorter stop string inside a longer one may complete first; otherwise the first to begin wins.
    assert (hit is None) == (not places)
    joined = "".join(out)
    assert text.startswith(joined)
    if hit is None:
        assert joined == text
    else:
        assert text[len(joined) :].startswith(hit)
        assert not any(s in joined for s in stop)
