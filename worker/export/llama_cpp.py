"""llama.cpp's tools: where they are, and how they are run. Each runs in a process of its own.

What interrupts the wait for such a process (worker/export/interrupt.py) ends it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import JobFailure
from service.settings import Settings

HOW = "install the tools with scripts/gguf-tools, or set LORRY_LLAMA_CPP_DIR to a built llama.cpp checkout"
UNSUPPORTED = 3  # exit status of a child that names what it cannot do on its last line
PACKAGED = Path(sys.prefix) / "share" / "lorry" / "llama.cpp"
QUANTIZERS = ("build/bin/llama-quantize", "bin/llama-quantize", "llama-quantize")


@dataclass(frozen=True)
class Tools:
    """Converters, quantiser and reader of GGUF files."""

    folder: Path  # convert_hf_to_gguf.py, convert_lora_to_gguf.py, gguf-py/
    quantizer: Path | None  # llama-quantize of a checkout; None: that in the package cyllama
    threads: int
    reader: str  # llama.cpp's build that reads the files back


def find(settings: Settings) -> Tools:
    """The tools in force. Raises JobFailure("unsupported") that says what is missing and how to install it."""
    folder = settings.llama_cpp_dir or PACKAGED
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        if not (folder / name).is_file():
            raise JobFailure("unsupported", f"gguf: this worker has no llama.cpp converter ({folder / name}): {HOW}")
    quantizer = None
    if settings.llama_cpp_dir:
        found = [folder / q for q in QUANTIZERS if os.access(folder / q, os.X_OK)]
        quantizer = found[0].absolute() if found else None
    for package in ("xllamacpp", "cyllama"):
        if importlib.util.find_spec(package) is None:
            raise JobFailure("unsupported", f"gguf: this worker lacks the package {package}: {HOW}")
    return Tools(
        folder=folder.absolute(),
        quantizer=quantizer,
        threads=settings.torch_threads or os.cpu_count() or 1,
        reader=f"xllamacpp {importlib.metadata.version('xllamacpp')}",
    )


def run(command: str, request: dict[str, Any], tools: Tools) -> list[dict[str, Any]]:
    """Run one command of llama_cpp_child.py in a process of its own; returns the JSON objects that it printed, in order.

    Raises JobFailure with the last lines that the child wrote, as `unsupported` if it said that it cannot do this,
    out_of_memory, insufficient_storage or internal_error.
    """
    environment = {k: v for k, v in os.environ.items() if "TOKEN" not in k}  # it reaches no hub
    root = str(Path(__file__).parents[2])
    environment |= {
        "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p),
        "LD_LIBRARY_PATH": os.pathsep.join(
            p for p in (os.environ.get("LD_LIBRARY_PATH"), str(PACKAGED / "lib")) if p
        ),  # libgomp, where the system has none
        "OMP_NUM_THREADS": str(tools.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "GGML_NO_BACKTRACE": "1",  # it would start a debugger
        "CUDA_VISIBLE_DEVICES": "",
    }
    request = {**request, "tools": str(tools.folder), "threads": tools.threads}
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(json.dumps(request).encode())
        given.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-m", "worker.export.llama_cpp_child", command],
            stdin=given, stdout=out, stderr=err, env=environment,
        )  # fmt: skip
        try:
            child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        out.seek(0)
        err.seek(0)
        if child.returncode != 0:
            raise _failure(command, child.returncode, err.read().decode("utf-8", "replace"))
        return [json.loads(line) for line in out]


def _failure(command: str, status: int, text: str) -> JobFailure:
    # A progress bar is one line with many carriage returns, and its last state is no reason.
    lines = [line.rsplit("\r", 1)[-1].strip() for line in text.splitlines()]
    last = [line for line in lines if line and "%|" not in line][-6:]
    if status == UNSUPPORTED or "is not supported" in " ".join(last):
        return JobFailure("unsupported", f"gguf: {last[-1] if last else 'llama.cpp cannot do this'}")
    if "No space left" in text:
        return JobFailure("insufficient_storage", f"gguf: the disk is full while llama.cpp's {command} writes")
    if status == -9 or "MemoryError" in text:
        return JobFailure("out_of_memory", f"gguf: llama.cpp's {command} was killed, most likely for want of memory")
    return JobFailure("internal_error", f"gguf: llama.cpp's {command} failed (status {status}): " + " | ".join(last))
