"""Which adapters the engine keeps: a budget in bytes, pinned ones, and those that left for the host's memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from service.errors import Conflict, NotFound, Unavailable
from tests import test_engine_model
from tests.serving import engine_settings
from worker.devices import free_host_memory
from worker.engine import registry as module
from worker.engine.lora import AdapterWeights, LoraPair
from worker.engine.registry import AdapterRegistry, Room, room_for
from worker.engine.runner import ModelRunner
from worker.engine.sleep import STEP_BYTES
from worker.engine.transfer import mapped, packed

adapters = test_engine_model.adapters


@pytest.fixture(scope="module")
def runner(tiny_base: Path) -> ModelRunner:
    return ModelRunner(engine_settings(tiny_base))


@pytest.fixture
def reads() -> list[str]:
    """From where each adapter was read."""
    return []


def registry(runner: ModelRunner, reads: list[str], room: Room) -> AdapterRegistry:
    return AdapterRegistry(runner.base_info(), room, runner.bank.install, on_read=reads.append)


def names(found: AdapterRegistry) -> list[str]:
    return [a.name for a in found.held()]


def test_adapters_beyond_the_bytes_leave_the_least_recently_used_first(
    runner: ModelRunner, reads: list[str], adapters: dict[str, Path]
) -> None:
    sizes = {n: registry(runner, reads, Room(1)).load(n, adapters[n]).bytes for n in ("small", "patterns", "full")}
    assert sizes["small"] < sizes["full"]
    found = registry(runner, reads, Room(16, sizes["full"] + sizes["patterns"]))
    for name in ("small", "patterns", "full"):
        found.load(name, adapters[name])
    assert names(found) == ["patterns", "full"]
    found.get("small")
    assert sum(a.bytes for a in found.held()) <= found.room.bytes
    assert "patterns" not in names(found)


def test_a_pinned_adapter_stays_until_it_is_unpinned(
    runner: ModelRunner, reads: list[str], adapters: dict[str, Path]
) -> None:
    found = registry(runner, reads, Room(2))
    found.load("small", adapters["small"], pinned=True)
    for name in ("patterns", "full", "patterns"):
        found.load(name, adapters[name])
    assert names(found) == ["small", "patterns"]
    found.load("small", adapters["small"])  # says nothing of pins
    assert found.pinned("small")
    found.load("small", adapters["small"], pinned=False)
    for name in ("patterns", "full"):
        found.load(name, adapters[name])
    assert names(found) == ["patterns", "full"]


def test_no_room_is_told_and_nothing_leaves_for_it(
    runner: ModelRunner, reads: list[str], adapters: dict[str, Path]
) -> None:
    found = registry(runner, reads, Room(2))
    found.load("small", adapters["small"], pinned=True)
    found.load("patterns", adapters["patterns"], pinned=True)
    with pytest.raises(Conflict, match=r"no room for adapter full of .* 2 pinned ones take .*MAX_ADAPTERS") as told:
        found.load("full", adapters["full"])
    assert told.value.code == "no_room_for_adapter"
    assert names(found) == ["small", "patterns"]
    found.unload("small")  # and its pin
    found.load("full", adapters["full"])
    found.load("small", adapters["small"])
    assert names(found) == ["patterns", "small"]

    narrow = registry(runner, reads, Room(2, bytes=100))
    with pytest.raises(Conflict, match=r"nothing else is there; .* ADAPTER_BYTES|LORRY_ENGINE_ADAPTER_BYTES"):
        narrow.load("full", adapters["full"])
    assert not names(narrow)


def test_a_gpu_without_memory_for_it_is_told(
    runner: ModelRunner, reads: list[str], adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = registry(runner, reads, Room(2))
    first = found.load("small", adapters["small"])

    def full(weights: AdapterWeights, device: torch.device) -> AdapterWeights:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    monkeypatch.setattr(module, "on_device", full)
    with pytest.raises(Unavailable, match=r"no memory for adapter full now, .* MiB") as told:
        found.load("full", adapters["full"])
    assert told.value.status == 503
    with pytest.raises(NotFound):
        found.get("full")
    assert found.get("small") is first


@pytest.fixture
def another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are copied, as from a host to its GPU."""
    monkeypatch.setattr(module, "on_device", lambda weights, device: mapped(weights, torch.clone))


@pytest.mark.usefixtures("another_device")
def test_an_adapter_that_left_comes_back_from_the_host_unless_its_files_are_others(
    runner: ModelRunner, reads: list[str], adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters["small"], tmp_path / "adapter")
    found = registry(runner, reads, Room(1, host_bytes=1 << 30))
    first = found.load("x", folder)
    found.load("full", adapters["full"])
    again = found.get("x")
    assert reads == ["disk", "disk", "host"]
    assert again.weights is not first.weights
    for a, b in zip(first.weights.tensors, again.weights.tensors, strict=True):
        assert torch.equal(a, b)
    shutil.copytree(adapters["patterns"], folder, dirs_exist_ok=True)
    found.get("full")
    assert found.get("x").weights.sites != first.weights.sites
    assert reads == ["disk", "disk", "host", "host", "disk"]
    found.unload("x")
    found.load("x", folder)
    assert reads[-1] == "disk"


@pytest.mark.usefixtures("another_device")
def test_the_host_keeps_what_its_bytes_allow(runner: ModelRunner, reads: list[str], adapters: dict[str, Path]) -> None:
    size = registry(runner, reads, Room(1)).load("full", adapters["full"]).bytes
    reads.clear()
    found = registry(runner, reads, Room(1, host_bytes=size))
    for name in ("small", "full", "small"):
        found.load(name, adapters[name])
    assert reads == ["disk", "disk", "disk"]  # "full" alone fills the host
    found = registry(runner, reads, Room(1, host_bytes=0))
    for name in ("small", "patterns", "small"):
        found.load(name, adapters[name])
    assert reads[3:] == ["disk", "disk", "disk"]


def test_room_is_what_the_settings_say_or_a_part_of_what_is_free(tiny_base: Path) -> None:
    cpu = torch.device("cpu")
    said = engine_settings(tiny_base, engine_max_adapters=3, engine_adapter_bytes=7, engine_adapter_host_bytes=0)
    assert room_for(said, cpu) == Room(3, 7, 0)
    found = room_for(engine_settings(tiny_base), cpu)
    assert 0 < found.bytes < 10 * free_host_memory()
    assert 0 < found.host_bytes < found.bytes


def test_a_limited_gpu_that_its_cache_has_filled_still_has_room_for_adapters(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "room_left", lambda fraction, device: 0)
    assert room_for(engine_settings(tiny_base), torch.device("cpu")).bytes == STEP_BYTES // 2


@pytest.mark.parametrize(
    ("group", "want"),
    [
        (None, 8 << 30),
        ({"max": "max\n", "current": "5\n", "stat": ""}, 8 << 30),
        ({"max": f"{4 << 30}\n", "current": f"{3 << 30}\n", "stat": f"anon 1\ninactive_file {1 << 29}\n"}, 3 << 29),
        ({"max": f"{64 << 30}\n", "current": f"{3 << 30}\n", "stat": ""}, 8 << 30),
        ({"max": f"{2 << 30}\n", "current": f"{3 << 30}\n", "stat": ""}, 0),
    ],
)
def test_free_memory_is_what_the_container_may_have(tmp_path: Path, group: dict[str, str] | None, want: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 << 20} kB\n")
    if group is not None:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        for name, text in group.items():
            (tmp_path / f"sys/fs/cgroup/memory.{name}").write_text(text)
    assert free_host_memory(tmp_path) == want


def test_a_packed_adapter_is_one_block_of_the_same_values_in_the_same_order_of_memory() -> None:
    torch.manual_seed(0)
    pairs = {
        "odd": LoraPair(torch.randn(5, 33), torch.randn(5, 17).t(), 0.5),
        "one": LoraPair(torch.randn(1, 8), torch.randn(1, 3).t(), 2.0),
    }
    shared = torch.randn(40, 6)
    weights = AdapterWeights(pairs, {"embed": shared, "head": shared}, {"odd": torch.randn(17)})
    found = packed(weights)
    for a, b in zip(weights.tensors, found.tensors, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert b.data_ptr() % 16 == 0
    assert len({t.untyped_storage().data_ptr() for t in found.tensors}) == 1
    assert found.full["embed"] is found.full["head"]
    assert [p.scaling for p in found.pairs.values()] == [0.5, 2.0]


def test_what_is_large_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.transfer._LARGE", 100)
    weights = AdapterWeights({"x": LoraPair(torch.randn(2, 8), torch.randn(8, 2), 1.0)}, {"head": torch.randn(20, 8)})
    found = packed(weights)
    assert found.full["head"] is weights.full["head"]
    assert found.pairs["x"].a is not weights.pairs["x"].a
