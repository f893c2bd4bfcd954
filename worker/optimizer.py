"""What the optimiser trains at which rate: asserted before the first step, and put into the run's record."""

from __future__ import annotations

from types import MethodType
from typing import Any

from service.errors import JobFailure
from service.specs import CptSpec, IftSpec
from worker.model import EMBEDDINGS
from worker.split_weights import DTYPE


def page_states(optimizer: Any) -> None:
    """Put an optimiser's states back into unified memory where it is a paged one of bitsandbytes'.

    Those that were loaded from a checkpoint lie on the GPU, whose memory the run had without them. Call after loading.
    """
    import torch

    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not getattr(inner, "is_paged", False) or not torch.cuda.is_available():
        return
    from bitsandbytes.functional import get_paged

    for parameter, state in inner.state.items():
        for name, values in state.items():
            # As bitsandbytes makes them: what is small stays on the GPU (Optimizer8bit.get_state_buffer).
            if name in ("state1", "state2") and values.numel() >= 1e5 and not getattr(values, "is_paged", False):
                paged = get_paged(*values.shape, dtype=values.dtype, device=parameter.device)
                paged.copy_(values)
                state[name] = paged
                inner.page_mng.paged_tensors.append(paged)
    torch.cuda.empty_cache()


def wait_less(optimizer: Any) -> None:
    """Keep bitsandbytes' optimisers from waiting for the GPU after each of the hundreds of tensors that a step updates.

    In one CUDA stream the order is kept without it, and what is launched next need not come late. States in unified memory
    are waited for once, at the end of a step. Other optimisers stay as they are.
    """
    import torch

    if not type(optimizer).__module__.startswith("bitsandbytes."):
        return
    from bitsandbytes.optim import optimizer as library

    step = optimizer.step

    def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        wait = library.sync_gpu
        library.sync_gpu = lambda tensor: None
        try:
            return step(*args, **kwargs)
        finally:
            library.sync_gpu = wait
            if self.is_paged and torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()

    optimizer.step = MethodType(without, optimizer)


def check_optimizer(trainer: Any, spec: CptSpec | IftSpec) -> list[dict[str, Any]]:
    """Assert what each optimiser group holds and at which rate; mark the embeddings' groups; return what to record.

    Raises JobFailure if embed_tokens or lm_head would train at the wrong rate or not at all, or if a trainable
    parameter is in no group.
    """
    trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters() if p.requires_grad}
    seen: set[int] = set()
    groups = []
    for group in trainer.optimizer.param_groups:
        if not group["params"]:
            continue  # transformers keeps an empty group for weights without decay
        members = [names.get(id(p)) for p in group["params"]]
        seen |= {id(p) for p in group["params"]}
        embeddings = {e for e in EMBEDDINGS for n in members if n and f".{e}.modules_to_save." in n}
        lora = [n for n in members if n and ".lora_" in n]
        if None in members or (embeddings and lora):
            raise JobFailure(
                "internal_error", "an optimiser group mixes embeddings and LoRA matrices, or holds a frozen weight"
            )
        want = spec.training.embedding_learning_rate if embeddings else spec.training.learning_rate
        if group["lr"] != want:
            raise JobFailure("internal_error", f"an optimiser group has learning rate {group['lr']}, not {want}")
        split = trainer.split and group["params"][0] in trainer.split.low
        group["lorry_embeddings"] = bool(embeddings)
        groups.append(
            {
                "learning_rate": want,
                "weight_decay": group["weight_decay"],
                "tensors": len(members),
                "parameters": sum(p.numel() for p in group["params"]),
                "modules": sorted(embeddings) or sorted({n.split(".lora_")[0].rsplit(".", 1)[-1] for n in lora}),
                "dtype": DTYPE if split else str(group["params"][0].dtype).removeprefix("torch."),
            }
        )
    found = {m for g in groups for m in g["modules"]}
    if spec.lora.train_embeddings and not set(EMBEDDINGS) <= found:
        raise JobFailure("internal_error", f"train_embeddings: only {sorted(found & set(EMBEDDINGS))} would be trained")
    if seen != set(names):
        raise JobFailure("internal_error", "a trainable weight is in no optimiser group")
    return groups
