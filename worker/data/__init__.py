"""Data: read, check, render, split, tokenise. Needs the tokenizer alone and runs before a model is loaded.

uploads.py, hub.py   where rows come from
stored.py            the spec's template and the tokenizer → StoredTemplate
render.py            a row → text in segments, checked
split.py             which rows, and on which side
tokenise.py          text → ids and labels, windows, fingerprint
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import JobFailure
from service.specs import CptSpec, IftSpec
from service.templates import StoredTemplate
from worker.data.hub import read_hub
from worker.data.problems import Problems, RowError, missing_columns
from worker.data.render import Renderer, Segments
from worker.data.split import choose, split
from worker.data.stored import base_template, configure, store_template
from worker.data.tokenise import Encoder, Sequences, answer_sequences, fingerprint, text_sequences
from worker.data.uploads import Source, read_upload

__all__ = ["Prepared", "base_template", "configure", "prepare", "store_template"]


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on: input_ids and labels (lists of ints, -100 where not trained), no padding."""

    train: Any  # datasets.Dataset
    eval: Any | None
    template: StoredTemplate
    fingerprint: str
    report: dict[str, Any]


def prepare(
    spec: CptSpec | IftSpec,
    tokenizer: Any,
    *,
    file: Path | None,
    eval_file: Path | None = None,
    token: str | None = None,
) -> Prepared:
    """Make a spec's data ready. `file` and `eval_file` are the uploads the spec names, `token` opens gated hub sets.

    The tokenizer gets the chat template and the EOS of the stored template, so that what is saved with it agrees.

    Raises JobFailure: invalid_data (with `rows`), invalid_spec, dataset_not_found, hub_error.
    """
    template = store_template(spec.dataset.template, tokenizer)
    cpt = isinstance(spec, CptSpec)
    masked = spec.training.train_on_responses_only
    renderer = Renderer(template, answers=not cpt, every_turn=masked)
    if any(f is not None and f.suffix.lower() == ".txt" for f in (file, eval_file)) and not cpt:
        raise JobFailure("invalid_data", "a .txt file is one text, for continued pre-training; instructions need rows")
    rows, columns = _rows(spec, renderer, file, token)

    encoder, size = Encoder(tokenizer), spec.model.max_seq_length

    def sequences(some: list[Segments]) -> Sequences:
        return (
            text_sequences(encoder, some, size) if cpt else answer_sequences(encoder, some, size, answers_only=masked)
        )

    if eval_file is not None:
        train = whole = sequences(rows)
        if file is not None and file.suffix.lower() == ".txt":
            chosen = choose(len(whole.ids), spec.dataset.max_samples, spec.dataset.seed)
            train = whole if chosen is None else whole.pick(chosen)
        held = sequences(_eval_rows(renderer, eval_file))
        sides, counted = [train, held], [whole, held]  # what is picked has no counts of its own
    elif file is not None and file.suffix.lower() == ".txt":
        # One text: what is chosen and split are its windows.
        whole = sequences(rows)
        chosen = choose(len(whole.ids), spec.dataset.max_samples, spec.dataset.seed) or list(range(len(whole.ids)))
        sides = [whole.pick([chosen[i] for i in side]) for side in split(len(chosen), spec.dataset)]
        counted = [whole]
    else:
        sides = counted = [sequences([rows[i] for i in side]) for side in split(len(rows), spec.dataset)]
    train, held = sides
    _check_left(train, held, counted, spec)
    configure(tokenizer, template)
    total = sum(side.rows for side in counted)
    report = {
        "rows": total,
        "bad": 0,
        "train_rows": len(train.ids),
        "eval_rows": len(held.ids),
        "train_tokens": train.tokens,
        "eval_tokens": held.tokens,
        "trained_tokens": train.trained,
        "truncated_rows": sum(side.truncated for side in counted),
        "dropped_rows": sum(side.dropped for side in counted),
        "windows": sum(len(side.ids) for side in sides) if cpt else 0,
        "longest": max(side.longest for side in counted),
        "mean_tokens": round(sum(side.row_tokens for side in counted) / total, 1),
        "columns": columns,
    }
    return Prepared(
        train=train.dataset(),
        eval=held.dataset() if held.ids else None,
        template=template,
        fingerprint=fingerprint([("train", train), ("eval", held)]),
        report=report,
    )


def _eval_rows(renderer: Renderer, file: Path) -> list[Segments]:
    """All rows of the upload that is evaluated on. Raises JobFailure, its rows named as the evaluation file's."""
    problems = Problems()
    try:
        rows, _ = _read(read_upload(file, problems, renderer.columns), renderer, problems)
    except JobFailure as error:
        raise JobFailure(error.code, f"dataset.eval_file_id: {error.message}", error.rows) from error
    return rows


def _rows(
    spec: CptSpec | IftSpec, renderer: Renderer, file: Path | None, token: str | None
) -> tuple[list[Segments], list[str]]:
    """The chosen rows as text, and the columns there are. Raises JobFailure."""
    problems = Problems()
    if file is not None:
        source = read_upload(file, problems, renderer.columns)
    else:
        source = read_hub(spec.dataset, renderer.columns, token)
    rows, columns = _read(source, renderer, problems)
    if file is not None and file.suffix.lower() != ".txt":
        chosen = choose(len(rows), spec.dataset.max_samples, spec.dataset.seed)
        rows = rows if chosen is None else [rows[i] for i in chosen]
    return rows, columns


def _read(source: Source, renderer: Renderer, problems: Problems) -> tuple[list[Segments], list[str]]:
    """All rows of a source as text, and the columns there are. Raises JobFailure."""
    if source.columns is not None and (missing := renderer.missing(source.columns)):
        raise missing_columns(missing, source.columns)
    rows: list[Segments] = []
    seen: dict[str, None] = dict.fromkeys(source.columns or ())
    for number, row in source.rows:
        seen.update(dict.fromkeys(row))
        try:
            rows.append(renderer(row))
        except RowError as e:
            problems.add(number, str(e))
    columns = list(seen)
    if columns and (missing := renderer.missing(columns)):
        raise missing_columns(missing, columns)
    problems.check()
    if not rows:
        raise JobFailure("invalid_data", "the set has no rows")
    return rows, columns


def _check_left(train: Sequences, held: Sequences, counted: list[Sequences], spec: CptSpec | IftSpec) -> None:
    dropped = sum(side.dropped for side in counted)
    for side, name in ((train, "training"), (held, "evaluation")):
        if not side.ids and (name == "training" or spec.dataset.evaluates):
            raise JobFailure(
                "invalid_data",
                f"no row is left for {name}: {dropped} rows have no trained token within "
                f"model.max_seq_length {spec.model.max_seq_length}, their prompts alone are that long",
            )
