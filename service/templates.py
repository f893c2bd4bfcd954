"""How a row or a request becomes text: one template, stored with the adapter, used in training and in generation.

No torch and no transformers here: the API renders prompts with jinja2 alone. What these functions return is always
tokenised with add_special_tokens=False, so the text the engine sees is the text the adapter was trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal, Self

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, model_validator

from service.errors import Invalid


class StoredTemplate(BaseModel):
    """A template with all that is needed to render it again; lorry_template.json beside an adapter's weights.

    `bos` stands before a rendered prompt so that BOS is there exactly once: "" if the template writes it or if the
    tokenizer adds none. `raw_bos` does the same for a raw prompt, which no template writes a BOS for; None means `bos`.
    `eos` ends each training text, once. `stop` are the strings that end a generation; `eos` is among them.
    `fingerprint` is the SHA-256 of all other fields; it is filled in if left empty and checked if given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["prompt", "chat"]
    prompt: str | None = None
    response: str | None = None
    chat_template: str | None = None
    chat_template_name: str | None = None
    system: str | None = None
    bos: str = ""
    raw_bos: str | None = None
    eos: str
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    stop: list[str]
    fingerprint: str = ""

    @model_validator(mode="before")
    @classmethod
    def _add_fingerprint(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("fingerprint"):
            return data
        fields = {name: data.get(name, field.default) for name, field in cls.model_fields.items()}
        return {**data, "fingerprint": _digest(fields)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "prompt" and self.prompt is None:
            raise ValueError("prompt: a template of kind 'prompt' needs it")
        if self.kind == "chat" and self.chat_template is None:
            raise ValueError("chat_template: a template of kind 'chat' needs it")
        if self.eos not in self.stop:
            raise ValueError("stop: must contain eos")
        if self.fingerprint != _digest(self.model_dump()):
            raise ValueError("fingerprint: does not belong to this template")
        return self


def _digest(fields: Mapping[str, Any]) -> str:
    content = {k: v for k, v in sorted(fields.items()) if k != "fingerprint"}
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True, default=str).encode()).hexdigest()


# Prompt templates


@lru_cache(maxsize=256)
def _parts(text: str) -> tuple[tuple[str, str | None], ...]:
    """Split into (literal, placeholder after it or None), in order. Raises ValueError with the position."""
    parts: list[tuple[str, str | None]] = []
    literal: list[str] = []
    at = 0
    while at < len(text):
        char = text[at]
        if char in "{}" and text[at : at + 2] == char * 2:
            literal.append(char)
            at += 2
        elif char == "{":
            end = text.find("}", at)
            name = text[at + 1 : end]
            if end < 0 or "{" in name:
                raise ValueError(f"'{{' at character {at + 1} is never closed (write '{{{{' for a literal brace)")
            if not name.strip():
                raise ValueError(f"empty placeholder at character {at + 1} (write '{{{{}}}}' for literal braces)")
            parts.append(("".join(literal), name))
            literal = []
            at = end + 1
        elif char == "}":
            raise ValueError(f"'}}' at character {at + 1} closes nothing (write '}}}}' for a literal brace)")
        else:
            literal.append(char)
            at += 1
    parts.append(("".join(literal), None))
    return tuple(parts)


def fields_of(text: str) -> list[str]:
    """Columns a prompt template names, each once, in order. Raises ValueError with a malformed brace's position."""
    return list(dict.fromkeys(name for _, name in _parts(text) if name is not None))


def fill(text: str, row: Mapping[str, Any]) -> str:
    """Put a row's values into a prompt template.

    Raises KeyError naming a column the row lacks, ValueError for a null and for a value that is not text, a number or
    a date.
    """
    return "".join(_fill(_parts(text), row))


def _fill(parts: Sequence[tuple[str, str | None]], row: Mapping[str, Any]) -> Iterator[str]:
    for literal, name in parts:
        yield literal
        if name is not None:
            yield _text(name, row[name])


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise ValueError(f"column '{name}' is null")
    if isinstance(value, (bool, int, float, Decimal, date, datetime)):
        return str(value)
    raise ValueError(f"column '{name}' is {kind_of(value)}, expected text")


def kind_of(value: Any) -> str:
    """A value's type in JSON's words, for messages."""
    if value is None:
        return "null"
    kinds: tuple[tuple[Any, str], ...] = (
        ((list, tuple), "a list"), (Mapping, "an object"), (str, "text"), (bool, "a boolean"), ((int, float), "a number")
    )  # fmt: skip
    return next((word for kind, word in kinds if isinstance(value, kind)), type(value).__name__)


# Chat templates


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the answer; here it only has to render."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=64)
def compile_chat(text: str) -> jinja2.Template:
    """Compile a chat template as transformers does. Raises ValueError with the line of a syntax error."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return env.from_string(text)
    except jinja2.TemplateSyntaxError as e:
        raise ValueError(f"chat template, line {e.lineno}: {e.message}") from None


def normalise(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """OpenAI messages with text parts joined into one string. Raises Invalid with `param` naming the member."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise Invalid("messages: a list with at least one message", param="messages")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise Invalid(f"messages.{i} is {kind_of(message)}, expected an object", param=f"messages.{i}")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise Invalid(f"messages.{i}.role is missing or not text", param=f"messages.{i}.role")
        # Columnar files give every message every member that any message has: those without a value are none.
        clean = {k: v for k, v in message.items() if v is not None}
        clean["content"] = _content(message.get("content"), i, optional=bool(clean.get("tool_calls")))
        out.append(clean)
    return out


def _content(content: Any, i: int, *, optional: bool) -> str:
    param = f"messages.{i}.content"
    if isinstance(content, str):
        return content
    if content is None:
        if optional:
            return ""
        raise Invalid(f"{param} is missing or null", param=param)
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise Invalid(f"{param}: only parts of type 'text' are taken", param=param)
        return "".join(str(text) for text in texts)
    raise Invalid(f"{param} is {kind_of(content)}, expected text", param=param)


def render_messages(
    t: StoredTemplate,
    messages: Sequence[Any],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Render a conversation with the chat template, `t.system` put in front if the conversation has no system message.

    Raises Invalid with `param` for a malformed message and for a conversation that the template refuses.
    """
    if t.chat_template is None:
        raise Invalid("messages: this adapter has no chat template", param="messages")
    chat = normalise(messages)
    if t.system is not None and not any(m["role"] in ("system", "developer") for m in chat):
        chat.insert(0, {"role": "system", "content": t.system})
    tokens = {name: getattr(t, name) for name in ("bos_token", "eos_token", "pad_token")}
    try:
        return compile_chat(t.chat_template).render(
            messages=chat,
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{name: token for name, token in tokens.items() if token is not None},
        )
    except ValueError as e:
        raise Invalid(str(e), param="messages") from None
    except (
        jinja2.TemplateError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as e:
        raise Invalid(f"messages: the chat template refuses them: {e}", param="messages") from None


# Generation


def with_bos(bos: str | None, text: str) -> str:
    """`text` with BOS in front exactly once: a text that already begins with it stays as it is."""
    return text if not bos or text.startswith(bos) else bos + text


def render_generation(
    t: StoredTemplate,
    *,
    prompt: str | None = None,
    messages: Sequence[Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The full text to generate from, BOS included once; give exactly one of prompt, messages and inputs.

    - prompt: as it is.
    - inputs: the prompt template filled with them. A template without a response may be cut short: the text ends
      before the first placeholder that inputs does not give, so "### {title}\\n\\n{text}" with a title continues
      with the text.
    - messages: rendered with the chat template, with the generation prompt. A prompt template with exactly one
      placeholder takes them too: the last user message fills it, the others are left out.

    Raises Invalid with `param`.
    """
    ways = {"prompt": prompt, "messages": messages, "inputs": inputs}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise Invalid("give exactly one of prompt, messages and inputs", param=given[1] if given else "prompt")
    if tools and (messages is None or t.kind != "chat"):
        raise Invalid("tools: only with messages and an adapter that has a chat template", param="tools")
    if prompt is not None:
        return with_bos(t.bos if t.raw_bos is None else t.raw_bos, prompt)
    if inputs is not None:
        return with_bos(t.bos, _render_inputs(t, inputs))
    assert messages is not None
    if t.kind == "chat":
        return with_bos(t.bos, render_messages(t, messages, add_generation_prompt=True, tools=tools))
    return with_bos(t.bos, _render_inputs(t, {_only_field(t): _last_user(messages)}))


def _only_field(t: StoredTemplate) -> str:
    assert t.prompt is not None
    names = fields_of(t.prompt)
    if len(names) != 1:
        raise Invalid(
            f"messages: this adapter has a prompt template with {len(names)} placeholders "
            f"({', '.join(names) or 'none'}), not a chat template; give inputs",
            param="messages",
        )
    return names[0]


def _last_user(messages: Sequence[Any]) -> str:
    for message in reversed(normalise(messages)):
        if message["role"] == "user":
            return str(message["content"])
    raise Invalid("messages: none of them is the user's", param="messages")


def _render_inputs(t: StoredTemplate, inputs: Mapping[str, Any]) -> str:
    if t.kind == "chat" or t.prompt is None:
        raise Invalid("inputs: this adapter has a chat template; give messages", param="inputs")
    names = fields_of(t.prompt)
    for name in inputs:
        if name not in names:
            raise Invalid(
                f"inputs.{name}: the template has no such placeholder, only {', '.join(names)}", param=f"inputs.{name}"
            )
    missing = next((name for name in names if name not in inputs), None)
    if missing is not None and t.response is not None:
        raise Invalid(f"inputs.{missing}: missing", param=f"inputs.{missing}")
    parts: list[tuple[str, str | None]] = []
    for literal, placeholder in _parts(t.prompt):
        parts.append((literal, None if placeholder == missing else placeholder))
        if missing is not None and placeholder == missing:
            break
    used = {name for _, name in parts}
    for name in inputs:
        if name not in used:
            raise Invalid(f"inputs.{name}: stands after {missing}, which is not given", param=f"inputs.{name}")
    try:
        return "".join(_fill(parts, inputs))
    except ValueError as e:
        bad = next(n for n in names if n in inputs and f"column '{n}'" in str(e))
        raise Invalid(str(e).replace(f"column '{bad}'", f"inputs.{bad}"), param=f"inputs.{bad}") from None
