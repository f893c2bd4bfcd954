"""What may import what: the API and the worker's parent hold no model and never bring torch in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "unsloth", "trl", "peft", "datasets", "accelerate", "bitsandbytes"}


def modules(package: str) -> list[str]:
    """Dotted names of all modules of a package."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    return [n.removesuffix(".__init__") for n in names]


def loaded_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh process that ran the statement."""
    code = f"import sys\n{statement}\nprint(' '.join({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_loading_all_of_service_loads_no_torch_and_no_worker() -> None:
    statement = f"import importlib\nfor name in {modules('service')!r}: importlib.import_module(name)"
    assert loaded_after(statement) & (HEAVY | {"worker"}) == set()


def test_the_application_starts_without_matplotlib() -> None:
    assert "matplotlib" not in loaded_after("import service.app")


def test_the_worker_s_parent_and_its_task_load_no_torch() -> None:
    assert loaded_after("import worker.run, worker.tasks") & HEAVY == set()


@pytest.mark.parametrize("path", sorted((ROOT / "service").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_of_service_imports_torch_or_worker(path: Path) -> None:
    assert imports(path) & (HEAVY | {"worker"}) == set()


def test_only_the_queue_module_of_service_imports_rq() -> None:
    assert [str(p.relative_to(ROOT)) for p in (ROOT / "service").rglob("*.py") if "rq" in imports(p)] == [
        "service/queue.py"
    ]


def test_http_exceptions_stay_at_the_edge() -> None:
    """Below the endpoints there is one error tree; only what answers for Starlette and FastAPI knows theirs."""
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "service").rglob("*.py")
        if "HTTPException" in path.read_text("utf-8")
    }
    assert found <= {"service/app.py", "service/limits.py"}


@pytest.mark.parametrize("package", ["service", "worker"])
def test_no_module_is_longer_than_420_lines(package: str) -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in (ROOT / package).rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 420} == {}
