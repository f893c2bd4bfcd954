"""A finished folder goes to a model repository of a hub, in one commit, and is read back from there.

The hub is Hugging Face's, or the server that HF_ENDPOINT names. What is to be known about token and repository is asked
before a job's work begins (`preflight`). A push that breaks off leaves the repository as it was; the blobs that arrived
stay, and the next attempt sends only what is missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers

from service.errors import JobFailure
from service.job_spec import HubSpec
from service.jobs.repository import Fenced
from worker.files import MANIFEST, list_file
from worker.outcome import Interrupted, Progress

log = logging.getLogger("lorry.worker")
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds between attempts; huggingface_hub's own come on top of each
LONGEST_WAIT = 300  # seconds of a Retry-After that are waited for
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
CONFLICT = frozenset({409, 412})  # the branch moved between our look and our commit
REPORT_SECONDS = 1.0
T = TypeVar("T")


def preflight(spec: HubSpec, token: str | None, progress: Progress) -> None:
    """Make sure that `push` will be let in: token, right to write, repository (made if it does not exist), branch.

    Raises JobFailure: hub_token_missing, hub_token_refused, hub_forbidden, hub_repo_public, hub_unreachable; Interrupted.
    """
    with _connected(spec, token, progress) as hub:
        hub.prepare()


def push(folder: Path, spec: HubSpec, token: str | None, progress: Progress) -> dict[str, Any]:
    """Upload the files that `folder`'s manifest.json lists, and the manifest; then compare what the hub has with them.

    Returns {repo_id, url, commit, revision, files, bytes}. Raises JobFailure (hub_push_failed; hub_token_missing),
    Interrupted (a cancel is heard within a second while a file is sent) and Fenced.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    files = [*manifest["files"], list_file(folder / MANIFEST, folder)]
    with _connected(spec, token, progress) as hub:
        try:
            progress.phase("pushing")
            message = f"{manifest['adapter']} ({manifest['format']}), made with lorry"
            commit = hub.call(lambda: hub.upload(folder, files, message), also=CONFLICT)
            there = hub.call(lambda: hub.tree(commit))
        except HubError as error:
            raise JobFailure("hub_push_failed", f"push_to_hub: {error.reason}") from None
    wrong = sorted(f["path"] for f in files if not _same(there.get(f["path"]), f, folder))
    if wrong:
        message = f"{spec.repo_id} at commit {commit} lacks or has otherwise what was sent: {', '.join(wrong[:20])}"
        raise JobFailure("hub_push_failed", f"push_to_hub: {message}")
    progress.phase("pushed")
    return {
        "repo_id": spec.repo_id,
        "url": f"{hub.endpoint}/{spec.repo_id}" + (f"/tree/{spec.revision}" if spec.revision else ""),
        "commit": commit,
        "revision": hub.revision,
        "files": len(files),
        "bytes": sum(f["bytes"] for f in files),
    }


class HubError(Exception):
    """A call that failed for good; `reason` says why, without the token. Never leaves this module."""

    def __init__(self, cause: BaseException, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        self.not_found = isinstance(cause, RepositoryNotFoundError)


@contextmanager
def _connected(spec: HubSpec, token: str | None, progress: Progress) -> Iterator[_Hub]:
    """A hub whose HTTP client gives up on a silent server, hears a cancel while it waits, and prints no URLs."""
    token = (token or "").strip()
    if not token:
        message = (
            "push_to_hub: no hub token; send one with the request as X-HF-Token, or set HF_TOKEN in the environment "
            "of lorry's worker"
        )
        raise JobFailure("hub_token_missing", message)
    if not token.isascii() or not token.isprintable() or " " in token:
        raise JobFailure("hub_token_refused", "push_to_hub: the hub token holds characters that no token has")
    hub = _Hub(spec, token, progress)
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)  # its warnings name signed addresses; `_Hub.heed` says what is needed
    set_client_factory(hub.client)
    try:
        yield hub
    finally:
        set_client_factory(default_client_factory)
        hub_logging.set_verbosity(verbosity)


class _Hub:
    """One repository, seen with one token."""

    def __init__(self, spec: HubSpec, token: str, progress: Progress) -> None:
        # Read here, not when huggingface_hub was imported.
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, library_name="lorry")
        self.endpoint = self.api.endpoint
        self.spec, self.token, self.progress = spec, token, progress
        self.repo_id, self.revision = spec.repo_id, spec.revision or "main"
        self.reported = 0.0

    # Talking to the hub

    def client(self) -> httpx.Client:
        client = default_client_factory()
        client.timeout = httpx.Timeout(60, connect=15, read=120)  # a commit of many files takes its time
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [*hooks.get("response", []), self.heed]}
        return client

    def heed(self, response: httpx.Response) -> None:
        """Wait as long as the hub asks for, here: huggingface_hub would sleep through a cancel."""
        if response.status_code not in TRANSIENT:
            return
        request = response.request
        log.warning("the hub answered %d to %s %s", response.status_code, request.method, request.url.path)
        limit = parse_ratelimit_headers(response.headers)
        after = response.headers.pop("retry-after", "")
        response.headers.pop("ratelimit", None)
        seconds = int(after) if after.isdecimal() else 0
        if response.status_code == 429 and limit is not None and limit.remaining == 0:
            seconds = max(seconds, limit.reset_in_seconds)
        self.sleep(min(seconds, LONGEST_WAIT))

    def call(self, action: Callable[[], T], also: frozenset[int] = frozenset()) -> T:
        """Do `action`, again after a while if what failed may pass: connections, 5xx, 429 and the statuses in `also`.

        Raises HubError, Interrupted and Fenced.
        """
        for wait in (*WAITS, None):
            self.check()
            try:
                return action()
            except Exception as error:
                cause = _cause(error)
                if isinstance(cause, (Interrupted, Fenced)):
                    raise cause from None
                reason = self.reason(cause)
                if wait is None or not (isinstance(cause, httpx.TransportError) or _status(cause) in TRANSIENT | also):
                    raise HubError(cause, reason) from None
            log.warning("push_to_hub: %s; trying again in %g s", reason, wait)
            self.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def reason(self, cause: BaseException) -> str:
        """What went wrong, in a line, without the token, whoever put it there."""
        if isinstance(cause, OfflineModeIsEnabled):
            text = "HF_HUB_OFFLINE is set in the worker's environment, so that no hub can be reached"
        elif isinstance(cause, HfHubHTTPError):
            said = cause.server_message or cause.response.reason_phrase
            text = f"{self.endpoint} answered {cause.response.status_code} {said}"
        elif isinstance(cause, httpx.TransportError):
            text = f"{self.endpoint} is out of reach: {type(cause).__name__} {cause}"
        else:
            text = f"{type(cause).__name__}: {cause}"
        return " ".join(text.replace(self.token, "***").split())[:1000]

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.2))

    def check(self) -> None:
        """Raise Interrupted if the run was asked to end; a push has no checkpoint to pause at."""
        ask = self.progress.asked()
        if ask in ("cancel", "stop"):
            raise Interrupted(ask)

    # Before the work

    def prepare(self) -> None:
        try:
            user = self.call(self.api.whoami).get("name")
        except HubError as error:
            raise self.refusal(error, denied="hub_token_refused") from None
        try:
            info = self.call(lambda: self.api.repo_info(self.repo_id))
        except HubError as error:
            if not error.not_found:
                raise self.refusal(error) from None
            info = None
        try:
            if info is None:
                self.call(lambda: self.api.create_repo(self.repo_id, private=self.spec.private, exist_ok=True))
                kind = "private" if self.spec.private else "public"
                self.progress.log(f"push_to_hub: made the {kind} repository {self.repo_id} as {user}")
            else:
                self.call(lambda: self.api.auth_check(self.repo_id, write=True))
            if info is not None and self.spec.private and info.private is False:
                message = (
                    f"push_to_hub.private: {self.repo_id} exists and is public; set private to false to publish there, "
                    "or name another repository"
                )
                raise JobFailure("hub_repo_public", message)
            if info is not None:
                kind = "private" if info.private else "public"
                self.progress.log(f"push_to_hub: {self.repo_id} exists ({kind}) and is pushed to, as {user}")
            if self.spec.revision:
                self.call(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))
        except HubError as error:
            raise self.refusal(error, user=user) from None

    def refusal(self, error: HubError, *, denied: str = "hub_forbidden", user: Any = None) -> JobFailure:
        """What a failed call before the work means for the job."""
        if error.status is None or error.status in TRANSIENT:
            return JobFailure("hub_unreachable", f"push_to_hub: {error.reason}")
        if denied == "hub_token_refused" and error.status in (401, 403):
            advice = "the hub refuses the token; make one that may write at the hub's settings, and send that"
            return JobFailure(denied, f"push_to_hub: {advice} ({error.reason})")
        if error.status in (401, 402, 403) or error.not_found:
            advice = (
                f"the token{f' of {user}' if user else ''} may not write to {self.repo_id}: the repository is another's, "
                "or the token lacks the right; name a repository of your own, or use a token with write access to it"
            )
            return JobFailure("hub_forbidden", f"push_to_hub: {advice} ({error.reason})")
        return JobFailure("hub_error", f"push_to_hub: {error.reason}")

    # The push

    def upload(self, folder: Path, files: list[dict[str, Any]], message: str) -> str:
        """Send what the branch lacks, and commit. Returns the commit at which the branch has all of `files`.

        Can be repeated after any failure: what is there already, as a blob or in the branch, is not sent again.
        """
        head = str(self.api.repo_info(self.repo_id, revision=self.revision).sha)
        there = self.tree(head)
        todo = [f for f in files if not _same(there.get(f["path"]), f, folder)]
        stale = self.stale(there, head) - {f["path"] for f in files}
        if not todo and not stale:
            return head
        sent = [f["bytes"] for f in files if f not in todo]
        sizes = {"total_files": len(files), "total_bytes": sum(f["bytes"] for f in files)}

        def report(position: int = 0, *, now: bool = False) -> None:
            self.check()
            if now or time.monotonic() - self.reported >= REPORT_SECONDS:
                self.reported = time.monotonic()
                self.progress.steps({"push": {"files": len(sent), "bytes": sum(sent) + position, **sizes}})

        operations: list[Any] = [CommitOperationDelete(path) for path in sorted(stale)]
        for file in todo:
            report(now=True)
            operations.append(self.send(folder / file["path"], file, report))
            sent.append(file["bytes"])
        report(now=True)
        return str(
            self.api.create_commit(
                self.repo_id, operations, commit_message=message, revision=self.revision, parent_commit=head
            ).oid
        )

    def send(self, path: Path, file: dict[str, Any], report: Callable[[int], None]) -> CommitOperationAdd:
        """Upload one file's blob, if the hub keeps it as a blob and has not got it; small files go in the commit.

        Over the hub's LFS protocol and not xet, which is deaf to a cancel and needs a server of its own.
        """
        with _Watched(path, report) as reader:
            operation = CommitOperationAdd(file["path"], reader)
            if operation.upload_info.sha256.hex() != file["sha256"]:
                raise ValueError(f"{file['path']} is not the file that the manifest lists")
            reader.sending = True
            self.api.preupload_lfs_files(self.repo_id, [operation], revision=self.revision)
        if operation.path_or_fileobj is reader:  # not a blob: its bytes are read when the commit is made
            operation.path_or_fileobj = str(path)
        return operation

    def tree(self, revision: str) -> dict[str, RepoFile]:
        found = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}

    def stale(self, there: dict[str, RepoFile], head: str) -> set[str]:
        """Files that an earlier push of lorry left: old shards beside new ones would make a model that loads wrongly."""
        if MANIFEST not in there:
            return set()
        with tempfile.TemporaryDirectory() as folder:
            path = self.api.hf_hub_download(self.repo_id, MANIFEST, revision=head, local_dir=folder)
            try:
                old = json.loads(Path(path).read_text())
                listed = {str(file["path"]) for file in old["files"]} if "verification" in old else set()
            except (ValueError, TypeError, KeyError):
                return set()  # somebody else's manifest.json
        return listed & set(there)


class _Watched(io.BufferedReader):
    """A file that says how far it has been read."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path))
        self.report, self.sending = report, False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.report(self.tell() if self.sending else 0)
        return data


def _same(remote: RepoFile | None, file: dict[str, Any], folder: Path) -> bool:
    """Whether the hub's entry is this file: by size and SHA-256, or by Git's own hash where it is no blob."""
    if remote is None or remote.size != file["bytes"]:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == file["sha256"])
    content = (folder / file["path"]).read_bytes()
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _cause(error: BaseException) -> BaseException:
    """What is behind an exception of huggingface_hub's, which wraps those of an upload in RuntimeErrors."""
    known = (Interrupted, Fenced, HfHubHTTPError, httpx.TransportError, OfflineModeIsEnabled)
    link: BaseException | None = error
    while link is not None and not isinstance(link, known):
        link = link.__cause__
    return link or error


def _status(cause: BaseException) -> int | None:
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
