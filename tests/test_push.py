"""push_to_hub against a hub on a socket, through the real client: what arrives, what is sent again, what is said."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.utils import _http, validate_repo_id

from service.errors import JobFailure
from service.job_spec import HubSpec
from service.spec_fields import check_repo_id
from tests.conftest import free_port
from tests.hub_server import Hub, User, serve_hub
from tests.recipes import Recorder
from worker import hub as pushing
from worker.files import list_files, write_json
from worker.hub import preflight, push
from worker.outcome import Interrupted
from worker.push import prepare, push_result

TOKEN = "hf_ThisIsAdasTokenAndNobodyElses"
SPEC = HubSpec(repo_id="ada/model")


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub that knows Ada (a writer), Bob, and a token of Ada's that may only read. Nobody waits long for it."""
    for state in (server.repos, server.blobs, server.parts, server.failures, server.seen, server.sent):
        state.clear()  # type: ignore[attr-defined]
    server.users = {TOKEN: User("ada"), "hf_bob": User("bob"), "hf_reader": User("ada", may_write=False)}
    server.lost = set()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(pushing, "WAITS", (0.01, 0.02, 0.03))
    monkeypatch.setattr(_http.constants, "HF_HUB_DISABLE_TELEMETRY", True)  # as the worker has it
    # The client library's own pauses between attempts, a second and more each.
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as an export leaves it: two blobs, one of which goes up in parts, small files, a manifest."""
    return make_folder(tmp_path / "export")


def make_folder(path: Path, seed: int = 0, **more: bytes) -> Path:
    def noise(count: int, salt: str) -> bytes:
        return hashlib.shake_256(f"{salt}{seed}".encode()).digest(count)

    files = {
        "model-00001-of-00002.safetensors": noise(250_001, "one"),
        "model-00002-of-00002.safetensors": noise(60_000, "two"),
        "config.json": json.dumps({"seed": seed}).encode(),
        "README.md": b"---\nbase_model: org/base\n---\n# A model\n",
        "nested/notes.txt": "grün".encode(),
        **more,
    }
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    manifest = {"format": "merged_16bit", "adapter": "a", "verification": None, "files": list_files(path)}
    write_json(path / "manifest.json", manifest)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def send(folder: Path, spec: HubSpec = SPEC, token: str | None = TOKEN) -> tuple[dict[str, Any], Recorder]:
    progress = Recorder()
    preflight(spec, token, progress)
    return push(folder, spec, token, progress), progress


def refusal(spec: HubSpec = SPEC, token: str | None = TOKEN) -> JobFailure:
    with pytest.raises(JobFailure) as caught:
        preflight(spec, token, Recorder())
    assert not (token or "").strip() or str(token) not in caught.value.message
    return caught.value


def test_a_folder_is_pushed_in_one_commit_and_downloads_as_it_was(hub: Hub, folder: Path, tmp_path: Path) -> None:
    result, progress = send(folder)
    repo = hub.repos["ada/model"]
    assert repo.private, "private unless asked otherwise"
    assert repo.files == contents(folder)
    assert repo.titles == ["initial commit", "a (merged_16bit), made with lorry"]
    files = list_files(folder)
    assert result == {
        "repo_id": "ada/model",
        "url": f"{hub.url}/ada/model",
        "commit": repo.branches["main"],
        "revision": "main",
        "files": len(files),
        "bytes": sum(f["bytes"] for f in files),
    }
    blobs = {f["sha256"]: 1 for f in files if f["path"].endswith(".safetensors")}
    assert hub.sent == blobs, "each blob once, the large one in parts"
    assert hub.counted("PUT /lfs/.*/part/") == 3
    assert progress.phases == ["pushing", "pushed"]
    last = progress.values["push"]
    assert (last["files"], last["bytes"]) == (last["total_files"], last["total_bytes"]) == (6, result["bytes"])
    assert any("made the private repository ada/model as ada" in line for line in progress.logged)
    local = snapshot_download("ada/model", endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "cache")
    assert contents(Path(local)).items() >= contents(folder).items()


def test_a_branch_of_its_own_leaves_main_alone(hub: Hub, folder: Path) -> None:
    repo = hub.make("ada/model")
    result, _ = send(folder, HubSpec(repo_id="ada/model", revision="try/1"))
    assert repo.files == {}
    assert repo.branches["try/1"] == result["commit"]
    assert result["url"] == f"{hub.url}/ada/model/tree/try/1"
    send(folder, HubSpec(repo_id="ada/model", revision="try/1"))
    assert repo.branches["try/1"] == result["commit"]


def test_pushing_again_sends_what_changed_and_takes_away_what_an_earlier_push_left(hub: Hub, tmp_path: Path) -> None:
    hub.make("ada/model", **{"mine.txt": b"the user's own", "more.bin": b"likewise"})
    send(make_folder(tmp_path / "one", **{"model-00003-of-00003.safetensors": b"an old shard"}))
    first, sent = hub.repos["ada/model"].branches["main"], dict(hub.sent)
    second = make_folder(tmp_path / "two", **{"generation_config.json": b"{}"})
    _, progress = send(second)
    assert hub.repos["ada/model"].files == contents(second) | {"mine.txt": b"the user's own", "more.bin": b"likewise"}
    assert hub.sent == sent, "the blobs were there"
    assert any("ada/model exists (private) and is pushed to, as ada" in line for line in progress.logged)
    again, _ = send(second)
    assert again["commit"] == hub.repos["ada/model"].branches["main"] != first
    assert len(hub.repos["ada/model"].titles) == 3, "nothing to change: no commit"


PASSING: list[tuple[str, dict[str, Any]]] = [
    ("GET /api/whoami-v2", {"times": 2, "status": 500}),
    ("POST /api/repos/create", {"status": 503}),
    ("POST /api/repos/create", {"after": True}),
    ("GET /api/models/ada/model/tree", {"times": 2, "status": 502}),
    ("POST .*/preupload/", {"status": 429, "headers": {"Retry-After": "0"}}),
    ("POST .*/preupload/", {"status": 429, "headers": {"RateLimit": '"api";r=0;t=0'}}),
    ("POST .*/objects/batch", {"status": 504}),
    ("PUT /lfs/[^/]+$", {"times": 2, "status": 500}),
    ("PUT /lfs/[^/]+/part/2", {"cut": True}),
    ("POST /lfs/[^/]+/complete", {"status": 500}),
    ("POST .*/commit/", {"times": 2, "status": 500}),
    ("POST .*/commit/", {"status": 412, "body": {"error": "A commit has happened since."}}),
    ("POST .*/commit/", {"after": True}),
]


@pytest.mark.parametrize(("pattern", "how"), PASSING, ids=[f"{p}-{list(h.values())[-1]}" for p, h in PASSING])
def test_what_passes_is_tried_again_until_all_is_there_once(
    hub: Hub, folder: Path, pattern: str, how: dict[str, Any]
) -> None:
    hub.fail(pattern, **how)
    result, _ = send(folder)
    assert all(f.times == 0 for f in hub.failures), "the failure has happened"
    repo = hub.repos["ada/model"]
    assert repo.files == contents(folder)
    assert result["commit"] == repo.branches["main"]
    assert len(repo.titles) == 2, "one commit, also where the answer to the first was lost"
    assert set(hub.sent.values()) == {1}


def test_a_hub_that_asks_for_time_gets_it_and_a_cancel_is_heard_meanwhile(hub: Hub) -> None:
    hub.fail("whoami", status=429, headers={"Retry-After": "1"})
    began = time.monotonic()
    preflight(SPEC, TOKEN, Recorder())
    assert time.monotonic() - began >= 1
    hub.fail("whoami", status=429, headers={"Retry-After": "3600"})
    progress = Recorder()
    asked: Callable[[], Any] = lambda: "cancel" if hub.counted("whoami") == 3 else None  # noqa: E731
    progress.asked = asked  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        preflight(SPEC, TOKEN, progress)


def test_a_push_that_failed_leaves_the_repository_as_it_was_and_the_next_one_goes_on(hub: Hub, folder: Path) -> None:
    second = hashlib.sha256((folder / "model-00002-of-00002.safetensors").read_bytes()).hexdigest()
    hub.fail(f"PUT /lfs/{second}", times=1000, body={"error": f"no room for {TOKEN}"})
    preflight(SPEC, TOKEN, Recorder())
    with pytest.raises(JobFailure) as caught:
        push(folder, SPEC, TOKEN, Recorder())
    assert caught.value.code == "hub_push_failed"
    assert "500 no room for ***" in caught.value.message
    assert hub.repos["ada/model"].files == {}
    assert sum(hub.sent.values()) == 1
    hub.failures.clear()
    send(folder)
    assert hub.repos["ada/model"].files == contents(folder)
    assert set(hub.sent.values()) == {1}, "the blob that had arrived was not sent again"


def test_a_file_that_the_hub_has_not_as_it_was_sent_fails_the_push(hub: Hub, folder: Path) -> None:
    hub.lost = {"config.json", "model-00002-of-00002.safetensors"}
    with pytest.raises(JobFailure, match=r"config\.json, model-00002-of-00002\.safetensors") as caught:
        send(folder)
    assert caught.value.code == "hub_push_failed"


def test_a_file_that_is_not_what_the_manifest_lists_is_not_sent(hub: Hub, folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(JobFailure, match=r"model-00001-of-00002\.safetensors is not the file"):
        send(folder)
    assert hub.repos["ada/model"].files == {}


def test_a_cancel_is_heard_in_the_middle_of_a_file(hub: Hub, folder: Path) -> None:
    progress = Recorder()
    preflight(SPEC, TOKEN, progress)
    asked: Callable[[], Any] = lambda: "cancel" if hub.counted("PUT /lfs/.*/part/2") else None  # noqa: E731
    progress.asked = asked  # type: ignore[method-assign]
    with pytest.raises(Interrupted) as caught:
        push(folder, SPEC, TOKEN, progress)
    assert caught.value.ask == "cancel"
    assert not hub.sent
    assert hub.repos["ada/model"].files == {}


@pytest.mark.parametrize("token", [None, "", "  "])
def test_without_a_token_the_job_says_where_to_put_one(hub: Hub, token: str | None) -> None:
    failure = refusal(token=token)
    assert failure.code == "hub_token_missing"
    assert "X-HF-Token" in failure.message
    assert "HF_TOKEN" in failure.message
    assert not hub.seen


def test_a_training_under_way_outweighs_a_token_that_was_lost(hub: Hub, folder: Path, tmp_path: Path) -> None:
    progress = Recorder()
    with pytest.raises(JobFailure):
        prepare(SPEC, None, progress, tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    prepare(SPEC, None, progress, tmp_path)
    assert "no hub token" in progress.logged[0]
    context: Any = SimpleNamespace(token=None, progress=progress)
    failure = push_result(folder, SPEC, context, {}, "It is kept")
    assert failure is not None
    assert failure.code == "hub_push_failed"
    assert failure.message.endswith("in the environment of lorry's worker. It is kept")


@pytest.mark.parametrize("token", ["hf_unknownToEverybody", "hf_mit ümläut", "hf_two words"])
def test_a_refused_token_is_said_to_be_so_and_not_shown(hub: Hub, token: str) -> None:
    failure = refusal(token=token)
    assert failure.code == "hub_token_refused"


def test_a_token_with_a_newline_at_its_end_is_taken_without_it(hub: Hub) -> None:
    preflight(SPEC, f"{TOKEN}\n", Recorder())


@pytest.mark.parametrize(
    "case", ["another's", "another's private", "another's namespace", "read-only", "read-only new"]
)
def test_a_repository_that_may_not_be_written_is_forbidden_before_the_work(hub: Hub, case: str) -> None:
    hub.make("bob/open", private=False)
    hub.make("bob/closed")
    hub.make("ada/model")
    repo, token = {
        "another's": ("bob/open", TOKEN),
        "another's private": ("bob/closed", TOKEN),
        "another's namespace": ("bob/new", TOKEN),
        "read-only": ("ada/model", "hf_reader"),
        "read-only new": ("ada/new", "hf_reader"),
    }[case]
    failure = refusal(HubSpec(repo_id=repo, private=False), token)
    assert failure.code == "hub_forbidden"
    assert repo in failure.message
    assert set(hub.repos) == {"bob/open", "bob/closed", "ada/model"}


def test_what_is_to_stay_private_is_not_pushed_to_a_public_repository(hub: Hub, folder: Path) -> None:
    hub.make("ada/model", private=False)
    failure = refusal()
    assert failure.code == "hub_repo_public"
    assert "push_to_hub.private" in failure.message
    send(folder, HubSpec(repo_id="ada/model", private=False))
    assert hub.repos["ada/model"].files == contents(folder)


def test_a_public_repository_is_made_if_asked_for(hub: Hub) -> None:
    preflight(HubSpec(repo_id="ada/shown", private=False), TOKEN, Recorder())
    assert not hub.repos["ada/shown"].private


def test_a_hub_out_of_reach_is_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("whoami", times=100, status=503)
    failure = refusal()
    assert (failure.code, hub.counted("whoami")) == ("hub_unreachable", 4)
    gone = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HF_ENDPOINT", gone)
    failure = refusal()
    assert failure.code == "hub_unreachable"
    assert gone in failure.message
    monkeypatch.setattr(_http.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal().message


NAMES = [
    "a/b", "Org-1/model.v2_x", "_a/b_", f"{'a' * 96}/{'b' * 96}", "a/" + "b" * 97, "a", "a/b/c", "a/b.git", "a/b--c", "a..b/c",
    "-a/b", "a/b-", "a/.b", "a/b.", "a b/c", "ä/b", "/b", "a/", "", "a/b\n", "datasets/a/b",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_repository_id_is_checked_as_the_hub_client_does(name: str) -> None:
    def accepted(check: Callable[[str], Any]) -> bool:
        try:
            check(name)
        except ValueError:
            return False
        return True

    # The client also takes a bare name, of the token's own namespace: which one that is, a spec should say.
    assert accepted(check_repo_id) == (accepted(validate_repo_id) and "/" in name)
