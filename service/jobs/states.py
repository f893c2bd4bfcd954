"""Job states and the moves between them.

    queued ──► preparing ──► running ──► succeeded
      ▲ │          │            │
      │ └──────────┴────────────┴──► failed | cancelled | paused
      └── a lost worker (attempt + 1), a worker told to stop, or resume from paused

`preparing`: data are read, checked and tokenised and the model is loaded. `running`: steps are taken.
"""

from __future__ import annotations

from typing import Final, Literal

Status = Literal["queued", "preparing", "running", "succeeded", "failed", "cancelled", "paused"]
FINAL: Final[frozenset[str]] = frozenset({"succeeded", "failed", "cancelled"})
ACTIVE: Final[frozenset[str]] = frozenset({"preparing", "running"})
MOVES: Final[dict[str, frozenset[str]]] = {
    "queued": frozenset({"preparing", "cancelled", "paused", "failed"}),
    "preparing": frozenset({"running", "queued", "failed", "cancelled", "paused"}),
    "running": frozenset({"succeeded", "queued", "failed", "cancelled", "paused"}),
    "paused": frozenset({"queued", "cancelled", "failed"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
