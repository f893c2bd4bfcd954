"""Uploads over HTTP."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.models import FileRow
from service.settings import Settings
from tests.conftest import Api, serve
from tests.steps import cpt, error_of, post, unique


def upload(api: Api, name: str, content: bytes, **form: str) -> dict[str, Any]:
    answer = api.http.post("/v1/files", files={"file": (name, content)}, data=form)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "x"}\n'),
        ("a.json", b'[{"text": "x"}]'),
        ("a.csv", "text\n한국어\n".encode()),
        ("a.txt", b"\xef\xbb\xbfwith a byte order mark"),
        ("A.TXT", b"upper case"),
        ("a.parquet", parquet()),
        ("한국어 자료.jsonl", b'{"text": "x"}\n'),
    ],
)
def test_an_upload_comes_back_as_it_was(api: Api, name: str, content: bytes) -> None:
    file = upload(api, name, content)
    assert file["id"].startswith("file-")
    expected = {
        "object": "file",
        "bytes": len(content),
        "filename": name,
        "purpose": "fine-tune",
        "status": "processed",
    }
    assert {k: file[k] for k in expected} == expected
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert api.http.get(f"/v1/files/{file['id']}").json() == file
    got = api.http.get(f"/v1/files/{file['id']}/content")
    assert got.content == content
    part = api.http.get(f"/v1/files/{file['id']}/content", headers={"Range": "bytes=1-2"})
    assert (part.status_code, part.content) == (206, content[1:3])


def test_a_folder_in_the_name_is_left_out(api: Api) -> None:
    assert upload(api, "../../etc/a.txt", b"x")["filename"] == "a.txt"
    assert upload(api, "C:\\data\\b.txt", b"x")["filename"] == "b.txt"


def test_openai_s_client_uploads_lists_and_deletes(api: Api) -> None:
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="none")
    made = client.files.create(file=("train.jsonl", b'{"messages": []}\n'), purpose="fine-tune")
    assert made.status == "processed"
    assert client.files.retrieve(made.id).filename == "train.jsonl"
    assert made.id in [f.id for f in client.files.list(limit=5)]
    assert client.files.content(made.id).read() == b'{"messages": []}\n'
    assert client.files.delete(made.id).deleted
    assert api.http.get(f"/v1/files/{made.id}").status_code == 404
    assert api.http.get(f"/v1/files/{made.id}/content").status_code == 404


def test_lists_walk_by_cursor(api: Api) -> None:
    made = [upload(api, f"{n}.txt", b"x", purpose="walk")["id"] for n in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2, "purpose": "walk"}
    while True:
        page = api.http.get("/v1/files", params=query).json()
        seen += [f["id"] for f in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["next"]
    assert seen == made[::-1]


def test_a_file_that_an_unfinished_job_reads_stays(api: Api) -> None:
    file_id = upload(api, "a.txt", b"some text")["id"]
    job = post(api, cpt(unique(), dataset__path=..., dataset__file_id=file_id))
    answer = api.http.delete(f"/v1/files/{file_id}")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "file_in_use")
    api.http.post(f"/v1/jobs/{job['id']}/cancel")
    assert api.http.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    assert not list(api.settings.files_dir.glob(f"{file_id}*"))


def test_deleting_a_file_and_making_a_job_of_it_at_once_never_both_succeed(api: Api) -> None:
    for _ in range(20):
        file_id = upload(api, "a.txt", b"some text")["id"]
        gate = threading.Barrier(2)
        deleted: list[int] = []

        def delete(file_id: str = file_id, gate: Any = gate, deleted: list[int] = deleted) -> None:
            gate.wait()
            deleted.append(api.http.delete(f"/v1/files/{file_id}").status_code)

        racer = threading.Thread(target=delete)
        racer.start()
        gate.wait()
        answer = api.http.post("/v1/jobs", json=cpt(unique(), dataset__path=..., dataset__file_id=file_id))
        racer.join()
        assert (answer.status_code, deleted[0]) in {(202, 409), (404, 200)}


@pytest.fixture(scope="module")
def small(sqlite_url: str, make_settings: Callable[..., Settings]) -> Iterator[Api]:
    with serve(make_settings(database_url=sqlite_url, max_upload_bytes=3_000_000)) as api:
        yield api


def left(api: Api) -> list[str]:
    return [p.name for p in api.settings.files_dir.iterdir()] if api.settings.files_dir.exists() else []


@pytest.mark.parametrize("size", [3_000_001, 9_000_000, 40_000_000])
def test_an_upload_over_the_limit_is_413_and_leaves_nothing(small: Api, size: int) -> None:
    answer = small.http.post("/v1/files", files={"file": ("a.txt", b"x" * size)})
    assert (answer.status_code, error_of(answer)["code"]) == (413, "too_large")
    assert str(small.settings.max_upload_bytes) in error_of(answer)["message"]
    assert left(small) == []


def test_an_upload_over_the_limit_without_a_declared_length_is_413_too(small: Api) -> None:
    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        for _ in range(40):
            yield b"x" * 100_000
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = small.http.post("/v1/files", content=body(), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "too_large")
    assert left(small) == []


def test_an_upload_of_exactly_the_limit_is_taken(small: Api) -> None:
    file_id = upload(small, "a.txt", b"x" * 3_000_000)["id"]
    assert small.http.delete(f"/v1/files/{file_id}").status_code == 200


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_an_upload_to_a_full_disk_is_507(
    sqlite_url: str, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=2", "tmpfs", str(tmp_path)], check=True)
    try:
        with serve(make_settings(database_url=sqlite_url, data_dir=tmp_path)) as api:
            for _ in range(3):  # the first may still get its folder
                answer = api.http.post("/v1/files", files={"file": ("a.txt", b"x")})
                assert (answer.status_code, error_of(answer)["code"]) == (507, "insufficient_storage")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_client_that_leaves_midway_leaves_nothing(small: Api) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            '--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        )
        connection.sendall(head.encode() + b"x" * 1_500_000)
        wait_for(lambda: left(small) != [])
    wait_for(lambda: left(small) == [])
    with small.db.read() as session:
        assert session.query(FileRow).count() == 0


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("did not happen in time")
