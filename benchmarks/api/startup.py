#!/usr/bin/env python3
"""Seconds from starting `lorry api` to its first 200 on /healthz, over several starts. Aim: under 2 s, each of them.

The database is migrated and the queue runs, as under `lorry up`. The first start may read Python's files from the disk;
it is reported apart. `--imports` also prints which packages take the longest to import.
"""

from __future__ import annotations

import http.client
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common

AIM = 2.0  # seconds


def start_once(where: Path, database_url: str, redis_url: str) -> tuple[float, float]:
    """Start `lorry api`, wait for /healthz, stop it; seconds from exec to the answer, and of processor time till then."""
    port = common.free_port()
    env = common.environment(where, database_url=database_url, redis_url=redis_url, port=str(port))
    began = time.perf_counter()
    process = subprocess.Popen(common.lorry("api"), env=env, stdin=subprocess.DEVNULL)
    try:
        while time.perf_counter() - began < 60:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/healthz")
                if connection.getresponse().status == 200:
                    return time.perf_counter() - began, processor_seconds(process.pid)
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"lorry api ended with status {process.returncode}") from None
                time.sleep(0.005)
            finally:
                connection.close()
        raise SystemExit("lorry api did not answer within a minute")
    finally:
        process.terminate()
        process.wait(30)


def processor_seconds(pid: int) -> float:
    """User and system time of a live process; 0 where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def import_times(where: Path) -> tuple[float, list[tuple[float, str]]]:
    """Seconds to import service.app, and each package's own share of it (its modules' self time), largest first."""
    command = [sys.executable, "-X", "importtime", "-c", "import service.cli, service.app, uvicorn"]
    text = subprocess.run(command, env=common.environment(where), capture_output=True, text=True, check=True).stderr
    own: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if found := re.fullmatch(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", line):
            package = found[2].split(".")[0]
            own["(stdlib)" if package in sys.stdlib_module_names else package] += int(found[1]) / 1e6
    return sum(own.values()), sorted(((seconds, name) for name, seconds in own.items()), reverse=True)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--starts", type=int, default=10, metavar="N", help="starts (default: 10)")
    parser.add_argument("--imports", action="store_true", help="print the packages that take longest to import")
    parser.add_argument("--database", choices=common.DATABASES, action="append", help="default: both")
    arguments = parser.parse_args()
    report = common.Report("api/startup", common.wait_until_calm(arguments.calm))
    with common.folder() as where, common.queue_server(where) as redis_url:
        for kind in arguments.database or common.DATABASES:
            with common.database(kind, where) as database_url:
                first, *starts = [start_once(where, database_url, redis_url) for _ in range(arguments.starts + 1)]
            times, processor = zip(*starts, strict=True)
            about = {"database": kind, "starts": arguments.starts}
            report.add("first_s", round(first[0], 3), **about)
            report.add("min_s", round(min(times), 3), **about)
            report.add("median_s", round(statistics.median(times), 3), **about)
            report.add("median_processor_s", round(statistics.median(processor), 3), **about)
            report.add_all({"max_s": round(max(times), 3)}, aims={"max_s": AIM}, **about)
        if arguments.imports:
            total, packages = import_times(where)
            print(f"imports: {total:.2f} s in all (measuring slows them down)")
            for seconds, name in packages[:15]:
                print(f"  {seconds:.3f} s  {name}")
    report.show()


if __name__ == "__main__":
    main()
