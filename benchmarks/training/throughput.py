#!/usr/bin/env python3
"""A job's tokens per second and memory against the script it replaces, on the same rows in the same steps.

The script is bare.py with its libraries' defaults: Unsloth's notebook recipe, which pads rows to the longest of a batch.
`job` is the worker's own task on a migrated SQLite database. Rows are full windows (`--data windows`), or of lengths spread
like instruction data's (`--data rows`: mean about 270 tokens, some longer than a thousand). Tokens are the rows' own,
padding left out. Weights are random, in a Llama's shape: neither speed nor memory depends on them.

    python benchmarks/training/throughput.py --size 1b --kind ift --data rows --accumulate 4
    python benchmarks/training/throughput.py --size 8b --kind cpt --data windows --steps 10
    python benchmarks/training/throughput.py --size tiny            # a CPU: to see that it runs
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common
from benchmarks.training import clock, overhead

GIB = 2**30


def rows_of_lengths(model: Path, lengths: list[int], path: Path) -> Path:
    """A .jsonl of {text, question, answer}, text being both, of the corpus; each of about so many tokens.

    Question and answer are cut where tokenising them apart gives the same tokens as tokenising them together.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = overhead.corpus(16_000_000)
    spans = tokenizer(text[: 12 * sum(lengths)], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [a for a, _ in spans["offset_mapping"]]
    rnd, rows = random.Random(0), []
    for length in lengths:
        while True:
            at = rnd.randrange(len(starts) - length - 1)
            parts = [text[starts[a] : starts[b]] for a, b in ((at, at + length // 4), (at + length // 4, at + length))]
            together = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
            apart = [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
            if together == apart and parts[0].strip() and parts[1].strip():
                break
        rows.append({"text": "".join(parts), "question": parts[0], "answer": parts[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lengths_of(number: int, window: int) -> list[int]:
    """Tokens of each row, spread like instruction data's."""
    rnd = random.Random(0)
    return [min(int(window * 0.61), int(50 + rnd.expovariate(1 / 225))) for _ in range(number)]


class Job(overhead.Job):
    """A job of either kind, packed as asked."""

    def spec(self) -> dict[str, Any]:
        spec = overhead.make_spec(self.arguments, self.model, self.file_id)
        spec["training"]["optim"] = self.arguments.optim
        spec["kind"] = self.arguments.kind
        spec["model"]["load_in_4bit"] = not self.arguments.sixteen_bit and self.arguments.size != "tiny"
        if self.arguments.kind == "ift":
            spec["dataset"]["template"] = {"prompt": "{question}", "response": "{answer}"}
        for field, asked in (
            ("packing", self.arguments.packing),
            ("gradient_checkpointing", self.arguments.checkpointing),
        ):
            spec["training"][field] = "auto" if asked == "auto" else asked == "true"
        return spec


def speed(seen: dict[str, Any], tokens_a_step: float, warm_up: int) -> float:
    """Tokens per second over the steps after the first `warm_up`: of the median step with full windows, else of all."""
    times = [b - a for a, b in pairwise(seen["ends"][warm_up - 1 :])]
    return tokens_a_step / statistics.mean(times)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=["tiny", "1b", "8b"], default="tiny")
    parser.add_argument("--kind", choices=["cpt", "ift"], default="ift")
    parser.add_argument("--data", choices=["windows", "rows"], default="rows")
    parser.add_argument("--packing", choices=["auto", "true", "false"], default="auto")
    parser.add_argument("--checkpointing", choices=["auto", "true", "false"], default="auto", help="of the job")
    parser.add_argument("--sixteen-bit", action="store_true", help="base in bfloat16 instead of NF4")
    parser.add_argument("--no-embeddings", action="store_true", help="LoRA only")
    parser.add_argument("--optim", default="adamw_8bit", help="of both")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=4, help="steps not counted (compiling, first allocations)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="the window, in tokens")
    parser.add_argument("--eval-rows", type=int, default=8)
    parser.add_argument("--models", type=Path, help="folder in which the model is kept for the next run")
    parser.add_argument(
        "--float32",
        action="store_true",
        help="also run the script with its trained weights in float32, for its losses; where the job's --checkpointing is "
        "false, once more without checkpointing",
    )
    parser.add_argument(
        "--quick", action="store_true", help="end both after the last step: nothing is saved or read back"
    )
    parser.add_argument("--only-job", action="store_true", help="leave the script out")
    arguments = parser.parse_args()
    arguments.gpu, arguments.logging_steps = arguments.size != "tiny", 1
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.quick:
        os.environ[clock.QUICK] = "1"

    with common.folder() as where, common.database("sqlite", where):
        models = arguments.models or where
        model = models / arguments.size
        if not model.exists():
            make = (
                f"from benchmarks.training.overhead import make_model; make_model({arguments.size!r}, {str(models)!r})"
            )
            subprocess.run([sys.executable, "-c", make], env=common.environment(where), check=True)
        number = arguments.steps * arguments.batch * arguments.accumulate + arguments.eval_rows
        rows_a_step = arguments.batch * arguments.accumulate
        tokens = float(arguments.length * rows_a_step)
        if arguments.data == "windows":
            rows = overhead.same_length_rows(model, arguments.length, number, where / "rows.jsonl")
        else:
            lengths = lengths_of(number, arguments.length)
            rows = rows_of_lengths(model, lengths, where / "rows.jsonl")
            tokens = rows_a_step * (statistics.mean(lengths) + 1)  # the end token
        job = Job(arguments, where, model, rows)
        report = common.Report("training/throughput", common.wait_until_calm(arguments.calm))
        runs: dict[str, list[dict[str, Any]]] = {"job": [], "script": []}
        for _ in range(arguments.pairs):
            runs["job"].append(job.run())
            if not arguments.only_job:
                runs["script"].append(overhead.run_bare(where, rows, "--library-defaults"))
        if arguments.float32:
            options = ["--library-defaults", "--float32"]
            runs["script, float32"] = [overhead.run_bare(where, rows, *options)]
            if arguments.checkpointing == "false":
                options.append("--keep-activations")
                runs["script, float32, activations kept"] = [overhead.run_bare(where, rows, *options)]

    about = {"size": arguments.size, "kind": arguments.kind, "data": arguments.data}
    for side, seen in runs.items():
        if not seen:
            continue
        rates = [speed(each, tokens, arguments.warm_up) for each in seen]
        report.add("tokens_per_second", round(statistics.median(rates)), side=side, **about)
        report.add("peak_gib", round(max(each["peak_bytes"] for each in seen) / GIB, 2), side=side, **about)
        report.add(
            "first_step_s", round(statistics.median(each["first_step_s"] for each in seen), 1), side=side, **about
        )
        print(side, "losses", [round(loss, 4) for loss in seen[0]["losses"].values()])
        print(side, "gradient norms", [round(norm, 3) for norm in seen[0]["grad_norms"].values()])
    report.add("tokens_a_step", round(tokens), side="job", **about)
    record = runs["job"][0]["record"]
    for name in ("packing", "gradient_checkpointing", "passes", "trainable_parameters"):
        print(name, record.get(name))
    if runs["script"]:
        ratios = [
            speed(a, tokens, arguments.warm_up) / speed(b, tokens, arguments.warm_up)
            for a, b in zip(runs["job"], runs["script"], strict=True)
        ]
        report.add("speed ratio", round(statistics.median(ratios), 3), side="job / script", **about)
    for side in [side for side in runs if side != "job" and runs[side]]:
        gap = max(overhead.largest_difference(a, b) for a, b in zip(runs["job"], runs[side], strict=False))
        report.add("largest loss difference", round(gap, 5), side=f"job - {side}", **about)
    report.show()


if __name__ == "__main__":
    main()
