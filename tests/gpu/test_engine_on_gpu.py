"""The engine's kernels and graphs on a CUDA device against its path without them. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving import KINDS, engine_settings, make_adapter
from tests.test_engine_model import TOKENS, generate, greedy, mixed, prompt, registry
from worker.engine.engine import Engine
from worker.engine.registry import AdapterRegistry, Room
from worker.engine.request import Request
from worker.engine.runner import ModelRunner
from worker.engine.sampling import Chosen, choose
from worker.engine.scheduler import Scheduled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {kind: make_adapter(base, folder / kind, seed=i, **lora) for i, (kind, lora) in enumerate(KINDS.items())}


def runner_of(base: Path, *, kernels: bool = True, **values: Any) -> ModelRunner:
    defaults: dict[str, Any] = {"engine_max_batch": 16, "engine_cache_bytes": 1 << 28, "engine_dtype": "float32"}
    runner = ModelRunner(engine_settings(base, **{**defaults, **values}), kernels=kernels)
    assert (runner._gpu is not None) == kernels
    return runner


def outputs(runner: ModelRunner, folders: dict[str, Path], **limits: int) -> list[list[int]]:
    requests, _ = mixed(runner, folders)
    generate(runner, requests, **limits)
    return [r.output_ids for r in requests]


@pytest.mark.parametrize(
    "limits", [{}, {"max_batch": 3, "max_step_tokens": 7}, {"num_blocks": 8, "max_batch": 6}], ids=str
)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "launches"])
def test_a_mixed_batch_gets_the_tokens_of_the_path_without_kernels(
    base: Path, folders: dict[str, Path], limits: dict[str, int], graphs: bool
) -> None:
    runner = runner_of(base, engine_cuda_graphs=graphs)
    assert runner._gpu is not None
    assert runner._gpu.captured == graphs
    assert outputs(runner, folders, **limits) == outputs(runner_of(base, kernels=False), folders, **limits)


def test_bfloat16_logits_are_those_of_the_path_without_kernels_within_rounding(
    base: Path, folders: dict[str, Path]
) -> None:
    logits = []
    exact = None
    for kernels, dtype in ((True, "bfloat16"), (False, "bfloat16"), (False, "float32")):
        runner = runner_of(base, kernels=kernels, engine_dtype=dtype)
        requests, _ = mixed(runner, folders)
        rows = first_logits(runner, requests)
        if dtype == "float32":
            exact = rows
        else:
            logits.append(rows)
    assert exact is not None
    errors = [float((each - exact).norm() / exact.norm()) for each in logits]
    assert errors[0] < 1.5 * errors[1], errors


def first_logits(runner: ModelRunner, requests: list[Request]) -> torch.Tensor:
    """Logits after each prompt and, given the same token, after one more. [2 * requests, vocabulary]"""
    rows = []
    found = []
    at = 0
    for r in requests:
        blocks = -(-(len(r.prompt_ids) + 1) // runner.cache.block_size)
        r.blocks = list(range(at, at + blocks))
        at += blocks
    for turn in range(2):
        step = [
            Scheduled(r, len(r.prompt_ids), 1, True) if turn else Scheduled(r, 0, len(r.prompt_ids), True)
            for r in requests
        ]
        logits, sampling = runner.forward(step)
        found = [s.request for s in sampling]
        order = sorted(range(len(found)), key=lambda i: requests.index(found[i]))
        rows.append(logits.float()[order].cpu())
        for r in requests:
            r.output_ids.append(77)
            r.computed = len(r.prompt_ids)
    return torch.cat(rows)


def test_steps_from_tokens_on_the_device_give_the_same_tokens(base: Path, folders: dict[str, Path]) -> None:
    runner = runner_of(base)
    expected = outputs(runner, folders)
    found, _ = stream(runner, folders, lambda _engine: None)
    assert found == expected


def test_an_adapter_loaded_in_mid_stream_changes_nothing_for_the_others_and_is_exact(
    base: Path, folders: dict[str, Path]
) -> None:
    runner = runner_of(base)
    expected = outputs(runner, folders)
    late = make_adapter(base, folders["small"].parent / "late", seed=99, r=32, lora_alpha=8, target_modules=["up_proj"])
    loaded: list[Any] = []
    found, engine = stream(runner, folders, lambda engine: loaded.append(engine.adapters.load("late", late)))
    assert found == expected
    assert loaded
    request = greedy(prompt(12, 3), engine.adapters, "late")
    plain = runner_of(base, kernels=False)
    again = registry(plain)
    again.load("late", late)
    other = greedy(prompt(12, 3), again, "late")
    generate(runner, [request])
    generate(plain, [other])
    assert request.output_ids == other.output_ids


def test_an_adapter_that_left_for_the_host_comes_back_with_the_same_tokens(
    base: Path, folders: dict[str, Path]
) -> None:
    runner = runner_of(base)
    reads: list[str] = []
    found = AdapterRegistry(runner.base_info(), Room(1, host_bytes=1 << 30), runner.bank.install, on_read=reads.append)
    tokens: dict[str, list[list[int]]] = {name: [] for name in folders}
    for _ in range(3):
        for name, folder in folders.items():
            found.load(name, folder)
            request = greedy(prompt(12, 3), found, name)
            generate(runner, [request])
            tokens[name].append(request.output_ids)
    assert reads == ["disk"] * len(folders) + ["host"] * 2 * len(folders)
    for first, *later in tokens.values():
        assert later == [first, first]


def stream(runner: ModelRunner, folders: dict[str, Path], meanwhile: Any) -> tuple[list[list[int]], Engine]:
    """The requests of `mixed` through an engine with its thread; `meanwhile` is called once some have a token."""
    engine = Engine(runner, max_batch=8, max_queue=99, room=Room(16, host_bytes=1 << 30))
    for name, folder in folders.items():
        engine.adapters.load(name, folder)
    names = [None, *folders, None, *folders]
    requests = [greedy(prompt(3 + 17 * i % 90, i), engine.adapters, n) for i, n in enumerate(names)]  # type: ignore[arg-type]
    for i, r in enumerate(requests):
        r.id = str(i)

    async def go() -> list[list[int]]:
        engine.start(asyncio.get_running_loop())
        streams = engine.submit(requests, None)
        first = await streams[0].get()
        await asyncio.to_thread(meanwhile, engine)

        async def rest(i: int) -> list[int]:
            delta = first if i == 0 else await streams[i].get()
            tokens = list(delta.token_ids)
            while delta.finish_reason is None:
                delta = await streams[i].get()
                tokens += delta.token_ids
            assert delta.error is None, delta.error
            return tokens

        found = await asyncio.gather(*(rest(i) for i in range(len(streams))))
        await asyncio.to_thread(engine.stop)
        return list(found)

    return asyncio.run(go()), engine


def test_graphs_given_back_are_captured_again(base: Path, folders: dict[str, Path]) -> None:
    runner = runner_of(base)
    expected = outputs(runner, folders)
    before = torch.cuda.memory_allocated()
    runner.release_graphs()
    assert torch.cuda.memory_allocated() < before
    assert outputs(runner, folders) == expected
    assert runner._gpu is not None
    assert runner._gpu.captured


def test_an_nf4_base_gets_the_tokens_of_the_path_without_kernels(base: Path, folders: dict[str, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    found = [
        outputs(runner_of(base, kernels=k, engine_load_in_4bit=True, engine_dtype="float32"), folders)
        for k in (True, False)
    ]
    assert found[0] == found[1]


def test_a_row_whose_logits_are_no_numbers_is_told_from_the_others() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [float("nan"), 1.0, 0.0]], device="cuda")
    requests = [greedy([5], None, None) for _ in range(2)]  # type: ignore[arg-type]
    chosen: Chosen = choose(logits, requests)
    assert [s.token_id for s in chosen.read()] == [1, None]


def test_as_many_tokens_as_asked_for_come_from_every_bucket(base: Path) -> None:
    runner = runner_of(base, engine_max_batch=40)
    expected = [r.output_ids for r in run_base(runner_of(base, kernels=False, engine_max_batch=40))]
    assert [r.output_ids for r in run_base(runner)] == expected


def test_nothing_is_compiled_once_the_graphs_are_captured(base: Path, folders: dict[str, Path]) -> None:
    """A kernel that is compiled holds up every stream for a second."""
    from triton import knobs

    runner = runner_of(base)
    outputs(runner, folders)
    assert runner._gpu is not None
    runner._gpu.captured = False  # every step with a prompt runs launch by launch, in a shape of its own
    compiled: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(str(about["repr"]))
    try:
        for limits in ({}, {"max_batch": 3, "max_step_tokens": 7}, {"max_step_tokens": 33}):  # prompts beside decodes
            outputs(runner, folders, **limits)
        for n in range(1, 9):
            found = registry(runner)
            generate(runner, [greedy(prompt(n + i, i), found, None, tokens=3) for i in range(n)])
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert not compiled, compiled


def run_base(runner: ModelRunner) -> list[Request]:
    found = registry(runner)
    requests = [greedy(prompt(5 + i, i), found, None, tokens=1 + i % TOKENS) for i in range(40)]
    generate(runner, requests, max_batch=40, max_step_tokens=512)
    return requests
