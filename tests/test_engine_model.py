"""The model's side: a mixed batch against PEFT alone, and adapters coming and going."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from service.bases import base_key
from service.errors import Conflict, Invalid, LorryError, NotFound
from tests.serving import KINDS, engine_settings, make_adapter, peft_greedy
from worker.engine.registry import AdapterRegistry, Room
from worker.engine.request import Request, SamplingParams
from worker.engine.runner import ModelRunner, UnsupportedModel
from worker.engine.sampling import sample
from worker.engine.scheduler import Scheduler

TOKENS = 16


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        kind: make_adapter(tiny_base, folder / kind, seed=i, **lora) for i, (kind, lora) in enumerate(KINDS.items())
    }


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(10, 900, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def registry(runner: ModelRunner, capacity: int = 16) -> AdapterRegistry:
    return AdapterRegistry(runner.base_info(), Room(capacity), runner.bank.install)


def generate(runner: ModelRunner, requests: list[Request], **limits: int) -> Scheduler:
    """Run requests to their end with the parts the engine is made of, without its thread."""
    defaults = {"num_blocks": runner.num_blocks, "max_batch": 8, "max_queue": 99, "max_step_tokens": 64}
    scheduler = Scheduler(block_size=runner.cache.block_size, **{**defaults, **limits})
    for r in requests:
        scheduler.add(r)
    while scheduler.has_work():
        step = scheduler.schedule()
        logits, sampling = runner.forward(step)
        for s in step:
            scheduler.computed(s)
        for s, found in zip(sampling, sample(logits, [s.request for s in sampling]), strict=True):
            assert found.token_id is not None
            s.request.output_ids.append(found.token_id)
            if len(s.request.output_ids) == s.request.params.max_tokens:
                scheduler.finish(s.request)
    return scheduler


def greedy(ids: list[int], registry_: AdapterRegistry, name: str | None, tokens: int = TOKENS) -> Request:
    weights = registry_.get(name).weights if name else None
    return Request(
        name or "base", ids, SamplingParams(max_tokens=tokens, temperature=0.0), key=name or "", adapter=weights
    )


def mixed(runner: ModelRunner, folders: dict[str, Path]) -> tuple[list[Request], AdapterRegistry]:
    """Requests of every adapter and the base, with prompts of many lengths."""
    found = registry(runner)
    for name, folder in folders.items():
        found.load(name, folder)
    names = [None, *folders, None, *folders]
    return [greedy(prompt(3 + 17 * i % 90, i), found, n) for i, n in enumerate(names)], found


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_batch": 3, "max_step_tokens": 7},  # prompts in small chunks between others' tokens
        {"num_blocks": 8, "max_batch": 6},  # preemption: what was computed is computed again
    ],
)
def test_a_mixed_batch_equals_peft_alone_token_for_token(
    tiny_base: Path, adapters: dict[str, Path], limits: dict[str, int]
) -> None:
    runner = ModelRunner(engine_settings(tiny_base))
    requests, _ = mixed(runner, adapters)
    scheduler = generate(runner, requests, **limits)
    assert bool(scheduler.preemptions) == ("num_blocks" in limits)
    for r in requests:
        assert r.output_ids == peft_greedy(tiny_base, adapters.get(r.key), r.prompt_ids, TOKENS), r.key


def test_adapters_change_the_text(tiny_base: Path, adapters: dict[str, Path]) -> None:
    runner = ModelRunner(engine_settings(tiny_base))
    found = registry(runner)
    for name, folder in adapters.items():
        found.load(name, folder)
    requests = [greedy(prompt(9, 0), found, n) for n in (None, *adapters)]
    generate(runner, requests)
    assert len({tuple(r.output_ids) for r in requests}) == len(requests)


def test_tied_embeddings_trained_apart_or_together_equal_peft(tiny_base_tied: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    both = make_adapter(tiny_base_tied, tmp_path / "both", **lora, modules_to_save=["embed_tokens", "lm_head"])
    tied = make_adapter(
        tiny_base_tied, tmp_path / "tied", **lora, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    runner = ModelRunner(engine_settings(tiny_base_tied))
    requests, _ = mixed(runner, {"both": both, "tied": tied})
    generate(runner, requests)
    for r in requests:
        folder = {"both": both, "tied": tied}.get(r.key)
        assert r.output_ids == peft_greedy(tiny_base_tied, folder, r.prompt_ids, TOKENS), r.key


def test_an_nf4_base_equals_peft_on_the_same_base(tiny_base: Path, adapters: dict[str, Path]) -> None:
    from transformers import BitsAndBytesConfig

    runner = ModelRunner(engine_settings(tiny_base, engine_load_in_4bit=True))
    assert any(type(m).__name__ == "Linear4bit" for m in runner.model.modules())
    chosen = {k: adapters[k] for k in ("small", "full")}
    requests, _ = mixed(runner, chosen)
    generate(runner, requests)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    for r in requests:
        expected = peft_greedy(tiny_base, chosen.get(r.key), r.prompt_ids, TOKENS, quantization_config=nf4)
        assert r.output_ids == expected, r.key


def other_architecture(name: str, folder: Path) -> Path:
    """A tiny model of another family; the tokenizer is of no matter here."""
    import transformers

    common = {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    config = {
        "mistral": lambda: transformers.MistralConfig(**common, sliding_window=8),
        "qwen2": lambda: transformers.Qwen2Config(**common),
        "qwen3": lambda: transformers.Qwen3Config(**common, head_dim=32),
        "gemma3": lambda: transformers.Gemma3TextConfig(**common, head_dim=16, sliding_window=8),
        "gemma2": lambda: transformers.Gemma2Config(**common, head_dim=16, sliding_window=8),
    }[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_other_architectures_are_served_exactly(tiny_base: Path, tmp_path: Path, name: str) -> None:
    base = other_architecture(name, tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_base / file, base / file)
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    if name == "qwen2":
        lora["bias"] = "lora_only"  # its projections have biases
    if name == "gemma3":
        lora["modules_to_save"] = ["embed_tokens", "lm_head"]  # its embeddings are scaled
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    runner = ModelRunner(engine_settings(base))
    requests, _ = mixed(runner, {"adapter": adapter})
    generate(runner, requests, max_step_tokens=13)
    for r in requests:
        expected = peft_greedy(base, adapter if r.key else None, r.prompt_ids, TOKENS)
        assert r.output_ids == expected, (r.key, len(r.prompt_ids))


def test_a_model_that_cannot_be_served_is_refused_at_the_start(tiny_base: Path, tmp_path: Path) -> None:
    base = other_architecture("gemma2", tmp_path / "gemma2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / file, base / file)
    with pytest.raises(UnsupportedModel, match="capped attention logits"):
        ModelRunner(engine_settings(base))


# The registry


@pytest.fixture(scope="module")
def runner(tiny_base: Path) -> ModelRunner:
    return ModelRunner(engine_settings(tiny_base))


def test_the_least_recently_used_adapter_leaves_and_comes_back(runner: ModelRunner, adapters: dict[str, Path]) -> None:
    evicted = []
    found = AdapterRegistry(runner.base_info(), Room(2), runner.bank.install, lambda: evicted.append(1))
    found.load("small", adapters["small"])
    found.load("full", adapters["full"])
    assert found.peek("small") is not None  # a use: "full" is now the older one
    found.load("patterns", adapters["patterns"])
    assert [a.name for a in found.held()] == ["small", "patterns"]
    assert len(evicted) == 1
    assert found.get("full").weights.bytes > 0
    assert [a.name for a in found.held()] == ["patterns", "full"]


def test_an_adapter_evicted_or_unloaded_under_a_running_request_stays_for_it(
    runner: ModelRunner, tiny_base: Path, adapters: dict[str, Path]
) -> None:
    found = registry(runner, capacity=1)
    found.load("full", adapters["full"])
    r = greedy(prompt(6, 1), found, "full")
    found.load("small", adapters["small"])
    found.unload("full")
    generate(runner, [r])
    assert r.output_ids == peft_greedy(tiny_base, adapters["full"], r.prompt_ids, TOKENS)
    with pytest.raises(NotFound, match="'full' does not exist"):
        found.get("full")


def test_loading_the_same_files_again_reads_nothing_and_other_files_replace(
    runner: ModelRunner, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters["small"], tmp_path / "adapter")
    found = registry(runner)
    first = found.load("x", folder)
    assert found.load("x", folder) is first
    shutil.copytree(adapters["patterns"], folder, dirs_exist_ok=True)
    second = found.load("x", folder)
    assert second.weights.sites != first.weights.sites


def edit(folder: Path, **config: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}, Conflict, "trained on meta-llama/Llama-3.2-1B"),
        ({"use_dora": True}, Invalid, "use_dora"),
        ({"peft_type": "IA3"}, Invalid, "type IA3"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    runner: ModelRunner,
    adapters: dict[str, Path],
    tmp_path: Path,
    change: dict[str, Any],
    error: type[LorryError],
    says: str,
) -> None:
    folder = edit(shutil.copytree(adapters["small"], tmp_path / "bad"), **change)
    with pytest.raises(error, match=says):
        registry(runner).load("bad", folder)


def test_an_adapter_of_another_shape_is_refused(runner: ModelRunner, tmp_path: Path) -> None:
    from tests.tiny import make_tiny_base

    other = make_tiny_base(tmp_path / "wide", hidden=128)
    folder = make_adapter(other, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(Conflict, match=r"q_proj lora_A is \[4, 128\], the engine's base takes \[4, 64\]"):
        registry(runner).load("wide", folder)


def test_an_adapter_for_modules_the_base_lacks_is_refused(
    runner: ModelRunner, adapters: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapters["small"], tmp_path / "deep")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k.replace("layers.1.", "layers.9."): v for k, v in weights.items()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(Conflict, match=r"layers\.9\.self_attn\.q_proj"):
        registry(runner).load("deep", folder)


def test_damaged_files_are_refused_and_what_had_the_name_stays(
    runner: ModelRunner, adapters: dict[str, Path], tmp_path: Path
) -> None:
    found = registry(runner)
    good = found.load("x", adapters["small"])
    folder = shutil.copytree(adapters["small"], tmp_path / "damaged")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Invalid, match="damaged"):
        found.load("x", folder)
    with pytest.raises(NotFound, match="no adapter found"):
        found.load("x", tmp_path / "nothing")
    assert found.get("x") is good


def test_a_damaged_adapter_does_not_reach_its_neighbours(
    runner: ModelRunner, tiny_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """NaN in one row of a batch, and in the memory it leaves behind, is nobody else's."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapters["small"], tmp_path / "nan")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v * float("nan") for k, v in weights.items()}, folder / "adapter_model.safetensors")
    found = registry(runner)
    found.load("nan", folder)
    scheduler = Scheduler(num_blocks=16, block_size=16, max_batch=4, max_queue=9, max_step_tokens=64)
    bad, good = greedy(prompt(20, 1), found, "nan"), greedy(prompt(5, 2), found, None)
    scheduler.add(bad)
    scheduler.add(good)
    while good in [*scheduler.running] or scheduler.waiting:
        step = scheduler.schedule()
        logits, sampling = runner.forward(step)
        for s in step:
            scheduler.computed(s)
        for s, one in zip(sampling, sample(logits, [s.request for s in sampling]), strict=True):
            assert (one.token_id is None) == (s.request is bad)
            s.request.output_ids.append(one.token_id or 0)
            if len(s.request.output_ids) == TOKENS:
                scheduler.finish(s.request)
    assert good.output_ids == peft_greedy(tiny_base, None, good.prompt_ids, TOKENS)
    again = greedy(prompt(30, 3), found, None)
    generate(runner, [again, greedy(prompt(3, 4), found, None)])
    assert again.output_ids == peft_greedy(tiny_base, None, again.prompt_ids, TOKENS)


def test_names_of_the_same_base_are_told_from_those_of_others() -> None:
    same = [
        "unsloth/Llama-3.2-1B",
        "meta-llama/Llama-3.2-1B",
        "unsloth/Llama-3.2-1B-unsloth-bnb-4bit",
        "/models/llama-3.2-1b/",
    ]
    assert len({base_key(n) for n in same}) == 1
    assert base_key("unsloth/Llama-3.2-1B-Instruct") != base_key("unsloth/Llama-3.2-1B")
