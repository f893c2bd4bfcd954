"""The types of GGUF files: what llama.cpp's quantiser calls them, which tensors they are made of, how near they come."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import JobFailure

# What llama.cpp stores instead where a row is no multiple of the type's 256 values; older builds took IQ4_NL for some.
FALLBACK = {
    "Q2_K": {"Q4_0", "IQ4_NL"}, "Q3_K": {"Q4_0", "IQ4_NL"}, "IQ4_XS": {"IQ4_NL"}, "Q4_K": {"Q5_0"}, "Q5_K": {"Q5_1"},
    "Q6_K": {"Q8_0"},
}  # fmt: skip
WHOLE = {"F32", "F16", "BF16"}
# The matrices that are quantised in every architecture; experts' have "_exps" after it. Routers and the like stay whole.
_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps)?)\.weight")


@dataclass(frozen=True)
class Kind:
    """One type of file."""

    file_type: int  # llama.h's llama_ftype: general.file_type
    main: str  # ggml's type of most matrices
    others: frozenset[str]  # types that some matrices get on purpose
    limit: float  # mean KL (nats) to the live adapter; docs/gguf.md has the measurements it comes from


def _kind(file_type: int, main: str, others: str, limit: float) -> Kind:
    return Kind(file_type, main, frozenset(others.split()), limit)


KINDS: dict[str, Kind] = {
    "f32": _kind(0, "F32", "", 5e-3),
    "f16": _kind(1, "F16", "", 5e-3),
    "bf16": _kind(32, "BF16", "", 5e-3),
    "q8_0": _kind(7, "Q8_0", "", 3e-2),
    "q6_k": _kind(18, "Q6_K", "", 1e-1),
    "q5_k_m": _kind(17, "Q5_K", "Q6_K", 3e-1),
    "q5_k_s": _kind(16, "Q5_K", "Q6_K", 3e-1),
    "q5_1": _kind(9, "Q5_1", "Q6_K", 3e-1),
    "q5_0": _kind(8, "Q5_0", "Q6_K", 3e-1),
    "q4_k_m": _kind(15, "Q4_K", "Q5_K Q6_K", 6e-1),
    "q4_k_s": _kind(14, "Q4_K", "Q5_K Q6_K", 6e-1),
    "q4_1": _kind(3, "Q4_1", "Q6_K", 6e-1),
    "q4_0": _kind(2, "Q4_0", "Q6_K", 1.5),
    "iq4_nl": _kind(25, "IQ4_NL", "Q5_K Q6_K", 1.0),
    "iq4_xs": _kind(30, "IQ4_XS", "Q5_K Q6_K", 1.0),
    "q3_k_l": _kind(13, "Q3_K", "Q4_K Q5_K Q6_K", 1.5),
    "q3_k_m": _kind(12, "Q3_K", "Q4_K Q5_K Q6_K", 1.5),
    "q3_k_s": _kind(11, "Q3_K", "Q4_K Q5_K Q6_K", 1.5),
    "q2_k": _kind(10, "Q2_K", "Q3_K Q4_K Q5_K Q6_K", 3.0),
}


def tensor_types(file: Path) -> dict[str, int]:
    """How many tensors a GGUF file holds of each of ggml's types, read from the file."""
    return dict(Counter(tensor.tensor_type.name for tensor in _reader(file).tensors).most_common())


def contents(file: Path) -> dict[str, Any]:
    """file_type (its name in llama.cpp), tensor_types, fallback, bits_per_weight of a GGUF file, read from the file.

    `fallback`: some matrices have rows that the type cannot hold and are stored in another.
    """
    import gguf

    reader = _reader(file)
    field = reader.get_field("general.file_type")
    number = int(field.contents()) if field else -1
    matrices = [t for t in reader.tensors if len(t.shape) > 1]
    name = gguf.LlamaFileType(number).name if number in list(gguf.LlamaFileType) else str(number)
    main = next((kind.main for kind in KINDS.values() if kind.file_type == number), None)
    return {
        "file_type": name,
        "tensor_types": dict(Counter(t.tensor_type.name for t in reader.tensors).most_common()),
        "fallback": main in FALLBACK and any(int(t.shape[0]) % 256 for t in matrices),
        "bits_per_weight": round(
            8 * sum(t.n_bytes for t in reader.tensors) / sum(t.n_elements for t in reader.tensors), 3
        ),
    }


def check_types(file: Path, method: str) -> None:
    """Raise JobFailure("export_mismatch") unless the file's own type field and tensors are those of `method`."""
    reader, kind = _reader(file), KINDS[method]
    field = reader.get_field("general.file_type")
    number = int(field.contents()) if field else -1
    counts: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    for tensor in reader.tensors:
        stored, row = tensor.tensor_type.name, int(tensor.shape[0])
        outer = tensor.name in ("output.weight", "token_embd.weight")
        if not outer and not _LINEAR.fullmatch(tensor.name):
            continue
        allowed: set[str] = set().union(*(_held(one, row) for one in (kind.main, *kind.others)))
        if kind.main not in WHOLE:
            # The outer matrices are stored in 6 bits, or in 8 where rows are no multiple of 256; in mixtures of few
            # experts, attention is stored in 8.
            allowed |= {"Q6_K", "Q8_0"} if outer else {"Q8_0"}
        if not outer:
            counts[stored] += 1
        if stored not in allowed:
            wrong[tensor.name] = stored
    mains = {kind.main} | FALLBACK.get(kind.main, set())
    if number != kind.file_type or wrong or (counts and counts.most_common(1)[0][0] not in mains):
        raise JobFailure(
            "export_mismatch",
            f"{file.name} is no {method} file: its type field is {number}, its matrices are "
            f"{', '.join(f'{n} × {name}' for name, n in counts.most_common())}"
            + (f", among them {next(iter(wrong))} in {next(iter(wrong.values()))}" if wrong else ""),
        )


def _held(name: str, row: int) -> set[str]:
    """The types in which llama.cpp may store a matrix whose rows have `row` values, when `name` is wanted."""
    if row % 32 and name not in WHOLE:
        return {"F16"}
    return FALLBACK[name] if row % 256 and name in FALLBACK else {name}


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(file)
