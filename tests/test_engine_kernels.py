"""The GPU's kernels against plain PyTorch: on a CUDA device as they are, else interpreted on the CPU. Skipped without Triton."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton")
pytest.importorskip("numpy")

from tests.serving import engine_settings, peft_greedy  # noqa: E402
from tests.test_engine_model import adapters, generate, mixed  # noqa: E402, F401
from worker.engine.gpu import plan  # noqa: E402
from worker.engine.gpu.attention import chunk_attention, decode_attention  # noqa: E402
from worker.engine.gpu.elementwise import add_norm, rotate_and_store, swiglu  # noqa: E402
from worker.engine.gpu.lora import lora_update, starts_early  # noqa: E402
from worker.engine.gpu.slots import AdapterSlots  # noqa: E402
from worker.engine.lora import AdapterWeights, LoraPair  # noqa: E402
from worker.engine.runner import ModelRunner  # noqa: E402

PAGE = 16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def ints(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Paged:
    """Keys and values of sequences of the given lengths, whose pages lie in any order."""

    def __init__(self, lengths: list[int], kv_heads: int, width: int, value_width: int) -> None:
        counts = [-(-n // PAGE) for n in lengths]
        pages = torch.randperm(sum(counts) + 2).tolist()
        self.tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
        self.rows = []
        for i, (n, count) in enumerate(zip(lengths, counts, strict=True)):
            mine, pages = pages[:count], pages[count:]
            self.tables[i, :count] = torch.tensor(mine, dtype=torch.int32)
            self.rows.append(torch.tensor([mine[at // PAGE] * PAGE + at % PAGE for at in range(n)], dtype=torch.int64))
        slots = (sum(counts) + 2) * PAGE + 1
        self.keys = torch.randn(slots, kv_heads, width, device=DEVICE)
        self.values = torch.randn(slots, kv_heads, value_width, device=DEVICE)
        self.tables = self.tables.to(DEVICE)

    def attend(self, i: int, q: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        """q [queries, heads, width], the last ones of sequence i. Returns [queries, heads * value width]."""
        k, v = (t[self.rows[i].to(DEVICE)].transpose(0, 1)[None] for t in (self.keys, self.values))
        n, m = k.shape[2], q.shape[0]
        at = torch.arange(n - m, n, device=DEVICE)[:, None]
        seen = torch.arange(n, device=DEVICE)[None, :] <= at
        if window is not None:
            seen &= torch.arange(n, device=DEVICE)[None, :] > at - window
        out = scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(m, -1)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (6, 2, 24), (3, 3, 32)])
def test_a_decode_attends_to_its_whole_sequence(
    heads: int, kv_heads: int, width: int, splits: int, window: int | None
) -> None:
    lengths = [1, 16, 45, 150]
    paged = Paged(lengths, kv_heads, width, width)
    q = torch.randn(len(lengths) + 1, heads * width + 8, device=DEVICE)
    out = torch.full((len(lengths) + 1, heads * width), 9.0, device=DEVICE)
    tables = torch.cat([paged.tables, torch.zeros_like(paged.tables[:1])])
    decode_attention(
        q, paged.keys, paged.values, out, tables, ints([*lengths, 0]),
        heads=heads, scale=0.3, window=window, page=PAGE, splits=splits,
    )  # fmt: skip
    for i in range(len(lengths)):
        mine = q[i, : heads * width].reshape(1, heads, width)
        close(out[i : i + 1], paged.attend(i, mine, 0.3, window))
    assert not out[-1].any()  # a padding row


@pytest.mark.parametrize("window", [None, 7, 100])
def test_a_chunk_attends_to_what_is_before_it_and_to_itself(window: int | None) -> None:
    heads, kv_heads, width = 4, 2, 16
    lengths, chunks = [70, 33, 150], [70, 5, 100]  # a whole prompt, a short last piece, a long one in several tiles
    paged = Paged(lengths, kv_heads, width, width)
    q = torch.randn(sum(chunks), heads * width, device=DEVICE)
    out = torch.empty_like(q)
    first = [0, 70, 75]
    tiles = plan.query_tiles([(f, c, n - c) for f, c, n in zip(first, chunks, lengths, strict=True)], 64)
    chunk_attention(
        q, paged.keys, paged.values, out, paged.tables, ints(tiles), heads=heads, scale=0.3, window=window, page=PAGE
    )
    for i, (f, c) in enumerate(zip(first, chunks, strict=True)):
        close(out[f : f + c], paged.attend(i, q[f : f + c].reshape(c, heads, width), 0.3, window))


@pytest.mark.parametrize("height", [plan.DECODE_TILE, plan.MIXED_TILE])
@pytest.mark.parametrize(("widths", "inside"), [((48,), 320), ((48, 16, 16), 320), ((160, 160), 320), ((48, 16), 2100)])
def test_rows_get_the_update_of_their_adapter_alone(widths: tuple[int, ...], inside: int, height: int) -> None:
    ranks = [4, 200, 64, 0]
    adapters_ = []
    sites = [f"site{i}" for i in range(len(widths) + 2)]
    for i, rank in enumerate(ranks):
        weights = AdapterWeights()
        for site, width in zip(sites[1:-1], widths, strict=True):
            if rank and not (i == 2 and site == "site1"):  # the third adapter leaves a site out
                a = torch.randn(rank, inside, device=DEVICE) / inside**0.5
                b = torch.randn(rank, width, device=DEVICE).t() / rank**0.5
                weights.pairs[site] = LoraPair(a, b, 0.5 + i)
        adapters_.append(weights)
    table = AdapterSlots(sites, set(), 5, torch.float32, torch.device(DEVICE))
    slots = table.assign(list(adapters_))
    owners = [-1] * 3 + [slots[adapters_[0]]] * 20 + [slots[adapters_[1]]] * 70 + [slots[adapters_[2]]]
    owners += [slots[adapters_[3]]] * 2 + [-1]
    x = torch.randn(len(owners), inside, device=DEVICE)
    tiles = [*plan.lora_tiles(owners, [1] * len(owners), height), (-1, -1, -1)]
    update = lora_update(
        x, ints(tiles), table.addresses, table.ranks, table.scalings, site=1, widths=widths, tile_rows=height
    )
    by_slot = {slot: weights for weights, slot in slots.items()}
    for row, owner in enumerate(owners):
        if owner < 0:
            continue
        parts = []
        for site, width in zip(sites[1:-1], widths, strict=True):
            pair = by_slot[owner].pairs.get(site)
            parts.append(x[row] @ pair.a.t() @ pair.b.t() * pair.scaling if pair else x.new_zeros(width))
        close(update[row], torch.cat(parts))


@pytest.mark.parametrize(
    ("capability", "cuda", "early"),
    [((9, 0), "13.0", True), ((12, 0), "13.0", True), ((8, 9), "13.0", False), ((9, 4), None, False)],
)
def test_launches_wait_within_only_on_a_gpu_that_can(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str | None, early: bool
) -> None:
    """On an older one the kernel does not compile: it is an RTX 4090's 8.9, and ROCm's numbers mean something else."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert starts_early.__wrapped__(torch.device("cuda", 0)) is early
    assert not starts_early.__wrapped__(torch.device("cpu"))


def test_a_slot_is_kept_while_it_is_used_and_then_goes_to_another_adapter() -> None:
    def weights(rank: int) -> AdapterWeights:
        a, b = torch.zeros(rank, 8, device=DEVICE), torch.zeros(8, rank, device=DEVICE)
        return AdapterWeights({"site": LoraPair(a, b, 1.0)})

    table = AdapterSlots(["site"], set(), 2, torch.float32, torch.device(DEVICE))
    one, two, three = weights(1), weights(2), weights(3)
    assert table.assign([None, one, two, one]) == {one: 0, two: 1}
    assert table.assign([one]) == {one: 0}
    assert table.assign([one, three]) == {one: 0, three: 1}  # the least recently used one left
    assert table.ranks[:, 0].tolist() == [1, 3]
    assert table.addresses[1, 0, 0].item() == three.pairs["site"].a.data_ptr()
    del one
    assert table.assign([two, three]) == {two: 0, three: 1}  # nobody has the first any more
    table.forget()
    assert table.assign([three]) == {three: 0}


@pytest.mark.parametrize("with_update", [False, True])
def test_residual_and_norm(with_update: bool) -> None:
    residual, out, update = (torch.randn(4, 40, device=DEVICE) for _ in range(3))
    weight = torch.randn(40, device=DEVICE)
    owners = [0, -1, 2, -1]
    wanted = residual + out
    if with_update:
        wanted[[0, 2]] += update[[0, 2]]
        update[[1, 3]] = float("nan")  # never read
    normed = add_norm(residual, out, update if with_update else None, ints(owners), weight, 1e-5)
    close(residual, wanted)
    close(normed, wanted * torch.rsqrt(wanted.pow(2).mean(-1, keepdim=True) + 1e-5) * weight)


@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_are_rotated_and_keys_and_values_stored(normed: bool) -> None:
    heads, kv, width, rows = 3, 1, 12, 3
    qkv, update = (torch.randn(rows, (heads + 2 * kv) * width, device=DEVICE) for _ in range(2))
    keys, values = (torch.zeros(8, kv, width, device=DEVICE) for _ in range(2))
    cos, sin = (torch.randn(9, width, device=DEVICE) for _ in range(2))
    norms = (torch.randn(width, device=DEVICE), torch.randn(width, device=DEVICE), 1e-6) if normed else None
    owners, positions, slots = [0, -1, 0], [4, 8, 0], [5, -1, 2]
    whole = qkv.clone()
    whole[[0, 2]] += update[[0, 2]]
    q, k, v = whole.view(rows, -1, width).split([heads, kv, kv], dim=1)

    def rotated(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
        c, s = cos[positions][:, None], sin[positions][:, None]
        first, second = x.chunk(2, dim=-1)
        return x * c + torch.cat([-second, first], dim=-1) * s

    wanted_q, wanted_k = rotated(q, norms[0] if norms else None), rotated(k, norms[1] if norms else None)
    rotate_and_store(qkv, update, ints(owners), ints(positions), ints(slots), (cos, sin), keys, values, norms, heads)
    close(qkv[:, : heads * width], wanted_q.reshape(rows, -1))
    for row, slot in ((0, 5), (2, 2)):
        close(keys[slot], wanted_k[row])
        close(values[slot], v[row])
    others = [0, 1, 3, 4, 6, 7]
    assert not keys[others].any()
    assert not values[others].any()


def test_swiglu() -> None:
    gate_up, update = (torch.randn(3, 80, device=DEVICE) for _ in range(2))
    owners = [-1, 1, -1]
    whole = gate_up.clone()
    whole[1] += update[1]
    gate, up = whole.chunk(2, dim=-1)
    close(swiglu(gate_up, update, ints(owners)), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("padded", [False, True])
def test_a_mixed_batch_through_the_kernels_equals_peft_alone(
    tiny_base: Path,
    adapters: dict[str, Path],  # noqa: F811
    padded: bool,
) -> None:
    runner = ModelRunner(engine_settings(tiny_base, engine_cache_bytes=1 << 24, engine_dtype="float32"), kernels=True)
    assert runner._gpu is not None
    if DEVICE == "cpu":
        runner._gpu.captured = (
            padded  # steps with prompts go through the graphs' buffers; without a GPU they are launched
        )
    requests, _ = mixed(runner, adapters)
    for r in requests:
        r.params = type(r.params)(max_tokens=3, temperature=0.0)
    generate(runner, requests[:6], max_batch=3, max_step_tokens=33)
    for r in requests[:6]:
        assert r.output_ids == peft_greedy(tiny_base, adapters.get(r.key), r.prompt_ids, 3), r.key


def test_steps_of_every_shape_give_the_kernels_arrays_at_multiples_of_16_bytes(
    tiny_base: Path,
    adapters: dict[str, Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton compiles a kernel again, for a second or so, when a pointer is aligned otherwise than before."""
    seen: list[tuple[int, int]] = []

    def recorded(q: torch.Tensor, *tensors: torch.Tensor, **how: Any) -> None:
        tables, tiles = tensors[3:5]
        seen.append((tables.data_ptr() % 16, tiles.data_ptr() % 16))
        chunk_attention(q, *tensors, **how)

    monkeypatch.setattr("worker.engine.gpu.decoder.chunk_attention", recorded)
    runner = ModelRunner(engine_settings(tiny_base, engine_cache_bytes=1 << 24, engine_dtype="float32"), kernels=True)
    assert runner._gpu is not None
    runner._gpu.captured = False
    requests, _ = mixed(runner, adapters)
    for r in requests:
        r.params = type(r.params)(max_tokens=3, temperature=0.0)
    generate(runner, requests[:6], max_batch=3, max_step_tokens=33)
    assert set(seen) == {(0, 0)}
