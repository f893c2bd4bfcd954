"""The clients: a stream of small jobs, followers of their events, and generations. Each writes down what it was told."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.faults.parts import Site
from tests.recipes import cpt_spec, ift_spec

FINAL = ("succeeded", "failed", "cancelled")
STEPS, SAVE, EVAL = 60, 10, 30
GIVE_UP = 150.0  # seconds in which a POST must be settled, whatever happens
PROMPT = "def main("


@dataclass
class Sent:
    """A job as its client knows it."""

    key: str
    role: str  # cpt | ift | export-lora | export-merged_16bit: jobs of one role must come out the same
    job_id: str | None = None
    refused: dict[str, Any] | None = None  # the error that settled it otherwise
    tries: int = 0


@dataclass
class Ledger:
    """What all clients saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: list[Sent] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)  # how requests were answered, by kind
    violations: list[str] = field(default_factory=list)
    broken: frozenset[str] = frozenset()  # what the fault under way may break
    recent: frozenset[str] = frozenset()  # what the last one broke, which has a little time to come back
    broken_until: float = 0.0

    def count(self, what: str) -> None:
        with self.lock:
            self.answers[what] += 1

    def violation(self, what: str) -> None:
        with self.lock:
            self.violations.append(what)

    def may_break(self, *parts: str) -> bool:
        recent = self.recent if time.monotonic() < self.broken_until else frozenset()
        return bool((self.broken | recent) & set(parts))


def specs(base: Any, file: str, name: str) -> dict[str, dict[str, Any]]:
    """One spec of each role for a chain that ends in the adapters `name` and `name-chat`."""
    training = {
        "max_steps": STEPS, "save_steps": SAVE, "eval_steps": EVAL, "logging_steps": 1, "save_total_limit": 2,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 8,
    }  # fmt: skip
    lora = {"r": 4, "lora_alpha": 8, "train_embeddings": False}
    data = {"file_id": file, "test_size": 0.1}
    chat = f"{name}-chat"
    cpt = cpt_spec(base, adapter=name, dataset=data, training=training, lora=lora)
    rows = {**data, "template": {"prompt": "{title}: ", "response": "{text}"}}
    ift = ift_spec(base, adapter=chat, dataset=rows, training={**training, "max_steps": 40}, lora=lora)
    ift["init"] = {"adapter": name}
    return {
        "cpt": cpt,
        "ift": ift,
        "export-lora": {"kind": "export", "adapter": chat, "format": "lora"},
        "export-merged_16bit": {"kind": "export", "adapter": chat, "format": "merged_16bit"},
    }


def error_of(response: httpx.Response) -> dict[str, Any] | None:
    """The error body, if it is one."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return error if isinstance(error, dict) and error.get("code") and error.get("message") else None


class Client:
    """Posts jobs until each is settled; keeps `backlog` of them unfinished."""

    def __init__(self, here: Site, ledger: Ledger, file: str, seed: int) -> None:
        self.here, self.ledger, self.file = here, ledger, file
        self.rng = random.Random(seed)
        self.http = httpx.Client(base_url=here.url, timeout=30, trust_env=False)
        self.numbers = 0

    def post(self, role: str, spec: dict[str, Any]) -> Sent:
        """Try with the same key until there is an answer that settles it."""
        sent = Sent(f"{self.here.tag}-{len(self.ledger.sent)}-{role}", role)
        with self.ledger.lock:
            self.ledger.sent.append(sent)
        deadline = time.monotonic() + GIVE_UP
        while time.monotonic() < deadline:
            sent.tries += 1
            try:
                response = self.http.post("/v1/jobs", json=spec, headers={"Idempotency-Key": sent.key})
            except httpx.TransportError as error:
                self.ledger.count(f"POST {type(error).__name__}")
                if not self.ledger.may_break("api"):
                    self.ledger.violation(f"POST broke off without a fault of the API: {error!r}")
                time.sleep(0.5)
                continue
            error = error_of(response)
            self.ledger.count(f"POST {response.status_code}" + (f" {error['code']}" if error else ""))
            if response.status_code == 202:
                sent.job_id = response.json()["id"]
                return sent
            if error is None or response.status_code == 500:
                self.ledger.violation(f"POST answered {response.status_code}: {response.text[:300]}")
                return sent
            if response.status_code in (503, 507):
                time.sleep(min(2.0, float(response.headers.get("Retry-After", 1))))
                continue
            sent.refused = error
            return sent
        self.ledger.violation(f"POST {sent.key} was not settled in {GIVE_UP:g} s")
        return sent

    def chain(self, name: str, roles: list[str]) -> None:
        """Post a chain; it ends where a parent has failed already."""
        before: str | None = None
        for role, spec in specs(self.here.base, self.file, name).items():
            if role not in roles:
                continue
            sent = self.post(role, {**spec, "after": [before]} if before else spec)
            if sent.job_id is None:
                code = (sent.refused or {}).get("code")
                if sent.refused and code not in ("parent_failed", "adapter_not_found"):
                    self.ledger.violation(f"POST {sent.key} was refused: {sent.refused}")
                return
            if not role.startswith("export"):
                before = sent.job_id

    def submit(self, stop: threading.Event, backlog: int) -> None:
        """In a thread: more work whenever there is little left."""
        while not stop.wait(2):
            if self.unfinished() >= backlog:
                continue
            self.numbers += 1
            roles = ["cpt"]
            if self.rng.random() < 0.4:
                roles += ["ift", self.rng.choice(["export-lora", "export-merged_16bit"])]
            self.chain(f"a{self.numbers}", roles)

    def unfinished(self) -> int:
        total = 0
        try:
            for status in ("queued", "preparing", "running"):
                page = self.http.get("/v1/jobs", params={"status": status, "limit": 100}).json()
                total += len(page["data"])
        except (httpx.TransportError, ValueError, KeyError):
            return 1 << 30  # unknown: ask again later
        return total


class Follower:
    """Follows one job after the other with Last-Event-ID; every event must come once and in order."""

    def __init__(self, here: Site, ledger: Ledger) -> None:
        self.here, self.ledger = here, ledger
        self.followed: set[str] = set()
        self.http = httpx.Client(base_url=here.url, timeout=httpx.Timeout(10, read=40), trust_env=False)

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(0.3):
            job = next(
                (s.job_id for s in reversed(self.ledger.sent) if s.job_id and s.job_id not in self.followed), None
            )
            if job is not None:
                self.followed.add(job)
                self.follow(job, stop)

    def follow(self, job_id: str, stop: threading.Event) -> None:
        seq = 0
        while not stop.is_set():
            try:
                headers = {"Last-Event-ID": str(seq)}
                with self.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
                    if response.status_code == 204:
                        return
                    if response.status_code not in (200, 503, 507):
                        self.ledger.violation(f"events of {job_id} answered {response.status_code}")
                    for kind, data, number in _events(response):
                        if int(number) != seq + 1:
                            self.ledger.violation(f"events of {job_id}: {number} followed {seq}")
                        seq = int(number)
                        if kind == "status" and data["status"] in FINAL:
                            self.ledger.count("events followed to the end")
                            return
                        if stop.is_set():
                            return
            except httpx.HTTPError as error:
                self.ledger.count(f"events {type(error).__name__}")
            time.sleep(0.5)


def _events(response: httpx.Response) -> Any:
    kind, data, number = "", "", "0"
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            data = value
        elif name == "id":
            number = value
        elif not line and data:
            yield kind, json.loads(data), number
            kind, data = "", ""


class Generator:
    """Asks for text, streamed or not, of the base and of the reference adapters; answers are known."""

    def __init__(self, here: Site, ledger: Ledger, seed: int, known: dict[str | None, str]) -> None:
        self.here, self.ledger, self.known = here, ledger, known
        self.rng = random.Random(seed)
        self.http = httpx.Client(base_url=here.url, timeout=httpx.Timeout(10, read=60), trust_env=False)

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(self.rng.uniform(0.3, 2.0)):
            adapter = self.rng.choice(list(self.known))
            stream = self.rng.random() < 0.7
            kind = "stream" if stream else "generate"
            outcome = self.ask(adapter, stream)
            self.ledger.count(f"{kind} {outcome}")

    def ask(self, adapter: str | None, stream: bool) -> str:
        """How one request ended, in a word; what must not be is written down as a violation."""
        body = {"adapter": adapter, "prompt": PROMPT, "max_new_tokens": 48, "temperature": 0, "stream": stream}
        try:
            with self.http.stream("POST", "/generate", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    return self.refused(response)
                if not stream:
                    response.read()
                    return self.check(adapter, response.json()["text"])
                text = ""
                for kind, data, _ in _events(response):
                    if kind == "token":
                        text += data["text"]
                    elif kind == "done":
                        if text != data["text"]:
                            self.ledger.violation(f"pieces of {adapter}'s answer are not the whole: {text!r}")
                        return self.check(adapter, data["text"])
                    elif kind == "error":
                        return f"error event {data['error']['code']}"
            if not self.ledger.may_break("api"):
                self.ledger.violation(f"a stream of {adapter} ended without a word")
            return "ended without a word"
        except httpx.TransportError as error:
            if not self.ledger.may_break("api"):
                self.ledger.violation(f"generate broke off without a fault of the API: {error!r}")
            return type(error).__name__

    def refused(self, response: httpx.Response) -> str:
        error = error_of(response)
        if error is None or response.status_code not in (503, 507):
            self.ledger.violation(f"generate answered {response.status_code}: {response.text[:300]}")
        return f"{response.status_code} {(error or {}).get('code')}"

    def check(self, adapter: str | None, text: str) -> str:
        if text != self.known[adapter]:
            self.ledger.violation(f"{adapter} answered {text!r}, not {self.known[adapter]!r}")
            return "wrong"
        return "answered"


def start(target: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread
