"""OpenAI's request bodies, with vLLM's further sampling fields. The API and the engine take the same ones.

Fields that would change the answer and are not served are errors, not silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

StopString = Annotated[str, Field(min_length=1, max_length=512)]
MAX_LOGPROBS = 20
MAX_CHOICES = 64
_ROLES = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool = Field(False, description="Send a last chunk with the token counts and no choices.")
    include_obfuscation: bool | None = Field(None, description="Accepted and without effect.")


class JsonSchema(Body):
    name: str = Field("response", max_length=64, description="Accepted and without effect.")
    description: str | None = Field(None, description="Accepted and without effect.")
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema", description="The JSON schema.")
    strict: bool | None = Field(None, description="Accepted: the schema is always kept to.")


class ResponseFormat(Body):
    """What the text has to be. Prompts should ask for it too: the model does not see the schema."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text: anything; json_object: a JSON object; json_schema: what the schema allows."
    )
    json_schema: JsonSchema | None = Field(None, description="With type json_schema.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema: goes with type 'json_schema', and that with it")
        return self

    @property
    def schema_of_text(self) -> dict[str, Any] | None:
        """The JSON schema the text must fit, or None for any text."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {"type": "object"}


class SamplingBody(Body):
    """What completions and chat completions have in common."""

    model: str = Field(min_length=1, description="An adapter's name, name@step for a checkpoint, or the base's name.")
    n: int = Field(
        1, ge=1, le=MAX_CHOICES, description="Completions for each prompt; with a seed, the i-th uses seed + i."
    )
    temperature: float | None = Field(None, ge=0, le=10, description="Divides the logits; 0 is greedy. Default: 1.")
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep the likeliest tokens that together have this probability, a fraction. Default: 1, off.",
    )
    top_k: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="Keep this many of the likeliest tokens; 0 or -1 for all. Default: 0."
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Drop tokens below this fraction of the likeliest one's probability. Default: 0, off.",
    )
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="Divides the logits of tokens seen in prompt or completion. Default: 1, off."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken from the logits of tokens already in the completion. Default: 0."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="The same for each time the token is there. Default: 0."
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**63 - 1,
        description="The same seed and request give the same tokens, whatever else runs.",
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=32)] | None = Field(
        None, description="Strings that end the text; they are not part of it."
    )
    stop_token_ids: Annotated[list[int], Field(max_length=256)] | None = Field(
        None, description="Tokens that end the text."
    )
    ignore_eos: bool = Field(False, description="Go on past the model's end token.")
    include_stop_str_in_output: bool = Field(False, description="Leave the stop string that ended the text at its end.")
    return_token_ids: bool | None = Field(None, description="Add token_ids to each choice.")
    stream: bool | None = Field(None, description="Server-sent events instead of one answer. Default: false.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, description="Accepted and without effect.")
    response_format: ResponseFormat | None = Field(
        None, description="Text, a JSON object, or JSON that a schema allows; tokens that would break it are not drawn."
    )
    logit_bias: dict[str, float] | None = Field(None, description="Not served; empty or null.")

    @model_validator(mode="after")
    def _common(self) -> Self:
        if self.logit_bias:
            raise ValueError("logit_bias: is not served")
        if self.ignore_eos and self.text_schema is not None:
            raise ValueError("ignore_eos: a text of a response_format ends where its JSON does")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream")
        return self

    @property
    def text_schema(self) -> dict[str, Any] | None:
        """The JSON schema the text must fit, or None for any text."""
        return self.response_format.schema_of_text if self.response_format else None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="Text or token ids, one or several.")
    max_tokens: int | None = Field(
        16, ge=1, le=2**31 - 1, description="Most tokens to generate; null, and at most: what the context has left."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Give the chosen token's log-probability and those of so many of the likeliest.",
    )
    echo: bool | None = Field(None, description="Not served; false or null.")
    best_of: int | None = Field(None, description="Not served; null or n.")
    suffix: str | None = Field(None, description="Not served; null.")
    add_special_tokens: bool = Field(True, description="Let the tokenizer add its BOS to text prompts.")

    @model_validator(mode="after")
    def _served(self) -> Self:
        if self.echo:
            raise ValueError("echo: is not served")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: only n is served")
        if self.suffix:
            raise ValueError("suffix: is not served")
        if not self.prompts or any(not p for p in self.prompts):
            raise ValueError("prompt: is empty")
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"prompt: at most {MAX_CHOICES} completions a request")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        several = self.prompt and not isinstance(self.prompt[0], int)
        return cast("list[str] | list[list[int]]", self.prompt if several else [self.prompt])


class TextPart(Body):
    type: Literal["text"] = Field(description="Only text is served.")
    text: str = Field(description="The text.")


class ChatMessage(BaseModel):
    """One turn. Further fields (tool_calls, tool_call_id, …) are handed to the template as they are."""

    model_config = ConfigDict(extra="allow")

    role: _ROLES = Field(description="Who speaks.")
    content: str | list[TextPart] | None = Field(None, description="What is said.")
    name: str | None = Field(None, description="The speaker's name, for templates that use it.")

    def plain(self) -> dict[str, Any]:
        """As a template takes it: content as one string."""
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        return message


class ChatCompletionRequest(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far.")
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Most tokens to generate. Default: what the context has left."
    )
    logprobs: bool | None = Field(None, description="Give the chosen tokens' log-probabilities.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="With logprobs: those of so many of the likeliest tokens too."
    )
    tools: list[dict[str, Any]] | None = Field(None, description="Handed to the chat template.")
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="'none' keeps the tools from the template; 'auto' is the default; others are not served."
    )
    parallel_tool_calls: bool | None = Field(None, description="Accepted and without effect.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted and without effect.")
    store: bool | None = Field(None, description="Accepted and without effect: nothing is stored.")
    service_tier: str | None = Field(None, description="Accepted and without effect.")
    reasoning_effort: str | None = Field(None, description="Accepted and without effect.")
    prompt_cache_key: str | None = Field(None, description="Accepted and without effect.")
    safety_identifier: str | None = Field(None, description="Accepted and without effect.")

    @model_validator(mode="after")
    def _served(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        if self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: only 'none' and 'auto' are served")
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools or None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """As in completions: null for none, else how many of the likeliest."""
        return (self.top_logprobs or 0) if self.logprobs else None
