"""GGUF files: converted by llama.cpp's converter, quantised by its quantiser, read back and compared in llama.cpp itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from service.errors import JobFailure
from service.specs import ExportSpec
from service.templates import StoredTemplate, fields_of
from worker.export import gguf_template, llama_cpp
from worker.export.gguf_ollama import write_modelfile
from worker.export.gguf_types import KINDS, check_types, contents, tensor_types
from worker.export.llama_cpp import Tools
from worker.export.reference import ANSWER_TOKENS, Comparison, Reference, equal_prefix

__all__ = ["file_name", "read_back", "read_back_all", "tensor_types", "write"]

CONTEXT = 512  # tokens: for prompts of at most 64 and their answers
Step = Callable[[int, int], None]
# What tokenizers disagree on: numbers, contractions, white space, letters of several scripts, emoji, punctuation.
HARD_TEXT = (
    "\n \n\n \t\t 3 33 333 3333 3.14 I'll he'S we'VE '' can't\r\n  x=1;\tfoo(bar)[0] == '''y''' 한국의 수도는 서울이다. "
    "Größe naïve नमस्ते 日本語 кириллица עברית 🚀👩‍👩‍👧 é é ---===!!!??? http://a.b/c?d=e&f  \n\n\n"
)


def file_name(name: str, method: str) -> str:
    """`<adapter>-<TYPE>.gguf`."""
    return f"{name}-{method.upper()}.gguf"


def write(
    merged: Path,
    methods: Sequence[str],
    out: Path,
    *,
    name: str,
    template: StoredTemplate,
    tokenizer: Any,
    tools: Tools,
    step: Step,
) -> list[Path]:
    """Write a merged transformers folder as GGUF files of each type, with a Modelfile beside each; returns the GGUF files.

    One conversion in the type that the folder is stored in, all other types from that file. `tokenizer` is the served
    one; `step(done, total)` is called after each part of the work. Raises JobFailure: unsupported for an architecture or
    a tokenizer that llama.cpp cannot hold, export_mismatch for a file that is not of its type.
    """
    total = 1 + len(methods)
    source_type = stored_type(merged)
    source = out / file_name(name, source_type)
    convert(merged, source, source_type, name=name, template=template, tokenizer=tokenizer, tools=tools)
    step(1, total)
    files = []
    for i, method in enumerate(methods):
        file = out / file_name(name, method)
        if file != source:
            quantize(source, file, method, tools)
        check_types(file, method)
        write_modelfile(file, template, context_length(merged))
        files.append(file)
        step(2 + i, total)
    if source not in files:
        source.unlink()
    return files


def quantize(source: Path, out: Path, method: str, tools: Tools) -> None:
    """Write a GGUF file in another type."""
    request = {
        "source": str(source), "out": str(out), "method": method, "ftype": KINDS[method].file_type,
        "quantizer": str(tools.quantizer) if tools.quantizer else None,
    }  # fmt: skip
    llama_cpp.run("quantize", request, tools)


def convert(
    folder: Path,
    out: Path,
    method: str,
    *,
    name: str,
    template: StoredTemplate,
    tokenizer: Any,
    tools: Tools,
) -> None:
    """Convert a transformers folder to one GGUF file in f32, f16 or bf16. Raises JobFailure as `write` does."""
    notes = out.with_suffix(".metadata.json")
    if template.kind == "prompt" and len(fields_of(template.prompt or "")) != 1:
        prompt = (template.prompt or "") + (template.response or "")
        note = {
            "general.description": f"No chat template: trained on the prompt template {json.dumps(prompt, ensure_ascii=False)}"
        }
        notes.write_text(json.dumps(note), encoding="utf-8")
    request = {
        "folder": str(folder), "out": str(out), "outtype": method, "name": name, **gguf_template.metadata(template, tokenizer),
        "metadata": str(notes) if notes.is_file() else None,
    }  # fmt: skip
    try:
        *_, done = llama_cpp.run("convert", request, tools)
    finally:
        notes.unlink(missing_ok=True)
    if done["pre_tokenizer"] is not None:
        # The converter did not know the tokenizer; it was told by its form, which is a guess until it is shown.
        prove_tokenizer(out, done["pre_tokenizer"], tokenizer, gguf_template.served_texts(template), tools)


def prove_tokenizer(file: Path, form: str, tokenizer: Any, texts: list[str], tools: Tools) -> None:
    """Raise JobFailure("unsupported") unless llama.cpp makes the same tokens as `tokenizer` of `texts` and a hard one."""
    texts = [HARD_TEXT, *texts]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if [line["ids"] for line in llama_cpp.run("tokenize", {"file": str(file), "texts": texts}, tools)] != expected:
        raise JobFailure(
            "unsupported",
            f"gguf: llama.cpp has no pre-tokenizer for this tokenizer: as {form!r}, the nearest by its form, it splits "
            "texts differently",
        )


def stored_type(folder: Path) -> str:
    """f32, f16 or bf16: the type of a transformers folder's matrices. Raises JobFailure("unsupported") for others."""
    types: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118
            types |= {s.get_dtype() for s in slices if len(s.get_shape()) > 1}
    for dtype in ("F32", "BF16", "F16"):
        if dtype in types:
            return dtype.lower()
    raise JobFailure("unsupported", f"gguf: a model stored in {', '.join(sorted(types))} cannot be converted")


def context_length(folder: Path) -> int | None:
    """The longest context in tokens that the model's configuration names."""
    value = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    return int(value) if value else None


def read_back_all(
    folder: Path,
    spec: ExportSpec,
    stored: StoredTemplate,
    expected: Reference,
    *,
    tokenizer: Any,
    tools: Tools,
    step: Step,
) -> dict[str, Any]:
    """The report on all files of a gguf export: {reader, files: [that of read_back for each], problems}."""
    reports = []
    for i, method in enumerate(spec.methods):
        file = folder / file_name(spec.adapter, method)
        reports.append(read_back(file, method, stored, expected, tokenizer=tokenizer, tools=tools))
        step(i + 1, len(spec.methods))
    problems = [problem for report in reports for problem in report.pop("problems")]
    return {"reader": f"llama.cpp ({tools.reader})", "files": reports, "problems": problems}


def read_back(
    file: Path,
    method: str,
    stored: StoredTemplate,
    expected: Reference,
    *,
    tokenizer: Any,
    tools: Tools,
) -> dict[str, Any]:
    """Read a GGUF file back in llama.cpp and compare it with the live adapter; `tokenizer` is the served one.

    Returns the report: file, method, file_type, tensor_types, fallback, bits_per_weight, the members of
    Comparison.report(), adapter_carried, limit, template; `problems` says what is wrong, if anything.
    """
    found: list[str] = []
    try:
        check_types(file, method)
    except JobFailure as failure:
        found.append(failure.message)
    rows = expected.ids
    sums = llama_cpp.run(
        "compare",
        {
            "file": str(file),
            "rows": rows,
            "logprobs": [str(expected.folder / f"{i}.npy") for i in range(len(rows))],
            "bases": [str(path) for path in sorted(expected.folder.glob("base-*.npy"))],
            "ends": expected.ends,
        },
        tools,
    )
    prompts = [expected.prompt(i) for i in range(len(rows))]
    greedy = {"n_predict": ANSWER_TOKENS, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    asked = [*gguf_template.calls(stored), *(("/completion", {"prompt": p, **greedy}) for p in prompts)]
    request = {"file": str(file), "context": CONTEXT, "calls": asked}
    answers = llama_cpp.run("serve", request, tools)
    of_template, of_prompts = answers[: -len(prompts)], answers[-len(prompts) :]
    found += gguf_template.problems(stored, tokenizer, of_template)
    found += [f"llama.cpp's server refuses a prompt: {a['error']}" for a in of_prompts if "error" in a][:1]
    compared = _comparison(expected, sums, [a.get("answer", {}).get("tokens", []) for a in of_prompts])
    share = carried(sums)
    limit = KINDS[method].limit
    if not compared.mean_kl <= limit:  # also true for NaN
        found.append(f"mean KL {compared.mean_kl:.3g} over the limit {limit:.3g}")
    found += carried_problems(share, compared.mean_kl, expected.effect)
    return {
        "file": file.name,
        "method": method,
        **contents(file),
        **compared.report(),
        "adapter_carried": share,
        "limit": limit,
        "template": {"fingerprint": stored.fingerprint, "prompts": len(of_template)},
        "ends": sums[-1]["ends"],
        "problems": [f"{file.name}: {problem}" for problem in found],
    }


def _comparison(expected: Reference, sums: list[dict[str, Any]], answers: list[list[int]]) -> Comparison:
    rows = [line for line in sums if "row" in line]
    positions = sum(len(row) for row in expected.ids)
    return Comparison(
        rows=len(expected.ids),
        positions=positions,
        mean_kl=sum(line["kl"] for line in rows) / positions,
        argmax_agreement=sum(line["same"] for line in rows) / positions,
        equal_tokens=sum(equal_prefix(a, b) for a, b in zip(expected.answers, answers, strict=True)),
        total_tokens=sum(len(a) for a in expected.answers),
        loss=sum(line["loss"] for line in rows) / max(1, positions - len(rows)),
        adapter_loss=expected.loss,
        adapter_effect=expected.effect,
    )


def carried(sums: list[dict[str, Any]]) -> float | None:
    """How much of the adapter's effect on the log-probabilities a file has: its regression coefficient.

    1 for the adapter, 0 for its base, and about that under rounding, whose errors have little to do with the effect: what
    a limit on the distance cannot tell when the adapter does little. A base whose weights lie on the grid that is rounded
    to is the exception: rounding then undoes small updates, and so it should be told. None without an effect.
    """
    norm = sum(line.get("norm", 0.0) for line in sums)
    return sum(line.get("dot", 0.0) for line in sums) / norm if norm > 1e-12 else None


def carried_problems(share: float | None, kl: float, effect: float) -> list[str]:
    """What `carried` says is wrong, if anything; more is allowed where rounding moves the file further than the adapter."""
    if share is None or abs(share - 1) <= max(0.2, 0.3 * math.sqrt(max(0.0, kl) / max(1e-9, effect))):
        return []
    return [f"it has {share:.3g} of what the adapter does to the base, not 1"]
