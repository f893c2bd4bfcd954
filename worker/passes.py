"""The rows of one optimiser step, and the passes they are computed in.

What is learnt depends on the rows of a step alone: the loss is the mean over all their trained tokens, however many
forward and backward passes it takes. So a step's rows (per_device_train_batch_size × gradient_accumulation_steps of
them) come from the data loader as one, and are split here into the fewest passes that the memory bears: packed, as many
whole rows as fit a number of tokens, one behind the other without padding, each with attention and positions of its
own; or padded to the longest, a number of rows at a time. Pure tensor work: no model, no trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100
ALIGN = 64  # tokens; the GPU's tensor cores want sizes that are multiples of this, or products take a slow path


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join rows of input_ids and labels.

    Returns row_lengths [rows], first because the Trainer takes the batch's size from the first tensor, input_ids and
    labels [tokens], and the lengths once more as a list that stays on the host. No row's first token counts as trained:
    nothing stands before it that could predict it.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    ids = torch.cat([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])
    labels = torch.cat([torch.as_tensor(row["labels"], dtype=torch.long) for row in rows])
    labels[[0, *accumulate(lengths[:-1])]] = IGNORE
    return {"row_lengths": torch.tensor(lengths), "input_ids": ids, "labels": labels, "lengths": lengths}


def take(step: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a collated step, collated; there may be none."""
    if len(rows) == len(step["lengths"]):
        return step
    lengths = [step["lengths"][i] for i in rows]
    parts = {k: step[k].split(step["lengths"]) for k in ("input_ids", "labels")}
    taken = {k: torch.cat([part[i] for i in rows]) if rows else step[k][:0] for k, part in parts.items()}
    return {"row_lengths": torch.tensor(lengths), **taken, "lengths": lengths}


@dataclass
class Capacity:
    """How much one pass takes: `tokens` where rows are packed, `rows` where they are padded. Shrinks, never grows."""

    packed: bool
    rows: int
    tokens: int

    def split(self, lengths: Sequence[int]) -> list[range]:
        """The rows of each pass, in order: as few passes as possible, and of those the least full ones."""
        if not lengths:
            return []
        if not self.packed:
            return [range(at, min(at + self.rows, len(lengths))) for at in range(0, len(lengths), self.rows)]
        fewest = len(_fill(lengths, self.tokens))
        low, high = min(max(lengths), self.tokens), self.tokens
        while low < high:  # the smallest size that takes no more passes: a fuller pass would only cost memory
            middle = (low + high) // 2
            low, high = (low, middle) if len(_fill(lengths, middle)) <= fewest else (middle + 1, high)
        return _fill(lengths, low)

    def halve(self, lengths: Sequence[int]) -> bool:
        """Make passes of such rows smaller; False if they hold one row each already."""
        shared = [rows for rows in self.split(lengths) if len(rows) > 1]
        if not shared:
            return False
        largest = max(shared, key=lambda rows: sum(lengths[i] for i in rows))
        self.rows = len(largest) // 2
        self.tokens = sum(lengths[i] for i in largest) // 2
        return True


def _fill(lengths: Sequence[int], tokens: int) -> list[range]:
    """First fit in order: a row longer than `tokens` stands alone."""
    cuts, held = [0], 0
    for i, length in enumerate(lengths):
        if held and held + length > tokens:
            cuts.append(i)
            held = 0
        held += length
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]


def inputs_of(step: dict[str, Any], rows: range, *, packed: bool, pad_token_id: int) -> dict[str, Any]:
    """A model's inputs for some rows of a collated step.

    Rows of one length: [rows, length], nothing to mask. Otherwise packed: [1, tokens], with position_ids that restart
    and packed_seq_lengths [rows] (int32, on the host), as Unsloth's attention takes them, and at the end a row of
    padding that makes the tokens a multiple of ALIGN; or padded on the right: [rows, longest] with attention_mask.
    """
    starts = [0, *accumulate(step["lengths"])]
    lengths = step["lengths"][rows.start : rows.stop]
    ids, labels = (step[k][starts[rows.start] : starts[rows.stop]] for k in ("input_ids", "labels"))
    if len(set(lengths)) == 1:
        return {"input_ids": ids.view(len(rows), -1), "labels": labels.view(len(rows), -1)}
    if packed:
        if filler := -sum(lengths) % ALIGN:
            lengths = [*lengths, filler]
            ids, labels = pad(ids, (0, filler), value=pad_token_id), pad(labels, (0, filler), value=IGNORE)
        return {
            "input_ids": ids[None],
            "labels": labels[None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths]).to(ids.device, non_blocking=True)[None],
            "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32),
        }
    longest = torch.arange(max(lengths), device=ids.device)
    return {
        "input_ids": pad_sequence(ids.split(lengths), batch_first=True, padding_value=pad_token_id),
        "labels": pad_sequence(labels.split(lengths), batch_first=True, padding_value=IGNORE),
        "attention_mask": (longest < torch.tensor(lengths, device=ids.device)[:, None]).long(),
    }


def passes_of(step: dict[str, Any], capacity: Capacity, pad_token_id: int) -> Iterator[dict[str, Any]]:
    """The inputs of each pass of a collated step."""
    for rows in capacity.split(step["lengths"]):
        yield inputs_of(step, rows, packed=capacity.packed, pad_token_id=pad_token_id)


def trained_tokens(step: dict[str, Any]) -> torch.Tensor:
    """How many labels of a collated step count in the loss; a scalar on the labels' device, so that nothing waits."""
    return (step["labels"] != IGNORE).sum()
