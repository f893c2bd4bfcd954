"""The API behind nginx, with deploy/nginx/lorry.conf: TLS, streams, uploads."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from service.settings import Settings
from tests.compose import ROOT
from tests.conftest import Api, free_port, serve
from tests.steps import cpt, post, start, succeed

CONF = ROOT / "deploy" / "nginx" / "lorry.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not there")


@pytest.fixture(scope="module")
def behind(sqlite_url: str, make_settings: Callable[..., Settings]) -> Iterator[Api]:
    with serve(make_settings(database_url=sqlite_url, api_key="secret", sse_ping_seconds=0.5)) as api:
        yield api


@pytest.fixture(scope="module")
def nginx(behind: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, int]]:
    """A client that trusts the proxy's certificate, and the port for plain HTTP."""
    folder = tmp_path_factory.mktemp("nginx")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    plain, tls = free_port(), free_port()
    # Only places are changed: ports, names, files.
    changes = {
        r"server 127\.0\.0\.1:8321": f"server {behind.url.removeprefix('http://')}",
        r"listen 80;": f"listen 127.0.0.1:{plain};",
        r"listen 443 ": f"listen 127.0.0.1:{tls} ",
        r"server_name \S+;": "server_name localhost;",
        r"/etc/ssl/lorry/fullchain\.pem": str(folder / "cert.pem"),
        r"/etc/ssl/lorry/privkey\.pem": str(folder / "key.pem"),
    }
    text = CONF.read_text("utf-8")
    for pattern, replacement in changes.items():
        text, count = re.subn(pattern, replacement, text)
        assert count, pattern
    temp = "".join(f"{n}_temp_path {folder / n};\n" for n in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;\n" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user}pid {folder / 'pid'};\nevents {{}}\nhttp {{\naccess_log off;\n{temp}{text}}}\n", "utf-8"
    )
    command = [str(NGINX), "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log", "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", tls)) == 0:
                    break
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        context = ssl.create_default_context(cafile=folder / "cert.pem")
        headers = {"Authorization": "Bearer secret"}
        with httpx.Client(
            base_url=f"https://localhost:{tls}", headers=headers, verify=context, timeout=60, trust_env=False
        ) as client:
            yield client, plain
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_events_come_through_as_they_happen(behind: Api, nginx: tuple[httpx.Client, int]) -> None:
    client, _ = nginx
    job = post(behind, cpt("through-nginx"))
    seen: list[str] = []
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()

        def until(part: str) -> None:
            for line in lines:
                seen.append(line)
                if part in line:
                    return
            raise AssertionError(f"no {part} in {seen}")

        # What follows happens only after the line before it was read here: held back, it would never come.
        until('"queued"')
        until(": ping")
        run = start(behind, job["id"])
        until('"running"')
        succeed(behind, job["id"], run)
        until('"succeeded"')
        assert [line for line in lines if line and not line.startswith((":", "data", "id", "event"))] == []


def test_a_large_upload_and_its_download_come_through(nginx: tuple[httpx.Client, int]) -> None:
    client, _ = nginx
    content = b'{"text": "' + b"x" * 5_000_000 + b'"}\n'  # nginx's own limit is 1 MB
    answer = client.post("/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "fine-tune"})
    assert answer.status_code < 300, answer.text
    assert client.get(f"/v1/files/{answer.json()['id']}/content").content == content


def test_the_proxy_takes_all_that_lorry_takes() -> None:
    found = re.search(r"client_max_body_size (\d+)m;", CONF.read_text("utf-8"))
    assert found
    assert int(found[1]) * 1024**2 > Settings.model_fields["max_upload_bytes"].default


def test_a_request_has_one_id_and_plain_http_leads_to_tls(nginx: tuple[httpx.Client, int]) -> None:
    client, plain = nginx
    assert re.fullmatch(r"[0-9a-f]{32}", client.get("/v1/jobs").headers["x-request-id"])
    assert client.get("/metrics").status_code == 404
    moved = httpx.post(f"http://127.0.0.1:{plain}/v1/jobs", headers={"Host": "localhost"}, trust_env=False)
    assert (moved.status_code, moved.headers["location"]) == (308, "https://localhost/v1/jobs")
