"""A row becomes text: segments that are trained on or not, checked on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from service.errors import Invalid
from service.templates import StoredTemplate, fields_of, fill, kind_of, render_messages, with_bos
from worker.data.problems import RowError

# Text in order; the first is not an answer, the second is, and so on by turns. ("", text) is an answer alone.
Segments = list[str]
CHAT_COLUMNS = ("messages", "conversations")
_ROLES = {
    "human": "user", "user": "user", "system": "system", "developer": "developer",
    "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "model": "assistant", "assistant": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip


class Renderer:
    """Renders rows of one spec; `columns` are those it reads.

    `answers` says whether a row must hold an answer (instruction data). With `every_turn` each answer of a conversation
    becomes a segment of its own (train_on_responses_only), else only the last one.
    """

    def __init__(self, template: StoredTemplate, *, answers: bool, every_turn: bool) -> None:
        self.template = template
        self.answers = answers
        self.every_turn = every_turn
        texts = (template.prompt or "", template.response or "")
        self.prompt_fields, self.response_fields = (fields_of(text) for text in texts)
        fields = list(dict.fromkeys(self.prompt_fields + self.response_fields))
        self.columns = [*CHAT_COLUMNS, "tools"] if template.kind == "chat" else fields

    def missing(self, there: list[str]) -> list[str]:
        """Columns the template needs and the data do not have."""
        if self.template.kind == "prompt":
            return [name for name in self.columns if name not in there]
        return [] if any(name in there for name in CHAT_COLUMNS) else [" or ".join(CHAT_COLUMNS)]

    def __call__(self, row: Mapping[str, Any]) -> Segments:
        """Raises RowError saying what is wrong with the row."""
        segments = self._chat(row) if self.template.kind == "chat" else self._prompt(row)
        for text in segments:
            try:
                text.isascii() or text.encode()
            except UnicodeEncodeError as e:
                raise RowError(f"text that is not Unicode: half a surrogate pair ({text[e.start]!r})") from None
        return segments

    # Prompt templates

    def _prompt(self, row: Mapping[str, Any]) -> Segments:
        t = self.template
        try:
            prompt = with_bos(t.bos, fill(t.prompt or "", row))
            response = None if t.response is None else fill(t.response, row)
        except KeyError as e:
            raise RowError(f"column '{e.args[0]}' is missing") from None
        except ValueError as e:
            raise RowError(str(e)) from None
        if response is None:
            self._not_blank(row, self.prompt_fields[-1:])
            return ["", with_eos(t, prompt)]
        self._not_blank(row, self.prompt_fields)
        self._not_blank(row, self.response_fields)
        return [prompt, with_eos(t, response)]

    def _not_blank(self, row: Mapping[str, Any], names: list[str]) -> None:
        if names and not any(str(row[name]).strip() for name in names):
            what = f"column '{names[0]}' is" if len(names) == 1 else f"columns {', '.join(names)} are all"
            raise RowError(f"{what} empty")

    # Chat templates

    def _chat(self, row: Mapping[str, Any]) -> Segments:
        try:
            messages, tools = conversation(row), _parsed(row.get("tools"), "tools")
            return self._answers(messages, tools) if self.answers else self._whole(messages, tools)
        except Invalid as e:
            raise RowError(e.message) from None

    def _whole(self, messages: list[dict[str, Any]], tools: Any) -> Segments:
        text = render_messages(self.template, messages, add_generation_prompt=False, tools=tools)
        return ["", with_eos(self.template, with_bos(self.template.bos, text))]

    def _answers(self, messages: list[dict[str, Any]], tools: Any) -> Segments:
        t = self.template
        if messages[-1]["role"] != "assistant":
            raise RowError(f"the last message is the {messages[-1]['role']}'s, so there is no answer to train on")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if turns[0] == 0:
            raise RowError("the first message is the assistant's, so there is nothing it answers")
        trained = [i for i in turns if messages[i].get("weight") != 0] if self.every_turn else turns[-1:]
        if not trained:
            raise RowError("every answer has weight 0, so there is none to train on")
        messages = messages[: trained[-1] + 1]  # nothing is trained behind it
        text = render_messages(t, messages, add_generation_prompt=False, tools=tools)
        spans = [self._span(text, messages, i, tools) for i in trained]
        start, end = spans[-1]
        if text[start:end].endswith(t.eos):
            text = text[:end]  # a line break after the EOS is no part of the answer
        text = with_eos(t, text)
        spans[-1] = (start, len(text))
        cuts = [at for span in spans for at in span]
        if cuts != sorted(cuts):
            raise RowError("the chat template renders the turns out of order, so answers cannot be told from prompts")
        segments = [text[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
        return [with_bos(t.bos, segments[0]), *segments[1:]]

    def _span(self, text: str, messages: list[dict[str, Any]], i: int, tools: Any) -> tuple[int, int]:
        """Where answer `i` stands in the rendered conversation, its end token included.

        It begins where the prompt of that turn ends: the messages before it rendered with the generation prompt, which
        is what the engine sends. It ends with the first end token, or where the messages up to it end.
        """
        t = self.template
        prompt = render_messages(t, messages[:i], add_generation_prompt=True, tools=tools)
        if not text.startswith(prompt):
            raise RowError(
                f"messages.{i}: the chat template does not write this answer behind its own generation prompt, so the "
                "answer cannot be told from the prompt"
            )
        last = i + 1 == len(messages)
        done = text if last else render_messages(t, messages[: i + 1], add_generation_prompt=False, tools=tools)
        limit = len(done) if text.startswith(done) else None
        ends = [at + len(stop) for stop in t.stop if (at := text.find(stop, len(prompt), limit)) >= 0]
        if ends:
            return len(prompt), min(ends)
        if limit is None:
            raise RowError(f"messages.{i}: the chat template does not show where the answer ends")
        return len(prompt), limit


def with_eos(t: StoredTemplate, text: str) -> str:
    """`text` with EOS at its end exactly once."""
    bare = text.rstrip()
    return bare if bare.endswith(t.eos) else text + t.eos


def conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's messages in OpenAI's form, from `messages` or `conversations`, which may be in either form.

    Raises RowError naming the member that is wrong.
    """
    name = next((c for c in CHAT_COLUMNS if row.get(c) is not None), None)
    if name is None:
        there = next((c for c in CHAT_COLUMNS if c in row), None)
        raise RowError(f"column '{there}' is null" if there else "columns messages and conversations are both missing")
    value = _parsed(row[name], name)
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        # The form older datasets give a list of objects in: {"from": [...], "value": [...]}.
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise RowError(f"column '{name}' is {kind_of(value)}, expected a list of messages")
    if not value:
        raise RowError(f"column '{name}' is empty")
    return [_message(message, f"{name}.{i}") for i, message in enumerate(value)]


def _message(message: Any, path: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError(f"{path} is {kind_of(message)}, expected an object")
    sharegpt = message.get("role") is None and "from" in message
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    role = message.get(role_key)
    if not isinstance(role, str):
        raise RowError(f"{path}.{role_key} is missing or not text")
    if sharegpt and role not in _ROLES:
        raise RowError(f"{path}.from is '{role}', expected human, gpt, system or tool")
    content = message.get(text_key)
    if not isinstance(content, (str, list, type(None))):
        raise RowError(f"{path}.{text_key} is {kind_of(content)}, expected text")
    blank = not (content.strip() if isinstance(content, str) else content)
    if blank and role != "system" and not message.get("tool_calls"):
        raise RowError(f"{path}.{text_key} is {'missing or null' if content is None else 'empty'}")
    if message.get("weight") not in (None, 0, 1):
        raise RowError(f"{path}.weight is {message['weight']!r}, expected 0 or 1")
    rest = {k: v for k, v in message.items() if k not in (role_key, text_key, "from", "value") and v is not None}
    return {**rest, "role": _ROLES.get(role, role), "content": content}


def _parsed(value: Any, name: str) -> Any:
    """Lists stay; text is taken for JSON, since a CSV file has no other way to hold a list."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as e:
        raise RowError(f"column '{name}' is text that is not JSON: {e}") from None
