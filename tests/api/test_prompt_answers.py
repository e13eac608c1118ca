"""What ``POST /prompt`` answers when all is well."""

import base64
import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import trio
from api_support import (
    blank,
    graph_of,
    loader,
    open_client,
    pixel,
    png,
    prompt,
    rest,
    saver,
    wait_folders_clean,
)
from daemon_support import Daemon, problem, submit


@pytest.fixture
async def client(shared_daemon: Daemon) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(shared_daemon) as client:
        yield client


async def test_a_graph_comes_back_with_its_picture(client: httpx.AsyncClient) -> None:
    response = await prompt(client, graph_of(blank("1", color=0xFF8000), saver("2", "1")), id="one-picture")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert int(response.headers["content-length"]) == len(response.content)
    answer = response.json()
    assert list(answer) == ["id", "prompt", "images", "filenames", "outputs", "stats"]
    assert answer["id"] == "one-picture"
    assert answer["filenames"] == ["one-picture_x_00001_.png"]
    data = base64.b64decode(answer["images"][0])
    assert pixel(data) == (255, 128, 0)
    assert answer["outputs"] == [
        {
            "filename": "one-picture_x_00001_.png",
            "node_id": "2",
            "media_type": "image/png",
            "size_bytes": len(data),
        }
    ]
    assert answer["prompt"]["2"]["inputs"]["filename_prefix"] == "one-picture_x"


async def test_an_id_is_made_up_when_none_is_given(client: httpx.AsyncClient) -> None:
    answer = (await prompt(client, graph_of(blank("1"), saver("2", "1")))).json()
    assert str(uuid.UUID(answer["id"], version=4)) == answer["id"]


async def test_stats_say_what_took_how_long(client: httpx.AsyncClient) -> None:
    stats = (await prompt(client, graph_of(blank("1", color=11), saver("2", "1")))).json()["stats"]
    execution = stats["comfy_execution"]
    assert execution["duration"] == pytest.approx(execution["end"] - execution["start"], abs=0.01)
    assert set(execution["nodes"]) == {"1", "2"}
    assert all(node["start"] >= execution["start"] and node["duration"] >= 0 for node in execution["nodes"].values())
    parts = ("preprocess_time", "queue_time", "comfy_round_trip_time", "postprocess_time", "upload_time")
    assert stats["total_time"] >= sum(stats[part] for part in parts) - 1
    assert stats["comfy_round_trip_time"] >= execution["duration"] - 1
    assert stats["attempts"] == 1


async def test_outputs_come_in_the_order_of_the_graph_and_of_their_node(client: httpx.AsyncClient) -> None:
    graph = graph_of(
        saver("9", "b", prefix="nine"),
        blank("a", color=0x0000FF, batch_size=3),
        saver("z", "a", prefix="zed"),
        blank("b", color=0xFF0000),
        saver("1", "a", prefix="one"),
    )
    answer = (await prompt(client, graph, id="order")).json()
    assert answer["filenames"] == [
        "order_nine_00001_.png",
        *(f"order_zed_{n:05d}_.png" for n in (1, 2, 3)),
        *(f"order_one_{n:05d}_.png" for n in (1, 2, 3)),
    ]
    assert [output["node_id"] for output in answer["outputs"]] == ["9", "z", "z", "z", "1", "1", "1"]
    colours = [pixel(base64.b64decode(image)) for image in answer["images"]]
    assert colours == [(255, 0, 0)] + [(0, 0, 255)] * 6


async def test_subfolders_of_a_prefix_are_kept_and_found(client: httpx.AsyncClient, shared_daemon: Daemon) -> None:
    answer = (await prompt(client, graph_of(blank("1"), saver("2", "1", prefix="a/b/c")), id="folders")).json()
    assert answer["prompt"]["2"]["inputs"]["filename_prefix"] == "a/b/folders_c"
    assert answer["filenames"] == ["folders_c_00001_.png"]
    assert len(answer["images"]) == 1
    await wait_folders_clean(shared_daemon)


async def test_a_prefix_from_another_node_is_kept_working(client: httpx.AsyncClient) -> None:
    graph = graph_of(blank("1"), saver("2", "1", prefix=["3", 0])) | {
        "3": {"class_type": "PrimitiveString", "inputs": {"value": "linked"}}
    }
    answer = (await prompt(client, graph, id="link")).json()
    assert answer["filenames"] == ["link_linked_00001_.png"]


async def test_previews_are_left_out_and_other_kinds_are_not(client: httpx.AsyncClient) -> None:
    graph = graph_of(blank("1"), saver("2", "1")) | {
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "4": {"class_type": "SaveAnimatedWEBP", "inputs": {
            "images": ["1", 0], "filename_prefix": "film", "fps": 6.0, "lossless": True, "quality": 80,
            "method": "default"}},
        "5": {"class_type": "SaveTextFile", "inputs": {"text": "hello", "filename_prefix": "note"}},
    }  # fmt: skip
    answer = (await prompt(client, graph, id="kinds")).json()
    types = {output["node_id"]: output["media_type"] for output in answer["outputs"]}
    assert types == {"2": "image/png", "4": "image/webp", "5": "text/plain"}
    assert base64.b64decode(answer["images"][2]) == b"hello"


async def test_64_bit_seeds_survive(client: httpx.AsyncClient) -> None:
    seed = 2**64 - 1
    graph = graph_of(blank("1"), saver("2", "1"))
    graph["2"]["_meta"] = {"title": "t", "seed": seed}
    response = await prompt(client, graph)
    assert response.json()["prompt"]["2"]["_meta"]["seed"] == seed
    assert str(seed) in response.text


async def test_unknown_members_of_a_node_pass_through(client: httpx.AsyncClient) -> None:
    graph = graph_of(blank("1"), saver("2", "1"))
    graph["1"]["is_changed"] = "whatever"
    answer = (await prompt(client, graph)).json()
    assert answer["prompt"]["1"]["is_changed"] == "whatever"


async def test_null_means_absent(client: httpx.AsyncClient) -> None:
    response = await prompt(
        client, graph_of(blank("1"), saver("2", "1")), id=None, priority=None, timeout_s=None, extra_data=None
    )
    assert response.status_code == 200


async def test_the_fields_of_comfyui_clients_are_accepted(client: httpx.AsyncClient) -> None:
    response = await prompt(
        client, graph_of(blank("1"), saver("2", "1")), client_id="abc", extra_data={"extra_pnginfo": {"a": 1}}
    )
    assert response.status_code == 200
    assert "extra_data" not in response.json()


async def test_the_same_id_again_after_the_end_is_a_new_job_with_its_file(client: httpx.AsyncClient) -> None:
    graph = graph_of(blank("1"), saver("2", "1"))
    for _ in range(3):
        answer = (await prompt(client, graph, id="again")).json()
        assert len(answer["images"]) == 1
        assert pixel(base64.b64decode(answer["images"][0])) == (0, 0, 255)


async def test_the_same_id_and_body_at_the_same_time_is_one_job(client: httpx.AsyncClient) -> None:
    graph = graph_of(blank("1", color=5), rest("slow", "1", 0.4), saver("2", "slow"))
    answers: list[dict[str, object]] = []

    async def ask() -> None:
        answers.append((await prompt(client, graph, id="twin")).json())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(ask)
    assert answers[0]["stats"] == answers[1]["stats"]
    assert answers[0]["images"] == answers[1]["images"]


async def test_another_body_under_an_id_in_use_is_a_conflict(client: httpx.AsyncClient, shared_daemon: Daemon) -> None:
    slow = graph_of(blank("1", color=7), rest("slow", "1", 1.0), saver("2", "slow"))
    async with trio.open_nursery() as nursery:
        first = await submit(shared_daemon, nursery, client, slow, id="taken")
        response = await prompt(client, graph_of(blank("1"), saver("2", "1")), id="taken")
        first.leave()
    assert problem(response, 409, "id-conflict")["detail"].endswith("taken")


async def test_files_are_gone_after_the_answer(client: httpx.AsyncClient, shared_daemon: Daemon) -> None:
    graph = {
        **loader("1", base64.b64encode(png()).decode()),
        **saver("2", "1"),
    }
    assert (await prompt(client, graph)).status_code == 200
    await wait_folders_clean(shared_daemon)


async def test_a_large_output_is_whole(client: httpx.AsyncClient, shared_daemon: Daemon) -> None:
    graph = {"1": {"class_type": "SaveBytes", "inputs": {"size_mb": 40, "filename_prefix": "large"}}}
    graph["2"] = {"class_type": "SaveBytes", "inputs": {"size_mb": 3, "filename_prefix": "small"}}
    response = await prompt(client, graph, id="large")
    assert int(response.headers["content-length"]) == len(response.content)
    answer = response.json()
    assert [len(base64.b64decode(image)) for image in answer["images"]] == [40 << 20, 3 << 20]
    block = hashlib.sha256(bytes(range(256)) * 4096 * 3).hexdigest()
    assert hashlib.sha256(base64.b64decode(answer["images"][1])).hexdigest() == block
    await wait_folders_clean(shared_daemon)


async def test_an_input_by_name_is_read_from_the_input_folder(client: httpx.AsyncClient, shared_daemon: Daemon) -> None:
    name = f"{uuid.uuid4().hex}.png"
    path = Path(shared_daemon.input_dir) / name
    await trio.Path(path).write_bytes(png(colour=(1, 2, 3)))
    try:
        for value in (name, f"{name} [input]"):
            graph = graph_of(loader("1", value), saver("2", "1"))
            answer = (await prompt(client, graph)).json()
            assert pixel(base64.b64decode(answer["images"][0])) == (1, 2, 3)
        assert path.exists(), "an input that the job did not bring was removed"
    finally:
        path.unlink()


@pytest.mark.parametrize("write", ["plain", "lines", "url-safe", "unpadded", "data", "data-upper", "data-parameters"])
async def test_an_input_in_any_spelling_of_base64_is_read(client: httpx.AsyncClient, write: str) -> None:
    data = png(colour=(9, 80, 200))
    plain = base64.b64encode(data).decode()
    value = {
        "plain": plain,
        "lines": base64.encodebytes(data).decode(),
        "url-safe": base64.urlsafe_b64encode(data).decode(),
        "unpadded": plain.rstrip("="),
        "data": f"data:image/png;base64,{plain}",
        "data-upper": f"DATA:image/png;BASE64,{plain}",
        "data-parameters": f"data:image/png;charset=utf-8;base64,{plain}",
    }[write]
    graph = graph_of(loader("1", value), saver("2", "1"))
    response = await prompt(client, graph)
    assert response.status_code == 200, response.text[:500]
    assert pixel(base64.b64decode(response.json()["images"][0])) == (9, 80, 200)


async def test_the_events_of_a_job_lead_to_its_result(client: httpx.AsyncClient) -> None:
    graph = graph_of(blank("1", color=6), rest("slow", "1", 0.5), saver("2", "slow"))
    events: list[tuple[str, dict[str, object]]] = []

    async def watch() -> None:
        while not events:
            async with client.stream("GET", "/jobs/watched/events") as stream:
                name = ""
                async for line in stream.aiter_lines():
                    if line.startswith("event: "):
                        name = line.removeprefix("event: ")
                    elif line.startswith("data: ") and stream.status_code == 200:
                        events.append((name, json.loads(line.removeprefix("data: "))))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        assert (await prompt(client, graph, id="watched")).status_code == 200
    names = [name for name, _ in events]
    assert names[-1] == "result"
    assert set(names[:-1]) == {"state", "progress"}
    assert [data["state"] for name, data in events if name == "state"][-3:] == ["queued", "running", "delivering"]
    assert any(data["node_title"] == "A rest" for name, data in events if name == "progress")
    percents = [data["percent"] for name, data in events if name == "progress"]
    assert percents == sorted(percents)  # type: ignore[type-var]  # numbers, by the contract
    assert events[-1][1]["state"] == "succeeded"
