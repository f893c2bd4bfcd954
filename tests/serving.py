"""Parts for the tests of generation: adapters of several kinds on a tiny base, an engine over a socket, the registry's rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from service.db import Database
from service.ids import new_id
from service.models import AdapterRow, CheckpointRow, JobRow
from service.server import Server, listen
from service.settings import Settings
from service.templates import StoredTemplate

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Different ranks, scalings and targets; "full" has trained embeddings, "lora-embeddings" has LoRA on them.
KINDS: dict[str, dict[str, Any]] = {
    "small": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "full": {
        "r": 16,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": PROJECTIONS,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "lora-embeddings": {"r": 8, "lora_alpha": 8, "target_modules": ["down_proj", "embed_tokens", "lm_head"]},
    "patterns": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": PROJECTIONS,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 32},
    },
}


def make_adapter(base: Path, folder: Path, *, seed: int = 0, size: float = 0.05, **lora: Any) -> Path:
    """A PEFT adapter with random weights on `base`, with the base's stored template beside it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from worker.data import base_template

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter) * size
    peft.save_pretrained(folder, save_embedding_layers=False)
    template = base_template(AutoTokenizer.from_pretrained(base))
    (folder / "lorry_template.json").write_text(template.model_dump_json(), encoding="utf-8")
    return folder


def peft_greedy(base: Path, adapter: Path | None, prompt: list[int], tokens: int, **model_kwargs: Any) -> list[int]:
    """What transformers' generate gives alone, with PEFT where there is an adapter; the end token does not end it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, **{"dtype": torch.float32, **model_kwargs})
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    # Not min_new_tokens, which would forbid the end token; the engine is told to ignore it, not to avoid it.
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.eval().generate(input_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    ids: list[int] = out[0, len(prompt) :].tolist()
    return ids


@dataclass
class EngineServer:
    """An engine served from a thread of the test's process."""

    url: str
    http: httpx.Client
    engine: Any
    server: Server

    def complete(self, **body: Any) -> dict[str, Any]:
        """POST /v1/completions; greedy and of the base unless said otherwise."""
        response = self.http.post("/v1/completions", json={"model": self.base, "temperature": 0, **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    @property
    def base(self) -> str:
        name: str = self.engine.runner.name
        return name

    def load(self, name: str, path: Path) -> None:
        response = self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
        assert response.status_code == 200, response.text

    def idle(self) -> bool:
        """Nothing runs, nothing waits, and all memory is free."""
        scheduler = self.engine.scheduler
        return not scheduler.has_work() and scheduler.pool.free == scheduler.pool.num_blocks


def engine_settings(base: Path, **values: Any) -> Settings:
    defaults: dict[str, Any] = {"base_model": str(base), "engine_max_seq_length": 256, "torch_threads": 1}
    return Settings(**{**defaults, **values})


@contextmanager
def serve_engine(settings: Settings) -> Iterator[EngineServer]:
    """A real engine on a real socket."""
    from worker.engine.server import build_engine, create_app, engine_server

    engine = build_engine(settings)
    server = engine_server(create_app(engine), engine, settings)
    sock = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    until(lambda: server.started, 20)
    try:
        with httpx.Client(base_url=url, timeout=60) as http:
            yield EngineServer(url, http, engine, server)
    finally:
        server.should_exit = True
        thread.join(20)


def until(condition: Any, seconds: float = 60.0) -> None:
    """Wait for a condition; fails if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.005)


def register(
    db: Database,
    name: str,
    path: Path,
    base: str,
    *,
    checkpoints: dict[int, Path] | None = None,
    config: dict[str, Any] | None = None,
) -> str:
    """Rows of a finished job and its adapter, as a worker leaves them. Returns the job's id."""
    job_id = new_id("job")
    template = StoredTemplate.model_validate_json((path / "lorry_template.json").read_text("utf-8")).model_dump()
    now = time.time()
    with db.write() as session:
        spec = {"model": {"name": base}}
        session.add(
            JobRow(id=job_id, kind="ift", status="succeeded", adapter=name, spec=spec, after=[], created_at=now)
        )
        session.flush()
        session.add(
            AdapterRow(
                name=name,
                job_id=job_id,
                ready=True,
                kind="ift",
                base=base,
                path=str(path),
                template=template,
                config=config or {},
                created_at=now,
            )
        )
        for step, folder in (checkpoints or {}).items():
            session.add(CheckpointRow(job_id=job_id, step=step, path=str(folder), bytes=1, created_at=now))
    return job_id
