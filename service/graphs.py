"""/v1/loss.svg and .png: train and eval loss of one or several jobs in one graph."""

from __future__ import annotations

import io
import math
import threading
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response

from service.deps import DbDep
from service.errors import Invalid, NotFound
from service.ids import is_id
from service.jobs import repository

router = APIRouter(tags=["jobs"])
_MAX_JOBS = 16
_drawing = threading.Lock()  # matplotlib's font cache and text layout are not thread-safe


@dataclass(frozen=True)
class Curve:
    """A job's two series of (step, loss in nats per token)."""

    label: str
    train: list[tuple[int, float]]
    eval: list[tuple[int, float]]


@router.get(
    "/v1/loss.{format}",
    summary="Loss curves",
    response_class=Response,
    responses={200: {"content": {"image/svg+xml": {}, "image/png": {}}, "description": "The graph."}},
)
def loss(
    format: Annotated[Literal["svg", "png"], Path(description="Format of the picture.")],
    jobs: Annotated[str, Query(min_length=1, max_length=1024, description="Comma-separated ids of cpt and ift jobs.")],
    db: DbDep,
) -> Response:
    """Train loss as lines, evaluation loss as dashed lines with points, over optimiser steps."""
    ids = list(dict.fromkeys(i.strip() for i in jobs.split(",") if i.strip()))
    if not 0 < len(ids) <= _MAX_JOBS:
        raise Invalid(f"jobs: 1 to {_MAX_JOBS} ids", param="jobs")
    curves = []
    with db.read() as session:
        for job_id in ids:
            row = repository.get(session, job_id) if is_id(job_id, "job") else None
            if row is None:
                raise NotFound(f"jobs: no job {job_id!r}", param="jobs", code="job_not_found")
            if row.kind == "export":
                raise Invalid(f"jobs: {job_id} is an export, which has no loss", param="jobs")
            series = repository.metrics(session, job_id)
            label = f"{row.adapter} ({row.kind})"
            curves.append(Curve(label, _points(series["train"], "loss"), _points(series["eval"], "eval_loss")))
    with _drawing:
        picture = draw(curves, format)
    media = "image/svg+xml" if format == "svg" else "image/png"
    return Response(picture, media_type=media, headers={"Cache-Control": "no-store"})


def _points(series: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    values = ((point["step"], point.get(key)) for point in series)
    return [(step, value) for step, value in values if isinstance(value, (int, float)) and math.isfinite(value)]


def draw(curves: list[Curve], format: str) -> bytes:
    """The picture's bytes."""
    # Imported here: matplotlib would take half of the API's start.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        color = f"C{number % 10}"
        if curve.train:
            axes.plot(*zip(*curve.train, strict=True), color=color, linewidth=1.2, label=f"{curve.label} train")
        if curve.eval:
            axes.plot(
                *zip(*curve.eval, strict=True),
                color=color, linestyle="--", marker="o", markersize=4, label=f"{curve.label} eval",
            )  # fmt: skip
        if not curve.train and not curve.eval:
            axes.plot([], [], color=color, label=f"{curve.label} (no points yet)")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=150, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()
