"""The application as a whole: health, request ids, authentication, errors outside any endpoint, OpenAPI."""

from __future__ import annotations

from tests.conftest import Api


def test_liveness_answers(api: Api) -> None:
    assert api.http.get("/healthz").json() == {"status": "ok"}
