"""The CPU's kernels: against torch, compiled by whoever comes first, and left out where they cannot be had."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from tests.serving import engine_settings, make_adapter, peft_greedy
from tests.test_engine_model import TOKENS, generate, greedy, mixed, prompt, registry
from worker.engine.cpu import library
from worker.engine.cpu.linear import CpuLinear
from worker.engine.lora import AdapterWeights, LoraPair, Segment
from worker.engine.runner import ModelRunner

LORA: dict[str, Any] = {
    "r": 5,
    "lora_alpha": 10,
    "target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"],
}


@pytest.fixture(scope="module")
def kernel() -> CpuLinear:
    try:
        return CpuLinear()
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inner", "out"), [(64, 48), (67, 37), (7, 5), (8, 1), (576, 100)])
def test_products_equal_torch_s(kernel: CpuLinear, dtype: torch.dtype, inner: int, out: int) -> None:
    torch.manual_seed(0)
    for bias in (False, True):
        module = nn.Linear(inner, out, bias=bias)
        module.weight = nn.Parameter(torch.randn(out, inner).to(dtype), requires_grad=False)
        for rows in (1, 2, 3, 4, 5, 8, 11, 63, 64, 65, 128, 130):
            x = torch.randn(1, rows, inner)
            with torch.inference_mode():
                expected = linear(x.double(), module.weight.double(), module.bias.double() if bias else None)
                torch.testing.assert_close(kernel(module, x).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [[1], [1, 1], [1, 4, 2, 1], [70, 3]])
def test_each_segment_gets_its_update(kernel: CpuLinear, counts: list[int]) -> None:
    torch.manual_seed(0)
    module, rows = nn.Linear(67, 43, bias=False), sum(counts) + 1  # the last row is the base's
    adapters = [AdapterWeights(bias={"site": torch.randn(43)} if i == 1 else {}) for i in range(len(counts))]
    for i, adapter in enumerate(adapters):
        if i != 2:  # one that does not change this site
            rank = 3 + 5 * i
            b = torch.randn(43, rank).t().contiguous().t()
            adapter.pairs["site"] = LoraPair(torch.randn(rank, 67), b, 0.5 + i)
    found, row = [], 0
    for adapter, count in zip(adapters, counts, strict=True):
        found.append(Segment(row, row + count, adapter))
        row += count
    x = torch.randn(1, rows, 67)
    with torch.inference_mode():
        expected = linear(x, module.weight)
        for s in found:
            part = x[:, s.start : s.stop]
            if (p := s.adapter.pairs.get("site")) is not None:
                expected[:, s.start : s.stop] += linear(linear(part, p.a), p.b) * p.scaling
            expected[:, s.start : s.stop] += s.adapter.bias.get("site", torch.zeros(43))
        for _ in range(2):  # the second time from what was kept of the first
            torch.testing.assert_close(kernel.updated(module, x, "site", found), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_of_16_bits_is_held_so_and_computed_exactly(
    kernel: CpuLinear, tiny_base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", **LORA, modules_to_save=["embed_tokens", "lm_head"])
    runner = ModelRunner(engine_settings(base))
    assert {m.weight.dtype for m in runner.model.modules() if isinstance(m, nn.Linear)} == {dtype}
    requests, _ = mixed(runner, {"adapter": adapter})
    generate(runner, requests)
    for r in requests:  # float32 holds these weights as they are
        assert r.output_ids == peft_greedy(base, adapter if r.key else None, r.prompt_ids, TOKENS)
    wide = ModelRunner(engine_settings(base, engine_dtype="float32"))
    assert {p.dtype for p in wide.model.parameters()} == {torch.float32}


def test_decode_steps_are_one_call_unless_an_adapter_has_biases(kernel: CpuLinear, tiny_base: Path) -> None:
    runner = ModelRunner(engine_settings(tiny_base))
    assert runner._cpu is not None
    calls = []
    run = runner._cpu.run
    runner._cpu.run = lambda step: calls.append(len(step)) or run(step)  # type: ignore[method-assign,func-returns-value]
    r = greedy(prompt(20, 0), registry(runner), None)
    generate(runner, [r])
    assert calls == [1] * (TOKENS - 1)
    runner.release_graphs()
    again = greedy(prompt(20, 0), registry(runner), None)
    again.adapter = AdapterWeights(bias={"nowhere": torch.zeros(1)})
    generate(runner, [again])
    assert len(calls) == TOKENS - 1
    assert again.output_ids == r.output_ids


def test_a_sequence_of_any_length_goes_on_as_module_by_module(kernel: CpuLinear, tiny_base: Path) -> None:
    runner = ModelRunner(engine_settings(tiny_base))
    ids = [prompt(n, n) for n in (2, 15, 16, 17, 140)]
    fast = [greedy(i, registry(runner), None, 40) for i in ids]
    generate(runner, fast)
    runner._cpu = None
    slow = [greedy(i, registry(runner), None, 40) for i in ids]
    generate(runner, slow)
    assert [r.output_ids for r in fast] == [r.output_ids for r in slow]


def test_without_a_compiler_torch_computes(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    library.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "lorry.engine"):
            runner = ModelRunner(engine_settings(tiny_base))
    finally:
        library.load.cache_clear()
    assert "there is no C compiler" in caplog.text
    assert runner._cpu is None
    assert runner.dtype == torch.float32
    r = greedy(prompt(20, 0), registry(runner), None)
    generate(runner, [r])
    assert r.output_ids == peft_greedy(tiny_base, None, r.prompt_ids, TOKENS)


LOAD = "from worker.engine.cpu.linear import CpuLinear; CpuLinear()"


def test_a_damaged_library_is_made_again(kernel: CpuLinear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subprocess.run([sys.executable, "-c", LOAD], check=True)
    (kept,) = (tmp_path / "lorry").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:5000], whole[:9000] + b"x" + whole[9001:]):
        kept.write_bytes(damaged)
        subprocess.run([sys.executable, "-c", LOAD], check=True)
        assert library._whole(kept)


def test_processes_that_come_at_once_all_get_it(
    kernel: CpuLinear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    processes = [subprocess.Popen([sys.executable, "-c", LOAD]) for _ in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    assert len(list((tmp_path / "lorry").iterdir())) == 1


def test_where_nothing_can_be_kept_it_is_compiled_each_time(
    kernel: CpuLinear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(library, "_whole", refused)
    library.load.cache_clear()
    try:
        CpuLinear()
    finally:
        library.load.cache_clear()
