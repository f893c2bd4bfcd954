"""Bodies of POST /generate."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.openai.schemas import MAX_LOGPROBS, ChatMessage, StopString
from service.spec_fields import AdapterRef


class GenerateRequest(BaseModel):
    """What to generate from, with which adapter, and how. Give exactly one of prompt, messages and inputs."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={"example": {"adapter": "ko-chat", "messages": [{"role": "user", "content": "안녕?"}]}},
    )

    adapter: AdapterRef | None = Field(
        None, description="Adapter's name, name@step for a checkpoint, or null for the base model."
    )
    prompt: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Text to go on from, as it is; BOS is put in front if the model wants one."
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = Field(
        None, description="A conversation, rendered with the adapter's own stored chat template."
    )
    inputs: dict[str, Any] | None = Field(
        None,
        description="Values for the placeholders of the adapter's stored prompt template; the text is cut before the "
        "first placeholder that is not given.",
    )
    tools: list[dict[str, Any]] | None = Field(None, description="With messages: handed to the chat template.")
    max_new_tokens: int = Field(
        256, ge=1, le=2**31 - 1, description="Most tokens to generate, at most what the context has left."
    )
    temperature: float = Field(0.0, ge=0, le=10, description="Divides the logits before sampling; 0 is greedy.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Keep the likeliest tokens that together have this probability, a fraction; 1: all.",
    )
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="Keep this many of the likeliest tokens; 0: all.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Drop tokens below this fraction of the likeliest one's probability; 0: none."
    )
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="Divides the logits of tokens seen in prompt or completion; 1: off."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=32)] | None = Field(
        None, description="Strings that end the text, besides the template's own; they are not part of it."
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**63 - 1,
        description="The same seed and request give the same tokens, whatever else runs; null: not repeatable.",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Give each token's log-probability (natural logarithm) and those of this many of the likeliest "
        "tokens; null: none.",
    )
    stream: bool = Field(False, description="Answer with server-sent events: token, …, then done or error.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("prompt", "messages", "inputs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{given[1] if given else 'prompt'}: give exactly one of prompt, messages and inputs")
        if self.tools and self.messages is None:
            raise ValueError("tools: only with messages")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class GenerateUsage(BaseModel):
    prompt_tokens: int = Field(description="Tokens of the rendered prompt.")
    completion_tokens: int = Field(description="Tokens generated, an end token included.")


class GenerateTimings(BaseModel):
    queue_ms: float = Field(description="From the request to the first step it was in, loading included; milliseconds.")
    first_token_ms: float = Field(description="From the request to its first token, milliseconds.")
    total_ms: float = Field(description="From the request to its last token, milliseconds.")


class TopLogprob(BaseModel):
    token: str = Field(description="Text of the token.")
    logprob: float = Field(description="Its log-probability, natural logarithm.")


class TokenLogprob(BaseModel):
    token_id: int | None = Field(description="The token.")
    token: str = Field(description="Its text; bytes:\\xe2\\x82 for one that is part of a character.")
    logprob: float = Field(description="Its log-probability under the model, natural logarithm.")
    top: list[TopLogprob] = Field(description="The likeliest tokens at this place, the likeliest first.")


class GenerateResponse(BaseModel):
    """The whole answer; with stream, the data of the `done` event."""

    id: str = Field(description="Of this generation.")
    adapter: str | None = Field(description="The adapter as it was named, null for the base.")
    text: str = Field(description="The completion.")
    token_ids: list[int] = Field(description="Its tokens, an end token or stop string included.")
    finish_reason: Literal["stop", "length"] = Field(description="stop: end token or stop string; length: the limit.")
    usage: GenerateUsage = Field(description="Token counts.")
    timings: GenerateTimings = Field(description="How long it took.")
    logprobs: list[TokenLogprob] | None = Field(description="One entry a token; null if not asked for.")
