"""A Modelfile for Ollama beside a GGUF file, with the template in Go's syntax where it can be shown to be the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.errors import Invalid
from service.templates import StoredTemplate, fields_of, fill, render_messages
from worker.export.gguf_template import added_bos

Messages = Sequence[dict[str, str]]
ROLES = ("system", "user", "assistant")
_SAMPLES: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True)
class Turns:
    """A chat template that is nothing but a text before and after each message's content, by role."""

    before: dict[str, str]
    after: dict[str, str]
    start: str  # before the first message when it is no system message
    answer: str  # the generation prompt

    def render(self, messages: Messages) -> str:
        parts = [] if messages[0]["role"] == "system" else [self.start]
        parts += [self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages]
        return "".join(parts) + self.answer

    def go(self) -> str:
        """The same as a Go template over Ollama's .Messages."""
        lines = []
        if self.start:
            lines.append(f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.start}{{{{ end }}}}')
        lines.append("{{ range .Messages }}")
        for i, role in enumerate(ROLES):
            lines.append(f'{{{{ {"else if" if i else "if"} eq .Role "{role}" }}}}')
            lines.append(f"{self.before[role]}{{{{ .Content }}}}{self.after[role]}")
        lines.append("{{ end }}{{ end }}" + self.answer)
        return "".join(lines)


def turns_of(template: StoredTemplate) -> Turns | None:
    """Read a chat template's turns from what it renders; None if it does more than that, so that it cannot be told."""
    if template.chat_template is None or "strftime_now" in template.chat_template:
        return None

    def render(messages: Messages, answer: bool = False) -> str:
        text = render_messages(template, messages, add_generation_prompt=answer)
        return text.removeprefix(added_bos(template))

    names = ("Sys0", "Usr1", "Ast2", "Usr3")
    talk = [{"role": r, "content": n} for r, n in zip((*ROLES, "user"), names, strict=True)]
    try:
        whole, answered, short = render(talk), render(talk, True), render(talk[1:3])
        alone = render(talk[1:2])
        pieces, rest = [], whole
        for name in names:
            piece, found, rest = rest.partition(name)
            if not found:
                return None
            pieces.append(piece)
        after_user, after_assistant = rest, short.partition("Ast2")[2]
        before_assistant = pieces[2].removeprefix(after_user)
        before_user = pieces[3].removeprefix(after_assistant)
        turns = Turns(
            before={"system": pieces[0], "user": before_user, "assistant": before_assistant},
            after={"system": pieces[1].removesuffix(before_user), "user": after_user, "assistant": after_assistant},
            start=alone.partition("Usr1")[0].removesuffix(before_user),
            answer=answered.removeprefix(whole),
        )
        for roles in _SAMPLES:
            messages = [{"role": role, "content": f"some text {i}\nof {role}"} for i, role in enumerate(roles)]
            if turns.render(messages) != render(messages, True):
                return None
    except Invalid:
        return None
    return turns


def go_template(template: StoredTemplate) -> str | None:
    """The template in Ollama's language; None where there is no translation that is certain to be the same."""
    go = None
    if template.kind == "chat":
        turns = turns_of(template)
        go = turns.go() if turns else None
        plain = (
            "" if turns is None else "".join([*turns.before.values(), *turns.after.values(), turns.start, turns.answer])
        )
    else:
        names = fields_of(template.prompt or "")
        if len(names) == 1:
            before, _, after = fill(template.prompt or "", {names[0]: "\0"}).partition("\0")
            go, plain = f"{before}{{{{ .Prompt }}}}{after}", before + after
    return None if go is None or "{{" in plain or '"""' in go else go


def _quoted(text: str) -> str:
    """A Modelfile knows no escapes: three quotes where one would end early."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def write_modelfile(file: Path, template: StoredTemplate, context: int | None, *, lora: bool = False) -> Path:
    """Write <file's stem>.Modelfile beside a GGUF file; returns its path. `context`: num_ctx, in tokens."""
    lines = [f"# ollama create NAME -f {file.stem}.Modelfile"]
    if lora:
        lines += ["# A LoRA: after FROM comes the base model's GGUF file, or its name in Ollama.", "FROM ./base.gguf"]
        lines.append(f"ADAPTER ./{file.name}")
    else:
        lines.append(f"FROM ./{file.name}")
    go = go_template(template)
    if go is not None:
        lines.append(f'TEMPLATE """{go}"""')
    elif template.kind == "chat":
        lines += [
            "# No TEMPLATE: the file's own, tokenizer.chat_template, is the one that was trained with. Ollama takes it over",
            "# where it knows it; llama-server renders it as it is.",
        ]
    else:
        names = ", ".join(fields_of(template.prompt or "")) or "none"
        lines += [
            f"# Trained on a prompt template that Ollama has no words for (placeholders: {names}). Fill it in yourself:",
            *(f"#   {line}" for line in (template.prompt or "").splitlines()),
            'TEMPLATE """{{ .Prompt }}"""',
        ]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in template.stop]
    if context:
        lines.append(f"PARAMETER num_ctx {context}")
    path = file.with_name(f"{file.stem}.Modelfile")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
