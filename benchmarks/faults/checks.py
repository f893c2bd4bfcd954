"""After the faults: what must hold. Every check returns the sentences that say where it does not."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, text

from benchmarks.faults.load import FINAL, Ledger, Sent
from benchmarks.faults.parts import Site
from service.db import Database
from service.jobs import repository
from service.jobs.states import ACTIVE, MOVES
from service.models import AdapterRow, ArtifactRow, JobRow, RunRow

_SAME = ("loss", "eval_loss", "grad_norm", "learning_rate", "epoch", "tokens")


def outcome(db: Database, here: Site, job_id: str) -> dict[str, Any]:
    """What a succeeded job came to, in a form in which two of one role can be compared."""
    with db.read() as session:
        row = session.get_one(JobRow, job_id)
        series = repository.metrics(session, job_id)
        path = session.scalar(select(AdapterRow.path).where(AdapterRow.job_id == job_id))
    points = {s: [{k: p.get(k) for k in ("step", *_SAME)} for p in series[s]] for s in series}
    folder = Path(path) if path else here.data / "exports" / job_id
    weights = {f.name: _sha256(f) for f in sorted(folder.glob("*.safetensors"))}
    result = {k: row.result.get(k) for k in ("eval_loss", "train_loss", "step")}
    return {"points": points, "weights": weights, "result": result}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def no_job_lost(db: Database, sent: Iterable[Sent]) -> list[str]:
    """Every accepted POST is in SQL and final, as one job; it succeeded, or failed for a disk that was full."""
    wrong = []
    accepted = {s.key: s for s in sent if s.job_id}
    with db.read() as session:
        rows = {r.idempotency_key: r for r in session.scalars(select(JobRow))}
        total = session.scalar(select(func.count()).select_from(JobRow))
    for key, s in accepted.items():
        row = rows.get(key)
        if row is None or row.id != s.job_id:
            wrong.append(f"{key}: accepted as {s.job_id}, in SQL it is {row and row.id}")
        elif row.status not in FINAL:
            wrong.append(f"{row.id} ({key}) is {row.status}, attempt {row.attempt}")
        elif row.status != "succeeded" and not _excused(row.error or {}):
            wrong.append(f"{row.id} ({key}) is {row.status}: {row.error}")
    if total != len(accepted):
        unsettled = [k for k in rows if k not in accepted]
        wrong.append(f"{total} jobs in SQL, {len(accepted)} accepted; not told to their clients: {unsettled}")
    return wrong


def _excused(error: dict[str, Any]) -> bool:
    """A full disk is a reason to fail that the client can act on, for the job and those behind it; nothing else is."""
    cause = error
    while cause.get("code") == "parent_failed":
        cause = cause.get("cause") or {}
    return cause.get("code") == "insufficient_storage"


def none_done_twice(db: Database, here: Site) -> list[str]:
    """One `succeeded` event, one finished run, one adapter or one set of artifacts, whole on disk."""
    wrong = []
    with db.read() as session:
        for row in session.scalars(select(JobRow)):
            ends = [e for e in _statuses(session, row.id) if e in FINAL]
            runs = session.scalars(select(RunRow.outcome).where(RunRow.job_id == row.id)).all()
            if len(ends) != 1 or ends[0] != row.status:
                wrong.append(f"{row.id} is {row.status} and had the final events {ends}")
            if row.status != "succeeded":
                continue
            if runs.count("succeeded") != 1 or None in runs:
                wrong.append(f"{row.id}: runs ended as {runs}")
            adapters = session.scalars(select(AdapterRow).where(AdapterRow.job_id == row.id)).all()
            artifacts = session.scalars(select(ArtifactRow).where(ArtifactRow.job_id == row.id)).all()
            if row.kind == "export":
                wrong += [f"{row.id} has no artifacts"] if not artifacts else []
                for a in artifacts:
                    path = here.data / "exports" / row.id / a.path
                    if not path.is_file() or _sha256(path) != a.sha256:
                        wrong.append(f"{row.id}: {a.path} is not what its row says")
            elif [a.ready for a in adapters] != [True] or not Path(adapters[0].path or "").is_dir():
                wrong.append(f"{row.id} has the adapters {[(a.name, a.ready, a.path) for a in adapters]}")
    return wrong


def _statuses(session: Any, job_id: str) -> list[str]:
    events = repository.events_after(session, job_id, 0, 100_000)
    return [e.data["status"] for e in events if e.type == "status"]


def fenced_runs_are_silent(db: Database) -> list[str]:
    """Events come without a gap, moves are allowed ones, and only a live run reports; its steps follow each other."""
    wrong = []
    with db.read() as session:
        for job_id in session.scalars(select(JobRow.id)).all():
            state, last = "", 0
            for n, event in enumerate(repository.events_after(session, job_id, 0, 100_000), 1):
                if event.seq != n:
                    wrong.append(f"{job_id}: event {event.seq} in the place of {n}")
                    break
                if event.type == "status":
                    to = event.data["status"]
                    if state and to not in MOVES[state]:
                        wrong.append(f"{job_id}: {state} → {to}")
                    state = to
                elif state not in ACTIVE:
                    wrong.append(f"{job_id}: a {event.type} event while {state}")
                elif event.type == "log" and (m := re.match(r"resumed from .* step (\d+)", event.data["message"])):
                    last = int(m[1])
                elif event.type == "metrics" and event.data["split"] == "train":
                    step = event.data["step"]
                    # 1: a run without a checkpoint begins again. The same step: told twice, its first commit unanswered.
                    if step not in (last, last + 1, 1):
                        wrong.append(f"{job_id}: step {step} after step {last}")
                    last = step
    return wrong


def same_as_undisturbed(db: Database, here: Site, sent: Iterable[Sent], reference: dict[str, Any]) -> list[str]:
    """Every succeeded job came to exactly what the undisturbed one of its role did: each point, each byte of weights."""
    wrong = []
    for s in sent:
        with db.read() as session:
            row = session.get(JobRow, s.job_id) if s.job_id else None
        if row is None or row.status != "succeeded":
            continue
        got, want = outcome(db, here, row.id), reference[s.role]
        for part in want:
            if got[part] != want[part]:
                wrong.append(
                    f"{row.id} ({s.role}, attempt {row.attempt}): {part} differ: {_first(got[part], want[part])}"
                )
    return wrong


def _first(got: Any, want: Any) -> str:
    for split in want if isinstance(want, dict) else ():
        if isinstance(want[split], list):
            for g, w in zip(got[split], want[split], strict=False):
                if g != w:
                    return f"{g} instead of {w}"
            if len(got[split]) != len(want[split]):
                return f"{len(got[split])} {split} points instead of {len(want[split])}"
    return f"{json.dumps(got)[:300]} instead of {json.dumps(want)[:300]}"


def nothing_left(db: Database, here: Site) -> list[str]:
    """No temporary file, and no folder without a row."""
    wrong = [
        f"left on disk: {p.relative_to(here.data)}"
        for p in sorted(here.data.rglob("*"))
        if re.search(r"\.(tmp|old)$|^\.staging|^\.upload-|^\.checkpoint", p.name) and "unsloth" not in str(p)
    ]
    with db.read() as session:
        kept = {Path(p).name for p in session.scalars(select(AdapterRow.path).where(AdapterRow.ready)) if p}
        exported = set(session.scalars(select(JobRow.id).where(JobRow.kind == "export", JobRow.status == "succeeded")))
    for folder, names in (("adapters", kept), ("exports", exported)):
        for path in (here.data / folder).iterdir() if (here.data / folder).is_dir() else ():
            if path.name not in names:
                wrong.append(f"on disk without a row: {path.relative_to(here.data)}")
    return wrong


def database_is_whole(db: Database) -> list[str]:
    if not db.sqlite:
        return []
    with db.read() as session:
        said = session.scalar(text("PRAGMA integrity_check"))
    return [] if said == "ok" else [f"SQLite: {said}"]


def run_all(
    db: Database, here: Site, ledger: Ledger, reference: dict[str, Any], overlaps: list[str]
) -> dict[str, list[str]]:
    """Check by check, what is wrong."""
    sent = list(ledger.sent)
    checks: dict[str, Callable[[], list[str]]] = {
        "no job lost": lambda: no_job_lost(db, sent),
        "none completed twice": lambda: none_done_twice(db, here),
        "no two attempts train at once": lambda: overlaps,
        "fenced runs write nothing": lambda: fenced_runs_are_silent(db),
        "as the undisturbed training": lambda: same_as_undisturbed(db, here, sent, reference),
        "nothing left on disk": lambda: nothing_left(db, here),
        "the database is whole": lambda: database_is_whole(db),
        "every client answered": lambda: ledger.violations,
    }
    return {name: check() for name, check in checks.items()}


def figures(db: Database) -> dict[str, Any]:
    """Counts of what was disturbed: jobs, attempts, why runs ended."""
    with db.read() as session:
        jobs = Counter(session.scalars(select(JobRow.status)))
        runs = session.execute(select(RunRow.job_id, RunRow.outcome, RunRow.reason)).all()
    per_job: dict[str, int] = defaultdict(int)
    for job_id, _, _ in runs:
        per_job[job_id] += 1
    reasons = Counter(re.sub(r"[\d.]+", "N", (r or "")[:60]) for _, outcome, r in runs if outcome == "queued")
    return {
        "jobs": dict(jobs),
        "runs": len(runs),
        "jobs_disturbed": sum(1 for n in per_job.values() if n > 1),
        "most_runs_of_a_job": max(per_job.values(), default=0),
        "given_back": dict(reasons),
    }
