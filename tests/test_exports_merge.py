"""The streamed merge: what PEFT's merge gives, tensor by tensor, for every kind of adapter and base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from service.errors import JobFailure
from tests.export_kit import NF4, make_adapter, peft_merged, quantized_copy
from tests.hub_server import User, serve_hub
from tests.tiny import make_tiny_base
from worker import adapter_io
from worker.export import plan as plans
from worker.export.merge_stream import write_merged
from worker.export.nf4 import Quantization
from worker.export.weights import open_base

BOTH = ["embed_tokens", "lm_head"]


def merge(base: Path, adapter: Path, out: Path, *, shard_bytes: int = 10**9, **options: Any) -> dict[str, torch.Tensor]:
    """Merge into `out` and read its files back."""
    out.mkdir()
    weights = open_base(str(base), revision=None, token=None)
    plan = plans.plan_merge(weights, adapter, plans.skeleton(weights, trust_remote_code=False))
    paths = write_merged(weights, adapter, plan, out, shard_bytes=shard_bytes, step=lambda done, total: None, **options)
    state: dict[str, torch.Tensor] = {}
    for path in paths:
        part = load_file(path)
        assert not state.keys() & part.keys()
        state |= part
    return state


@pytest.mark.parametrize("embeddings", [None, BOTH, ["lm_head"]], ids=["none", "both", "head"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_merge_is_pefts_merge_rounded_once(
    tiny_base: Path, tiny_base_tied: Path, tmp_path: Path, tied: bool, embeddings: list[str] | None
) -> None:
    base = tiny_base_tied if tied else tiny_base
    patterns = {
        "rank_pattern": {"k_proj": 4},
        "alpha_pattern": {"q_proj": 5},
        "target_modules": ["q_proj", "k_proj", "down_proj"],
    }
    adapter = make_adapter(base, tmp_path / "adapter", embeddings=embeddings, **patterns)
    got = merge(base, adapter, tmp_path / "out", shard_bytes=100_000)
    expected = {name: tensor.bfloat16() for name, tensor in peft_merged(base, adapter).items()}
    if tied and not embeddings:
        del expected["lm_head.weight"]  # tied and untrained: one matrix, written once
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) >= 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in got.values())


def test_trained_biases_replace_the_bases(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", layers=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = {**model.config.to_dict(), "attention_bias": True}
    model = type(model)(type(model.config)(**config))
    model.save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", bias="all")
    expected = peft_merged(base, adapter)
    got = merge(base, adapter, tmp_path / "out")
    biases = [name for name in expected if name.endswith(".bias")]
    assert len(biases) == 4
    assert not torch.equal(got[biases[0]], model.state_dict()[biases[0]].bfloat16())
    assert [name for name in got if not torch.equal(got[name], expected[name].bfloat16())] == []


def test_a_stack_of_two_trainings_merges_to_base_and_both(tiny_base: Path, tmp_path: Path) -> None:
    first = make_adapter(tiny_base, tmp_path / "cpt", embeddings=BOTH, r=4)
    second = make_adapter(tiny_base, tmp_path / "ift", seed=2, r=8, lora_alpha=24, use_rslora=False)
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    adapter_io.combine(first, second, stacked)
    got = merge(tiny_base, stacked, tmp_path / "out")
    one, two = peft_merged(tiny_base, first), peft_merged(tiny_base, second)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).state_dict()
    for name, tensor in got.items():
        expected = one[name] + (two[name] - base[name])
        torch.testing.assert_close(tensor.float(), expected, rtol=2**-8, atol=1e-6, msg=name)


def test_a_4_bit_base_is_dequantised_and_rounded_once(tiny_base_tied: Path, tmp_path: Path) -> None:
    base = quantized_copy(tiny_base_tied, tmp_path / "nf4")
    adapter = make_adapter(tiny_base_tied, tmp_path / "adapter")
    got = merge(base, adapter, tmp_path / "out", shard_bytes=50_000)
    # By hand, from the model that transformers loads: its NF4 weights in float32, plus the update.
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base_tied, dtype=torch.float32).state_dict()
    update = peft_merged(tiny_base_tied, adapter)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    weight.quant_state.dtype = torch.float32
    dequantized = dequantize_4bit(weight.data, weight.quant_state)
    torch.testing.assert_close(got[name].float(), dequantized + (update[name] - plain[name]), rtol=2**-8, atol=1e-6)
    assert {t.dtype for t in got.values()} == {torch.bfloat16}
    assert got.keys() == plain.keys() - {"lm_head.weight"}


def test_a_16_bit_base_trained_in_4_bits_is_rounded_as_training_rounded_it(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", size=0.0)
    how = Quantization.of(NF4.to_dict(), "float32")
    got = merge(tiny_base, adapter, tmp_path / "out", trained_on=lambda name: how if "_proj" in name else None)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, quantization_config=NF4)
    expected = model.dequantize(dtype=torch.float32).state_dict()
    assert [name for name in got if not torch.equal(got[name], expected[name].bfloat16())] == []


def spoil(adapter: Path, change: Any) -> None:
    """Rewrite the adapter's tensors and configuration."""
    path, config_path = adapter / adapter_io.WEIGHTS, adapter / adapter_io.CONFIG
    state, config = load_file(path), json.loads(config_path.read_text())
    change(state, config)
    save_file(state, path)
    config_path.write_text(json.dumps(config))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
UNFIT: dict[str, tuple[Any, str, str]] = {
    "a matrix missing": (lambda s, c: s.pop(f"{Q}.lora_B.weight"), "export_mismatch", "layers.0.self_attn.q_proj"),
    "a layer too many": (
        lambda s, c: s.update({k.replace("layers.0", "layers.7"): v.clone() for k, v in s.items() if Q in k}),
        "export_mismatch",
        "layers.7.self_attn.q_proj.weight: not among the base's tensors",
    ),
    "another shape": (
        lambda s, c: s.update({f"{Q}.lora_A.weight": torch.zeros(8, 32)}), "export_mismatch", r"q_proj.weight: base \[64, 64\]"
    ),
    "another rank": (lambda s, c: c.update({"r": 4}), "export_mismatch", "rank 8 in the file, 4 in adapter_config.json"),
    "embeddings of another vocabulary": (
        lambda s, c: s.update({"base_model.model.lm_head.weight": torch.zeros(7, 64)}), "export_mismatch", "lm_head.weight"
    ),
    "DoRA": (lambda s, c: c.update({"use_dora": True}), "unsupported", "use_dora"),
    "an unknown tensor": (
        lambda s, c: s.update({f"{Q}.lora_magnitude_vector": torch.zeros(64)}), "unsupported", "lora_magnitude_vector"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    unfit: tuple[Path, Path], tiny_base: Path, tmp_path: Path, case: str
) -> None:
    change, code, message = UNFIT[case]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in (adapter_io.WEIGHTS, adapter_io.CONFIG):
        (adapter / name).write_bytes((unfit[0] / name).read_bytes())
    spoil(adapter, change)
    with pytest.raises(JobFailure, match=message) as failure:
        merge(tiny_base, adapter, tmp_path / "out")
    assert failure.value.code == code
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture(scope="module")
def unfit(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter that fits, to be spoilt."""
    folder = tmp_path_factory.mktemp("unfit")
    return make_adapter(tiny_base, folder / "adapter"), folder


def test_values_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", layers=1)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", size=300.0)
    with pytest.raises(JobFailure, match="beyond the range of float16"):
        merge(base, adapter, tmp_path / "out")


def test_a_base_is_read_from_a_hub_at_its_revision(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(sharded, max_shard_size="100KB")
    files = {p.name: p.read_bytes() for p in sharded.iterdir()}
    with serve_hub() as hub:
        hub.users["hf_ada"] = User("ada")
        repo = hub.make("ada/base", **files)
        revision = repo.at("main")[0]  # type: ignore[index]
        repo.commit("main", {}, "all gone")
        where = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", where)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        base = open_base("ada/base", revision=revision, token="hf_ada")
        with pytest.raises(JobFailure, match="ada/base") as failure:
            open_base("ada/base", revision=None, token="hf_ada")
    assert failure.value.code == "model_not_found"
    local = open_base(str(tiny_base), revision=None, token=None)
    assert (base.commit, local.commit) == (revision, None)
    assert base.tensors.keys() == local.tensors.keys()
    assert len({t.file for t in base.tensors.values()}) > 1
    cpu = torch.device("cpu")
    assert [name for name in local.tensors if not torch.equal(base.read(name, cpu), local.read(name, cpu))] == []
    assert (base.folder / "generation_config.json").is_file()
