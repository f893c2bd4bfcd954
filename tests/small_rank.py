"""worker.rank with a fault of its own, for tests: rank 1's memory holds 70 tokens a pass, or rank 1 ends itself."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from worker import rank


def main() -> None:
    fault = os.environ.get("TEST_RANK_FAULT", "")
    if os.environ["RANK"] == "1":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import unsloth  # noqa: F401
        from transformers import Trainer

        compute_loss, calls = Trainer.compute_loss, 0

        def faulty(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if fault == "memory" and inputs["input_ids"].numel() > 70:
                raise torch.OutOfMemoryError("CUDA out of memory at rank 1")
            if fault == "killed" and calls == 3:
                print("the last thing that rank 1 said", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "error" and calls == 3:
                raise ValueError("rank 1 has had enough")
            return compute_loss(self, model, inputs, *args, **kwargs)

        Trainer.compute_loss = faulty  # type: ignore[method-assign]
    rank.main()


if __name__ == "__main__":
    main()
