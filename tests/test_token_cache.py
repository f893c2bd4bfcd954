"""Tokenised data that are kept: found again where nothing differs, made anew where anything does, never used damaged."""

from __future__ import annotations

import datetime
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from service.errors import JobFailure
from service.settings import Settings
from service.specs import CptSpec, IftSpec
from tests.data_helpers import data_spec, upload
from tests.recipes import chats, cpt_spec, ift_spec, run_recipe, texts, weights
from tests.tiny import CHAT_TEMPLATE, make_tiny_tokenizer
from worker.data import Prepared, TokenCache, identity, prepare, threads

PROMPT = {"prompt": "{title}: {text}"}
QA = {"prompt": "{title}: ", "response": "{text}"}
LIMIT = 10**9
ROWS = [{"title": f"t{i}", "text": f"some text {i} " * (i % 5 + 1)} for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "tokens", LIMIT)


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ready(
    spec: CptSpec | IftSpec, model: Path | Any, file: Path | None, kept: TokenCache, eval_file: Path | None = None
) -> Prepared:
    tokenizer = load(model) if isinstance(model, Path) else model  # a job loads its own
    return prepare(spec, tokenizer, file=file, eval_file=eval_file, kept=kept)


def cached(*args: Any, **kwargs: Any) -> str:
    return str(ready(*args, **kwargs).preparation["cache"])


def entries(kept: TokenCache) -> list[Path]:
    return sorted(kept.cache.root.glob("*.arrow"), key=lambda path: path.stat().st_mtime)


def assert_equal(one: Prepared, other: Prepared) -> None:
    for a, b in ((one.train, other.train), (one.eval, other.eval)):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.to_dict() == b.to_dict()
    assert one.fingerprint == other.fingerprint
    assert one.report == other.report
    assert one.template == other.template


# Hits


@pytest.mark.parametrize(
    ("kind", "template", "more"),
    [
        ("cpt", PROMPT, {"size": 16, "test_size": 0.2}),
        ("cpt", PROMPT, {"size": 16}),  # no evaluation side
        ("cpt", PROMPT, {"max_samples": 7}),
        ("ift", QA, {"size": 20, "test_size": 0.2}),  # some are truncated
        ("ift", QA, {"size": 20, "test_size": 0.2, "responses_only": True}),
    ],
)
def test_what_is_read_is_what_was_tokenised(
    kind: str, template: dict[str, Any], more: dict[str, Any], model: Path, kept: TokenCache, tmp_path: Path
) -> None:
    spec, file = data_spec(kind, template, **more), upload(tmp_path, ROWS)
    alone = prepare(spec, load(model), file=file)
    first, second = ready(spec, model, file, kept), ready(spec, model, file, kept)
    states = [each.preparation["cache"] for each in (alone, first, second)]
    assert states == ["off", "miss", "hit"]
    assert_equal(first, alone)
    assert_equal(second, alone)


def test_rows_for_evaluation_and_one_long_text_are_kept_too(model: Path, kept: TokenCache, tmp_path: Path) -> None:
    file, held = upload(tmp_path, ROWS[:30]), upload(tmp_path, ROWS[30:], "eval.jsonl")
    spec = data_spec("cpt", PROMPT, eval_file_id="file_2")
    assert cached(spec, model, file, kept, eval_file=held) == "miss"
    assert cached(spec, model, file, kept, eval_file=held) == "hit"
    upload(tmp_path, ROWS[31:], "eval.jsonl")
    assert cached(spec, model, file, kept, eval_file=held) == "miss"
    text = tmp_path / "book.txt"
    text.write_text("a long story " * 200)
    spec = data_spec("cpt", {"prompt": "{text}"}, size=16, test_size=0.1)
    first, second = ready(spec, model, text, kept), ready(spec, model, text, kept)
    assert second.preparation["cache"] == "hit"
    assert_equal(first, second)


def test_a_hit_leaves_the_tokenizer_as_a_miss_does(model: Path, kept: TokenCache, tmp_path: Path) -> None:
    jinja = CHAT_TEMPLATE.replace("trim", "trim | trim")
    spec, file = data_spec("ift", {"chat_template": jinja}, size=256), chats(tmp_path / "chats.jsonl", n=4)
    for state in ("miss", "hit"):
        tokenizer = load(model)
        assert cached(spec, tokenizer, file, kept) == state
        assert tokenizer.chat_template == jinja


@pytest.mark.parametrize("kind", ["cpt", "ift"])
def test_a_second_job_over_a_file_reads_it_and_learns_the_same(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    if kind == "cpt":
        spec, file = cpt_spec(tiny_base), texts(tmp_path / "rows.jsonl")
    else:
        spec = ift_spec(tiny_base, training={"train_on_responses_only": True})
        file = chats(tmp_path / "rows.jsonl")
    runs = [run_recipe(spec, tmp_path / name, file=file, data_dir=tmp_path / "data") for name in ("one", "two")]
    one, two = (run.progress for run in runs)
    assert [p.records["preparation"]["cache"] for p in (one, two)] == ["miss", "hit"]
    assert any("read from the token cache" in line for line in two.logged)
    assert one.losses == two.losses
    assert one.eval_losses == two.eval_losses
    differ = {"preparation", "peak_memory_bytes", "gradient_checkpointing"}  # the last has the free memory in its words
    assert {k: v for k, v in one.records.items() if k not in differ} == {
        k: v for k, v in two.records.items() if k not in differ
    }
    assert all(torch.equal(weight, weights(runs[1])[name]) for name, weight in weights(runs[0]).items())


def test_a_resumed_job_and_one_with_other_rates_read_what_the_first_left(tiny_base: Path, tmp_path: Path) -> None:
    file, data_dir = texts(tmp_path / "rows.jsonl"), tmp_path / "data"

    def state(folder: str, spec: dict[str, Any], **more: Any) -> str:
        run = run_recipe(spec, tmp_path / folder, file=file, data_dir=data_dir, **more)
        return str(run.progress.records["preparation"]["cache"])

    assert state("a", cpt_spec(tiny_base), ask_at=(3, "pause")) == "miss"
    assert state("a", cpt_spec(tiny_base)) == "hit"
    other = {"learning_rate": 5e-4, "per_device_train_batch_size": 2, "max_steps": 2, "seed": 1}
    assert state("b", cpt_spec(tiny_base, training=other, lora={"r": 4})) == "hit"


# Misses


def test_whatever_the_data_depend_on_makes_a_miss(model: Path, kept: TokenCache, tmp_path: Path) -> None:
    file = upload(tmp_path, ROWS)

    def spec(template: dict[str, Any] = QA, kind: str = "ift", **more: Any) -> CptSpec | IftSpec:
        return data_spec(kind, template, **{"size": 20, "test_size": 0.2, **more})

    assert cached(spec(), model, file, kept) == "miss"
    changed = {
        "template": spec({**QA, "prompt": "{title} - "}),
        "kind": spec(PROMPT, "cpt"),
        "window": spec(size=21),
        "seed": spec(seed=1),
        "test_size": spec(test_size=0.3),
        "max_samples": spec(max_samples=30),
        "mask": spec(responses_only=True),
    }
    assert {name: cached(other, model, file, kept) for name, other in changed.items()} == dict.fromkeys(changed, "miss")
    assert cached(spec(), model, upload(tmp_path, ROWS[1:], "other.jsonl"), kept) == "miss"
    assert cached(spec(), model, upload(tmp_path, ROWS, "same.jsonl"), kept) == "hit"  # a name is no content


def test_another_tokenizer_makes_a_miss(model: Path, kept: TokenCache, tmp_path: Path) -> None:
    spec, file = data_spec("cpt", PROMPT), upload(tmp_path, ROWS)
    first = ready(spec, model, file, kept)
    smaller = tmp_path / "smaller"
    make_tiny_tokenizer(smaller, vocab=500)
    second = ready(spec, smaller, file, kept)
    assert second.preparation["cache"] == "miss"
    assert second.fingerprint != first.fingerprint
    with_token = load(model)
    with_token.add_tokens(["some text"])
    third = ready(spec, with_token, file, kept)
    assert third.preparation["cache"] == "miss"
    assert third.report["train_tokens"] < first.report["train_tokens"]
    assert cached(spec, model, file, kept) == "hit"


def test_the_model_s_own_chat_template_is_part_of_it(model: Path, kept: TokenCache, tmp_path: Path) -> None:
    spec, file = data_spec("ift", {"chat_template": "default"}, size=256), chats(tmp_path / "chats.jsonl", n=4)
    assert cached(spec, model, file, kept) == "miss"
    other = load(model)
    other.chat_template = CHAT_TEMPLATE.replace("\n\n", "\n")
    assert cached(spec, other, file, kept) == "miss"


def test_another_version_of_a_library_makes_a_miss(
    model: Path, kept: TokenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, file = data_spec("cpt", PROMPT), upload(tmp_path, ROWS)
    assert cached(spec, model, file, kept) == "miss"
    monkeypatch.setattr(identity.importlib.metadata, "version", lambda name: "another")
    identity._code.cache_clear()
    try:
        assert cached(spec, model, file, kept) == "miss"
    finally:
        identity._code.cache_clear()


def test_bad_rows_fail_a_job_each_time(model: Path, kept: TokenCache, tmp_path: Path) -> None:
    spec, file = data_spec("cpt", PROMPT), upload(tmp_path, [*ROWS, {"title": "x", "text": None}])
    for _ in range(2):
        with pytest.raises(JobFailure, match="row 41: column 'text' is null"):
            ready(spec, model, file, kept)
    assert entries(kept) == []


# Sets by path


def test_a_set_by_path_is_known_by_its_rows(
    model: Path, kept: TokenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def saved(rows: list[dict[str, Any]], name: str) -> CptSpec | IftSpec:
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
        return data_spec("cpt", PROMPT, path=str(tmp_path / name), max_samples=25, test_size=0.2)

    spec = saved(ROWS, "one")
    first, second = ready(spec, model, None, kept), ready(spec, model, None, kept)
    assert [first.preparation["cache"], second.preparation["cache"]] == ["miss", "hit"]
    assert_equal(first, second)
    changed = [{**row, "text": row["text"] + "!"} for row in ROWS]
    assert cached(saved(changed, "three"), model, None, kept) == "miss"
    stream = data_spec("cpt", PROMPT, path=str(tmp_path / "one"), streaming=True, max_samples=25)
    made = ready(stream, model, None, kept)
    assert made.preparation["cache"] == "off"
    assert "stream" in made.preparation["why"]


# Templates that do not always write the same


def test_a_template_that_writes_the_date_is_of_its_day(
    model: Path, kept: TokenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = data_spec("ift", {"chat_template": "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE}, size=256)
    file = chats(tmp_path / "chats.jsonl", n=4)
    assert [cached(spec, model, file, kept) for _ in range(2)] == ["miss", "hit"]

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:  # type: ignore[override]
            return datetime.date.fromordinal(datetime.date.toordinal(datetime.datetime.now()) + 1)

    monkeypatch.setattr(identity, "date", Tomorrow)
    assert cached(spec, model, file, kept) == "miss"


@pytest.mark.parametrize(
    ("text", "why"),
    [("{{ strftime_now('%H:%M') }}", "time of day"), ("{{ ['a', 'b'] | random }}", "something else each time")],
)
def test_a_template_that_writes_something_else_each_time_is_not_kept(
    text: str, why: str, model: Path, kept: TokenCache, tmp_path: Path
) -> None:
    system = "{% for message in messages %}"
    jinja = CHAT_TEMPLATE.replace(system, "{% set it = " + text[2:-2] + "%}" + system)
    data = ready(data_spec("ift", {"chat_template": jinja}, size=256), model, chats(tmp_path / "c.jsonl", n=4), kept)
    assert data.preparation["cache"] == "off"
    assert why in data.preparation["why"]
    assert entries(kept) == []


# Damage, limits, and several at once


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("damage", [cut, empty, flip, lengthen], ids=lambda f: f.__name__)
def test_a_damaged_file_is_never_used_and_made_again(
    damage: Callable[[Path], None], model: Path, kept: TokenCache, tmp_path: Path
) -> None:
    spec, file = data_spec("cpt", PROMPT, test_size=0.2), upload(tmp_path, ROWS)
    ready(spec, model, file, kept)
    damage(entries(kept)[0])
    alone = prepare(spec, load(model), file=file)
    again = ready(spec, model, file, kept)
    assert again.preparation["cache"] == "miss"
    assert_equal(again, alone)
    after = ready(spec, model, file, kept)
    assert after.preparation["cache"] == "hit"
    assert_equal(after, alone)


def test_the_limit_is_kept_and_the_last_used_stay(model: Path, tmp_path: Path) -> None:
    file = upload(tmp_path, ROWS)
    specs = [data_spec("cpt", PROMPT, size=64 + n) for n in range(3)]
    unbounded = TokenCache(tmp_path / "first", LIMIT)
    ready(specs[0], model, file, unbounded)
    size = unbounded.cache.bytes()
    assert size == entries(unbounded)[0].stat().st_size
    kept = TokenCache(tmp_path / "tokens", size * 5 // 2)
    assert [cached(spec, model, file, kept) for spec in specs[:2]] == ["miss", "miss"]
    reader = ready(specs[0], model, file, kept)  # the first was used last now
    assert reader.preparation["cache"] == "hit"
    assert cached(specs[2], model, file, kept) == "miss"
    assert len(entries(kept)) == 2
    assert sum(path.stat().st_size for path in entries(kept)) <= kept.limit
    assert cached(specs[0], model, file, kept) == "hit"
    assert cached(specs[1], model, file, kept) == "miss"
    # What was read stays when its file goes.
    for path in entries(kept):
        path.unlink()
    assert_equal(reader, prepare(specs[0], load(model), file=file))


def test_what_is_beyond_the_limit_by_itself_drives_nothing_out(model: Path, tmp_path: Path) -> None:
    small, large = upload(tmp_path, ROWS[:5], "small.jsonl"), upload(tmp_path, ROWS * 50, "large.jsonl")
    spec, kept = data_spec("cpt", PROMPT), TokenCache(tmp_path / "tokens", 20_000)
    assert cached(spec, model, small, kept) == "miss"
    assert [cached(spec, model, large, kept) for _ in range(2)] == ["miss", "miss"]
    assert cached(spec, model, small, kept) == "hit"


def test_a_limit_of_nothing_leaves_nothing(model: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", token_cache_bytes=0)
    file = upload(tmp_path, ROWS)
    for _ in range(2):
        data = ready(data_spec("cpt", PROMPT), model, file, TokenCache.of(settings))
        assert data.preparation["cache"] == "off"
    assert not settings.tokens_dir.exists()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_disk_that_takes_nothing_costs_no_job(
    what: str, model: Path, kept: TokenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, file = data_spec("cpt", PROMPT), upload(tmp_path, ROWS)
    if what == "folder":
        kept.cache.root.write_text("no folder")
    else:

        def full(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(pa, "OSFile", full)
    assert_equal(ready(spec, model, file, kept), prepare(spec, load(model), file=file))
    assert entries(kept) == []


CHILD = """
import sys, time
from pathlib import Path
import pyarrow as pa
from worker.data.kept import Rows, TokenCache

def make():
    time.sleep(0.5)  # the others come meanwhile
    ids = pa.array([[n] * 3 for n in range(1000)], pa.list_(pa.int32()))
    return Rows(pa.table({"input_ids": ids}), 900, "f" * 64, {"rows": 1000})

rows, found = TokenCache(Path(sys.argv[1]), 10**9).get("key", make)
print(found, rows.table["input_ids"].to_pylist() == [[n] * 3 for n in range(1000)], rows.train_rows, rows.report)
"""


def child(code: str, *args: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True)


def test_several_at_once_make_it_once_and_have_the_same(kept: TokenCache) -> None:
    children = [child(CHILD, kept.cache.root) for _ in range(4)]
    said = sorted(process.communicate()[0].strip() for process in children)
    assert said == ["False True 900 {'rows': 1000}", *["True True 900 {'rows': 1000}"] * 3]
    assert len(entries(kept)) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from worker.data import TokenCache
cache = TokenCache(Path(sys.argv[1]), 10**9).cache
with cache.making("x.arrow") as (place, staging):
    staging.write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_is_killed_while_making_leaves_nothing_that_is_found(kept: TokenCache) -> None:
    process = child(KILLED, kept.cache.root)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert entries(kept) == []
    assert kept.cache.bytes() == 0
    with kept.cache.making("x.arrow") as (place, staging):  # nobody has it locked
        assert not place.exists()
        staging.write_bytes(b"all of it")
    assert [path.read_bytes() for path in entries(kept)] == [b"all of it"]


def test_what_fails_while_making_leaves_nothing(kept: TokenCache) -> None:
    def fail() -> None:
        with kept.cache.making("x.arrow") as (_, staging):
            staging.write_bytes(b"half of it")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert [path for path in kept.cache.root.rglob("*") if path.is_file()] == []


# Threads


@pytest.mark.parametrize(("given", "within"), [(None, "true"), ("", "true"), ("false", "false"), ("true", "true")])
def test_texts_are_tokenised_on_all_cores_unless_the_environment_says_otherwise(
    given: str | None, within: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(threads.NAME, raising=False)
    if given is not None:
        monkeypatch.setenv(threads.NAME, given)
    with threads.all_cores():
        assert os.environ[threads.NAME] == within
    assert os.environ.get(threads.NAME) == given
