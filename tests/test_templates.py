"""One stored template renders training text and prompts."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.errors import Invalid
from service.templates import StoredTemplate, compile_chat, fields_of, fill, render_generation, render_messages

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def prompt_template(prompt: str, response: str | None = None, **kw: Any) -> StoredTemplate:
    fields = {"bos": "<s>", "eos": "</s>", "stop": ["</s>"], "bos_token": "<s>", "eos_token": "</s>"} | kw
    return StoredTemplate(kind="prompt", prompt=prompt, response=response, **fields)


def chat_template(text: str = CHATML, **kw: Any) -> StoredTemplate:
    fields = {"eos": "</s>", "stop": ["</s>"], "bos_token": "<s>", "eos_token": "</s>"} | kw
    return StoredTemplate(kind="chat", chat_template=text, **fields)


def test_placeholders_are_named_once_and_in_order() -> None:
    assert fields_of("### {title}\n\n{text} {title} {{literal}} {a column, with: anything!}") == [
        "title",
        "text",
        "a column, with: anything!",
    ]


@pytest.mark.parametrize(
    ("text", "position"),
    [("ab {c", "character 4"), ("ab } c", "character 4"), ("{}", "character 1"), ("{a {b}}", "character 1")],
)
def test_a_malformed_placeholder_is_named_by_its_position(text: str, position: str) -> None:
    with pytest.raises(ValueError, match=position):
        fields_of(text)


def test_filling_keeps_text_numbers_and_braces() -> None:
    assert fill("{{{n}}} {a}", {"n": 3, "a": "x {b} y"}) == "{3} x {b} y"


def test_filling_names_what_a_row_lacks() -> None:
    with pytest.raises(KeyError, match="text"):
        fill("{text}", {"title": "x"})
    with pytest.raises(ValueError, match="column 'text' is null"):
        fill("{text}", {"text": None})
    with pytest.raises(ValueError, match="column 'text' is a list, expected text"):
        fill("{text}", {"text": ["x"]})


def test_a_template_survives_its_json_with_the_same_fingerprint() -> None:
    t = prompt_template("{a}", stop=["</s>", "<|eot|>"])
    again = StoredTemplate.model_validate_json(t.model_dump_json())
    assert again == t
    assert len(t.fingerprint) == 64


def test_each_field_is_in_the_fingerprint_and_a_wrong_one_is_refused() -> None:
    t = prompt_template("{a}", "{b}")
    others = [
        prompt_template("{c}", "{b}"),
        prompt_template("{a}", "{c}"),
        prompt_template("{a}", "{b}", bos=""),
        prompt_template("{a}", "{b}", raw_bos="<s>"),
        prompt_template("{a}", "{b}", stop=["</s>", "x"]),
        prompt_template("{a}", "{b}", pad_token="<pad>"),
    ]
    assert len({x.fingerprint for x in [t, *others]}) == 1 + len(others)
    with pytest.raises(ValidationError, match="fingerprint"):
        StoredTemplate.model_validate(t.model_dump() | {"prompt": "{x}"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "prompt", "eos": "e", "stop": ["e"]}, "prompt: "),
        ({"kind": "chat", "eos": "e", "stop": ["e"]}, "chat_template: "),
        ({"kind": "prompt", "prompt": "{a}", "eos": "e", "stop": []}, "stop: must contain eos"),
        ({"kind": "prompt", "prompt": "{a}", "eos": "e", "stop": ["e"], "extra": 1}, "extra"),
        ({"kind": "prompt", "prompt": "{a}"}, "eos"),
    ],
)
def test_a_template_that_cannot_render_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StoredTemplate(**fields)


# Generation


def test_a_raw_prompt_gets_bos_once() -> None:
    t = prompt_template("### {title}\n\n{text}")
    assert render_generation(t, prompt="x") == "<s>x"
    assert render_generation(t, prompt="<s>x") == "<s>x"
    assert render_generation(chat_template(bos="", raw_bos="<s>"), prompt="x") == "<s>x"
    assert render_generation(chat_template(bos="", raw_bos=""), prompt="x") == "x"


def test_inputs_fill_the_template_up_to_the_first_one_not_given() -> None:
    t = prompt_template("### {title}\n\n{text}\n-- {title}")
    assert render_generation(t, inputs={"title": "Python"}) == "<s>### Python\n\n"
    assert render_generation(t, inputs={"title": "Python", "text": "is"}) == "<s>### Python\n\nis\n-- Python"
    assert render_generation(t, inputs={}) == "<s>### "


def test_a_template_with_a_response_needs_all_its_inputs() -> None:
    t = prompt_template("Q: {q} ({level})\nA: ", "{a}")
    assert render_generation(t, inputs={"q": "why?", "level": 1}) == "<s>Q: why? (1)\nA: "
    with pytest.raises(Invalid, match=r"inputs\.level: missing") as e:
        render_generation(t, inputs={"q": "why?"})
    assert e.value.param == "inputs.level"


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"inputs": {"nope": "x"}}, "inputs.nope"),
        ({"inputs": {"text": "x"}}, "inputs.text"),  # stands after title, which is not given
        ({"inputs": {"title": None}}, "inputs.title"),
        ({"inputs": {"title": ["x"]}}, "inputs.title"),
        ({"messages": HELLO}, "messages"),  # two placeholders
        ({"prompt": "x", "inputs": {}}, "inputs"),
        ({"prompt": "x", "tools": [{}]}, "tools"),
        ({}, "prompt"),
    ],
)
def test_what_a_prompt_template_cannot_take_names_the_field(arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as e:
        render_generation(prompt_template("### {title}\n\n{text}"), **arguments)
    assert (e.value.status, e.value.param) == (422, param)


def test_the_last_user_message_fills_the_only_placeholder() -> None:
    t = prompt_template("Q: {question}\nA: ", "{answer}")
    chat = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "why?"}]
    assert render_generation(t, messages=chat) == "<s>Q: why?\nA: "
    with pytest.raises(Invalid, match="none of them is the user's"):
        render_generation(t, messages=[{"role": "system", "content": "x"}])


def test_messages_are_rendered_with_the_generation_prompt_and_bos_once() -> None:
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert render_generation(chat_template(), messages=HELLO) == expected
    assert render_generation(chat_template(bos="<s>"), messages=HELLO) == "<s>" + expected
    assert render_generation(chat_template("{{ bos_token }}" + CHATML, bos="<s>"), messages=HELLO) == "<s>" + expected


def test_inputs_are_refused_by_a_chat_template() -> None:
    with pytest.raises(Invalid, match="give messages"):
        render_generation(chat_template(), inputs={"a": "x"})


# Chat


def test_the_stored_system_message_stands_before_conversations_without_one() -> None:
    t = chat_template(system="Be brief.")
    assert render_messages(t, HELLO, add_generation_prompt=False).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    own = [{"role": "system", "content": "Be long."}, *HELLO]
    assert "Be brief." not in render_messages(t, own, add_generation_prompt=False)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    t = chat_template()
    assert render_messages(t, [{"role": "user", "content": parts}], add_generation_prompt=True) == render_messages(
        t, HELLO, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages.0"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": 1, "content": "x"}], "messages.0.role"),
        ([*HELLO, {"role": "user"}], "messages.1.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": {"a": 1}}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content"),
    ],
)
def test_a_malformed_message_is_named_by_its_path(messages: Any, param: str) -> None:
    with pytest.raises(Invalid) as e:
        render_messages(chat_template(), messages, add_generation_prompt=True)
    assert e.value.param == param


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7]['content'] }}",
        "{{ 1 + messages[0]['content'] }}",
        "{{ messages.append({}) }}",  # the sandbox: templates change nothing
        "{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}",
        "{{ 1 // 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_a_clear_refusal(text: str) -> None:
    with pytest.raises(Invalid, match="the chat template refuses them") as e:
        render_messages(chat_template(text), HELLO, add_generation_prompt=True)
    assert e.value.param == "messages"


def test_a_syntax_error_is_named_by_its_line() -> None:
    with pytest.raises(ValueError, match="line 2"):
        compile_chat("{% if true %}\n{% endfro %}")


def test_tools_reach_the_template() -> None:
    t = chat_template("{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}")
    tool = {"type": "function", "function": {"name": "né<b>"}}
    assert (
        render_generation(t, messages=HELLO, tools=[tool])
        == '[{"type": "function", "function": {"name": "né<b>"}}]hello'
    )
    assert render_generation(t, messages=HELLO) == "hello"


def test_templates_render_as_in_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    text = """{{- bos_token }}
    {%- for m in messages %}
        {% if loop.index0 > 5 %}{% break %}{% endif %}
        {% generation %}
        {{- '[' + m.role + ']' + m.content + eos_token }}
        {% endgeneration %}
    {% endfor %}
    {{ strftime_now('%Y')[:2] }} {{ messages | tojson(indent=2) }}
    {%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""
    chat = [{"role": "user", "content": "ä <b>"}, {"role": "assistant", "content": "x"}] * 4
    theirs, _ = render_jinja_template(
        [chat], chat_template=text, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert render_messages(chat_template(text), chat, add_generation_prompt=True) == theirs[0]
