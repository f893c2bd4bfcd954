"""A whole export as one tar over HTTP: its bytes, parts of them, and what happens when files go away."""

from __future__ import annotations

import io
import os
import tarfile
from typing import Any

import httpx
import pytest

from service.jobs.tar import CHUNK
from service.models import ArtifactRow, JobRow
from tests.conftest import Api
from tests.steps import adapter, cpt, error_of, post, succeed, unique

FILES = {
    "manifest.json": b'{"files": []}',
    "model.safetensors": bytes(range(256)) * 5000,
    "empty.txt": b"",
    "nested/ümläut.txt": b"x" * 512,
    "nested/" + "long" * 60 + ".txt": b"y",
}


def make_export(api: Api, files: dict[str, bytes] | None) -> str:
    adapter(api, name := unique())
    job_id = str(post(api, {"kind": "export", "adapter": name})["id"])
    if files is not None:
        succeed(api, job_id, artifacts=files)
    return job_id


@pytest.fixture(scope="module")
def export(sqlite_api: Api) -> str:
    job_id = make_export(sqlite_api, FILES)
    (sqlite_api.settings.exports_dir / job_id / "unlisted.txt").write_text("no artifact")
    return job_id


@pytest.fixture(scope="module")
def whole(sqlite_api: Api, export: str) -> bytes:
    return sqlite_api.http.get(f"/v1/jobs/{export}/artifacts.tar").content


def test_the_tar_holds_the_listed_files_in_order_and_its_length_is_known(sqlite_api: Api, export: str) -> None:
    answer = sqlite_api.http.get(f"/v1/jobs/{export}/artifacts.tar")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["content-disposition"] == f'attachment; filename="{export}.tar"'
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        found = {m.name.removeprefix(f"{export}/"): tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        times = {m.mtime for m in tar}
    assert found == FILES
    assert list(found) == sorted(FILES)
    with sqlite_api.db.read() as session:
        assert times == {int(session.get_one(JobRow, export).finished_at or 0)}


def test_a_download_that_broke_off_goes_on_by_range(sqlite_api: Api, export: str, whole: bytes) -> None:
    url = f"/v1/jobs/{export}/artifacts.tar"
    head = sqlite_api.http.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert (head.headers["content-length"], head.headers["accept-ranges"]) == (str(len(whole)), "bytes")
    etag = head.headers["etag"]
    got = b""
    for begin, end in ((0, 99), (100, 700), (701, len(whole) // 2), (len(whole) // 2 + 1, None)):
        span = f"bytes={begin}-{'' if end is None else end}"
        part = sqlite_api.http.get(url, headers={"Range": span, "If-Range": etag})
        assert part.status_code == 206
        assert part.headers["content-range"] == f"bytes {begin}-{len(whole) - 1 if end is None else end}/{len(whole)}"
        assert part.headers["content-length"] == str(len(part.content))
        got += part.content
    assert got == whole
    assert sqlite_api.http.get(url, headers={"Range": "bytes=-600"}).content == whole[-600:]
    assert sqlite_api.http.get(url, headers={"Range": "bytes=5-9999999999"}).content == whole[5:]
    other = sqlite_api.http.get(url, headers={"Range": "bytes=0-3", "If-Range": '"another"'})
    assert (other.status_code, len(other.content)) == (200, len(whole))


@pytest.mark.parametrize("span", ["bytes=9-3", "bytes=-", "bytes=0-1,4-5", "lines=0-3", f"bytes=0-{'9' * 5000}"])
def test_a_range_that_is_not_understood_gives_the_whole(sqlite_api: Api, export: str, whole: bytes, span: str) -> None:
    answer = sqlite_api.http.get(f"/v1/jobs/{export}/artifacts.tar", headers={"Range": span})
    assert (answer.status_code, answer.content) == (200, whole)


def test_a_range_beyond_the_end_is_416(sqlite_api: Api, export: str, whole: bytes) -> None:
    answer = sqlite_api.http.get(f"/v1/jobs/{export}/artifacts.tar", headers={"Range": f"bytes={len(whole)}-"})
    assert (answer.status_code, error_of(answer)["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(whole)}"


def test_a_file_beyond_8_gib_is_read_in_small_pieces_from_where_it_is_asked_for(sqlite_api: Api) -> None:
    job_id = make_export(sqlite_api, {"manifest.json": b"{}"})
    size = 9 * 2**30
    path = sqlite_api.settings.exports_dir / job_id / "big.gguf"
    with open(path, "wb") as file:
        file.truncate(size)  # without blocks on the disk
        file.seek(size - 4)
        file.write(b"last")
    with sqlite_api.db.write() as session:
        session.add(ArtifactRow(job_id=job_id, path="big.gguf", bytes=size, sha256="0" * 64))
    url = f"/v1/jobs/{job_id}/artifacts.tar"
    begin = sqlite_api.http.get(url, headers={"Range": f"bytes=0-{CHUNK}"}).content
    with tarfile.open(fileobj=io.BytesIO(begin)) as tar:
        first = tar.next()
        assert first is not None
        assert (first.name, first.size) == (f"{job_id}/big.gguf", size)
        at = first.offset_data + size
    assert sqlite_api.http.get(url, headers={"Range": f"bytes={at - 4}-{at - 1}"}).content == b"last"


@pytest.mark.parametrize("change", [os.unlink, lambda path: os.truncate(path, 3)], ids=["gone", "cut short"])
def test_a_file_that_is_not_there_as_listed_is_an_error_before_the_first_byte(sqlite_api: Api, change: Any) -> None:
    job_id = make_export(sqlite_api, FILES)
    change(sqlite_api.settings.exports_dir / job_id / "model.safetensors")
    answer = sqlite_api.http.get(f"/v1/jobs/{job_id}/artifacts.tar")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "file_gone")
    assert "model.safetensors" in error_of(answer)["message"]


@pytest.mark.parametrize("change", [os.unlink, lambda path: os.truncate(path, 3)], ids=["gone", "cut short"])
def test_a_file_that_goes_away_meanwhile_breaks_the_connection(sqlite_api: Api, change: Any) -> None:
    # The first file is more than any buffer on the way can take.
    job_id = make_export(sqlite_api, {"a.bin": bytes(48 * CHUNK), "b.bin": b"b" * 5000})
    with (
        httpx.Client(base_url=sqlite_api.url, timeout=60) as http,
        http.stream("GET", f"/v1/jobs/{job_id}/artifacts.tar") as answer,
    ):
        pieces = answer.iter_raw()
        next(pieces)
        change(sqlite_api.settings.exports_dir / job_id / "b.bin")
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
            sum(map(len, pieces))


def test_without_artifacts_there_is_no_tar(sqlite_api: Api) -> None:
    training = post(sqlite_api, cpt(unique()))["id"]
    for job_id, status, code in (
        (training, 404, "artifact_not_found"),
        (make_export(sqlite_api, None), 409, "job_not_finished"),
        ("job_none", 404, "job_not_found"),
    ):
        answer = sqlite_api.http.get(f"/v1/jobs/{job_id}/artifacts.tar")
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
