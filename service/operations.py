"""The commands that look after an installation: migrate, backup, restore, prune. Imports are late: `lorry api` has none."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.settings import Settings

if TYPE_CHECKING:
    from service.retention import Item


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    backup = commands.add_parser("backup", help="copy the database and what it refers to, while everything runs")
    backup.add_argument("target", type=Path, help="a new folder, or a new file named .tar")
    backup.add_argument("--exports", action="store_true", help="the files of exports, too, not their manifests alone")
    backup.add_argument("--checkpoints", action="store_true", help="checkpoints of finished jobs, too")
    restore = commands.add_parser("restore", help="fill an empty database and data folder from a backup")
    restore.add_argument("source", type=Path, help="what `lorry backup` made")
    restore.add_argument("--replace", action="store_true", help="remove what is there; nothing may run meanwhile")
    restore.add_argument("--check", action="store_true", help="only read the backup and compare it with its manifest")
    prune = commands.add_parser("prune", help="remove what the LORRY_KEEP_ settings let go")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.add_argument("-v", "--verbose", action="store_true", help="each thing, not the sums alone")
    prune.add_argument("--json", action="store_true", help="as JSON")


def migrate(settings: Settings, revision: str) -> None:
    """Raises SystemExit with the reason if it cannot."""
    from alembic.util import CommandError
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from service.migrate import head, known, move

    if revision != "head" and revision not in known():
        raise SystemExit(f"lorry: no revision {revision!r}; there are {', '.join(sorted(known()))}")
    try:
        move(settings.sqlalchemy_url, revision)
    except (SQLAlchemyError, CommandError) as error:
        raise SystemExit(f"lorry: cannot migrate: {error}") from None
    at = "the newest revision" if revision in ("head", head()) else f"revision {revision}"
    print(f"at {at}: {make_url(settings.sqlalchemy_url).render_as_string(hide_password=True)}")


def backup(settings: Settings, arguments: argparse.Namespace) -> None:
    """Exit status 2 for a backup that was made but lacks what its rows name, or has files that are not what they say."""
    from sqlalchemy.exc import SQLAlchemyError

    from service.archive import BackupError
    from service.backup import backup as make

    _end_cleanly()
    try:
        report = make(settings, arguments.target, exports=arguments.exports, checkpoints=arguments.checkpoints)
    except (BackupError, OSError, SQLAlchemyError) as error:
        raise SystemExit(f"lorry: no backup: {error}") from None
    rows = ", ".join(f"{count} {name}" for name, count in report.rows.items() if count)
    print(f"{arguments.target}: {report.files} files, {report.bytes} bytes; rows: {rows or 'none'}")
    for name, count in report.left_out.items():
        flag = "--checkpoints" if name == "checkpoints" else "--exports"
        print(f"left out: {count} {name} ({flag} takes them along)")
    for word in ("deleted", "missing", "damaged"):
        for name in getattr(report, word):
            print(f"{word}{' meanwhile' if word == 'deleted' else ''}: {name}", file=sys.stderr)
    if report.missing or report.damaged:
        sys.exit(2)


def restore(settings: Settings, arguments: argparse.Namespace) -> None:
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    from service.archive import BackupError
    from service.restore import check
    from service.restore import restore as fill

    _end_cleanly()
    try:
        if arguments.check:
            manifest = check(arguments.source)
            files = manifest["files"]
            print(f"{arguments.source} is whole: {len(files)} files, {sum(f['bytes'] for f in files)} bytes")
            return
        report = fill(settings, arguments.source, replace=arguments.replace)
    except (BackupError, OSError, SQLAlchemyError, CommandError) as error:
        raise SystemExit(f"lorry: not restored: {error}") from None
    rows = ", ".join(f"{count} {name}" for name, count in report.rows.items() if count)
    print(f"restored {report.files} files, {report.bytes} bytes; rows: {rows or 'none'}")
    if report.requeued:
        print(f"queued again, since they ran when the backup was made: {', '.join(report.requeued)}")


def prune(settings: Settings, arguments: argparse.Namespace) -> None:
    from sqlalchemy.exc import SQLAlchemyError

    from service.cli import check_database
    from service.db import Database
    from service.retention import plan
    from service.retention import prune as let_go

    check_database(settings)
    db = Database(settings.sqlalchemy_url)
    try:
        if arguments.dry_run:
            items = plan(db, settings)
        else:
            report = let_go(db, settings)
            if report is None:
                raise SystemExit("lorry: another process prunes right now")
            items = report.gone
    except (OSError, SQLAlchemyError) as error:
        raise SystemExit(f"lorry: pruning ended early: {error}") from None
    finally:
        db.dispose()
    if arguments.json:
        fields: Any = [{"kind": i.kind, "ref": i.ref, "bytes": i.bytes} for i in items]
        print(json.dumps({"dry_run": arguments.dry_run, "bytes": sum(i.bytes for i in items), "items": fields}))
    else:
        print("\n".join(_table(items, arguments.verbose)))
        print("nothing was removed: --dry-run" if arguments.dry_run else "removed")


def _table(items: Iterable[Item], verbose: bool) -> list[str]:
    from service.retention import REASONS

    by_kind: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_kind[item.kind].append(item)
    lines = [f"{'what':<16} {'number':>7} {'bytes':>15}  why"]
    for kind in (k for k in REASONS if k in by_kind):
        some = by_kind[kind]
        lines.append(f"{kind:<16} {len(some):>7} {sum(i.bytes for i in some):>15}  {REASONS[kind]}")
        lines += [f"  {i.ref:<30} {i.bytes:>8}" for i in some if verbose]
    every = [i for some in by_kind.values() for i in some]
    return [*lines, f"{'in all':<16} {len(every):>7} {sum(i.bytes for i in every):>15}"]


def _end_cleanly() -> None:
    """SIGTERM ends as Ctrl-C does, with what was half-written removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
