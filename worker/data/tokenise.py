"""Text becomes token ids and labels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from worker.data.render import Segments

IGNORE = -100
BATCH = 1000  # rows
PIECE = 500_000  # characters; the tokenizer needs a hundred times a text's size while it works on it
Ids = np.ndarray[Any, np.dtype[np.int32]]


class Encoder:
    """Tokenises segments one by one, so that no token spans a prompt and its answer.

    An answer's tokens then follow the very ids that the engine gets for the prompt. A tokenizer that puts a space in
    front of each text (SentencePiece's dummy prefix) must not do so within a row: there the segment is tokenised after
    a line break, whose ids are taken off again.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lead = self._plain(["\n"])[0]
        alone, after = self._plain(["a b", "\na b"])
        self._prefixes = after[len(self._lead) :] != alone

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def _within(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._prefixes:
            return self._plain(texts)
        return [ids[len(self._lead) :] for ids in self._plain(["\n" + text for text in texts])]

    def rows(self, rows: Sequence[Segments]) -> Iterator[list[Ids]]:
        """The ids of each row's segments."""
        for at in range(0, len(rows), BATCH):
            yield from self._batch(rows[at : at + BATCH])

    def _batch(self, rows: Sequence[Segments]) -> Iterator[list[Ids]]:
        pieces: list[tuple[int, int, str]] = []  # row, segment, text
        for r, row in enumerate(rows):
            for s, text in enumerate(row):
                pieces += [(r, s, piece) for piece in self._pieces(text)]
        firsts: dict[int, int] = {}
        for n, (r, _, _) in enumerate(pieces):
            firsts.setdefault(r, n)
        first = set(firsts.values())
        ids: list[list[int]] = [[] for _ in pieces]
        for some, encode in (
            (sorted(first), self._plain),
            ([n for n in range(len(pieces)) if n not in first], self._within),
        ):
            for chunk in _by_size(some, pieces):
                for n, found in zip(chunk, encode([pieces[n][2] for n in chunk]), strict=True):
                    ids[n] = found
        out: list[list[list[Ids]]] = [[[] for _ in row] for row in rows]
        for (r, s, _), found in zip(pieces, ids, strict=True):
            out[r][s].append(np.asarray(found, dtype=np.int32))
        for row_ids in out:
            yield [np.concatenate(parts) if parts else np.zeros(0, np.int32) for parts in row_ids]

    def _pieces(self, text: str) -> Iterator[str]:
        """A very long text in pieces that tokenise as the whole does."""
        while len(text) > PIECE * 3 // 2:
            cut = self._cut(text)
            yield text[:cut]
            text = text[cut:]
        if text:
            yield text

    def _cut(self, text: str) -> int:
        """A place near PIECE where cutting changes no token nearby: before a space, else anywhere."""
        near = range(PIECE, min(PIECE + 2000, len(text) - 1))
        spaces = [m.start() + PIECE for m in re.finditer(r"(?<=\w) (?=\w)", text[PIECE : near.stop])]
        for some in (spaces[:64], list(near)[:256]):
            around = [(text[at - 100 : at], text[at : at + 100]) for at in some]
            joint = self._plain([left + right for left, right in around])
            lefts, rights = self._plain([left for left, _ in around]), self._within([right for _, right in around])
            for at, whole, left_ids, right_ids in zip(some, joint, lefts, rights, strict=True):
                if whole == left_ids + right_ids:
                    return at
        return PIECE


def _by_size(numbers: list[int], pieces: list[tuple[int, int, str]]) -> Iterator[list[int]]:
    """Batches of about 2 × PIECE characters."""
    chunk: list[int] = []
    size = 0
    for n in numbers:
        chunk.append(n)
        size += len(pieces[n][2])
        if size > 2 * PIECE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def windows(ids: Ids, size: int) -> list[Ids]:
    """Cut ids into windows of at most `size` tokens, in order, nothing left out and nothing added.

    A last window of one token would have no next token to predict: the window before it gives up its last one.
    """
    cuts = [*range(0, len(ids), size), len(ids)]
    if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:
        cuts[-2] -= 1
    return [ids[a:b] for a, b in pairwise(cuts)]


@dataclass
class Sequences:
    """Training sequences in the making, with their counts. `labels` is None where they are the ids."""

    ids: list[Ids] = field(default_factory=list)
    labels: list[Ids] | None = None
    rows: int = 0
    row_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: int = 0

    def _count(self, tokens: int) -> None:
        self.rows += 1
        self.row_tokens += tokens
        self.longest = max(self.longest, tokens)

    def pick(self, numbers: list[int]) -> Sequences:
        """Some of the sequences, in the order given, without the counts of rows."""
        return Sequences(
            [self.ids[n] for n in numbers], None if self.labels is None else [self.labels[n] for n in numbers]
        )

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.ids)

    @property
    def trained(self) -> int:
        """Labels that count in the loss: those that are not masked and have a token before them."""
        return sum(trained(labels) for labels in (self.ids if self.labels is None else self.labels))

    def fingerprint(self, digest: Any) -> None:
        lengths = np.array([len(ids) for ids in self.ids], dtype="<i8")
        digest.update(lengths.tobytes())
        for column in (self.ids, self.ids if self.labels is None else self.labels):
            for values in column:
                digest.update(np.ascontiguousarray(values, dtype="<i4").tobytes())

    def table(self) -> Any:
        """A pyarrow.Table with input_ids, and with labels where they are not the ids."""
        import pyarrow as pa

        columns = {"input_ids": self.ids, **({} if self.labels is None else {"labels": self.labels})}
        return pa.table({name: _column(values) for name, values in columns.items()})


def trained(labels: Ids) -> int:
    return int(np.count_nonzero(labels[1:] != IGNORE))


def _column(values: list[Ids]) -> Any:
    import pyarrow as pa

    chunks = []
    for at in range(0, len(values), BATCH):
        part = values[at : at + BATCH]
        offsets = np.zeros(len(part) + 1, dtype=np.int32)
        np.cumsum([len(v) for v in part], out=offsets[1:])
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(part))))
    return pa.chunked_array(chunks, type=pa.list_(pa.int32()))


def text_sequences(encoder: Encoder, rows: Sequence[Segments], size: int) -> Sequences:
    """Raw text: every token is trained on, long rows are cut into windows."""
    out = Sequences()
    for segments in encoder.rows(rows):
        ids = np.concatenate(segments)
        out._count(len(ids))
        out.ids += windows(ids, size)
    return out


def answer_sequences(encoder: Encoder, rows: Sequence[Segments], size: int, *, answers_only: bool) -> Sequences:
    """Instruction data: rows longer than `size` tokens are truncated; rows left without a trained token are dropped."""
    out = Sequences(labels=[] if answers_only else None)
    for segments in encoder.rows(rows):
        ids = np.concatenate(segments)
        out._count(len(ids))
        out.truncated += len(ids) > size
        masks = [part if s % 2 else np.full_like(part, IGNORE) for s, part in enumerate(segments)]
        labels = np.concatenate(masks)[:size] if answers_only else ids[:size]
        if not trained(labels):
            out.dropped += 1
            continue
        out.ids.append(ids[:size])
        if out.labels is not None:
            out.labels.append(labels)
    return out


def fingerprint(sides: Sequence[tuple[str, Sequences]]) -> str:
    """SHA-256 over the ids and labels of each side."""
    digest = hashlib.sha256()
    for name, sequences in sides:
        digest.update(name.encode())
        sequences.fingerprint(digest)
    return digest.hexdigest()
