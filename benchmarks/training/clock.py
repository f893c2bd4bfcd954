"""The clock both sides carry: a callback that notes when steps end and what was logged, written as JSON at the end."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers import trainer as transformers_trainer

OUT, STARTED = "BENCH_OUT", "BENCH_STARTED"  # where to write; when the process was started, in Unix seconds
QUICK = "BENCH_QUICK"  # end the process after the last step


class Clock(TrainerCallback):
    """Step ends, losses and the way to the first step. Its hooks run before every other callback's."""

    def __init__(self) -> None:
        self.out, self.started = Path(os.environ[OUT]), float(os.environ[STARTED])
        self.seen: dict[str, Any] = {"begins": [], "ends": [], "losses": {}, "eval_losses": {}, "grad_norms": {}}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.setdefault("first_step_s", time.time() - self.started)
        self.seen["begins"].append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seen["ends"].append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for key, name in (("loss", "losses"), ("eval_loss", "eval_losses"), ("grad_norm", "grad_norms")):
            if key in (logs or {}):
                self.seen[name][state.global_step] = logs[key]

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen["trained_s"] = time.time() - self.started
        if os.environ.get(QUICK):  # the steps are all that is measured: nothing is saved or read back
            self.write()
            os._exit(0)

    def write(self) -> None:
        import torch

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.seen["peak_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak
        self.out.write_text(json.dumps(self.seen))


def install() -> Clock:
    """Add a Clock to every Trainer made from now on. Call after `import unsloth`."""
    clock = Clock()
    transformers_trainer.DEFAULT_CALLBACKS.insert(0, clock)
    return clock
