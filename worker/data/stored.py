"""From a spec's template and a tokenizer to the StoredTemplate that is kept with the adapter."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from service.errors import Invalid, JobFailure
from service.specs import TemplateSpec
from service.templates import StoredTemplate, compile_chat, fields_of, render_messages

# Unsloth's "zephyr" marks turns with plain text that no Zephyr tokenizer has as a token.
_PLAIN_TEXT = {"zephyr"}
_MARKER = re.compile(r"<\|?[A-Za-z0-9_]+\|?>")
_PROBE = "lorryprobe"


def store_template(spec: TemplateSpec, tokenizer: Any) -> StoredTemplate:
    """Resolve a spec's template against a tokenizer.

    Raises JobFailure("invalid_spec") for a malformed template, an unknown name, a tokenizer without EOS or chat
    template, and a named template whose tokens the tokenizer does not have.
    """
    if not tokenizer.eos_token:
        raise JobFailure("invalid_spec", "the model's tokenizer has no EOS token, so no text could end")
    if spec.prompt is not None:
        return _prompt(spec, tokenizer)
    assert spec.chat_template is not None
    text, name, eos = _chat_text(spec, tokenizer)
    return _chat(text, name, spec.system, eos, tokenizer)


def base_template(tokenizer: Any) -> StoredTemplate:
    """The template of a base model as it comes: its tokenizer's chat template, or a bare prompt if it has none."""
    if _own_chat_template(tokenizer) is None:
        return store_template(TemplateSpec(prompt="{text}", response=None, chat_template=None, system=None), tokenizer)
    return store_template(TemplateSpec(prompt=None, response=None, chat_template="default", system=None), tokenizer)


def configure(tokenizer: Any, template: StoredTemplate) -> None:
    """Make a tokenizer's chat template and EOS those of the stored template, for folders saved with it."""
    if template.chat_template is not None:
        tokenizer.chat_template = template.chat_template
    if tokenizer.eos_token != template.eos:
        tokenizer.eos_token = template.eos


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS in front of a text."""
    ids = tokenizer("")["input_ids"]
    return tokenizer.bos_token_id is not None and list(ids[:1]) == [tokenizer.bos_token_id]


def _prompt(spec: TemplateSpec, tokenizer: Any) -> StoredTemplate:
    names: list[str] = []
    for field, text in (("prompt", spec.prompt), ("response", spec.response)):
        try:
            names += fields_of(text or "")
        except ValueError as e:
            raise JobFailure("invalid_spec", f"dataset.template.{field}: {e}") from None
    if not names:
        raise JobFailure("invalid_spec", "dataset.template.prompt: names no column, so all rows would be the same text")
    if spec.response is not None and not fields_of(spec.response):
        raise JobFailure("invalid_spec", "dataset.template.response: names no column, so all answers would be the same")
    assert spec.prompt is not None
    raw_bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    return StoredTemplate(
        kind="prompt",
        prompt=spec.prompt,
        response=spec.response,
        bos="" if raw_bos and spec.prompt.startswith(raw_bos) else raw_bos,
        raw_bos=raw_bos,
        eos=tokenizer.eos_token,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        stop=[tokenizer.eos_token],
    )


def _chat(text: str, name: str | None, system: str | None, eos: str, tokenizer: Any) -> StoredTemplate:
    try:
        compile_chat(text)
    except ValueError as e:
        raise JobFailure("invalid_spec", f"dataset.template.chat_template: {e}") from None
    raw_bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    draft = StoredTemplate(
        kind="chat",
        chat_template=text,
        chat_template_name=name,
        system=system,
        raw_bos=raw_bos,
        eos=eos,
        bos_token=tokenizer.bos_token,
        eos_token=eos,
        pad_token=tokenizer.pad_token,
        stop=[eos],
    )
    ask, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}
    probes = [_probe(draft, chat) for chat in ([ask, answer], [ask, answer, ask])]
    if name not in _PLAIN_TEXT and name not in (None, "default"):
        _check_markers(name, [p for p in probes if p], tokenizer)
    writes_bos = bool(raw_bos) and any(p.startswith(raw_bos) for p in probes if p)
    stop = dict.fromkeys([eos, *_turn_ends(probes, tokenizer), tokenizer.eos_token])
    return StoredTemplate.model_validate(
        draft.model_dump() | {"bos": "" if writes_bos else raw_bos, "stop": list(stop), "fingerprint": ""}
    )


def _probe(t: StoredTemplate, chat: list[dict[str, str]]) -> str | None:
    """Render a small conversation; None if the template refuses it (it may demand a system message, say)."""
    try:
        return render_messages(t, chat, add_generation_prompt=False)
    except Invalid:
        return None


def _turn_ends(probes: list[str | None], tokenizer: Any) -> Iterable[str]:
    """Special tokens the template writes right after an answer: at the end of a conversation, and within one.

    The second counts only where there is a first: otherwise it may be the head of the next turn.
    """
    special = sorted(special_tokens(tokenizer), key=len, reverse=True)
    for probe in probes:
        tail = (probe or "").rpartition(_PROBE)[2].lstrip()
        found = next((token for token in special if tail.startswith(token)), None)
        if found is None:
            return
        yield found


def special_tokens(tokenizer: Any) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {str(token.content) for token in added if token.special} | {str(t) for t in tokenizer.all_special_tokens}


# Where a chat template comes from


def _chat_text(spec: TemplateSpec, tokenizer: Any) -> tuple[str, str | None, str]:
    """(Jinja text, name or None, EOS)."""
    given = spec.chat_template
    assert given is not None
    if given == "default":
        own = _own_chat_template(tokenizer)
        if own is None:
            raise JobFailure(
                "invalid_spec",
                "dataset.template.chat_template: 'default' is the model's own, and this model's tokenizer has none; "
                "give a name or a Jinja string",
            )
        return own, "default", tokenizer.eos_token
    if "{{" in given or "{%" in given:
        return given, None, tokenizer.eos_token
    return _named(given, spec.system, tokenizer)


def _own_chat_template(tokenizer: Any) -> str | None:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return own or None


def _named(name: str, system: str | None, tokenizer: Any) -> tuple[str, str, str]:
    """One of Unsloth's templates. As in its get_chat_template some of them (chatml, gemma) bring their own EOS.

    Unsloth renames a token of the vocabulary where that EOS is not in it; here a row of the embedding matrix keeps its
    name, so the tokens must be there.
    """
    from unsloth.chat_templates import CHAT_TEMPLATES, DEFAULT_SYSTEM_MESSAGE

    if name not in CHAT_TEMPLATES:
        near = difflib.get_close_matches(name, CHAT_TEMPLATES, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"those there are: default, {', '.join(sorted(CHAT_TEMPLATES))}"
        )
        raise JobFailure("invalid_spec", f"dataset.template.chat_template: no template is named '{name}'; {hint}")
    text, stop_word, brings_eos = CHAT_TEMPLATES[name][:3]
    if isinstance(stop_word, (tuple, list)):
        stop_word = stop_word[1]  # with the renaming of tokens before it
    if "{system_message}" in text:
        message = system if system is not None else DEFAULT_SYSTEM_MESSAGE.get(name)
        if message is None:
            raise JobFailure("invalid_spec", f"dataset.template.system: the template '{name}' needs a system message")
        text = text.replace("{system_message}", _jinja_literal(message))
    if not brings_eos or stop_word == "eos_token":
        return text, name, tokenizer.eos_token
    if stop_word not in tokenizer.get_vocab():
        raise _not_in_vocabulary(name, [stop_word])
    return text, name, stop_word


def _jinja_literal(text: str) -> str:
    # It stands inside a quoted Jinja string.
    return text.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"').replace("\r", "\\r")


def _check_markers(name: str | None, probes: list[str], tokenizer: Any) -> None:
    vocab = tokenizer.get_vocab()
    unknown = {marker for probe in probes for marker in _MARKER.findall(probe) if marker not in vocab}
    if unknown:
        raise _not_in_vocabulary(name, sorted(unknown))


def _not_in_vocabulary(name: str | None, tokens: list[str]) -> JobFailure:
    return JobFailure(
        "invalid_spec",
        f"dataset.template.chat_template: '{name}' is written with {', '.join(tokens)}, which this model's "
        "tokenizer does not have as tokens; take 'default', another name or a Jinja string",
    )
