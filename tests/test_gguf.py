"""GGUF exports, by llama.cpp's own tools: what is in the files, that it is the adapter, and that broken ones are caught."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from service.errors import JobFailure
from service.settings import Settings
from service.templates import StoredTemplate
from tests.export_kit import Export, Exporter, Watcher, chat_template, make_adapter
from worker.export import gguf, gguf_lora, llama_cpp, load, reference, template
from worker.export.gguf_types import check_types
from worker.export.llama_cpp_child import derive_pre_tokenizer
from worker.export.source import Source, open_source
from worker.outcome import Context, Interrupted

METHODS = ["f16", "q8_0", "q4_k_m"]
TOOLS = llama_cpp.find(Settings(torch_threads=1))


def nothing(done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With trained embeddings."""
    return make_adapter(tiny_base, tmp_path_factory.mktemp("a") / "adapter", embeddings=["embed_tokens", "lm_head"])


@pytest.fixture(scope="module")
def exporter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    return Exporter(tmp_path_factory.mktemp("exports"), tiny_base)


@pytest.fixture(scope="module")
def export(exporter: Exporter, adapter: Path) -> Export:
    return exporter(adapter, format="gguf", quantization_method=METHODS)


@dataclasses.dataclass
class Lora:
    """An rsLoRA without embeddings, as GGUF LoRA and with its base as GGUF."""

    source: Source
    stored: StoredTemplate
    expected: reference.Reference
    files: list[Path]
    base: Path
    report: dict[str, Any]
    tokenizer: Any


@pytest.fixture(scope="module")
def lora(tiny_base_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Lora:
    root = tmp_path_factory.mktemp("lora")
    folder = make_adapter(tiny_base_tied, root / "adapter", r=4, lora_alpha=8)
    spec = Exporter.spec(format="lora", quantization_method=["f16", "q8_0"])
    paths = Exporter(root, tiny_base_tied).paths(folder)
    context = Context(paths=paths, progress=Watcher(), settings=Settings(), about={}, token=None)
    source = open_source(spec, context, folder, json.loads((folder / "lorry_adapter.json").read_text()))
    stored, tokenizer = chat_template(tiny_base_tied), AutoTokenizer.from_pretrained(tiny_base_tied)
    live = load.load_live(
        source.name,
        folder,
        source.place,
        source.load_in,
        revision=None,
        hub={"token": None, "trust_remote_code": False},
    )
    probe = json.loads((folder / "lorry_probe.json").read_text())
    expected = reference.take(live, probe, template.stop_ids(stored, tokenizer), root / "expected", nothing)
    out, aside = root / "out", root / "aside"
    out.mkdir()
    aside.mkdir()
    files = gguf_lora.write(source, spec, stored, out, aside, tools=TOOLS)
    report = gguf_lora.read_back(
        out, source, spec, stored, expected, aside, tokenizer=tokenizer, tools=TOOLS, step=nothing
    )
    return Lora(source, stored, expected, files, aside / "base.gguf", report, tokenizer)


def test_several_types_come_from_one_merge_and_each_says_what_the_adapter_says(export: Export) -> None:
    names = {f"a-{m.upper()}.{end}" for m in METHODS for end in ("gguf", "Modelfile")}
    assert names | {"manifest.json", "README.md", "lorry_template.json"} == {p.name for p in export.folder.iterdir()}
    assert {f["path"] for f in export.manifest["files"]} >= names
    files = {f["method"]: f for f in export.report["files"]}
    assert list(files) == METHODS
    assert files["f16"]["mean_kl"] < 1e-5
    assert files["f16"]["greedy_tokens"]["equal"] == files["f16"]["greedy_tokens"]["total"] > 0
    assert files["f16"]["mean_kl"] < files["q8_0"]["mean_kl"] < files["q4_k_m"]["mean_kl"]
    for report in files.values():
        assert report["mean_kl"] <= report["limit"]
        assert report["adapter_carried"] == pytest.approx(1, abs=0.1)
        assert report["eval_loss"] == pytest.approx(report["adapter_eval_loss"], abs=0.01)
        assert report["positions"] > 100


def test_types_are_read_from_the_file_and_fallbacks_said(export: Export) -> None:
    files = {f["method"]: f for f in export.report["files"]}
    assert files["f16"]["file_type"] == "MOSTLY_F16"
    assert files["q8_0"]["file_type"] == "MOSTLY_Q8_0"
    assert not files["q8_0"]["fallback"]
    # Rows of 64 and 128 values cannot be stored in blocks of 256.
    assert files["q4_k_m"]["file_type"] == "MOSTLY_Q4_K_M"
    assert files["q4_k_m"]["fallback"]
    assert set(files["q4_k_m"]["tensor_types"]) == {"Q5_0", "Q8_0", "F32"}
    assert gguf.tensor_types(export.folder / "a-Q8_0.gguf") == files["q8_0"]["tensor_types"] == {"Q8_0": 16, "F32": 5}


def test_the_file_has_the_served_template_and_tokens(export: Export, tiny_base: Path) -> None:
    reader = GGUFReader(export.folder / "a-Q8_0.gguf")
    stored, tokenizer = chat_template(tiny_base), AutoTokenizer.from_pretrained(tiny_base)

    def read(key: str) -> Any:
        return reader.get_field(f"tokenizer.{key}").contents()  # type: ignore[union-attr]

    assert read("chat_template") == stored.chat_template
    assert read("ggml.eos_token_id") == tokenizer.eos_token_id
    assert read("ggml.bos_token_id") == tokenizer.bos_token_id
    assert read("ggml.add_bos_token") is True
    assert read("ggml.add_eos_token") is False
    assert all(f["ends"] == [tokenizer.eos_token_id] for f in export.report["files"])
    modelfile = (export.folder / "a-Q8_0.Modelfile").read_text()
    assert "FROM ./a-Q8_0.gguf\n" in modelfile
    assert '\nPARAMETER stop "<|eos|>"\nPARAMETER num_ctx 512\n' in modelfile
    assert "{{ range .Messages }}" in modelfile


def test_a_file_that_is_not_of_its_type_is_refused(export: Export, tmp_path: Path) -> None:
    for method in METHODS:
        check_types(export.folder / f"a-{method.upper()}.gguf", method)
    with pytest.raises(JobFailure, match="no q4_k_m file: its type field is 1, its matrices are 14 × F16") as caught:
        check_types(export.folder / "a-F16.gguf", "q4_k_m")
    assert caught.value.code == "export_mismatch"
    # A type field that lies.
    lying = tmp_path / "lying.gguf"
    lying.write_bytes((export.folder / "a-F16.gguf").read_bytes())
    GGUFReader(lying, "r+").get_field("general.file_type").parts[-1][0] = 15  # type: ignore[union-attr]
    with pytest.raises(JobFailure, match=r"no q4_k_m file: its type field is 15, .*among them"):
        check_types(lying, "q4_k_m")


def test_a_quantiser_of_ones_own_is_used_and_found_out_if_it_does_not_quantise(
    exporter: Exporter, adapter: Path, export: Export, tmp_path: Path
) -> None:
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    for path in TOOLS.folder.iterdir():
        (checkout / path.name).symlink_to(path)
    tool = checkout / "build/bin/llama-quantize"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\necho "$3" > "$2.asked"\ncp "$1" "$2"\n')
    tool.chmod(0o755)
    tools = llama_cpp.find(Settings(llama_cpp_dir=checkout))
    assert tools.quantizer == tool
    out = tmp_path / "a-Q6_K.gguf"
    gguf.quantize(export.folder / "a-F16.gguf", out, "q6_k", tools)
    assert Path(f"{out}.asked").read_text() == "Q6_K\n"
    with pytest.raises(JobFailure, match="no q6_k file"):
        check_types(out, "q6_k")


def test_a_worker_without_the_tools_says_so_before_it_begins(exporter: Exporter, adapter: Path, tmp_path: Path) -> None:
    settings = Settings(llama_cpp_dir=tmp_path)
    with pytest.raises(JobFailure, match="scripts/gguf-tools, or set LORRY_LLAMA_CPP_DIR") as caught:
        exporter(adapter, format="gguf", settings=settings)
    assert caught.value.code == "unsupported"
    assert exporter.left() == []


def test_a_cancel_ends_the_converter(exporter: Exporter, adapter: Path) -> None:
    with pytest.raises(Interrupted):
        exporter(adapter, format="gguf", ask_in="converting")
    assert exporter.left() == []
    assert not [c for c in psutil.Process().children() if "llama_cpp_child" in " ".join(c.cmdline())]


def test_a_gguf_lora_does_in_llama_cpp_what_the_adapter_does(lora: Lora) -> None:
    assert lora.report["problems"] == []
    assert [f.name for f in lora.files] == ["a-lora-F16.gguf", "a-lora-Q8_0.gguf"]
    for report in lora.report["files"]:
        assert report["positions"] == 32
        assert report["mean_kl"] < 1e-3 < lora.expected.effect
        assert report["adapter_carried"] == pytest.approx(1, abs=0.1)
    assert GGUFReader(lora.files[0]).get_field("adapter.lora.alpha").contents() == 16  # type: ignore[union-attr]  # 8 / √4 · 4
    assert "ADAPTER ./a-lora-F16.gguf" in lora.files[0].with_name("a-lora-F16.Modelfile").read_text()


def test_an_adapter_with_trained_embeddings_is_no_gguf_lora(exporter: Exporter, adapter: Path) -> None:
    with pytest.raises(JobFailure, match="holds no fully trained tensors") as caught:
        exporter(adapter, format="lora", quantization_method="f16")
    assert caught.value.code == "unsupported"
    assert exporter.left() == []


def test_a_file_of_the_base_without_the_adapter_is_caught(lora: Lora) -> None:
    # An adapter that does little: a limit on the distance alone would let its base pass.
    stored, tokenizer = lora.stored, lora.tokenizer
    report = gguf.read_back(lora.base, "bf16", stored, lora.expected, tokenizer=tokenizer, tools=TOOLS)
    assert report["adapter_carried"] == pytest.approx(0, abs=0.1)
    assert any("of what the adapter does to the base, not 1" in problem for problem in report["problems"])
    # And with another template served than the file has.
    text = (stored.chat_template or "").replace("\n\n", "\n")
    other = StoredTemplate(**{**stored.model_dump(), "chat_template": text, "fingerprint": ""})
    report = gguf.read_back(lora.base, "bf16", other, lora.expected, tokenizer=tokenizer, tools=TOOLS)
    assert any("renders a conversation otherwise than it is served" in problem for problem in report["problems"])


def test_another_vocabulary_is_caught(lora: Lora, tmp_path: Path) -> None:
    import numpy as np

    rows = tmp_path / "0.npy"
    np.save(rows, np.zeros((2, 7), np.float32))
    request = {"file": str(lora.base), "rows": [[1, 2]], "logprobs": [str(rows)], "bases": [], "ends": []}
    with pytest.raises(JobFailure, match="tokens in its vocabulary, the adapter 7") as caught:
        llama_cpp.run("compare", request, TOOLS)
    assert caught.value.code == "unsupported"


def test_an_unknown_tokenizer_is_told_by_its_form_only_if_it_then_makes_the_same_tokens(
    lora: Lora, tiny_base: Path, tmp_path: Path
) -> None:
    file = json.loads((tiny_base / "tokenizer.json").read_text())
    assert derive_pre_tokenizer(file) == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = file["pre_tokenizer"]
    several = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    assert derive_pre_tokenizer({**file, "pre_tokenizer": several}) == "smollm"
    for other in ({"type": "Whitespace"}, {**byte_level, "add_prefix_space": True}, None):
        assert derive_pre_tokenizer({**file, "pre_tokenizer": other}) is None
    # The file was made for a tokenizer that keeps digits together: this one's tokens differ.
    (tmp_path / "tokenizer.json").write_text(json.dumps({**file, "pre_tokenizer": several}))
    (tmp_path / "tokenizer_config.json").write_text((tiny_base / "tokenizer_config.json").read_text())
    other_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    gguf.prove_tokenizer(lora.base, "gpt-2", lora.tokenizer, [], TOOLS)
    with pytest.raises(JobFailure, match="splits texts differently") as caught:
        gguf.prove_tokenizer(lora.base, "gpt-2", other_tokenizer, [], TOOLS)
    assert caught.value.code == "unsupported"
