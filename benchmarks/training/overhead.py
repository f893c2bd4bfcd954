#!/usr/bin/env python3
"""A job's training against the bare Unsloth script with the same spec: time of a step, start-up, losses.

Both train on the same rows, all of the same length, with the same seed, optimiser, evaluations and loss, each in a
process of its own, in turn (A B A B …). `job` is the worker's own task on a migrated SQLite database; `bare` is bare.py.
Aim: median step of the job at most 1.02 times the bare script's, by pairs. Beside it the seconds from the process's
start to the first step, and the largest difference between the losses of the same step, which should be rounding only.

A last run, `defaults`, leaves the loss to TRL and the gradient checkpointing to Unsloth, as a script would that names
neither.

    python benchmarks/training/overhead.py                       # a tiny model: what lorry adds to a step, in ms
    python benchmarks/training/overhead.py --model smollm2       # the built-in model: the ratio
    python benchmarks/training/overhead.py --gpu --size 1b       # random weights in a Llama's shape, NF4, on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common
from benchmarks.training import clock

AIM = 1.02
SAME = 1e-5  # largest difference of a loss that counts as the same
HERE = Path(__file__).resolve().parent
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip


# What is trained on


def corpus(characters: int) -> str:
    """Source text of the standard library, in a fixed order."""
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if len(text) >= characters:
            break
        if "site-packages" not in path.parts:
            text += path.read_text("utf-8", errors="replace")
    return text


def make_model(size: str, where: str) -> Path:
    """A folder with the built-in model, or with a random Llama of that shape and a tokenizer trained on the corpus."""
    if size == "smollm2":
        from worker.base_model import unpack_builtin

        return unpack_builtin(Path(where))
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(32_000, SHAPES[size]["vocab_size"]),
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([corpus(2_000_000)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", model_max_length=8192
    )
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = LlamaConfig(max_position_embeddings=8192, rope_theta=500_000.0, dtype=dtype, **special, **SHAPES[size])
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    folder = Path(where) / size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def same_length_rows(model: Path, length: int, number: int, path: Path) -> Path:
    """A .jsonl of `number` texts of the corpus, each of exactly `length` tokens with its end token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    want = length - 1 - len(tokenizer("")["input_ids"])  # the end token, and what the tokenizer puts in front
    text = corpus(8 * length * number)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    rows: list[str] = []
    at = 0
    while len(rows) < number:
        if at + want > len(spans):
            raise SystemExit(f"the corpus gives {len(rows)} rows of {length} tokens, {number} are needed")
        piece = text[spans[at][0] : spans[at + want - 1][1]]
        # A cut may change the tokens around it; such a piece is left out.
        same = len(tokenizer(piece, add_special_tokens=False)["input_ids"]) == want
        if same:
            rows.append(piece)
        at += want if same else 7
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


# The two sides


def make_spec(arguments: argparse.Namespace, model: Path, file_id: str) -> dict[str, Any]:
    return {
        "kind": "cpt",
        "adapter": "bench",
        "model": {"name": str(model), "max_seq_length": arguments.length, "load_in_4bit": arguments.gpu},
        "lora": {"train_embeddings": not arguments.no_embeddings},
        "dataset": {"file_id": file_id, "test_size": arguments.eval_rows, "template": {"prompt": "{text}"}},
        "training": {
            "per_device_train_batch_size": arguments.batch,
            "per_device_eval_batch_size": arguments.batch,
            "gradient_accumulation_steps": arguments.accumulate,
            "max_steps": arguments.steps,
            "logging_steps": arguments.logging_steps,
            # Evaluated at the start and at the end, saved at the end: steps between the two are steps only.
            "eval_steps": arguments.steps + 1,
            "save_steps": arguments.steps + 1,
        },
    }


def timed(command: list[str], where: Path, **env: str) -> dict[str, Any]:
    """Run one side; what its clock saw, and the seconds of the whole process."""
    out = where / "clock.json"
    out.unlink(missing_ok=True)
    began = time.time()
    variables = {**common.environment(where, **env), "BENCH_OUT": str(out), "BENCH_STARTED": repr(began)}
    with open(where / "log.txt", "ab") as log:
        status = subprocess.run(command, env=variables, stdout=log, stderr=log, check=False, cwd=where).returncode
    took = time.time() - began
    if status or not out.exists():
        tail = (where / "log.txt").read_text(errors="replace")[-3000:]
        raise SystemExit(f"{' '.join(command)} ended with status {status} and no figures:\n{tail}")
    seen: dict[str, Any] = json.loads(out.read_text())
    return {**seen, "whole_s": took}


class Job:
    """lorry's side: a job made through the service, run by the worker's task."""

    def __init__(self, arguments: argparse.Namespace, where: Path, model: Path, rows: Path) -> None:
        from service.db import Database
        from service.files.service import Upload
        from service.queue import JobQueue
        from service.settings import Settings

        self.arguments, self.where, self.model = arguments, where, model
        url = f"sqlite:///{where / 'lorry.db'}"
        # The task needs no queue; one that is away is part of what it can bear.
        self.env = {"database_url": url, "redis_url": f"redis://127.0.0.1:{common.free_port()}/0"}
        self.settings = Settings(data_dir=where / "data", database_url=url, redis_url=self.env["redis_url"])
        self.db, self.queue = Database(url), JobQueue(self.settings.redis_url, "lorry")
        upload = Upload(self.settings)
        upload.begin(rows.name)
        upload.write(rows.read_bytes())
        self.file_id = upload.keep(self.db, "fine-tune").id

    def spec(self) -> dict[str, Any]:
        return make_spec(self.arguments, self.model, self.file_id)

    def run(self) -> dict[str, Any]:
        from service.jobs import repository
        from service.jobs import service as jobs
        from service.specs import parse_spec

        spec = {**self.spec(), "adapter": f"bench-{time.time_ns()}"}
        row, _ = jobs.create(self.db, self.queue, self.settings, parse_spec(spec), key=None, token=None)
        (self.where / "spec.json").write_text(json.dumps(row.spec))
        seen = timed([sys.executable, str(HERE / "job.py"), row.id], self.where, **self.env)
        with self.db.read() as session:
            done = repository.get(session, row.id)
            run = repository.runs(session, row.id)[-1]
        assert done is not None
        if clock.QUICK not in os.environ and done.status != "succeeded":
            raise SystemExit(f"the job ended {done.status}: {done.error}\n{run.record.get('log_tail')}")
        return {**seen, "result": done.result, "record": run.record}


def run_bare(where: Path, rows: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "bare.py"), "--spec", str(where / "spec.json"), "--rows", str(rows)]
    return timed([*command, "--output", str(where / "bare"), *options], where)


# Figures


def step_times(seen: dict[str, Any], warm_up: int) -> list[float]:
    """Seconds between the ends of consecutive steps, after the first `warm_up` steps."""
    ends = seen["ends"][warm_up - 1 :] if warm_up else seen["ends"]
    return [b - a for a, b in pairwise(ends)]


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Over all logged steps of both, training and evaluation."""
    gaps: list[float] = []
    for name in ("losses", "eval_losses"):
        assert one[name].keys() == other[name].keys(), (name, one[name], other[name])
        gaps += [abs(value - other[name][step]) for step, value in one[name].items()]
    return max(gaps)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny", help="on a CPU (default: tiny)")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU, base in NF4; with --size")
    parser.add_argument("--size", choices=["1b", "8b"], default="1b", help="shape of the model on a GPU (default: 1b)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: 200; 12 on smollm2; 30 on a GPU)")
    parser.add_argument("--warm-up", type=int, help="steps not counted (default: a quarter)")
    parser.add_argument("--batch", type=int, help="rows a pass (default: 4; 8 on a GPU)")
    parser.add_argument("--accumulate", type=int, help="passes a step (default: 1; 2 on a GPU)")
    parser.add_argument("--length", type=int, help="tokens a row (default: 64; 256 on smollm2; 2048 on a GPU)")
    parser.add_argument("--eval-rows", type=int, default=8, help="evaluation rows (default: 8)")
    parser.add_argument(
        "--logging-steps", type=int, default=1, help="steps between metrics (default: 1, the worst case)"
    )
    parser.add_argument("--no-embeddings", action="store_true", help="LoRA only; embed_tokens and lm_head stay frozen")
    parser.add_argument("--no-defaults", action="store_true", help="leave out the run with the libraries' defaults")
    arguments = parser.parse_args()
    size = arguments.size if arguments.gpu else arguments.model
    for name, tiny, smollm2, gpu in (
        ("steps", 200, 12, 30),
        ("batch", 4, 4, 8),
        ("accumulate", 1, 1, 2),
        ("length", 64, 256, 2048),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, gpu if arguments.gpu else {"tiny": tiny, "smollm2": smollm2}[size])
    warm_up = arguments.steps // 4 if arguments.warm_up is None else arguments.warm_up
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    with common.folder() as where, common.database("sqlite", where):
        make = f"from benchmarks.training.overhead import make_model; print(make_model({size!r}, {str(where)!r}))"
        # Apart, so that this process holds neither torch's memory nor a GPU.
        made = subprocess.run(
            [sys.executable, "-c", make], env=common.environment(where), capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise SystemExit(made.stderr)
        model = Path(made.stdout.splitlines()[-1])
        number = arguments.steps * arguments.batch * arguments.accumulate + arguments.eval_rows
        rows = same_length_rows(model, arguments.length, number, where / "rows.jsonl")
        job = Job(arguments, where, model, rows)

        report = common.Report("training/overhead", common.wait_until_calm(arguments.calm))
        pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for number in range(arguments.pairs):
            ours = job.run()
            options = ["--checkpointing"] if ours["record"]["gradient_checkpointing"] else []
            pairs.append((ours, run_bare(where, rows, *options)))
            shown = [sorted(round(t, 3) for t in step_times(side, warm_up)) for side in pairs[-1]]
            print(f"pair {number + 1}, s a step: job {shown[0]}, bare {shown[1]}"[:2000], flush=True)
        defaults = None if arguments.no_defaults else run_bare(where, rows, "--library-defaults")

    about = {"model": size, "tokens_a_step": arguments.batch * arguments.accumulate * arguments.length}
    sides = {"job": [a for a, _ in pairs], "bare": [b for _, b in pairs]} | (
        {"defaults": [defaults]} if defaults else {}
    )
    for side, runs in sides.items():
        medians = [statistics.median(step_times(r, warm_up)) for r in runs]
        report.add("step_ms", round(1000 * statistics.median(medians), 2), side=side, **about)
        report.add("first_step_s", round(statistics.median(r["first_step_s"] for r in runs), 2), side=side, **about)
        after = [r["whole_s"] - r["trained_s"] for r in runs]
        report.add("after_last_step_s", round(statistics.median(after), 2), side=side, **about)
        report.add("whole_s", round(statistics.median(r["whole_s"] for r in runs), 2), side=side, **about)
        report.add("peak_mib", round(statistics.median(r["peak_bytes"] for r in runs) / 2**20), side=side, **about)
    ratios = [statistics.median(step_times(a, warm_up)) / statistics.median(step_times(b, warm_up)) for a, b in pairs]
    ratio = round(statistics.median(ratios), 4)
    spread = f"{min(ratios):.4f} to {max(ratios):.4f}"
    # A step of the tiny model is nearly all overhead, on both sides: it shows what is added, not the aim's ratio.
    aim: dict[str, Any] = {} if size == "tiny" else {"aim": f"<= {AIM}", "met": ratio <= AIM}
    report.add("step ratio", ratio, side="job / bare", pairs=spread, **aim, **about)
    added = [statistics.median(step_times(a, warm_up)) - statistics.median(step_times(b, warm_up)) for a, b in pairs]
    report.add("step_ms", round(1000 * statistics.median(added), 2), side="job - bare", **about)
    for name in ("first_step_s", "whole_s"):
        gap = statistics.median(a[name] - b[name] for a, b in pairs)
        report.add(name, round(gap, 2), side="job - bare", **about)
    gap = max(largest_difference(a, b) for a, b in pairs)
    report.add("largest loss difference", gap, aim=f"< {SAME:g}", met=gap < SAME, side="job - bare", **about)
    if defaults:
        gaps = [largest_difference(a, defaults) for a, _ in pairs]
        report.add("largest loss difference", max(gaps), side="job - defaults", **about)
    report.show()


if __name__ == "__main__":
    main()
