#!/usr/bin/env python3
"""Load on real processes, each figure against its bound: exit status 1 if one is missed.

    python benchmarks/load/run.py                    # all parts, about 6 minutes
    python benchmarks/load/run.py --part followers   # one of them
    python benchmarks/load/run.py --quick            # a tenth of each

streams     500 streams of POST /generate at once, API and engine on a tiny model: all end or are told when to come again
jobs        10,000 queued jobs: POST, list, cancel, reconcile
upload      1 GB up and down at constant memory
followers   1,000 followers of one job: one poller, every event to each of them in order
slow        clients that read nothing: cut off in bounded time, at bounded memory, while others notice nothing

Memory is resident memory of a process read from /proc, growth is its peak under load less what it was before.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common
from benchmarks.load import followers, jobs, parts, slow, streams, upload

PARTS = ("streams", "jobs", "upload", "followers", "slow")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="a tenth of the clients, jobs and bytes")
    arguments = parser.parse_args()
    parts.many_files()
    report = common.Report("load", common.wait_until_calm(arguments.calm))
    scale = 10 if arguments.quick else 1
    try:
        for part in arguments.part or PARTS:
            print(f"{part} …", file=sys.stderr, flush=True)
            if part == "streams":
                streams.measure(report, 500 // scale)
            elif part == "jobs":
                jobs.measure(report, 10_000 // scale)
            elif part == "upload":
                upload.measure(report, 1024 * 1024 * 1024 // scale)
            elif part == "followers":
                followers.measure(report, 1000 // scale)
            else:
                slow.measure(report, 200 // scale)
    finally:
        report.show()
    missed = [row for row in report.rows if row["met"] is False]
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
