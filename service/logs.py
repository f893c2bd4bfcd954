"""Logging of a process: one format and one level, to stderr; what a line belongs to; no secret in any line.

Text is for people. LORRY_LOG_FORMAT=json gives one JSON object a line with time, level, logger, message, part, pid, and
where they are known job, attempt, run, request and what a record carries in `extra={"fields": {…}}`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

from service.settings import Settings

_LONGEST = 2000  # characters of a line that tail() gives
TAIL_LINES = 200  # of a run's log, kept in its record when it fails
REQUEST_ID_HEADER = "X-Request-Id"

_SHOWN = ("job", "attempt", "run", "request")  # of the fields, those that text shows

_request: ContextVar[str | None] = ContextVar("lorry_request", default=None)
_process: dict[str, Any] = {}  # fields of every line of this process: part; in a job's child: job, attempt, run
_json = False

# A token of the hub's, a bearer header, a password in a URL: whatever prints it, it does not come into a log.
_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{4,}|(?<=://)[^\s:/@]*:[^\s/@]+(?=@)")
_known: set[str] = set()  # this process's own secrets, whatever their form


def configure(settings: Settings, part: str | None = None) -> None:
    """Set up the root logger of a process that is this part of lorry. Raises SystemExit for a level that is none."""
    global _json
    _json = settings.log_format == "json"
    _process.clear()
    if part:
        _process["part"] = part
    hide(settings.api_key, *(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")))
    hide(*(urlsplit(url).password for url in (settings.database_url, settings.redis_url) if url))
    hide(*(value for value in settings.storage_options.values() if isinstance(value, str) and "://" not in value))
    try:
        logging.basicConfig(level=settings.log_level.upper(), handlers=[_handler(sys.stderr, _formatter())], force=True)
    except ValueError as error:
        raise SystemExit(f"LORRY_LOG_LEVEL: {error}") from error
    if _json:  # what Python itself would print
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
    for name in ("httpx", "httpcore", "alembic"):  # a line per call to the engine, or per migration
        logging.getLogger(name).setLevel("WARNING")
    logging.getLogger("lorry.access").setLevel("NOTSET" if settings.access_log else "WARNING")


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("lorry").critical("the process ends: %s", error, exc_info=(kind, error, trace))


def hide(*secrets: str | None) -> None:
    """Keep these texts out of every log line of this process."""
    _known.update(s for s in secrets if s and len(s) >= 4)


def redact(text: str) -> str:
    """`text` with secrets as ***: those told to hide(), and what has the form of one."""
    for secret in _known:
        text = text.replace(secret, "***")
    return _SECRETS.sub("***", text)


def request_id() -> str | None:
    """Id of the HTTP request that is being served here, if one is."""
    return _request.get()


@contextlib.contextmanager
def serving(request: str) -> Iterator[None]:
    """Lines logged inside belong to this request; so does what the thread pool does for it."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)


@contextlib.contextmanager
def belonging(**fields: Any) -> Iterator[None]:
    """Every line of this process belongs to these (job, attempt, run), in all its threads and forks, until the end."""
    before = dict(_process)
    _process.update(fields)
    try:
        yield
    finally:
        _process.clear()
        _process.update(before)


def about_job(job_id: str) -> dict[str, Any]:
    """The `extra` of one line that is about a job."""
    return {"fields": {"job": job_id}}


class _Text(logging.Formatter):
    """`time LEVEL logger: message [job=… run=…]`"""

    def __init__(self, with_context: bool = True) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.with_context = with_context

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if not self.with_context:
            return line
        fields = " ".join(f"{k}={v}" for k, v in context(record).items() if k in _SHOWN)
        return f"{line} [{fields}]" if fields else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **context(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, ensure_ascii=False, default=str))


def context(record: logging.LogRecord) -> dict[str, Any]:
    """What a record belongs to, and what it carries itself."""
    request = _request.get()
    own: Mapping[str, Any] = getattr(record, "fields", {})
    return {**_process, **({"request": request} if request else {}), **own}


def part_line(part: str, line: str) -> str:
    """A line that a child process of `lorry up` wrote, as `up` writes it: JSON stays JSON, anything else is wrapped."""
    if not _json:
        return f"{part:<9}| {line}"
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.dumps({**json.loads(line), "part": part}, ensure_ascii=False)
    plain = {"time": _time(time.time()), "level": "INFO", "logger": "lorry.up", "message": redact(line), "part": part}
    return json.dumps(plain, ensure_ascii=False)


@contextlib.contextmanager
def job_log(path: Path, **fields: Any) -> Iterator[None]:
    """In a job's process: send stdout and stderr, libraries' included, to the job's log; a new attempt appends.

    Log records go there as text, and those of lorry's own loggers to the process's former stderr too, in the format that
    was configured, with `fields` (job, attempt, run). A crash in native code leaves its Python stack in the log.
    """
    saved = os.dup(1), os.dup(2)
    root = logging.getLogger()
    handlers, level = root.handlers[:], logging.getLogger("lorry").level
    sys.stdout.flush()
    sys.stderr.flush()
    with (
        belonging(**fields),
        open(path, "a", encoding="utf-8") as file,
        os.fdopen(os.dup(saved[1]), "w", encoding="utf-8") as outside,
    ):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        root.handlers = [_handler(file, _Text(with_context=False)), _handler(outside, _formatter())]
        root.handlers[1].addFilter(lambda record: record.name.partition(".")[0] == "lorry")
        logging.getLogger("lorry").setLevel(min(logging.INFO, root.level))
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])
            root.handlers = handlers
            logging.getLogger("lorry").setLevel(level)


def run_started(job_id: str, attempt: int, run_id: str) -> str:
    """The line that begins a run in its job's log; tail() looks for it."""
    return f"job {job_id} attempt {attempt} run {run_id}"


def tail(path: Path, run_id: str | None = None, *, lines: int = TAIL_LINES, size: int = 262_144) -> list[str]:
    """The last lines of a job's log, secrets hidden, reading at most `size` bytes of it; empty if there is none.

    With a run, only what that run wrote.
    """
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            text = file.read(size).decode("utf-8", "replace")
    except OSError:
        return []
    found = text.splitlines()
    if end > size and len(found) > 1:
        found = found[1:]  # its beginning is not there
    if run_id is not None:
        begin = next((i for i in range(len(found) - 1, -1, -1) if found[i].endswith(f"run {run_id}")), 0)
        found = found[begin:]
    # Postgres takes no NUL in JSON, and one line must not be all there is.
    return [redact(line.replace("\x00", ""))[:_LONGEST] for line in found[-lines:]]


def _handler(stream: IO[str], formatter: logging.Formatter) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    return handler


def _formatter() -> logging.Formatter:
    return _Json() if _json else _Text()


def _time(seconds: float) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
