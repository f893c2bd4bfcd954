#!/usr/bin/env python3
"""The main job, start to end, over HTTP: continued pre-training, instruction tuning, two exports, answers side by side.

    scripts/demo [--keep] [--port N] [--data-dir FOLDER] [--loss-svg FILE]

starts `lorry up` (SQLite, embedded queue server) on free ports, trains the built-in SmolLM2-135M-Instruct on Python's
language reference and then, going on from that adapter, on question-answer pairs from docstrings; exports the result as
LoRA and as merged 16-bit model; asks base, CPT and IFT model the same four questions; writes loss.svg; stops all it
started. It fails if an evaluation loss is not lower at the end than at the start.

On Ctrl-C, too, nothing is left running. With --keep the service goes on at the end, and its folder is kept.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from demo_data import QUESTIONS, write_demo_data
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
FINAL = {"succeeded", "failed", "cancelled"}
READY_SECONDS = 180
STOP_SECONDS = 60  # for `lorry up` to stop its parts; then they are killed
SILENCE_SECONDS = 60  # the event stream has a ping every 15 s
console = Console(highlight=False)


class Failed(Exception):
    """The demo cannot go on; the message says why."""


# What is trained. Small sizes, so that two cores finish in minutes: a real run leaves most of this at its defaults.

LORA = {"r": 16, "lora_alpha": 32}
MODEL = {"max_seq_length": 256, "load_in_4bit": False}


def cpt_spec(file_id: str) -> dict[str, Any]:
    """About a quarter of the language reference, in windows of 256 tokens."""
    return {
        "kind": "cpt",
        "adapter": "pydocs",
        "model": MODEL,
        "lora": LORA,
        "dataset": {"file_id": file_id, "test_size": 5, "template": {"prompt": "### {title}\n\n{text}"}},
        "training": {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": 32,
            "learning_rate": 2e-4,
            "embedding_learning_rate": 2e-5,
            "logging_steps": 2,
            "eval_steps": 16,
        },
    }


def ift_spec(file_id: str, cpt_job: str) -> dict[str, Any]:
    """Question-answer pairs in the model's own chat template; only answers count in the loss."""
    return {
        "kind": "ift",
        "adapter": "pydocs-qa",
        "init": {"adapter": "pydocs", "mode": "continue"},
        "after": [cpt_job],
        "model": MODEL,
        "lora": LORA,
        "dataset": {"file_id": file_id, "test_size": 32, "template": {"chat_template": "default"}},
        "training": {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": 32,
            "learning_rate": 2e-4,
            "embedding_learning_rate": 2e-5,
            "logging_steps": 2,
            "eval_steps": 16,
            "train_on_responses_only": True,
        },
    }


# The service


class Service:
    """`lorry up` as a child process, with a data folder of its own and no LORRY_ variable from outside."""

    def __init__(self, folder: Path, port: int, *, keep: bool) -> None:
        self.folder, self.keep = folder, keep
        self.url = f"http://127.0.0.1:{port or free_port()}"
        self.log = folder / "up.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("LORRY_")}
        env["LORRY_DATA_DIR"] = str(self.folder)
        env["LORRY_PORT"] = self.url.rpartition(":")[2]
        env["LORRY_ENGINE_PORT"] = "0"  # a free one
        if not self.keep:
            env["LORRY_SHUTDOWN_SECONDS"] = str(STOP_SECONDS - 20)
        with open(self.log, "ab") as log:
            # A session of its own: a Ctrl-C in the terminal is for this script alone, which then stops the service.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "up"],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=None if self.keep else die_with_parent,
            )
        self.wait_for("database,queue,workers")  # jobs need no engine: it loads its model meanwhile

    def wait_for(self, parts: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not self.is_ready(parts):
            if self.process is None or self.process.poll() is not None:
                raise Failed(f"lorry up has ended:\n{tail(self.log)}")
            if time.monotonic() > deadline:
                raise Failed(f"lorry up: {parts} not ready after {READY_SECONDS} s:\n{tail(self.log)}")
            time.sleep(0.3)

    def is_ready(self, parts: str) -> bool:
        try:
            answer = httpx.get(f"{self.url}/readyz", params={"parts": parts}, timeout=5, trust_env=False)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its parts are told to end by the kernel
            self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """Even if this script is killed outright, the service gets a SIGTERM (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:]) if path.exists() else ""


# Calls


class Api:
    """The calls of the demo, over HTTP. Raises Failed with the API's own message."""

    def __init__(self, url: str) -> None:
        timeout = httpx.Timeout(60, read=SILENCE_SECONDS)
        self.http = httpx.Client(base_url=url, timeout=timeout, trust_env=False)

    def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            return checked(self.http.request(method, path, **kwargs))
        except httpx.TransportError as error:
            raise Failed(f"{method} {path}: {error or type(error).__name__}") from error

    def upload(self, path: Path) -> str:
        with open(path, "rb") as file:
            answer = self.call("POST", "/v1/files", files={"file": (path.name, file)}, data={"purpose": "fine-tune"})
        return str(answer.json()["id"])

    def submit(self, spec: dict[str, Any]) -> str:
        return str(self.call("POST", "/v1/jobs", json=spec).json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.call("GET", f"/v1/jobs/{job_id}").json()
        return answer

    def events(self, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every event of a job up to its final state; a lost connection is taken up where it broke."""
        last, tries = "0", 0
        while True:
            try:
                with self.http.stream("GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": last}) as stream:
                    checked(stream)
                    for event_id, kind, data in sse(stream):
                        last, tries = event_id or last, 0
                        yield kind, data
                        if kind == "status" and data["status"] in FINAL:
                            return
            except httpx.TransportError as error:
                tries += 1
                if tries > 5:
                    raise Failed(f"the events of {job_id} cannot be followed: {error}") from error
            time.sleep(0.5)

    def generate(self, body: dict[str, Any]) -> Iterator[str]:
        """Pieces of text as they come."""
        with self.http.stream("POST", "/generate", json={**body, "stream": True}) as stream:
            checked(stream)
            for _, kind, data in sse(stream):
                if kind == "error":
                    raise Failed(f"/generate: {data['error']['message']}")
                if kind == "token":
                    yield data["text"]


def checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        answer.read()
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = answer.text[:500]
        raise Failed(f"{answer.request.method} {answer.request.url.path}: {answer.status_code}: {message}")
    return answer


def sse(stream: httpx.Response) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, event, data) of each server-sent event."""
    event_id, kind, data = "", "message", ""
    for line in stream.iter_lines():
        field, _, value = line.partition(": ")
        if field == "id":
            event_id = value
        elif field == "event":
            kind = value
        elif field == "data":
            data += value
        elif not line and data:
            yield event_id, kind, json.loads(data)
            event_id, kind, data = "", "message", ""


# The steps of the demo


def follow(api: Api, job_id: str, title: str) -> dict[str, Any]:
    """Show a job's progress until it ends; returns the job. Raises Failed with its error and the end of its log."""
    columns = (
        TextColumn("{task.description:<19}"),
        BarColumn(20),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[info]}"),
    )
    began, seen, printed = time.monotonic(), {"loss": "", "eval": ""}, -1
    with Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1, info="waiting")
        for kind, data in api.events(job_id):
            if kind == "status":
                bar.update(task, info=data["status"])
            elif kind == "metrics" and data["split"] == "train":
                seen["loss"] = f"loss {data['loss']:.3f}  "
            elif kind == "metrics":
                seen["eval"] = f"eval {data['eval_loss']:.3f}  "
            elif kind == "progress":
                step, total = data.get("step") or 0, data.get("total_steps") or 1
                speed = f"{data['tokens_per_second']:.0f} tokens/s  " if data.get("tokens_per_second") else ""
                left = data.get("eta_seconds") if data.get("phase") == "training" else None
                info = f"{seen['loss']}{seen['eval']}{speed}"
                info += f"{clock(left)} left" if left is not None and step else data.get("phase", "")
                bar.update(task, completed=step, total=total, info=info)
                if not console.is_terminal and step % 10 == 0 and step != printed:
                    console.print(f"  {title} {step}/{total}  {info}", soft_wrap=True)
                    printed = step
        job = api.job(job_id)
        done = job["status"] == "succeeded"
        info = f"{seen['loss']}{seen['eval']}{job['status']} in {clock(time.monotonic() - began)}"
        total = job["progress"].get("total_steps") or 1
        bar.update(task, completed=total if done else job["progress"].get("step") or 0, total=total, info=info)
        if not console.is_terminal:
            console.print(f"  {title}  {info}", soft_wrap=True)
    if not done:
        error = job["error"] or {"code": job["status"], "message": ""}
        log = api.call("GET", f"/v1/jobs/{job_id}/log", params={"bytes": 4000}).text
        rows = "".join(f"\n  row {r['row']}: {r['reason']}" for r in error.get("rows", [])[:10])
        raise Failed(f"{title} {job['status']}: {error['code']}: {error['message']}{rows}\n\nend of its log:\n{log}")
    return job


def check_loss(title: str, job: dict[str, Any]) -> None:
    start, end = job["result"]["eval_loss_start"], job["result"]["eval_loss"]
    console.print(f"  {title}: evaluation loss {start:.4f} at the start, {end:.4f} at the end")
    if not end < start:
        raise Failed(f"{title}: the evaluation loss did not fall")


def compare(api: Api) -> None:
    """The same questions to the three models at once, their answers side by side as they are written."""
    for question in QUESTIONS:
        asked = {"role": "user", "content": question}
        bodies = {
            "base": {"adapter": None, "messages": [asked]},
            # A CPT model goes on with a text: the question stands where an article's title stood.
            "CPT: pydocs": {"adapter": "pydocs", "inputs": {"title": question}},
            "IFT: pydocs-qa": {"adapter": "pydocs-qa", "messages": [asked]},
        }
        texts, errors = dict.fromkeys(bodies, ""), []

        def run(name: str, body: dict[str, Any], texts: dict[str, str], errors: list[str]) -> None:
            try:
                for piece in api.generate({**body, "max_new_tokens": 80}):
                    texts[name] += piece
            except (Failed, httpx.HTTPError) as error:
                errors.append(f"{name}: {error}")

        threads = [
            threading.Thread(target=run, args=(name, body, texts, errors), daemon=True) for name, body in bodies.items()
        ]
        for thread in threads:
            thread.start()
        with Live(console=console, refresh_per_second=8, transient=True) as live:
            while any(thread.is_alive() for thread in threads):
                live.update(side_by_side(question, texts) if console.is_terminal else "")
                time.sleep(0.1)
        console.print(side_by_side(question, texts))
        if errors:
            raise Failed("\n".join(errors))
        if not all(text.strip() for text in texts.values()):
            raise Failed(f"no answer from {', '.join(n for n, t in texts.items() if not t.strip())}")


def side_by_side(question: str, texts: dict[str, str]) -> Table:
    table = Table(title=Text(question, style="bold"), title_justify="left", expand=True)
    for name in texts:
        table.add_column(name, ratio=1, vertical="top")
    table.add_row(*(Text(text.strip()) for text in texts.values()))
    return table


def demo(service: Service, loss_svg: Path) -> None:
    console.print("starting lorry up …")
    began = time.monotonic()
    service.start()
    api = Api(service.url)
    data = write_demo_data(service.folder / "demo")
    console.print(f"ready after {clock(time.monotonic() - began)}: {service.url}/docs")

    files = {kind: api.upload(path) for kind, path in data.items()}
    cpt = api.submit(cpt_spec(files["cpt"]))
    ift = api.submit(ift_spec(files["ift"], cpt))
    exports = {
        format: api.submit({"kind": "export", "adapter": "pydocs-qa", "format": format, "after": [ift]})
        for format in ("lora", "merged_16bit")
    }
    console.print("four jobs queued, each after the one it needs")

    check_loss("CPT", follow(api, cpt, "CPT pydocs"))
    check_loss("IFT", follow(api, ift, "IFT pydocs-qa"))
    for format, job_id in exports.items():
        job = follow(api, job_id, f"export {format}")
        report = job["result"]["verification"]
        console.print(
            f"  {job['result']['bytes'] / 1e6:,.0f} MB; read back: mean KL {report['mean_kl']:.2g} from the adapter, "
            f"{report['greedy_tokens']['equal']} of {report['greedy_tokens']['total']} generated tokens the same"
        )
    console.print()
    service.wait_for("engine")
    compare(api)
    loss_svg.write_bytes(api.call("GET", "/v1/loss.svg", params={"jobs": f"{cpt},{ift}"}).content)
    console.print(f"loss curves: {loss_svg}")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def how_to_use(service: Service) -> str:
    pid = service.process.pid if service.process else 0
    question = '{"adapter": "pydocs-qa", "messages": [{"role": "user", "content": "What does str.partition do?"}]}'
    return f"""
lorry goes on running: {service.url} (API reference: {service.url}/docs; stop it with: kill {pid})
data and log: {service.folder}

curl -s {service.url}/generate -H 'Content-Type: application/json' \\
  -d '{question}'

pip install openai
python - <<'END'
from openai import OpenAI
client = OpenAI(base_url="{service.url}/v1", api_key="none")
messages = [{{"role": "user", "content": "What does str.partition do?"}}]
for chunk in client.chat.completions.create(model="pydocs-qa", messages=messages, stream=True):
    print(chunk.choices and chunk.choices[0].delta.content or "", end="", flush=True)
END
"""


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="leave the service running and say how to use it")
    parser.add_argument("--port", type=int, default=0, help="port of the API (default: a free one)")
    parser.add_argument("--data-dir", type=Path, help="data folder to use and to keep (default: a new one in data/)")
    parser.add_argument("--loss-svg", type=Path, default=ROOT / "loss.svg", help="where to write the loss curves")
    options = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    if options.data_dir:
        folder = options.data_dir.absolute()
        folder.mkdir(parents=True, exist_ok=True)
    else:
        (ROOT / "data").mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="demo-", dir=ROOT / "data"))
    service = Service(folder, options.port, keep=options.keep)
    began, status = time.monotonic(), 1
    try:
        demo(service, options.loss_svg)
        status = 0
        console.print(f"done in {clock(time.monotonic() - began)}")
        if options.keep:
            console.print(how_to_use(service), markup=False, soft_wrap=True)
    except Failed as error:
        console.print(f"demo failed: {error}", style="red", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        status = 130
        console.print("interrupted")
    finally:
        if status or not options.keep:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(
                    number, signal.SIG_IGN
                )  # stopping is bounded in time; a second Ctrl-C must not cut it short
            console.print("stopping what was started …")
            service.stop()
            if status == 1 or options.data_dir:
                console.print(f"data and log are kept: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
