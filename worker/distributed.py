"""Several processes that train together, over torch.distributed: NCCL between GPUs, gloo between CPUs and for agreements.

Why there is no DistributedDataParallel: docs/decisions/0018-several-gpus.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from service.errors import JobFailure
from worker.ranks import Ranks

# A dead rank is seen by the launcher at once; a living one may be long about storing a checkpoint.
PATIENCE = timedelta(days=1)
BUCKET = 64 * 2**20  # bytes that are summed at once; larger tensors go alone, uncopied


class Group(Ranks):
    """This process as one of several. `host` and `port` are where torchrun's store listens."""

    def __init__(self, rank: int, size: int, host: str, port: int) -> None:
        self.rank, self.size = rank, size
        self._at = host, port

    def join(self, weights: Iterable[Any], same: str) -> None:
        # Not before: while a group exists, the libraries that load models take this for a distributed load.
        store = dist.TCPStore(*self._at, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=10))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("lorry", store),
            rank=self.rank,
            world_size=self.size,
            timeout=PATIENCE,
        )
        if len(set(self.gather(same))) > 1:
            raise JobFailure("invalid_data", "dataset: the processes of the job did not read the same rows")
        for weight in weights:
            dist.broadcast(weight, 0)

    def leave(self) -> None:
        self.wait()
        dist.destroy_process_group()

    def wait(self) -> None:
        self.total(0.0)  # not barrier(), which would be NCCL's, and keep a GPU busy

    def of_first(self, value: int) -> int:
        tensor = torch.tensor(value)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def anyone(self, flag: bool) -> bool:
        return bool(self._reduced([flag], dist.ReduceOp.MAX)[0])

    def least(self, values: list[int]) -> list[int]:
        return [int(v) for v in self._reduced(values, dist.ReduceOp.MIN)]

    def total(self, value: float) -> float:
        return self._reduced([value], dist.ReduceOp.SUM)[0]

    def add_up(self, tensors: list[Any]) -> None:
        for bucket in buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def own_randomness(self, seed: int) -> AbstractContextManager[Any]:
        return _seeded(seed * self.size + self.rank)

    def _reduced(self, values: list[Any], op: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)  # on the host: what is agreed on waits for no GPU
        dist.all_reduce(tensor, op)
        return [float(v) for v in tensor]


def buckets(tensors: list[torch.Tensor], size: int = BUCKET) -> Iterator[list[torch.Tensor]]:
    """The tensors in order, in groups of one kind and at most `size` bytes, those larger alone."""
    held: list[torch.Tensor] = []
    room = 0
    for tensor in tensors:
        if held and (tensor.nbytes > room or (tensor.dtype, tensor.device) != (held[0].dtype, held[0].device)):
            yield held
            held = []
        room = (room if held else size) - tensor.nbytes
        held.append(tensor)
    if held:
        yield held


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
