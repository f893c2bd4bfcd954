"""How far each GGUF type is from the live adapter: mean KL, agreement, loss, size, seconds; a row a type, as it is done.

    python -m benchmarks.export.gguf_types MODEL_FOLDER [--rows 16] [--tokens 64] [--types q8_0,q4_k_m] [--size 0.02]

MODEL_FOLDER is a base; the adapter is a random one of `--size` on all projections. The text is Python's documentation.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from service.settings import Settings
from service.specs import GGUF_METHODS, parse_spec
from service.templates import StoredTemplate
from tests.export_kit import Exporter, Watcher, make_adapter
from worker.data.stored import base_template
from worker.export import folder as folders
from worker.export import gguf, llama_cpp, load, reference, template
from worker.export.gguf_types import KINDS, contents
from worker.export.merge_stream import write_merged
from worker.export.source import open_source
from worker.outcome import Context


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--size", type=float, default=0.02)
    parser.add_argument("--types", default=",".join(GGUF_METHODS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        tokenizer = AutoTokenizer.from_pretrained(asked.model)
        adapter = make_adapter(asked.model, root / "adapter", size=asked.size, template=base_template(tokenizer))
        texts = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 2000][: asked.rows]
        probe = [tokenizer(text[:2000], add_special_tokens=False)["input_ids"][: asked.tokens] for text in texts]
        context = Context(
            paths=Exporter(root, asked.model).paths(adapter),
            progress=Watcher(),
            settings=Settings(),
            about={},
            token=None,
        )
        about = json.loads((adapter / "lorry_adapter.json").read_text())
        stored = StoredTemplate.model_validate_json((adapter / "lorry_template.json").read_text())
        spec = parse_spec({"kind": "export", "adapter": "a", "format": "gguf"})
        source = open_source(spec, context, adapter, about)  # type: ignore[arg-type]
        ends = template.stop_ids(stored, tokenizer)
        hub = {"token": None, "trust_remote_code": False}
        live = load.load_live(source.name, adapter, source.place, source.load_in, revision=None, hub=hub)
        expected = reference.take(live, probe, ends, root / "expected", lambda done, total: None)
        del live
        merged = root / "merged"
        merged.mkdir()
        write_merged(source.base, adapter, source.plan, merged, shard_bytes=10**10, step=lambda done, total: None)
        folders.write_configs(source.base, source.plan, source.model, merged, dtype=source.dtype, ends=ends)
        folders.write_template(adapter, stored, tokenizer, merged)
        tools = llama_cpp.find(Settings(torch_threads=1))
        start = time.perf_counter()
        first = root / "a.gguf"
        gguf.convert(merged, first, "f32", name="a", template=stored, tokenizer=tokenizer, tools=tools)
        print(
            f"converted in {time.perf_counter() - start:.0f} s; the adapter's effect is {expected.effect:.4f} nats",
            flush=True,
        )
        print(
            "| type | bits per weight | mean KL | same likeliest token | greedy | loss - adapter's | carried | s |",
            flush=True,
        )
        for method in asked.types.split(","):
            file = root / f"{method}.gguf"
            start = time.perf_counter()
            gguf.quantize(first, file, method, tools)
            seconds = time.perf_counter() - start
            report = gguf.read_back(file, method, stored, expected, tokenizer=tokenizer, tools=tools)
            tokens = report["greedy_tokens"]
            print(
                f"| {method} | {contents(file)['bits_per_weight']:.2f} | {report['mean_kl']:.2e} of {KINDS[method].limit} | "
                f"{report['argmax_agreement']:.3f} | {tokens['equal']} of {tokens['total']} | "
                f"{report['eval_loss'] - report['adapter_eval_loss']:+.4f} | {report['adapter_carried']:.3f} | {seconds:.1f} |"
                f" {'; '.join(report['problems'])}",
                flush=True,
            )
            file.unlink()


if __name__ == "__main__":
    main()
