"""The registry over HTTP, with a real engine behind it where the engine matters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.adapters.service import resolve
from service.errors import NotFound
from service.models import AdapterRow
from service.settings import Settings
from service.storage import open_storage
from tests.conftest import Api, serve
from tests.steps import TEMPLATE, adapter, checkpoint, cpt, error_of, ift, post, start, succeed, unique


def test_a_finished_adapter_is_shown_in_full(api: Api) -> None:
    job_id = adapter(api, name := unique(), lora__r=8, lora__train_embeddings=False)
    shown = api.http.get(f"/v1/adapters/{name}").json()
    why = shown.pop("servable_by")
    assert why == {"lorry": True, "vllm": True, "why": None}
    assert isinstance(shown.pop("created_at"), int)
    assert shown == {
        "name": name, "object": "adapter", "base": api.settings.base_model, "kind": "cpt", "job": job_id, "step": 10,
        "r": 8, "lora_alpha": 128, "use_rslora": True, "train_embeddings": False, "template": TEMPLATE, "parent": None,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "bytes": 100, "loaded": None, "pinned": False, "eval_loss": 1.5,
    }  # fmt: skip


def test_trained_embeddings_cannot_be_served_by_vllm(api: Api) -> None:
    adapter(api, name := unique(), lora__train_embeddings=True)
    servable = api.http.get(f"/v1/adapters/{name}").json()["servable_by"]
    assert (servable["lorry"], servable["vllm"]) == (True, False)
    assert "embed_tokens" in servable["why"]


def test_the_list_has_finished_adapters_by_name_and_a_cursor(api: Api) -> None:
    names = sorted(unique("walk") for _ in range(3))
    for name in names:
        adapter(api, name)
    post(api, cpt(unfinished := unique("walk")))
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = api.http.get("/v1/adapters", params=query).json()
        seen += [a["name"] for a in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["next"]
    assert seen == sorted(seen)
    assert [n for n in seen if n in names] == names
    assert unfinished not in seen


def test_rename_and_pin(api: Api) -> None:
    job_id = adapter(api, old := unique())
    checkpoint(api, job_id, 5)
    child = post(api, ift(unique(), init={"adapter": old, "mode": "stack"}))
    of_step = post(api, ift(unique(), init={"adapter": f"{old}@5", "mode": "stack"}))
    refused = api.http.patch(f"/v1/adapters/{old}", json={"name": unique()})
    assert (refused.status_code, error_of(refused)["code"]) == (409, "adapter_in_use")
    succeed(api, child["id"])
    succeed(api, of_step["id"])
    new = unique()
    changed = api.http.patch(f"/v1/adapters/{old}", json={"name": new, "pinned": True}).json()
    assert (changed["name"], changed["pinned"], changed["job"]) == (new, True, job_id)
    assert api.http.get(f"/v1/adapters/{old}").status_code == 404
    assert api.http.get(f"/v1/adapters/{child['adapter']}").json()["parent"] == new
    assert api.http.get(f"/v1/adapters/{of_step['adapter']}").json()["parent"] == f"{new}@5"
    assert api.http.get(f"/v1/jobs/{job_id}").json()["adapter"] == new
    assert api.http.patch(f"/v1/adapters/{new}", json={"pinned": False}).json()["pinned"] is False
    assert post(api, cpt(old))["adapter"] == old, "the old name is free"


@pytest.mark.parametrize(
    "use",
    [
        lambda name, job: ift(unique(), init={"adapter": name, "mode": "stack"}),
        lambda name, job: ift(unique(), init={"adapter": f"{name}@5", "mode": "stack"}),
        lambda name, job: {"kind": "export", "adapter": name},
        lambda name, job: {"kind": "export", "adapter": f"{job}@5"},
    ],
    ids=["init", "init-checkpoint", "export", "export-checkpoint"],
)
def test_an_adapter_that_an_unfinished_job_needs_stays(api: Api, use: Callable[[str, str], dict[str, Any]]) -> None:
    job_id = adapter(api, name := unique())
    checkpoint(api, job_id, 5)
    other = adapter(api, name + "x")  # a name that only begins alike is another
    needs = post(api, use(name, job_id))
    answer = api.http.delete(f"/v1/adapters/{name}")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "adapter_in_use")
    assert needs["id"] in error_of(answer)["message"]
    assert api.http.delete(f"/v1/adapters/{name}x").status_code == 200
    assert not (api.settings.adapters_dir / other).exists()
    api.http.post(f"/v1/jobs/{needs['id']}/cancel")
    assert api.http.delete(f"/v1/adapters/{name}").json() == {"id": name, "object": "adapter", "deleted": True}


@pytest.mark.parametrize("ref", ["{name}", "{job}@5"])
def test_deleting_an_adapter_and_exporting_it_at_once_never_both_succeed(api: Api, ref: str) -> None:
    for _ in range(15):
        job_id = adapter(api, name := unique())
        checkpoint(api, job_id, 5)
        gate = threading.Barrier(2)

        def delete(name: str = name, gate: threading.Barrier = gate) -> int:
            gate.wait()
            return api.http.delete(f"/v1/adapters/{name}").status_code

        with ThreadPoolExecutor(1) as pool:
            deleted = pool.submit(delete)
            gate.wait()
            answer = api.http.post("/v1/jobs", json={"kind": "export", "adapter": ref.format(name=name, job=job_id)})
            assert (answer.status_code, deleted.result()) in {(202, 409), (404, 200)}


def test_deleting_removes_files_and_checkpoints(api: Api) -> None:
    job_id = adapter(api, name := unique())
    path = checkpoint(api, job_id, 5)
    assert (api.settings.adapters_dir / job_id).exists()
    assert api.http.delete(f"/v1/adapters/{name}").status_code == 200
    assert not (api.settings.adapters_dir / job_id).exists()
    assert not path.exists()
    assert api.http.get(f"/v1/adapters/{name}").status_code == 404
    assert api.http.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"] == []
    assert api.http.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded", "its record stays"
    assert post(api, cpt(name))["adapter"] == name


def test_without_an_engine_loading_is_503(api: Api) -> None:
    adapter(api, name := unique())
    answer = api.http.post(f"/v1/adapters/{name}/load")
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "engine_unavailable"
    assert int(answer.headers["retry-after"]) > 0


def test_references_resolve_to_folders(api: Api) -> None:
    job_id = adapter(api, name := unique())
    at_5 = checkpoint(api, job_id, 5)
    files = open_storage(api.settings)
    with api.db.read() as session:
        for ref, path, step in (
            (name, api.settings.adapters_dir / job_id, 10),
            (f"{name}@5", at_5, 5),
            (f"{job_id}@5", at_5, 5),
        ):
            found = resolve(session, files, ref)
            assert (found.ref, found.path, found.step, found.template) == (ref, path, step, TEMPLATE)
            assert found.base == api.settings.base_model
            assert found.row is not None
            assert found.row.name == name
        for ref in (
            "none",
            f"{name}@6",
            f"{name}@",
            f"{name}@5@5",
            f"{name}@-5",
            f"{name}@٥",
            "",
            "@5",
            f"{job_id}",
            "a\0",
        ):
            with pytest.raises(NotFound):
                resolve(session, files, ref)


def test_a_checkpoint_of_a_running_job_resolves_and_the_unfinished_adapter_does_not(api: Api) -> None:
    job_id = post(api, cpt(name := unique()))["id"]
    start(api, job_id)
    path = checkpoint(api, job_id, 3)
    files = open_storage(api.settings)
    with api.db.read() as session:
        assert resolve(session, files, f"{name}@3").path == path
        with pytest.raises(NotFound, match=job_id):
            resolve(session, files, name)


@pytest.fixture(scope="module")
def with_engine(
    tiny_base: Path, sqlite_url: str, make_settings: Callable[..., Settings]
) -> Iterator[tuple[Api, Callable[[str], str]]]:
    """The API with a real engine on a tiny model, and a maker of adapters that the engine can load."""
    from tests.serving import KINDS, engine_settings, make_adapter, serve_engine

    with serve_engine(engine_settings(tiny_base)) as engine:
        settings = make_settings(database_url=sqlite_url, engine_url=engine.url, base_model=str(tiny_base))
        with serve(settings) as api:

            def make(name: str) -> str:
                job_id = adapter(api, name)
                make_adapter(tiny_base, settings.adapters_dir / job_id, **KINDS["small"])
                return job_id

            yield api, make


def test_load_and_unload_show_in_the_registry(with_engine: tuple[Api, Callable[[str], str]]) -> None:
    api, make = with_engine
    make(name := unique())
    url = f"/v1/adapters/{name}"
    assert api.http.get(url).json()["loaded"] is False
    assert api.http.post(f"{url}/load").json() == {"name": name, "loaded": True}
    assert api.http.get(url).json()["loaded"] is True
    assert {a["name"]: a["loaded"] for a in api.http.get("/v1/adapters").json()["data"]}[name] is True
    assert api.http.post(f"{url}/unload").json() == {"name": name, "loaded": False}
    assert api.http.post(f"{url}/unload").status_code == 200, "unloading twice is no error"
    assert api.http.get(url).json()["loaded"] is False


@pytest.mark.parametrize("change", ["rename", "delete"])
def test_the_engine_forgets_an_adapter_that_is_renamed_or_deleted(
    with_engine: tuple[Api, Callable[[str], str]], change: str
) -> None:
    api, make = with_engine
    make(name := unique())
    api.http.post(f"/v1/adapters/{name}/load")
    if change == "rename":
        assert api.http.patch(f"/v1/adapters/{name}", json={"name": unique()}).json()["loaded"] is False
    else:
        assert api.http.delete(f"/v1/adapters/{name}").status_code == 200
    with api.db.read() as session:
        assert session.get(AdapterRow, name) is None
    assert name not in httpx.get(f"{api.settings.engine_url}/v1/models").text
