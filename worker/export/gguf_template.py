"""What a GGUF file says of its template and special tokens, and whether llama.cpp makes of them what is served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.templates import StoredTemplate, fields_of, render_generation
from worker.export.template import PLAIN, portable, served_prompts, stop_ids

Call = tuple[str, dict[str, Any] | None]


def added_bos(template: StoredTemplate) -> str:
    """The BOS that a tokenizer puts in front of a text by itself, llama.cpp's too; "" if it does not."""
    return (template.bos if template.raw_bos is None else template.raw_bos) or ""


def metadata(template: StoredTemplate, tokenizer: Any) -> dict[str, Any]:
    """Overrides for the converter: chat_template, token_ids, and which tokens llama.cpp adds to a text by itself.

    llama.cpp knows three tokens that end a generation: EOS, and those that end a turn and a message.
    """
    known = tokenizer.get_vocab()
    ids = dict(zip(("eos", "eot", "eom"), stop_ids(template, tokenizer), strict=False))
    if template.bos_token in known:
        ids["bos"] = known[template.bos_token]
    return {
        "chat_template": portable(template),
        "token_ids": ids,
        "add": {"bos": bool(added_bos(template)), "eos": False},
    }


def served_texts(template: StoredTemplate) -> list[str]:
    """Prompts as lorry serves them: conversations, raw texts, and for a prompt template its fields filled in."""
    texts = [served for _, served in served_prompts(template)]
    texts += [render_generation(template, prompt=text) for text in PLAIN]
    if template.kind == "prompt":
        names = fields_of(template.prompt or "")
        texts.append(render_generation(template, inputs={name: f"What is {name}? 사과 12" for name in names}))
    return texts


def calls(template: StoredTemplate) -> list[Call]:
    """What to ask llama.cpp's server; `problems` judges the answers."""
    bos = added_bos(template)
    asked: list[Call] = [("/apply-template", {"messages": messages}) for messages, _ in served_prompts(template)]
    for text in served_texts(template):
        content = text.removeprefix(bos)  # that one is added by llama.cpp
        asked.append(("/tokenize", {"content": content, "add_special": True, "parse_special": True}))
    return asked


def problems(template: StoredTemplate, tokenizer: Any, answers: list[dict[str, Any]]) -> Iterator[str]:
    """What of the answers is not as served: prompts byte for byte, and their tokens."""
    prompts, texts = served_prompts(template), served_texts(template)
    bos = added_bos(template)
    for (_, served), answer in zip(prompts, answers[: len(prompts)], strict=True):
        # llama.cpp takes a BOS off that it will add when it makes tokens of the text.
        got = answer.get("answer", {}).get("prompt", answer.get("error"))
        if got not in (served, served.removeprefix(bos)):
            yield f"llama.cpp renders a conversation otherwise than it is served: {got!r:.200} instead of {served!r:.200}"
    for text, answer in zip(texts, answers[len(prompts) :], strict=True):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = answer.get("answer", {}).get("tokens")
        if ids != expected:
            yield f"llama.cpp makes other tokens of the served prompt {text!r:.120}: {ids} instead of {expected}"
