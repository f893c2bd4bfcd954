"""Following jobs: server-sent events with replay, pages, many followers, slow ones."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from service.jobs import repository
from service.jobs.events import POLL_SECONDS
from tests.conftest import Api
from tests.serving import until
from tests.steps import checkpoint, cpt, post, start, succeed, unique

Event = tuple[int, str, dict[str, Any]]


def parse(lines: Iterator[str]) -> Iterator[Event]:
    """(id, type, data) of each server-sent event; comments are left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if "data" in fields:
                yield int(fields["id"]), fields["event"], json.loads(fields["data"])
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


def follow(api: Api, job_id: str, last: int | None = None) -> list[Event]:
    """Every event until the server ends the stream."""
    headers = {"Last-Event-ID": str(last)} if last is not None else {}
    with api.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(parse(answer.iter_lines()))


def log(api: Api, job_id: str, *messages: str) -> None:
    for message in messages:
        with api.db.write() as session:
            repository.add_event(session, job_id, "log", {"message": message})


def finished(api: Api, logs: int = 3) -> str:
    job_id = str(post(api, cpt(unique()))["id"])
    run = start(api, job_id)
    log(api, job_id, *(f"line {n}" for n in range(logs)))
    checkpoint(api, job_id, 5)
    succeed(api, job_id, run)
    return job_id


def test_a_finished_job_s_stream_replays_all_of_it_and_ends(api: Api) -> None:
    events = follow(api, finished(api))
    assert [e[0] for e in events] == list(range(1, len(events) + 1))
    assert [e[2]["status"] for e in events if e[1] == "status"] == ["queued", "preparing", "running", "succeeded"]
    assert [e[2]["message"] for e in events if e[1] == "log"] == ["line 0", "line 1", "line 2"]
    assert [e[2]["step"] for e in events if e[1] == "checkpoint"] == [5]
    assert events[-1][1:] == ("status", {"status": "succeeded", "attempt": 1, "reason": None, "error": None})


def test_last_event_id_goes_on_behind_that_event(api: Api) -> None:
    job_id = finished(api)
    events = follow(api, job_id)
    for cut in (0, 1, 4, len(events) - 1):
        assert follow(api, job_id, cut) == events[cut:]
    # Nothing can follow the final state: 204 tells a browser's EventSource not to connect again.
    done = api.http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(len(events))})
    assert (done.status_code, done.content) == (204, b"")


def test_events_arrive_while_the_job_runs(api: Api) -> None:
    job_id = str(post(api, cpt(unique()))["id"])
    seen: list[Event] = []

    def read() -> None:
        with (
            httpx.Client(base_url=api.url, timeout=30) as http,
            http.stream("GET", f"/v1/jobs/{job_id}/events") as answer,
        ):
            seen.extend(parse(answer.iter_lines()))

    reader = threading.Thread(target=read)
    reader.start()
    run = start(api, job_id)
    log(api, job_id, "now")
    until(lambda: any(e[2].get("message") == "now" for e in seen))
    succeed(api, job_id, run)
    reader.join(60)
    assert not reader.is_alive(), "the stream ends with the final state"
    assert [e[0] for e in seen] == list(range(1, 6))


def test_a_long_log_is_replayed_in_full(api: Api) -> None:
    """More events than one page from SQL, or the hub's window, holds."""
    job_id = finished(api, logs=0)
    other = str(post(api, cpt(unique()))["id"])
    run = start(api, other)
    with api.db.write() as session:
        for n in range(1200):
            repository.add_event(session, other, "log", {"message": str(n)})
    succeed(api, other, run)
    assert [e[2]["message"] for e in follow(api, other) if e[1] == "log"] == [str(n) for n in range(1200)]
    assert len(follow(api, job_id)) == 5


def test_a_page_of_events_is_json_with_a_cursor(api: Api) -> None:
    job_id = finished(api)
    url, headers = f"/v1/jobs/{job_id}/events", {"Accept": "application/json"}
    seen: list[Any] = []
    query: dict[str, Any] = {"limit": 3}
    while True:
        page = api.http.get(url, params=query, headers=headers).json()
        assert page["object"] == "list"
        seen += page["data"]
        if not page["has_more"]:
            assert page["next"] is None
            break
        query["after"] = page["next"]
    assert [(e["id"], e["type"], e["data"]) for e in seen] == follow(api, job_id)
    assert all(isinstance(e["created_at"], int) for e in seen)


def test_one_poller_serves_all_followers_of_all_jobs(sqlite_api: Api) -> None:
    api = sqlite_api
    jobs = [str(post(api, cpt(unique()))["id"]) for _ in range(4)]
    runs = [start(api, job_id) for job_id in jobs]
    hub = api.app.state.events
    with ThreadPoolExecutor(24) as pool:
        followers = [pool.submit(follow_alone, api.url, job_id) for job_id in jobs for _ in range(6)]
        time.sleep(1)
        polls, began = hub.polls, time.monotonic()
        time.sleep(1.5)
        rate = (hub.polls - polls) / (time.monotonic() - began)
        for job_id, run in zip(jobs, runs, strict=True):
            log(api, job_id, "end is near")
            succeed(api, job_id, run)
        streams = [f.result(timeout=60) for f in followers]
    assert rate <= 1.1 / POLL_SECONDS, "24 followers cost the database no more polls than one"
    assert all([e[0] for e in s] == [1, 2, 3, 4, 5] for s in streams)
    until(lambda: not hub._feeds)
    time.sleep(POLL_SECONDS * 2)  # for a poll that is under way
    polls = hub.polls
    time.sleep(POLL_SECONDS * 4)
    assert hub.polls == polls, "with nobody following, nobody asks"


def follow_alone(url: str, job_id: str) -> list[Event]:
    with httpx.Client(base_url=url, timeout=60) as http, http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        return list(parse(answer.iter_lines()))


def test_a_slow_reader_holds_up_nobody_and_gets_everything(sqlite_api: Api) -> None:
    api = sqlite_api
    job_id = str(post(api, cpt(unique()))["id"])
    run = start(api, job_id)
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow, ThreadPoolExecutor(1) as pool:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.sendall(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        quick = pool.submit(follow_alone, api.url, job_id)
        time.sleep(POLL_SECONDS * 2)
        for part in range(4):
            with api.db.write() as session:
                for n in range(200):
                    repository.add_event(session, job_id, "log", {"message": f"{part}.{n} " + "x" * 16000})
            time.sleep(POLL_SECONDS)
        succeed(api, job_id, run)
        assert len(quick.result(timeout=60)) == 804, "the quick reader is done before the slow one takes a byte"
        received = b""
        while chunk := slow.recv(1 << 20):
            received += chunk
    ids = [int(line[4:]) for line in received.decode().splitlines() if line.startswith("id: ")]
    assert ids == list(range(1, 805))


def test_a_client_that_leaves_is_forgotten(sqlite_api: Api) -> None:
    api = sqlite_api
    job_id = str(post(api, cpt(unique()))["id"])
    with api.http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        lines = answer.iter_lines()  # dropping it would close the connection
        next(lines)
        assert job_id in api.app.state.events._feeds
    until(lambda: job_id not in api.app.state.events._feeds)
