"""A hub on a socket: the part of the Hugging Face hub's protocol that pushing to a repository and reading it back need.

Users with tokens, repositories with branches and commits, Git LFS uploads in one part or several, NDJSON commits, file
listings in pages, downloads. `fail()` makes requests fail as real ones do; `sent` counts what arrived.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

BLOBS = (".safetensors", ".gguf", ".bin")  # kept as LFS blobs whatever their size
PAGE = 5  # entries of a listing's page


@dataclass(frozen=True)
class User:
    name: str
    may_write: bool = True


@dataclass
class Entry:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        shown = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        data = shown.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    id: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, Entry], title: str) -> str:
        seed = json.dumps([sorted((p, e.oid) for p, e in tree.items()), len(self.commits), title])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        self.titles.append(title)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Entry]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """What main holds, less the file that the hub itself puts into each repository."""
        tree = self.commits[self.branches["main"]]
        return {path: entry.content for path, entry in tree.items() if path != ".gitattributes"}


@dataclass
class Failure:
    """What becomes of the next `times` requests whose 'METHOD path' the pattern is found in."""

    pattern: str
    times: int
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    cut: bool = False  # close the connection when some of the body has arrived
    after: bool = False  # do what was asked, and lose the answer


class Hub:
    """The server's state, to be looked at and changed by tests."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_bytes = 100_000
        self.failures: list[Failure] = []
        self.actions: list[tuple[str, Callable[[], Any]]] = []
        self.seen: Counter[str] = Counter()  # METHOD path
        self.sent: Counter[str] = Counter()  # blob's SHA-256: times it arrived whole
        self.lost: set[str] = set()  # paths that a commit leaves out, without a word
        self.url = ""
        self.app = FastAPI()
        _routes(self.app, self)

    def fail(self, pattern: str, times: int = 1, **how: Any) -> None:
        self.failures.append(Failure(pattern, times, **how))

    def when(self, pattern: str, action: Callable[[], Any]) -> None:
        """Do `action` once, before the next request that the pattern is found in is served."""
        self.actions.append((pattern, action))

    def make(self, repo_id: str, *, private: bool = True, **files: bytes) -> Repo:
        """A repository that somebody has made before."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        tree = {".gitattributes": Entry(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}
        repo.commit("main", tree | {p: Entry(c, p.endswith(BLOBS)) for p, c in files.items()}, "initial commit")
        return repo

    def counted(self, pattern: str) -> int:
        """Requests so far whose 'METHOD path' the pattern is found in."""
        return sum(n for line, n in self.seen.items() if re.search(pattern, line))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        line = f"{scope['method']} {scope['path']}"
        self.seen[line] += 1
        for item in [item for item in self.actions if re.search(item[0], line)]:
            self.actions.remove(item)
            await run_in_threadpool(item[1])
        found = next((f for f in self.failures if f.times > 0 and re.search(f.pattern, line)), None)
        if found is None:
            await self.app(scope, receive, send)
            return
        found.times -= 1
        transport = receive.__self__.transport
        if found.after:

            async def lose(message: Any) -> None:
                transport.abort()

            await self.app(scope, receive, lose)
        elif found.cut:
            await receive()
            transport.abort()
        else:
            while (await receive()).get("more_body"):
                pass
            body = {"error": "injected"} if found.body is None else found.body
            await JSONResponse(body, found.status, headers=found.headers)(scope, receive, send)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a hub on a socket from a thread."""
    hub = Hub()
    server = uvicorn.Server(uvicorn.Config(hub, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the hub did not start")
        time.sleep(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(60)


class Refused(Exception):
    """An error answer; `code` is what the hub's client looks at."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


def _routes(app: FastAPI, hub: Hub) -> None:
    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
        return JSONResponse({"error": error.message}, error.status, headers=headers)

    def user_of(request: Request) -> User:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in hub.users:
            # A careless server: what it was sent stands in its answer.
            raise Refused(401, f"Invalid credentials in Authorization header: {token}")
        return hub.users[token]

    def repo_of(request: Request, owner: str, name: str, *, write: bool = False) -> Repo:
        user, repo = user_of(request), hub.repos.get(f"{owner}/{name}")
        if repo is None or (repo.private and user.name != owner):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and (user.name != owner or not user.may_write):
            raise Refused(403, f"You don't have the required permissions to write to {repo.id}")
        return repo

    def tree_of(repo: Repo, revision: str) -> tuple[str, dict[str, Entry]]:
        found = repo.at(revision)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    @app.get("/api/whoami-v2")
    def whoami(request: Request) -> Any:
        return {"type": "user", "name": user_of(request).name, "orgs": []}

    @app.post("/api/repos/create")
    async def create(request: Request) -> Any:
        user, body = user_of(request), await request.json()
        owner = body["organization"] or user.name
        repo_id = f"{owner}/{body['name']}"
        if owner != user.name or not user.may_write:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if repo_id in hub.repos:
            return JSONResponse({"error": "You already created this model repo", "url": f"{hub.url}/{repo_id}"}, 409)
        hub.make(repo_id, private=body.get("visibility") == "private")
        return {"url": f"{hub.url}/{repo_id}", "id": repo_id}

    @app.post("/api/validate-yaml")
    async def validate(request: Request) -> Any:
        text = (await request.json())["content"]
        base = re.search(r"^base_model: *(.*)$", text, re.M)
        if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1]):
            message = f'"base_model" with value "{base[1]}" is not valid. Use a model id from https://hf.co/models.'
            return JSONResponse({"errors": [{"message": message}], "warnings": []}, 400)
        return {"errors": [], "warnings": []}

    @app.get("/api/models/{owner}/{name}/auth-check/write")
    def auth_check(request: Request, owner: str, name: str) -> Any:
        repo_of(request, owner, name, write=True)
        return {}

    @app.post("/api/models/{owner}/{name}/branch/{branch:path}")
    def branch(request: Request, owner: str, name: str, branch: str) -> Any:
        repo = repo_of(request, owner, name, write=True)
        if branch in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    @app.get("/api/models/{owner}/{name}/tree/{revision:path}")
    def tree(request: Request, owner: str, name: str, revision: str, cursor: int = 0) -> Any:
        _, files = tree_of(repo_of(request, owner, name), revision)
        page = sorted(files.items())[cursor : cursor + PAGE]
        listed = []
        for path, entry in page:
            shown = {"type": "file", "path": path, "size": len(entry.content), "oid": entry.oid}
            if entry.lfs:
                shown["lfs"] = {"oid": entry.sha256, "size": len(entry.content), "pointerSize": 130}
            listed.append(shown)
        more = f"{hub.url}{quote(request.url.path)}?recursive=true&cursor={cursor + PAGE}"
        links = {"Link": f'<{more}>; rel="next"'} if cursor + PAGE < len(files) else {}
        return JSONResponse(listed, headers=links)

    @app.post("/api/models/{owner}/{name}/preupload/{revision:path}")
    async def preupload(request: Request, owner: str, name: str, revision: str) -> Any:
        _, there = tree_of(repo_of(request, owner, name, write=True), revision)
        asked = (await request.json())["files"]

        def mode(path: str) -> dict[str, Any]:
            entry = there.get(path)
            known = {"oid": entry.sha256 if entry.lfs else entry.oid} if entry else {}
            upload = "lfs" if path.endswith(BLOBS) else "regular"
            return {"path": path, "uploadMode": upload, "shouldIgnore": False, **known}

        return {"files": [mode(file["path"]) for file in asked]}

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request, owner: str, name: str) -> Any:
        repo_of(request, owner, name, write=True)
        body = await request.json()
        out = []
        for blob in body["objects"]:
            shown, oid, size = dict(blob), blob["oid"], blob["size"]
            if oid not in hub.blobs:
                upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{oid}?signature=secret-{oid[:8]}"}
                if size > hub.part_bytes and "multipart" in body["transfers"]:
                    numbers = range(1, -(-size // hub.part_bytes) + 1)
                    parts = {f"{n:05}": f"{hub.url}/lfs/{oid}/part/{n}?signature=secret-{n}" for n in numbers}
                    upload = {
                        "href": f"{hub.url}/lfs/{oid}/complete",
                        "header": {"chunk_size": hub.part_bytes, **parts},
                    }
                shown["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/lfs/{oid}/verify"}}
            out.append(shown)
        return {"objects": out, "transfer": "basic"}

    def keep(oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content is not what its SHA-256 says")
        hub.blobs[oid] = content
        hub.sent[oid] += 1

    async def body_of(request: Request) -> bytes:
        if "authorization" in request.headers:
            raise Refused(400, "a signed address takes no Authorization header")  # as S3 does
        return await request.body()

    @app.put("/lfs/{oid}")
    async def put(request: Request, oid: str) -> Any:
        keep(oid, await body_of(request))
        return {}

    @app.put("/lfs/{oid}/part/{number}")
    async def put_part(request: Request, oid: str, number: int) -> Any:
        content = await body_of(request)
        hub.parts.setdefault(oid, {})[number] = content
        return Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    @app.post("/lfs/{oid}/complete")
    async def complete(request: Request, oid: str) -> Any:
        body, parts = await request.json(), hub.parts.pop(oid)
        for part in body["parts"]:
            if part["etag"] != f'"{hashlib.md5(parts[part["partNumber"]]).hexdigest()}"':
                raise Refused(400, "a part's ETag is another")
        keep(oid, b"".join(parts[number] for number in sorted(parts)))
        return {}

    @app.post("/lfs/{oid}/verify")
    async def verify(request: Request, oid: str) -> Any:
        user_of(request)
        if len(hub.blobs.get(oid, b"")) != (await request.json())["size"]:
            raise Refused(404, "no such blob")
        return {}

    @app.post("/api/models/{owner}/{name}/commit/{revision:path}")
    async def commit(request: Request, owner: str, name: str, revision: str) -> Any:
        repo = repo_of(request, owner, name, write=True)
        head, files = tree_of(repo, revision)
        files = dict(files)
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if value["path"] in hub.lost:
                continue
            if line["key"] == "file":
                files[value["path"]] = Entry(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Entry(hub.blobs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(revision, files, header["summary"])
        return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo.id}/commit/{oid}"}

    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision:path}")
    def info(request: Request, owner: str, name: str, revision: str = "main") -> Any:
        repo = repo_of(request, owner, name)
        oid, files = tree_of(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {
            "id": repo.id,
            "modelId": repo.id,
            "sha": oid,
            "private": repo.private,
            "siblings": siblings,
            "tags": [],
        }

    @app.head("/{owner}/{name}/resolve/{revision}/{path:path}")
    @app.get("/{owner}/{name}/resolve/{revision}/{path:path}")
    def resolve(request: Request, owner: str, name: str, revision: str, path: str) -> Response:
        oid, files = tree_of(repo_of(request, owner, name), revision)
        entry = files.get(path)
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        etag = f'"{entry.sha256 if entry.lfs else entry.oid}"'
        headers = {"X-Repo-Commit": oid, "ETag": etag, "Content-Length": str(len(entry.content))}
        content = entry.content if request.method == "GET" else b""
        return Response(content, headers=headers, media_type="application/octet-stream")
