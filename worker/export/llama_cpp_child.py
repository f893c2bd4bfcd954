"""What runs in llama.cpp's own processes: `python -m worker.export.llama_cpp_child COMMAND`, a JSON request on stdin.

Results are JSON objects on stdout, one a line. Only the converters import torch. Two builds of llama.cpp are used, each
in processes of its own: the one that quantises also gives the whole distribution at every position; the other is
a current server, which reads the files as their users will.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn

UNSUPPORTED = 3
Request = dict[str, Any]
_results = sys.stdout

# The regular expressions by which byte-level BPE tokenizers split text first, and llama.cpp's names for them.
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def say(**values: Any) -> None:
    print(json.dumps(values), file=_results, flush=True)


def refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(UNSUPPORTED)


def derive_pre_tokenizer(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json whose hash its converter does not know; None if unclear."""
    steps = tokenizer.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    last = parts[-1]
    if tokenizer.get("normalizer") or tokenizer["model"].get("type") != "BPE":
        return None
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    before, regex = parts[:-1], last.get("use_regex", True)
    if regex and not before:
        return "gpt-2"
    if regex and before == [_DIGITS]:
        return "smollm"
    if not regex and len(before) == 1 and before[0].get("type") == "Split":
        pattern = before[0].get("pattern", {}).get("Regex")
        return {_SPLIT % "{1,3}": "llama-bpe", _SPLIT % "": "qwen2"}.get(pattern)
    return None


def convert(request: Request) -> None:
    """Run llama.cpp's converter on a transformers folder: {folder, out, outtype, name, chat_template, token_ids, add}."""
    tools = Path(request["tools"])
    sys.path[:0] = [str(tools / "gguf-py"), str(tools)]
    import gguf

    derived: list[str] = []
    write = gguf.SpecialVocab.add_to_gguf

    def add_to_gguf(self: Any, writer: Any, quiet: bool = False) -> None:
        # What is served decides, not what the tokenizer's files happen to say.
        self.chat_template = request["chat_template"]
        self.special_token_ids |= request["token_ids"]
        self.add_special_token |= request["add"]
        write(self, writer, quiet=True)

    gguf.SpecialVocab.add_to_gguf = add_to_gguf
    set_add_bos = gguf.GGUFWriter.add_add_bos_token

    def add_add_bos_token(self: Any, value: bool) -> None:
        set_add_bos(self, request["add"].get("bos", value))  # a later step sets it by the vocabulary's size

    gguf.GGUFWriter.add_add_bos_token = add_add_bos_token
    try:
        from conversion.base import TextModel  # type: ignore[import-not-found]
    except ImportError:
        pass  # an older checkout: all in one script
    else:
        known = TextModel.get_vocab_base_pre

        def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
            try:
                name: str = known(self, tokenizer)
                return name
            except NotImplementedError:
                file = Path(self.dir_model) / "tokenizer.json"
                found = derive_pre_tokenizer(json.loads(file.read_text("utf-8"))) if file.is_file() else None
                if found is None:
                    refuse(
                        "llama.cpp's converter does not know this tokenizer's pre-tokenizer, and its tokenizer.json is "
                        "none of those that can be told by their form"
                    )
                derived.append(found)
                return found

        TextModel.get_vocab_base_pre = get_vocab_base_pre
    script = str(tools / "convert_hf_to_gguf.py")
    sys.argv = [script, request["folder"], "--outfile", request["out"], "--outtype", request["outtype"]]
    if request.get("name"):
        sys.argv += ["--model-name", request["name"]]
    if request.get("metadata"):
        sys.argv += ["--metadata", request["metadata"]]
    runpy.run_path(script, run_name="__main__")
    say(pre_tokenizer=derived[0] if derived else None)


def convert_lora(request: Request) -> None:
    """Run llama.cpp's LoRA converter on a PEFT folder: {folder, base, outputs: [[file, type], …]}."""
    tools = Path(request["tools"])
    sys.path[:0] = [str(tools / "gguf-py"), str(tools)]
    script = str(tools / "convert_lora_to_gguf.py")
    for out, outtype in request["outputs"]:
        sys.argv = [script, request["folder"], "--base", request["base"], "--outfile", out, "--outtype", outtype]
        runpy.run_path(script, run_name="__main__")


def quantize(request: Request) -> None:
    """Quantise a GGUF file: {source, out, method, ftype, quantizer}."""
    source, out, threads = request["source"], request["out"], request["threads"]
    if request.get("quantizer"):
        tool = request["quantizer"]
        os.execv(tool, [tool, source, out, request["method"].upper(), str(threads)])
    from cyllama.llama import llama_cpp

    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread = request["ftype"], threads
    llama_cpp.model_quantize(source, out, params)


def distance(want: Any, got: Any, base: Any | None) -> dict[str, float]:
    """Of two log-probabilities over the vocabulary: kl (nats), same (likeliest token).

    With the base's, also dot and norm: the covariance of the distances of both from it, and the variance of `want`'s.
    """
    import numpy as np

    want = want.astype(np.float64)
    weights = np.exp(want)
    out = {"kl": float((weights * (want - got)).sum()), "same": float(want.argmax() == got.argmax())}
    if base is not None:
        effect = want - base
        effect -= (weights * effect).sum()
        out |= {"dot": float((weights * effect * (got - base)).sum()), "norm": float((weights * effect**2).sum())}
    return out


def compare(request: Request) -> None:
    """Compare a file's next-token distributions with the adapter's: {file, rows, logprobs, bases, ends}.

    One .npy of log-probabilities a row; `bases`: the base's for the first rows. Prints for each row {row, kl (nats),
    same, loss (nats)}, sums over its positions, for the first ones also {dot, norm}, the covariance of the file's
    distance from the base with the adapter's, and the latter's variance; then {ends}: which of them end a generation.
    """
    import numpy as np
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
        @property
        def n_vocab(self) -> int:
            # LlamaContext.get_logits_ith asks the model for it, which cyllama 0.2.18 forgot to give it.
            return int(self.get_vocab().n_vocab)

    rows: list[list[int]] = request["rows"]
    llama_cpp.disable_logging()
    model = Model(request["file"], llama_cpp.LlamaModelParams(), False)
    params = llama_cpp.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = max(64, *(len(row) for row in rows))
    params.n_threads = params.n_threads_batch = request["threads"]
    context = llama_cpp.LlamaContext(model, params, False)
    for i, row in enumerate(rows):
        expected = np.load(request["logprobs"][i], mmap_mode="r")
        base = np.load(request["bases"][i], mmap_mode="r") if i < len(request["bases"]) else None
        if expected.shape[1] != model.n_vocab:
            refuse(f"the file has {model.n_vocab} tokens in its vocabulary, the adapter {expected.shape[1]}")
        batch = llama_cpp.LlamaBatch(n_tokens=len(row), embd=0, n_seq_max=1)
        for position, token in enumerate(row):
            batch.add(token, position, [0], True)
        context.kv_cache_clear(True)
        context.decode(batch)
        total: dict[str, float] = defaultdict(float)
        for position in range(len(row)):
            got = np.asarray(context.get_logits_ith(position), dtype=np.float64)
            top = got.max()
            got -= top + np.log(np.exp(got - top).sum())
            for name, value in distance(expected[position], got, None if base is None else base[position]).items():
                total[name] += value
            if position + 1 < len(row):
                total["loss"] -= float(got[row[position + 1]])
        say(row=i, **total)
    vocabulary = model.get_vocab()
    say(ends=[token for token in request["ends"] if vocabulary.is_eog(token)])


def tokenize(request: Request) -> None:
    """Token ids of texts by a file's own tokenizer: {file, texts}; special tokens are read, none is added."""
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    model = llama_cpp.LlamaModel(request["file"], llama_cpp.LlamaModelParams(), False)
    vocabulary = model.get_vocab()  # valid as long as the model is
    for text in request["texts"]:
        say(ids=vocabulary.tokenize(text, False, True))


def serve(request: Request) -> None:
    """Start llama.cpp's server in this process on a file, with a LoRA if `lora` is given, and ask it.

    {file, lora, context, calls: [[path, body or null for GET], …], positions: [[ids, .npy, row of it, base's .npy], …]}:
    prints {answer} or {error} for each call, then for each position, the last of `ids`, what `distance` gives.
    """
    import numpy as np
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["file"]
    params.n_ctx, params.n_parallel = request["context"], 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.port, params.warmup, params.use_jinja, params.verbosity = 0, False, True, 0
    if request.get("lora"):
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["lora"], 1.0)]
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with opener.open(urllib.request.Request(server.listening_address + path, data, headers)) as answer:
            return json.load(answer)

    for path, body in request["calls"]:
        try:
            say(answer=call(path, body))
        except urllib.error.HTTPError as error:
            say(error=error.read().decode("utf-8", "replace")[:1000])
    # The server answers with probabilities only beside text, which half a character or an end token is not: it is made to
    # choose a letter. What it reports are the probabilities before that.
    letter = call("/tokenize", {"content": "a"})["tokens"][-1]
    for ids, file, row, bare in request.get("positions", []):
        want, base = np.load(file, mmap_mode="r")[row], np.load(bare, mmap_mode="r")[row]
        body = {"prompt": ids, "n_predict": 1, "n_probs": len(want), "temperature": 0, "logit_bias": [[letter, 1e6]]}
        entries = call("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        if len(entries) != len(want):
            refuse(f"the file has {len(entries)} tokens in its vocabulary, the adapter {len(want)}")
        got = np.empty(len(want))
        got[[e["id"] for e in entries]] = [e["logprob"] for e in entries]
        say(**distance(want, got, base))


COMMANDS = {
    "convert": convert,
    "convert_lora": convert_lora,
    "quantize": quantize,
    "compare": compare,
    "tokenize": tokenize,
    "serve": serve,
}


def main() -> None:
    # The worker's child that started this one may be killed: nobody else would end it then.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    global _results
    # The libraries write to the standard output, too: that goes where errors go.
    _results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    COMMANDS[sys.argv[1]](json.load(sys.stdin))


if __name__ == "__main__":
    main()
