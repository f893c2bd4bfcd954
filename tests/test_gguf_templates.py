"""llama.cpp makes of a GGUF file's template and tokens what lorry serves; Ollama's Modelfile says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as gguf_py
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from service.settings import Settings
from service.templates import StoredTemplate, render_generation
from tests.export_kit import chat_template
from worker import base_model
from worker.data.stored import base_template
from worker.export import gguf, gguf_template, llama_cpp
from worker.export.gguf_ollama import go_template, turns_of, write_modelfile

TOOLS = llama_cpp.find(Settings(torch_threads=1))
LLAMA_3 = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Cutting Knowledge Date: December 2023\n\n' }}"
    "{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
NO_BOS = (
    "{% for m in messages %}\n[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def ask(file: Path, stored: StoredTemplate, tokenizer: Any) -> list[str]:
    """What llama.cpp does otherwise than lorry serves."""
    request = {"file": str(file), "context": 256, "calls": gguf_template.calls(stored)}
    return list(gguf_template.problems(stored, tokenizer, llama_cpp.run("serve", request, TOOLS)))


@pytest.fixture(scope="module")
def tiny_file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose tokenizer puts BOS in front, with its own template."""
    out = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    gguf.convert(tiny_base, out, "f32", name="t", template=chat_template(tiny_base), tokenizer=tokenizer, tools=TOOLS)
    return out


def with_template(file: Path, stored: StoredTemplate, tokenizer: Any, out: Path) -> Path:
    """A copy of a file with another template's metadata, as the converter is told to write it."""
    said = gguf_template.metadata(stored, tokenizer)
    keys = gguf_py.Keys.Tokenizer
    new = {
        keys.ADD_BOS: MetadataDetails(gguf_py.GGUFValueType.BOOL, said["add"]["bos"]),
        **{
            getattr(keys, f"{name.upper()}_ID"): MetadataDetails(gguf_py.GGUFValueType.UINT32, number)
            for name, number in said["token_ids"].items()
        },
    }
    if said["chat_template"] is not None:
        new[keys.CHAT_TEMPLATE] = MetadataDetails(gguf_py.GGUFValueType.STRING, said["chat_template"])
    writer = gguf_py.GGUFWriter(out, "llama")
    removed = [] if said["chat_template"] is not None else [keys.CHAT_TEMPLATE]
    copy_with_new_metadata(gguf_py.GGUFReader(file), writer, new, removed)
    return out


def prompt_template(base: Path, **changes: Any) -> StoredTemplate:
    chat = chat_template(base)
    tokens = {name: getattr(chat, name) for name in ("eos", "bos_token", "eos_token", "pad_token", "stop")}
    return StoredTemplate(**{"kind": "prompt", "bos": chat.raw_bos, **tokens, **changes})


TEMPLATES = {
    "llama-3": lambda base: chat_template(
        base, chat_template=LLAMA_3, eos="<|eot_id|>", eos_token="<|eot_id|>", stop=["<|eot_id|>", "<|eos|>"]
    ),
    "no BOS in the template": lambda base: chat_template(base, chat_template=NO_BOS, bos="<|bos|>"),
    "system message": lambda base: chat_template(base, system='Answer in "one" line\\n.'),
    "prompt with one field": lambda base: prompt_template(base, prompt="### Q:\n{q}\n\n### A:\n", response="{a}"),
    "prompt with two fields": lambda base: prompt_template(base, prompt="# {title}\n\n{text}\n"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_llama_cpp_renders_what_is_served_and_makes_the_same_tokens(
    name: str, tiny_base: Path, tiny_file: Path, tmp_path: Path
) -> None:
    stored, tokenizer = TEMPLATES[name](tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    file = with_template(tiny_file, stored, tokenizer, tmp_path / "x.gguf")
    assert ask(file, stored, tokenizer) == []
    if name == "llama-3":  # the file it was made from has another template, and a tokenizer that adds BOS
        other = ask(tiny_file, stored, tokenizer)
        assert any("renders a conversation otherwise" in problem for problem in other)
        bare = StoredTemplate(**{**stored.model_dump(), "raw_bos": "", "fingerprint": ""})
        assert any("makes other tokens" in problem for problem in ask(file, bare, tokenizer))


def test_the_built_in_models_tokenizer_and_template_are_llama_cpps_own(tmp_path: Path) -> None:
    tokenizer = base_model._tokenizer(base_model._gguf_file())
    folder = tmp_path / "smol"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored, file = base_template(tokenizer), tmp_path / "smol.gguf"
    gguf.convert(folder, file, "f32", name="smol", template=stored, tokenizer=tokenizer, tools=TOOLS)
    reader = gguf_py.GGUFReader(file)
    assert reader.get_field("tokenizer.ggml.pre").contents() == "smollm"  # type: ignore[union-attr]
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is False  # type: ignore[union-attr]
    assert ask(file, stored, tokenizer) == []
    assert "You are a helpful AI assistant named SmolLM" in (go_template(stored) or "")


def test_ollamas_template_is_the_served_one(tiny_base: Path) -> None:
    for name in ("llama-3", "system message", "no BOS in the template"):
        stored = TEMPLATES[name](tiny_base)
        turns = turns_of(stored)
        assert turns is not None
        assert turns.go() == go_template(stored)
        for roles in (["user"], ["system", "user"], ["user", "assistant", "user"]):
            messages = [{"role": role, "content": f"{role}'s {i}"} for i, role in enumerate(roles)]
            assert stored.raw_bos + turns.render(messages) == render_generation(stored, messages=messages)  # type: ignore[operator]
    assert go_template(TEMPLATES["prompt with one field"](tiny_base)) == "### Q:\n{{ .Prompt }}\n\n### A:\n"
    assert go_template(TEMPLATES["prompt with two fields"](tiny_base)) is None


@pytest.mark.parametrize(
    "text",
    [
        NO_BOS + "{{ strftime_now('%d') }}",
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] if loop.last else m['content'][:3] }}\n{% endfor %}>",
        "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] }}\n{% endfor %}>",
    ],
    ids=["a date", "shortens what was said", "braces of Go"],
)
def test_a_template_that_ollama_has_no_words_for_is_left_to_the_file(
    text: str, tiny_base: Path, tmp_path: Path
) -> None:
    stored = chat_template(tiny_base, chat_template=text)
    assert go_template(stored) is None
    modelfile = write_modelfile(tmp_path / "a-Q8_0.gguf", stored, None).read_text()
    assert "# No TEMPLATE: the file's own" in modelfile
    assert "\nTEMPLATE" not in modelfile


def test_a_modelfile_says_what_it_cannot_say(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "a-Q8_0.gguf"
    text = write_modelfile(file, TEMPLATES["prompt with two fields"](tiny_base), 512).read_text()
    assert "(placeholders: title, text)" in text
    assert "\n#   # {title}\n" in text
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    text = write_modelfile(file, TEMPLATES["llama-3"](tiny_base), None).read_text()
    assert text.startswith("# ollama create NAME -f a-Q8_0.Modelfile\nFROM ./a-Q8_0.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|eot_id|>"\nPARAMETER stop "<|eos|>"\n' in text
    text = write_modelfile(file, chat_template(tiny_base, stop=["<|eos|>", '"\n']), None).read_text()
    assert 'PARAMETER stop "<|eos|>"\nPARAMETER stop """"\n"""\n' in text
