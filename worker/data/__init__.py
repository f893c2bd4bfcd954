"""Data: read, check, render, split, tokenise. Needs the tokenizer alone and runs before a model is loaded.

uploads.py, hub.py   where rows come from
stored.py            the spec's template and the tokenizer → StoredTemplate
render.py            a row → text in segments, checked
split.py             which rows, and on which side
tokenise.py          text → ids and labels, windows, fingerprint; threads.py: on all cores
identity.py kept.py  what the result depends on, and the results that are kept under it
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import JobFailure
from service.specs import CptSpec, IftSpec
from service.templates import StoredTemplate
from worker.data.hub import read_hub
from worker.data.identity import Unfit, identify
from worker.data.kept import Rows, TokenCache
from worker.data.problems import Problems, RowError, missing_columns
from worker.data.render import Renderer, Segments
from worker.data.split import choose, split
from worker.data.stored import base_template, configure, store_template
from worker.data.threads import all_cores
from worker.data.tokenise import Encoder, Sequences, answer_sequences, fingerprint, text_sequences
from worker.data.uploads import Source, read_upload

__all__ = ["Prepared", "TokenCache", "base_template", "configure", "prepare", "store_template"]


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on: input_ids and labels (lists of ints, -100 where not trained), no padding."""

    train: Any  # datasets.Dataset
    eval: Any | None
    template: StoredTemplate
    fingerprint: str
    report: dict[str, Any]
    preparation: dict[str, Any]  # seconds; cache: hit, miss, or off with `why`

    @property
    def record(self) -> dict[str, Any]:
        """For the run's record."""
        data = {**self.report, "fingerprint": self.fingerprint}
        return {"data": data, "preparation": self.preparation, "template": self.template.fingerprint}

    @property
    def said(self) -> str:
        """For the run's log."""
        how = {"hit": "read from the token cache", "miss": "tokenised", "off": "tokenised, not kept"}
        tokens = self.report["train_tokens"] + self.report["eval_tokens"]
        p = self.preparation
        why = f": {p['why']}" if "why" in p else ""
        return f"data: {tokens} tokens, {how[p['cache']]} in {p['seconds']:.1f} s{why}"


def prepare(
    spec: CptSpec | IftSpec,
    tokenizer: Any,
    *,
    file: Path | None,
    eval_file: Path | None = None,
    token: str | None = None,
    kept: TokenCache | None = None,
) -> Prepared:
    """Make a spec's data ready. `file` and `eval_file` are the uploads the spec names, `token` opens gated hub sets.

    With `kept` data that were made ready before are read from there, and others are left there; what comes of it is the same.
    The tokenizer gets the chat template and the EOS of the stored template, so that what is saved with it agrees.

    Raises JobFailure: invalid_data (with `rows`), invalid_spec, dataset_not_found, hub_error.
    """
    begun = time.monotonic()
    template = store_template(spec.dataset.template, tokenizer)
    instructions = isinstance(spec, IftSpec)
    renderer = Renderer(template, answers=instructions, every_turn=spec.training.train_on_responses_only)
    if any(f is not None and f.suffix.lower() == ".txt" for f in (file, eval_file)) and instructions:
        raise JobFailure("invalid_data", "a .txt file is one text, for continued pre-training; instructions need rows")
    problems = Problems()
    if file is not None:
        source = read_upload(file, problems, renderer.columns)
    else:
        source = read_hub(spec.dataset, renderer.columns, token)

    def make() -> Rows:
        with all_cores():
            return _make(spec, tokenizer, renderer, source, problems, file, eval_file)

    how: dict[str, Any] = {}
    try:
        if kept is None or not kept.limit:
            raise Unfit("LORRY_TOKEN_CACHE_BYTES is 0")
        rows, found = kept.get(identify(spec, tokenizer, template, source, file, eval_file), make)
        how["cache"] = "hit" if found else "miss"
    except Unfit as reason:
        rows, how = make(), {"cache": "off", "why": str(reason)}
    configure(tokenizer, template)
    return Prepared(
        train=rows.train(),
        eval=rows.eval(),
        template=template,
        fingerprint=rows.fingerprint,
        report=rows.report,
        preparation={**how, "seconds": round(time.monotonic() - begun, 3)},
    )


def _make(
    spec: CptSpec | IftSpec,
    tokenizer: Any,
    renderer: Renderer,
    source: Source,
    problems: Problems,
    file: Path | None,
    eval_file: Path | None,
) -> Rows:
    """Read, check, render, choose, split and tokenise. Raises JobFailure."""
    import pyarrow as pa

    cpt = isinstance(spec, CptSpec)
    masked = spec.training.train_on_responses_only
    rows, columns = _rows(spec, renderer, source, problems, file)
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
    table = pa.concat_tables([train.table(), held.table()])
    return Rows(table, len(train.ids), fingerprint([("train", train), ("eval", held)]), report)


def _eval_rows(renderer: Renderer, file: Path) -> list[Segments]:
    """All rows of the upload that is evaluated on. Raises JobFailure, its rows named as the evaluation file's."""
    problems = Problems()
    try:
        rows, _ = _read(read_upload(file, problems, renderer.columns), renderer, problems)
    except JobFailure as error:
        raise JobFailure(error.code, f"dataset.eval_file_id: {error.message}", error.rows) from error
    return rows


def _rows(
    spec: CptSpec | IftSpec, renderer: Renderer, source: Source, problems: Problems, file: Path | None
) -> tuple[list[Segments], list[str]]:
    """The chosen rows as text, and the columns there are. Raises JobFailure."""
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
