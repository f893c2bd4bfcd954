"""The template travels: a chat template that renders by itself what lorry serves, and the check that it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from service.errors import Invalid, JobFailure
from service.templates import StoredTemplate, _parts, fields_of, render_generation, with_bos

# Written before a template that begins a line of its own: jinja's trim_blocks takes the line break away again, and
# lstrip_blocks then sees the template's first line as it was.
_LINE = "\n"
# Every content is read: llama.cpp puts a system message in front of the user's where a template does not look at it.
_LAST_USER = (
    "{%- set lorry = namespace(text='') %}{%- for message in messages %}{%- set text = message['content'] %}"
    "{%- if message['role'] == 'user' %}{%- set lorry.text = text %}{%- endif %}{%- endfor %}"
)
# Conversations every export is tried on; those that the served template refuses are left out.
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is a list?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}],
    [
        {"role": "user", "content": "  사과는 무엇입니까? {x} 🍎\n\n"},
        {"role": "assistant", "content": "A fruit."},
        {"role": "user", "content": "And <b>\"pears\"</b> & 'plums'?"},
    ],
]
PLAIN = ["What is a list?", "  사과 🍎\n{x}", "<b>\"pears\"</b> & 'plums'"]


def portable(t: StoredTemplate) -> str | None:
    """The chat template of an export: what lorry adds to a conversation (BOS, default system message) is part of it.

    A prompt template with one placeholder becomes a chat template that fills it with the last user message, as
    /generate does; one with several has none.
    """
    if t.kind == "prompt":
        return _of_prompt(t)
    assert t.chat_template is not None
    if not t.bos and t.system is None:
        return t.chat_template
    head = f"{{{{- {_literal(t.bos)} }}}}" if t.bos else ""
    if t.system is None:
        return f"{head}{{%- set lorry = true %}}{_LINE}{t.chat_template}"
    return (
        f"{head}{{%- set lorry = namespace(system=false) %}}{{%- for message in messages %}}"
        "{%- if message['role'] in ['system', 'developer'] %}{%- set lorry.system = true %}{%- endif %}{%- endfor %}"
        f"{{%- if not lorry.system %}}{{%- set messages = [{{'role': 'system', 'content': {_literal(t.system)}}}] + messages %}}"
        f"{{%- endif %}}{_LINE}{t.chat_template}"
    )


def _of_prompt(t: StoredTemplate) -> str | None:
    if len(fields_of(t.prompt or "")) != 1:
        return None
    out = [_LAST_USER]
    for i, (literal, name) in enumerate(_parts(t.prompt or "")):
        text = with_bos(t.bos, literal) if i == 0 else literal
        if text:
            out.append(f"{{{{- {_literal(text)} }}}}")
        if name is not None:
            out.append("{{- lorry.text }}")
    return "".join(out)


def _literal(text: str) -> str:
    """A Jinja string. JSON's escapes are Jinja's; other characters stay as they are."""
    return json.dumps(text, ensure_ascii=False)


def stop_ids(t: StoredTemplate, tokenizer: Any) -> list[int]:
    """Token ids that end a generation: the stop strings that are one token each, EOS first."""
    known = tokenizer.get_vocab()
    strings = dict.fromkeys([t.eos, *t.stop])
    return [known[s] for s in strings if s in known]


def prepare_tokenizer(tokenizer: Any, t: StoredTemplate, folder: Path) -> None:
    """Save the tokenizer into an export with the served template and its tokens."""
    tokenizer.chat_template = portable(t)
    for name in ("bos_token", "eos_token", "pad_token"):
        value = getattr(t, name)
        if value is not None and getattr(tokenizer, name) != value:
            setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    if tokenizer.chat_template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)


def served_prompts(t: StoredTemplate) -> list[tuple[list[dict[str, str]], str]]:
    """Conversations and the prompts lorry serves for them; none for a prompt template with several placeholders."""
    out = []
    for messages in CONVERSATIONS:
        try:
            out.append((messages, render_generation(t, messages=messages)))
        except Invalid:
            continue
    return out


def check(folder: Path, t: StoredTemplate, trained: Any) -> dict[str, Any]:
    """Compare what the export's tokenizer makes of conversations and raw prompts with what lorry serves.

    Byte for byte, and token for token with `trained`, the tokenizer of training. Raises JobFailure("export_mismatch").
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("bos_token", "eos_token", "pad_token"):
        stored, exported = getattr(t, name), getattr(tokenizer, name)
        if stored is not None and stored != exported:
            raise JobFailure("export_mismatch", f"template: {name} is {exported!r} in the export, {stored!r} as served")
    prompts = served_prompts(t)
    for messages, served in prompts:
        try:
            got = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # no template, or one that refuses what is served
            raise JobFailure("export_mismatch", f"template: the export renders no conversation: {error}") from error
        _same("conversation", got, served)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        _same_ids(tokenizer, ids, trained, served)
    if not prompts and tokenizer.chat_template is not None:
        raise JobFailure("export_mismatch", "template: the export has a chat template, which was not trained with")
    plain_equal = True
    for text in PLAIN:
        served = render_generation(t, prompt=text)
        _same_ids(tokenizer, tokenizer(served, add_special_tokens=False)["input_ids"], trained, served)
        # A tokenizer that adds more than BOS by itself cannot be told not to by a file: said, not refused.
        plain_equal &= tokenizer(text)["input_ids"] == trained(served, add_special_tokens=False)["input_ids"]
    return {"fingerprint": t.fingerprint, "conversations_equal": len(prompts), "plain_prompts_equal": plain_equal}


def _same(what: str, got: str, served: str) -> None:
    if got == served:
        return
    at = next((i for i, (a, b) in enumerate(zip(got, served, strict=False)) if a != b), min(len(got), len(served)))
    raise JobFailure(
        "export_mismatch",
        f"template: the export renders a {what} otherwise than it is served, from character {at}: "
        f"{got[at : at + 40]!r} instead of {served[at : at + 40]!r}",
    )


def _same_ids(tokenizer: Any, got: list[int], trained: Any, served: str) -> None:
    expected = trained(served, add_special_tokens=False)["input_ids"]
    if got != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
        )
        raise JobFailure(
            "export_mismatch",
            f"template: the export makes other tokens of a served prompt, from token {at}: "
            f"{tokenizer.convert_ids_to_tokens(got[at : at + 5])} instead of "
            f"{trained.convert_ids_to_tokens(expected[at : at + 5])}",
        )
