"""One error tree; the status is on the class and one handler in app.py renders it.

LorryError (500 internal_error)
├── BadRequest           400  malformed request outside the body's schema
├── Unauthorized         401
├── NotFound             404
├── Conflict             409  the state forbids it
├── RequestTimeout       408  the client stopped sending; the connection is closed
├── TooLarge             413
├── UnsupportedMedia     415
├── RangeNotSatisfiable  416
├── Invalid              422  the body's content is wrong; `param` names the field
├── InsufficientStorage  507
└── Unavailable          503  with Retry-After

JobFailure: raised inside a recipe; its code, message and rows become the job's `error`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class LorryError(Exception):
    """Base of every error a client may see."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def body(self) -> dict[str, Any]:
        """The answer's body, in OpenAI's shape (plus `extra` members, e.g. both lengths of a too long prompt)."""
        return {
            "error": {"type": self.type, "message": self.message, "param": self.param, "code": self.code, **self.extra}
        }


class BadRequest(LorryError):
    status, type, code = 400, "invalid_request_error", "bad_request"


class Unauthorized(LorryError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class NotFound(LorryError):
    status, type, code = 404, "not_found_error", "not_found"


class Conflict(LorryError):
    status, type, code = 409, "conflict_error", "conflict"


class RequestTimeout(LorryError):
    status, type, code = 408, "invalid_request_error", "request_timeout"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"Connection": "close"})


class TooLarge(LorryError):
    status, type, code = 413, "invalid_request_error", "too_large"


class UnsupportedMedia(LorryError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class RangeNotSatisfiable(LorryError):
    status, type, code = 416, "invalid_request_error", "range_not_satisfiable"


class Invalid(LorryError):
    status, type, code = 422, "invalid_request_error", "invalid_value"


class InsufficientStorage(LorryError):
    status, type, code = 507, "server_error", "insufficient_storage"


class Unavailable(LorryError):
    status, type, code = 503, "server_error", "unavailable"

    def __init__(self, message: str, *, retry_after: int = 5, code: str | None = None) -> None:
        super().__init__(message, code=code, headers={"Retry-After": str(retry_after)})


class JobFailure(Exception):
    """A job's failure for a reason the user can act on.

    Codes: invalid_data, invalid_spec, model_not_found, dataset_not_found, adapter_not_found, out_of_memory,
    insufficient_storage, worker_killed, worker_lost, parent_failed, verification_failed, export_mismatch,
    hub_token_missing, hub_token_refused, hub_forbidden, hub_repo_public, hub_unreachable, hub_error, hub_push_failed,
    unsupported, internal_error.
    """

    def __init__(self, code: str, message: str, rows: Sequence[Mapping[str, Any]] = (), *, retry: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.rows = [dict(r) for r in rows]
        self.retry = retry

    def __reduce__(self) -> tuple[Any, ...]:  # it passes between the processes of a job on several GPUs
        return type(self), (self.code, self.message, self.rows), {"retry": self.retry}

    def body(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "rows": self.rows}
