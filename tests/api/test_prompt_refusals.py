"""What ``POST /prompt`` says of bad input: a clear problem document, and nothing queued, left, or shown."""

import base64
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from api_support import Graph, blank, graph_of, loader, open_client, png, prompt, saver, wait_folders_clean
from daemon_support import Daemon, problem

GOOD = graph_of(blank("1"), saver("2", "1"))
JSON = {"content-type": "application/json"}


@pytest.fixture
async def client(shared_daemon: Daemon) -> AsyncIterator[httpx.AsyncClient]:
    """After each test: no file is left, the next prompt runs, and the log holds no bug."""
    async with open_client(shared_daemon) as client:
        yield client
        assert (await prompt(client, GOOD)).status_code == 200
        await wait_folders_clean(shared_daemon)
        shared_daemon.assert_no_bug()


def places(document: dict[str, Any]) -> list[str]:
    return [fault["location"] for fault in document["errors"]]


BODIES = {
    "empty": b"",
    "no JSON": b"{prompt: 1}",
    "a list": b"[1]",
    "null": b"null",
    "a string": b'"prompt"',
    "not UTF-8": b'{"prompt": {"1": {"class_type": "\xff\xfe", "inputs": {}}}}',
    "lone surrogate": b'{"prompt": {"1": {"class_type": "\\ud800", "inputs": {}}}}',
    "truncated": b'{"prompt": {"1": {"class_type": "Empt',
    "trailing text": b'{"prompt": {}} x',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "NaN": b'{"prompt": NaN}',
    "UTF-16": '{"prompt": {}}'.encode("utf-16"),
    "NUL": b"\0",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_a_body_that_is_no_request_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post("/prompt", content=body, headers=JSON)
    document = problem(response, 400, "invalid-request")
    assert document["detail"] == document["error"]
    assert len(response.content) < 2000


FIELDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "prompt missing": ({"prompt": None}, {"prompt"}),
    "prompt a list": ({"prompt": []}, {"prompt"}),
    "prompt empty": ({"prompt": {}}, {"prompt"}),
    "id with a slash": ({"id": "a/b"}, {"id"}),
    "id is dots": ({"id": ".."}, {"id"}),
    "id begins with a dot": ({"id": ".a"}, {"id"}),
    "id empty": ({"id": ""}, {"id"}),
    "id with a line end": ({"id": "a\n"}, {"id"}),
    "id with NUL": ({"id": "a\0b"}, {"id"}),
    "id of 5000": ({"id": "a" * 5000}, {"id"}),
    "id of 129": ({"id": "a" * 129}, {"id"}),
    "id not ASCII": ({"id": "é"}, {"id"}),
    "id a number": ({"id": 5}, {"id"}),
    "priority high": ({"priority": 101}, {"priority"}),
    "priority low": ({"priority": -101}, {"priority"}),
    "priority a float": ({"priority": 1.5}, {"priority"}),
    "priority a bool": ({"priority": True}, {"priority"}),
    "time-out zero": ({"timeout_s": 0}, {"timeout_s"}),
    "time-out a text": ({"timeout_s": "5"}, {"timeout_s"}),
    "extra data a list": ({"extra_data": []}, {"extra_data"}),
    "unknown field": ({"promptt": 1}, {"promptt"}),
    "everything at once": (
        {"id": "/", "priority": 1000, "timeout_s": -1, "nonsense": 1, "prompt": 3},
        {"id", "priority", "timeout_s", "nonsense", "prompt"},
    ),
}


@pytest.mark.parametrize(("fields", "where"), FIELDS.values(), ids=FIELDS.keys())
async def test_a_wrong_field_is_named(client: httpx.AsyncClient, fields: dict[str, Any], where: set[str]) -> None:
    response = await client.post("/prompt", json={"prompt": GOOD, **fields})
    document = problem(response, 400, "invalid-request")
    assert set(places(document)) == where
    assert document["location"] in where
    assert len(response.content) < 4000


async def test_the_nearest_known_field_is_offered(client: httpx.AsyncClient) -> None:
    response = await client.post("/prompt", json={"prompt": GOOD, "priorty": 3})
    assert "priority" in problem(response, 400, "invalid-request")["errors"][0]["message"]


@pytest.mark.parametrize("longest", ["a" * 128, "A.b_c:d-9", "0", "-", ":"])
async def test_an_id_may_be_all_that_the_contract_says(client: httpx.AsyncClient, longest: str) -> None:
    response = await prompt(client, GOOD, id=longest)
    assert response.status_code == 200
    assert response.json()["id"] == longest


SHAPES: dict[str, tuple[Any, set[str]]] = {
    "node null": ({"1": None}, {"prompt.1"}),
    "node a number": ({"1": 5}, {"prompt.1"}),
    "node a list": ({"1": []}, {"prompt.1"}),
    "no class": ({"1": {"inputs": {}}}, {"prompt.1.class_type"}),
    "class a number": ({"1": {"class_type": 7}}, {"prompt.1.class_type"}),
    "class empty": ({"1": {"class_type": ""}}, {"prompt.1.class_type"}),
    "inputs a list": ({"1": {"class_type": "EmptyImage", "inputs": []}}, {"prompt.1.inputs"}),
    "meta a text": ({"1": {"class_type": "EmptyImage", "_meta": "x"}}, {"prompt.1._meta"}),
    "dangling link": (saver("2", "99"), {"prompt.2.inputs.images"}),
    "dangling link in a node that nothing needs": (
        GOOD | {"3": {"class_type": "ImageInvert", "inputs": {"image": ["99", 0]}}},
        {"prompt.3.inputs.image"},
    ),
    "absolute prefix": (graph_of(blank("1"), saver("2", "1", prefix="/etc/x")), {"prompt.2.inputs.filename_prefix"}),
    "prefix going up": (graph_of(blank("1"), saver("2", "1", prefix="a/../../x")), {"prompt.2.inputs.filename_prefix"}),
    "two at once": (
        {"1": None, "2": {"class_type": 1, "inputs": 2}},
        {"prompt.1", "prompt.2.class_type", "prompt.2.inputs"},
    ),
}


@pytest.mark.parametrize(("graph", "where"), SHAPES.values(), ids=SHAPES.keys())
async def test_a_malformed_graph_is_refused_with_its_places(
    client: httpx.AsyncClient, graph: Any, where: set[str]
) -> None:
    document = problem(await client.post("/prompt", json={"prompt": graph}), 400, "invalid-request")
    assert set(places(document)) == where


async def test_an_editor_workflow_is_told_how_to_be_exported(client: httpx.AsyncClient) -> None:
    workflow = {"last_node_id": 9, "nodes": [{"id": 1, "type": "KSampler"}], "links": [], "version": 0.4}
    document = problem(await client.post("/prompt", json={"prompt": workflow}), 400, "invalid-request")
    assert "Export (API)" in str(document["errors"])


async def test_an_unknown_class_is_named_with_the_nearest(client: httpx.AsyncClient) -> None:
    graph = GOOD | {"3": {"class_type": "SaveImge", "inputs": {}}}
    document = problem(await prompt(client, graph), 400, "invalid-prompt")
    assert places(document) == ["prompt.3.class_type"]
    assert "SaveImage" in document["detail"]


@pytest.mark.parametrize(
    "graph",
    [blank("1"), graph_of(blank("1")) | {"2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}],
    ids=["no output", "only a preview"],
)
async def test_a_graph_that_saves_nothing_is_refused(client: httpx.AsyncClient, graph: Graph) -> None:
    document = problem(await prompt(client, graph), 400, "no-output-node")
    assert document["location"] == "prompt"


async def test_comfyuis_own_validation_is_passed_on_with_all_places(client: httpx.AsyncClient) -> None:
    graph: Graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": -1, "batch_size": "many", "color": 0}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
    }
    document = problem(await prompt(client, graph), 400, "invalid-prompt")
    assert set(places(document)) >= {
        "prompt.1.inputs.width",
        "prompt.1.inputs.height",
        "prompt.1.inputs.batch_size",
        "prompt.2.inputs.filename_prefix",
    }
    assert set(document["node_errors"]) == {"1", "2"}
    assert "raceback" not in str(document)


async def test_a_partly_valid_graph_is_a_refusal_and_leaves_nothing(client: httpx.AsyncClient) -> None:
    graph = GOOD | {"3": {"class_type": "SaveImage", "inputs": {"filename_prefix": "y"}}}
    document = problem(await prompt(client, graph), 400, "invalid-prompt")
    assert places(document) == ["prompt.3.inputs.images"]


async def test_a_node_that_raises_is_named_without_paths_or_traceback(client: httpx.AsyncClient) -> None:
    message = "cannot open /srv/comfy/secret/model.bin"
    graph = graph_of(blank("1"), saver("2", "r")) | {
        "r": {"class_type": "Raise", "inputs": {"message": message, "enabled": True, "value": ["1", 0]}}
    }
    response = await prompt(client, graph, id="raiser")
    document = problem(response, 500, "execution-failed")
    assert (document["node_id"], document["node_type"], document["id"]) == ("r", "Raise", "raiser")
    assert document["exception_message"] == "cannot open model.bin"
    assert "/srv" not in response.text
    assert "raceback" not in response.text


async def test_a_node_without_inputs_does_no_harm(client: httpx.AsyncClient) -> None:
    """ComfyUI's worker dies of such a node when it gets it as it is; the fixture then runs another prompt."""
    response = await prompt(client, GOOD | {"3": {"class_type": "EmptyImage"}})
    assert response.status_code == 200


INPUTS: dict[str, Any] = {
    "absolute": "/etc/passwd",
    "going up": "../../etc/passwd",
    "backslashes": "..\\..\\x.png",
    "not there": "nope.png",
    "empty": "",
    "NUL": "a\0.png",
    "very long name": "a.b" * 2000,
    "http": "http://127.0.0.1:1/x.png",
    "s3": "s3://bucket/key.png",
    "file": "file:///etc/passwd",
    "other folder": "x.png [output]",
    "data of nothing known": "data:image/png;base64,AAAA",
    "data of text": "data:,hello",
    "data broken": "data:nonsense",
    "data not base64": "data:image/png;base64,%%%%",
    "base64 of nothing known": "A" * 200,
    "damaged picture": base64.b64encode(png()[:60]).decode(),
    "padding inside": base64.b64encode(png()).decode()[:40] + "==" + base64.b64encode(png()).decode()[40:],
    "JPEG that is none": "/9j/" + "A" * 100,
}


@pytest.mark.parametrize("value", INPUTS.values(), ids=INPUTS.keys())
async def test_an_input_that_cannot_be_used_is_named(client: httpx.AsyncClient, value: str) -> None:
    graph = graph_of(loader("1", value), saver("2", "1"))
    response = await prompt(client, graph)
    document = problem(response, 400, "invalid-input")
    assert places(document) == ["prompt.1.inputs.image"]
    assert len(response.content) < 1500


async def test_every_bad_input_is_named_at_once(client: httpx.AsyncClient) -> None:
    good = base64.b64encode(png()).decode()
    graph = graph_of(loader("1", "nope"), loader("2", good), loader("3", "/x"), saver("4", "2"))
    document = problem(await prompt(client, graph), 400, "invalid-input")
    assert places(document) == ["prompt.1.inputs.image", "prompt.3.inputs.image"]


async def test_a_picture_of_too_many_pixels_is_refused_by_its_header(client: httpx.AsyncClient) -> None:
    header = bytearray(png())
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    graph = graph_of(loader("1", base64.b64encode(header).decode()), saver("2", "1"))
    document = problem(await prompt(client, graph), 400, "invalid-input")
    assert "100000 x 100000" in document["detail"]


@pytest.mark.parametrize("given", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
async def test_another_content_type_is_415(client: httpx.AsyncClient, given: str) -> None:
    response = await client.post("/prompt", content=b"{}", headers={"content-type": given})
    assert "application/json" in problem(response, 415, "unsupported-media-type")["detail"]


@pytest.mark.parametrize("given", ["application/json", "APPLICATION/JSON; charset=utf-8", "application/vnd.x+json"])
async def test_json_by_any_name_is_taken(client: httpx.AsyncClient, given: str) -> None:
    response = await client.post("/prompt", json={"prompt": GOOD}, headers={"content-type": given})
    assert response.status_code == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_another_method_is_405_with_allow(client: httpx.AsyncClient, method: str) -> None:
    response = await client.request(method, "/prompt")
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/", "/promp", "/prompt/", "/jobs/none/events", "/%2e%2e/etc/passwd"])
async def test_an_unknown_route_is_a_404_document(client: httpx.AsyncClient, path: str) -> None:
    problem(await client.get(path), 404, "not-found")


async def test_a_body_over_the_limit_is_413(client: httpx.AsyncClient) -> None:
    response = await client.post("/prompt", content=b" " * ((100 << 20) + 1), headers=JSON)
    assert "100 MB" in problem(response, 413, "body-too-large")["detail"]


async def test_a_chunked_body_over_the_limit_is_413(client: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:  # noqa: ASYNC900  # httpx iterates over it to its end, or not at all
        for _ in range(101):
            yield b" " * (1 << 20)

    response = await client.post("/prompt", content=body(), headers=JSON)
    problem(response, 413, "body-too-large")
