"""Liveness, readiness by part, Prometheus."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Liveness")
def healthz() -> dict[str, str]:
    """Answers as long as the process does."""
    return {"status": "ok"}
