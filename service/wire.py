"""Shapes that every part of the API shares: errors, pages, the cursor's parameters."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Header, Query
from pydantic import BaseModel, Field

T = TypeVar("T")


class ErrorDetail(BaseModel):
    type: str = Field(description="Family of the error, e.g. invalid_request_error, not_found_error, conflict_error.")
    message: str = Field(description="What is wrong and, where there is one, the way out.")
    param: str | None = Field(description="Path of the field at fault, e.g. lora.r; null if no field is.")
    code: str = Field(description="Stable identifier of this error, for programs.")


class ErrorBody(BaseModel):
    """Every answer of status 400 and above."""

    error: ErrorDetail = Field(description="The error.")


class Page(BaseModel, Generic[T]):
    """One page of a list, newest first unless said otherwise."""

    object: Literal["list"] = Field("list", description="Always 'list'.")
    data: list[T] = Field(description="The page's items.")
    has_more: bool = Field(description="Whether more items follow.")
    next: str | None = Field(None, description="Value of `after` that gives the next page; null on the last one.")


class Deleted(BaseModel):
    id: str = Field(description="What was deleted.")
    object: str = Field(description="Kind of the thing deleted.")
    deleted: Literal[True] = Field(True, description="Always true.")


Limit = Annotated[int, Query(ge=1, le=100, description="At most this many items.")]
After = Annotated[
    str | None,
    Query(pattern=r"^[A-Za-z0-9._-]{1,128}$", description="Cursor: the `next` of the page before."),
]
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="The same key and body give the same job, another body 409."),
]
