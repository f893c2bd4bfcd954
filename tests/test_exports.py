"""Exports from plan to manifest: what each format holds, how it is read back, what is caught, how it ends early."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.errors import JobFailure
from service.templates import StoredTemplate, render_generation
from tests.export_kit import NF4, Exporter, Watcher, chat_template, make_adapter, quantized_copy
from tests.recipes import chats, ift_spec, run_recipe
from tests.tiny import BOS, EOS, make_tiny_base
from worker import adapter_io
from worker.export import folder as folders
from worker.export import plan as plans
from worker.export import template as templates
from worker.export.interrupt import interruptible
from worker.export.weights import BaseWeights
from worker.outcome import Interrupted
from worker.verify_math import mean_kl, next_token_logprobs

BOTH = ["embed_tokens", "lm_head"]
TRAINED_IN_4_BITS = {"dtype": "float32", "quantization_config": NF4.to_dict()}


@pytest.fixture(scope="module")
def adapter(tiny_base_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat adapter of a tied base, embeddings trained."""
    template = chat_template(tiny_base_tied, stop=[EOS, "<|eot_id|>", "###"])
    # A seed whose answers have no near tie, which rounding to 16 bits would turn, with any Python's text in the tokenizer.
    folder = tmp_path_factory.mktemp("adapter") / "a"
    return make_adapter(tiny_base_tied, folder, embeddings=BOTH, template=template, seed=3)


@pytest.fixture(scope="module")
def export(tiny_base_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    return Exporter(tmp_path_factory.mktemp("exports"), tiny_base_tied)


@pytest.mark.parametrize("format", ["lora", "merged_16bit", "merged_4bit"])
def test_an_export_is_listed_whole_and_says_what_it_is(export: Exporter, adapter: Path, format: str) -> None:
    done = export(adapter, format=format)
    manifest = done.manifest
    files = {p.relative_to(done.folder).as_posix() for p in done.folder.rglob("*") if p.is_file()}
    assert {f["path"] for f in done.outcome.artifacts} == files
    assert {f["path"] for f in manifest["files"]} == files - {"manifest.json"}
    for entry in done.outcome.artifacts:
        content = (done.folder / entry["path"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest["lineage"] == {"job": "job_t", "step": 3, "data_fingerprint": "f" * 64, "jobs": []}
    assert manifest["merged_into"]["weights"] == "the base's own"
    assert {"torch", "transformers", "peft"} <= manifest["versions"].keys()
    report = manifest["verification"]
    assert report == done.report
    assert report["mean_kl"] <= report["limit"]
    assert report["greedy_tokens"]["total"] > 20
    assert report["greedy_tokens"]["equal"] == report["greedy_tokens"]["total"] or format == "merged_4bit"
    assert report["eval_loss"] == pytest.approx(report["adapter_eval_loss"], rel=0.05)
    assert report["template"]["conversations_equal"] == 3
    tensors = Counter(t.dtype for path in done.folder.glob("*.safetensors") for t in load_file(path).values())
    expected = {"lora": {torch.float32: 30}, "merged_16bit": {torch.bfloat16: 21}}
    expected["merged_4bit"] = {torch.bfloat16: 7, torch.uint8: 14 * 3, torch.float32: 14 * 3}
    assert tensors == expected[format]
    assert format == "lora" or report["weights"] == {
        "tensors": 21,
        "largest_difference": 0,
        "tensor": None,
        "limit": 2e-4,
    }
    assert sum(report["tensor_types"].values()) == sum(tensors.values())
    assert export.left() == ["exports/job_e"]
    last = {phase: steps[-1] for phase, steps in done.progress.steps_in.items()}
    assert last["loading"] == last["verifying"] == (6, 6)
    assert format == "lora" or last["merging"] == (21, 21)


def test_the_merged_models_load_as_what_they_are(export: Exporter, adapter: Path) -> None:
    folder = export(adapter, format="merged_4bit", max_shard_size="1MB", verify=False).folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.is_loaded_in_4bit
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert (layer.weight.dtype, layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == (
        torch.uint8,
        "nf4",
        True,
    )
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is not model.model.embed_tokens.weight, "trained apart: untied"
    assert model.config.tie_word_embeddings is False
    ends = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids([EOS, "<|eot_id|>"])
    assert model.generation_config.eos_token_id == ends, "what ends an answer as served, as far as it is one token"


def test_bits_per_weight_are_those_of_nf4(tmp_path: Path) -> None:
    # Matrices large enough that the two tables each of them carries hardly count.
    base = make_tiny_base(tmp_path / "base", hidden=256, intermediate=1024, layers=1)
    report = Exporter(tmp_path, base)(make_adapter(base, tmp_path / "a"), format="merged_4bit").report
    assert 4.1 < report["bits_per_weight"]["nf4"] < 4.6
    assert report["bits_per_weight"]["all"] > report["bits_per_weight"]["nf4"]


@pytest.mark.parametrize("stored", [True, False], ids=["stored in 4 bits", "held in 4 bits"])
def test_a_model_trained_in_4_bits_is_exported_as_it_was_trained(
    tiny_base_tied: Path, tmp_path: Path, stored: bool
) -> None:
    base = quantized_copy(tiny_base_tied, tmp_path / "nf4") if stored else tiny_base_tied
    adapter = make_adapter(tiny_base_tied, tmp_path / "a", trained_on=TRAINED_IN_4_BITS)
    export = Exporter(tmp_path, base)
    trained = export(adapter, format="merged_16bit")
    assert trained.manifest["merged_into"]["weights"].startswith("dequantised")
    assert trained.report["mean_kl"] < trained.report["limit"]
    original = export(adapter, format="merged_16bit", base=str(tiny_base_tied))
    assert original.manifest["merged_into"] == {
        "weights": "16-bit original", "base": str(tiny_base_tied), "revision": None, "dtype": "float32"
    }  # fmt: skip
    name = "model.layers.0.mlp.up_proj.weight"
    ours, theirs = (load_file(e.folder / "model.safetensors")[name].float() for e in (trained, original))
    assert 0.01 < (ours - theirs).norm() / theirs.norm() < 0.2  # NF4's error
    lora = export(adapter, format="lora")
    assert lora.report["mean_kl"] < 1e-6


def test_where_float32_does_not_fit_models_are_compared_in_16_bits(
    tiny_base_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = psutil.virtual_memory()._replace(available=2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    base = quantized_copy(tiny_base_tied, tmp_path / "nf4")
    adapter = make_adapter(tiny_base_tied, tmp_path / "a", embeddings=BOTH)
    report = Exporter(tmp_path, base)(adapter, format="merged_16bit").report
    assert (report["dtype"], report["mean_kl"] < report["limit"]) == ("bfloat16", True)
    assert "weights" not in report, "PEFT's merge would be rounded otherwise"


def test_another_model_is_refused_as_the_original(export: Exporter, adapter: Path, tmp_path: Path) -> None:
    other = make_tiny_base(tmp_path / "other", layers=3)
    with pytest.raises(JobFailure, match=r"base: .*num_hidden_layers is 3, not 2") as failure:
        export(adapter, format="merged_16bit", base=str(other))
    assert failure.value.code == "invalid_spec"
    quantized = quantized_copy(export.base, tmp_path / "nf4")
    with pytest.raises(JobFailure, match="quantised itself"):
        export(adapter, format="merged_16bit", base=str(quantized))
    assert export.left() == []


def scaling_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adapter_io, "scaling", lambda config: config["lora_alpha"] / config["r"])  # not rsLoRA's


def embeddings_untrained(patch: pytest.MonkeyPatch) -> None:
    read = plans.read_adapter
    patch.setattr(plans, "read_adapter", lambda *a: (read(*a)[0], {}, read(*a)[2]))


def a_matrix_left_out(patch: pytest.MonkeyPatch) -> None:
    def plan(*args: Any, **options: Any) -> plans.Plan:
        made = plans.plan_merge(*args, **options)
        return replace(made, tensors=[replace(t, lora=None) if "0.mlp.up_proj" in t.name else t for t in made.tensors])

    patch.setattr("worker.export.source.plan_merge", plan)


def another_configuration(patch: pytest.MonkeyPatch) -> None:
    write = folders.write_configs

    def wrong(base: BaseWeights, *args: Any, **options: Any) -> None:
        config = {**base.config, "rms_norm_eps": 1e-2}
        write(BaseWeights(config, base.tensors, base.folder, base.name, base.revision), *args, **options)

    patch.setattr(folders, "write_configs", wrong)


def another_template(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(templates, "portable", lambda t: t.chat_template.replace("\n\n", "\n"))


def no_template(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(templates, "portable", lambda t: None)


BROKEN = {
    "scaling off": (scaling_off, "merged_16bit", "weight differs from PEFT's merge"),
    "scaling off, in 4 bits": (scaling_off, "merged_4bit", "weight differs from PEFT's merge"),
    "embeddings untrained": (embeddings_untrained, "merged_16bit", "(embed_tokens|lm_head).weight differs from PEFT's merge"),
    "a matrix left out": (a_matrix_left_out, "merged_16bit", "0.mlp.up_proj.weight differs from PEFT's merge"),
    "another configuration": (another_configuration, "merged_16bit", "mean KL .* over the limit"),
    "another template": (another_template, "merged_16bit", "renders a conversation otherwise than it is served, from character"),
    "no template": (no_template, "lora", "the export renders no conversation"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_export_is_caught_and_kept_aside(
    weak: Path, export: Exporter, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    break_it, format, message = BROKEN[case]
    with monkeypatch.context() as patch:
        break_it(patch)
        with pytest.raises(JobFailure, match=message) as failure:
            export(weak, format=format)
    assert failure.value.code == "export_mismatch"
    assert export.left() == ["exports/job_e.rejected"], "nothing is there under the export's name"
    rejected = export.home / "exports" / "job_e.rejected"
    report = json.loads((rejected / "verification.json").read_text())
    assert report["problems"]
    assert report["greedy_tokens"]["total"] > 0
    assert list(rejected.glob("*.safetensors"))
    assert not (rejected / "manifest.json").exists()


def test_a_good_export_takes_a_refused_ones_place(
    weak: Path, export: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        no_template(patch)
        with pytest.raises(JobFailure):
            export(weak, format="lora")
    export(weak, format="lora", again=True)
    assert export.left() == ["exports/job_e"]


@pytest.fixture(scope="module")
def weak(tiny_base_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that does little: what is missing of it hardly shows in the answers."""
    return make_adapter(tiny_base_tied, tmp_path_factory.mktemp("weak") / "a", embeddings=BOTH, size=0.02)


@pytest.mark.parametrize("phase", ["planning", "loading", "merging", "verifying", "listing"])
def test_a_cancel_is_heard_in_every_phase_and_leaves_nothing(export: Exporter, adapter: Path, phase: str) -> None:
    with pytest.raises(Interrupted):
        export(adapter, format="merged_16bit", ask_in=phase)
    assert export.left() == []


def test_a_cancel_reaches_a_library_that_never_asks() -> None:
    progress = Watcher(ask_in="loading", phases=["loading"])
    with pytest.raises(Interrupted), interruptible(progress):
        time.sleep(600)


def test_an_attempt_that_was_killed_leaves_nothing_to_the_next(export: Exporter, adapter: Path) -> None:
    def killed(paths: Any) -> None:
        for folder in (paths.out_dir.with_name(".job_e.12345.tmp"), paths.run_dir / "export" / "expected"):
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"half")

    done = export(adapter, format="lora", before=killed)
    assert export.left() == ["exports/job_e"]
    assert "model.safetensors" not in {f["path"] for f in done.outcome.artifacts}


def test_a_disk_too_small_is_said_before_the_work(
    export: Exporter, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(export.root)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1_234_567))
    with pytest.raises(JobFailure, match=r"needs [\d,]+ bytes on .*, 1,234,567 are free") as failure:
        export(adapter, format="merged_16bit")
    assert failure.value.code == "insufficient_storage"
    assert export.left() == []


# Templates


class Case(NamedTuple):
    changes: dict[str, Any]
    chats: bool  # whether the export has a chat template


LSTRIP = "  {% if true %}\n\n{{ bos_token }}{% endif %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
NO_BOS = (
    "\n{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
TEMPLATES = {
    "the base's own": Case({}, True),
    "a default system message": Case({"system": 'Say "yes" or\n\\n {{ no }} 예'}, True),
    "no BOS of its own": Case({"chat_template": NO_BOS, "bos": BOS}, True),
    "neither BOS nor system message": Case({"chat_template": NO_BOS, "bos": BOS, "system": "Be kind."}, True),
    "white space that Jinja strips": Case({"chat_template": LSTRIP, "system": "  Be kind. "}, True),
    "a prompt with one placeholder": Case(
        {"kind": "prompt", "prompt": "### Q: {q}\n\n{{x}} \"A\": ", "response": "{a}", "bos": BOS}, True
    ),
    "a prompt with two placeholders": Case({"kind": "prompt", "prompt": "# {title}\n{text}", "bos": BOS}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATES)
def test_the_exports_tokenizer_renders_what_is_served(tiny_base: Path, tmp_path: Path, case: str) -> None:
    changes, chats = TEMPLATES[case]
    if changes.get("kind") == "prompt":
        changes = {"chat_template": None, **changes}
    stored = StoredTemplate(**{**chat_template(tiny_base).model_dump(exclude={"fingerprint"}), **changes})
    trained = AutoTokenizer.from_pretrained(tiny_base)
    templates.prepare_tokenizer(AutoTokenizer.from_pretrained(tiny_base), stored, tmp_path)
    report = templates.check(tmp_path, stored, trained)
    assert report == {
        "fingerprint": stored.fingerprint,
        "conversations_equal": 3 if chats else 0,
        "plain_prompts_equal": True,
    }
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert (exported.chat_template is not None) == chats
    if chats:
        messages = [{"role": "user", "content": "  hello\n"}]
        text = exported.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == render_generation(stored, messages=messages)
        assert text.count(BOS) == 1


def test_a_lora_export_names_its_base_as_the_world_knows_it(
    export: Exporter, tiny_base_tied: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base_tied, tmp_path / "a")
    about = json.loads((adapter / "lorry_adapter.json").read_text())
    (adapter / "lorry_adapter.json").write_text(json.dumps({**about, "base": "org/base"}))
    folder = export(adapter, format="lora").folder
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert "base_model: org/base" in (folder / "README.md").read_text()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base_tied), folder)


def test_what_was_trained_in_4_bits_is_what_the_export_says(tiny_base: Path, tmp_path: Path) -> None:
    """From the training itself: what it records of its base is enough to give the same model back."""
    training = {"max_steps": 3, "learning_rate": 0.01}
    spec = ift_spec(tiny_base, model={"load_in_4bit": True}, training=training)
    trained = run_recipe(spec, tmp_path / "train", file=chats(tmp_path / "chats.jsonl"))
    done = Exporter(tmp_path, tiny_base)(trained.adapter, format="merged_16bit")
    assert done.manifest["merged_into"]["weights"] == "dequantised nf4 of the base's weights, as in training"
    fingerprint = trained.outcome.result["data_fingerprint"]
    assert done.manifest["lineage"] == {"job": "job_x", "step": 3, "data_fingerprint": fingerprint}
    row = json.loads((trained.adapter / adapter_io.PROBE).read_text())[0]
    exported = next_token_logprobs(AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32), row)

    def live(**options: Any) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, **options)
        return next_token_logprobs(PeftModel.from_pretrained(base, trained.adapter), row)

    assert mean_kl(live(quantization_config=NF4), exported) * 20 < mean_kl(live(), exported)
