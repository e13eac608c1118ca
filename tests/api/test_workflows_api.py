"""``/workflow/<name>``: a file in a folder is an endpoint, typed, and as careful as ``/prompt``."""

import json
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon_support import Daemon, problem, running_daemon

GRAPH: dict[str, Any] = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 32, "height": 16, "batch_size": 1, "color": 7},
        "_meta": {"title": "Canvas"},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "made"}},
}
PYTHON = '''
"""A plain picture.

Of one colour, for tests.
"""

import random
from typing import Annotated

import attrs

from comfyd.workflow import Field, Graph, inputs


@inputs
class Input:
    colour: Annotated[int, Field(ge=0, le=255, description="How light it is.")]
    width: Annotated[int, Field(ge=16, le=64)] = 16
    lucky: int = attrs.field(factory=lambda: random.randrange(1 << 20))


def workflow(given: Input) -> Graph:
    return {
        "1": {"class_type": "EmptyImage",
              "inputs": {"width": given.width, "height": 16, "batch_size": 1, "color": given.colour}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "plain"}},
    }
'''
RAISING = '''
"""One that fails."""

from comfyd.workflow import Graph, inputs


@inputs
class Input:
    word: str = "x"


def workflow(given: Input) -> Graph:
    raise RuntimeError("a secret of the author's code")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workflows of these tests."""
    folder = tmp_path_factory.mktemp("workflows")
    (folder / "nested").mkdir()
    (folder / "canvas.json").write_text(json.dumps(GRAPH))
    (folder / "nested/plain.py").write_text(textwrap.dedent(PYTHON))
    (folder / "raising.py").write_text(textwrap.dedent(RAISING))
    (folder / "broken.py").write_text("def workflow(:\n")
    return folder


@pytest.fixture(scope="module")
def daemon(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that serves them."""
    with running_daemon(tmp_path_factory.mktemp("daemon"), environ={"WORKFLOW_DIR": str(folder)}) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[httpx.Client]:
    """Someone who calls it."""
    with httpx.Client(base_url=daemon.url, trust_env=False, timeout=20) as client:
        yield client


@pytest.mark.parametrize("prefix", ["workflow", "workflows"])
def test_a_python_workflow_runs_and_tells_its_input_with_the_defaults(client: httpx.Client, prefix: str) -> None:
    answer = client.post(f"/{prefix}/nested/plain", json={"input": {"colour": 3}})
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert document["input"]["colour"] == 3
    assert document["input"]["width"] == 16
    assert 0 <= document["input"]["lucky"] < 1 << 20
    assert document["prompt"]["1"]["inputs"]["color"] == 3
    assert len(document["images"]) == 1
    assert document["filenames"][0].endswith("_plain_00001_.png")


def test_what_is_drawn_by_lot_is_drawn_for_each_request(client: httpx.Client) -> None:
    drawn = {
        client.post("/workflow/nested/plain", json={"input": {"colour": 3}}).json()["input"]["lucky"] for _ in range(5)
    }
    assert len(drawn) > 1


def test_a_graph_in_a_file_is_an_endpoint_without_any_code(client: httpx.Client) -> None:
    described = client.get("/workflow/canvas").json()
    names = list(described["input"]["properties"])
    width = next(name for name in names if "width" in name)
    answer = client.post("/workflow/canvas", json={"input": {width: 48}})
    assert answer.status_code == 200, answer.text
    assert answer.json()["prompt"]["1"]["inputs"]["width"] == 48
    assert answer.json()["prompt"]["1"]["inputs"]["height"] == 16


def test_workflows_are_listed_and_described(client: httpx.Client) -> None:
    listed = client.get("/workflows").json()["workflows"]
    assert [each["name"] for each in listed] == ["canvas", "nested/plain", "raising"]
    described = client.get("/workflow/nested/plain").json()
    assert (described["summary"], described["source"]) == ("A plain picture.", "python")
    assert described["input"]["required"] == ["colour"]
    assert described["input"]["properties"]["colour"]["maximum"] == 255


def test_every_fault_is_told_with_its_place(client: httpx.Client) -> None:
    answer = client.post("/workflow/nested/plain", json={"input": {"colour": 256, "width": "wide", "colr": 1}})
    document = problem(answer, 400, "invalid-request")
    assert {fault["location"] for fault in document["errors"]} == {"input.colour", "input.width", "input.colr"}


@pytest.mark.parametrize(
    ("body", "location"),
    [
        ({"input": 5}, "input"),
        ({"input": {}, "prompt": {}}, "prompt"),
        ({"input": {}, "priority": 1000}, "priority"),
        ({"input": {"colour": 1}, "webhook_v2": "ftp://a.test/"}, "webhook_v2"),
        ({"input": {"colour": 1}, "convert_output": {"format": "bmp"}}, "convert_output.format"),
    ],
)
def test_the_rest_of_a_request_is_held_to_the_rules_of_prompt(
    client: httpx.Client, body: dict[str, Any], location: str
) -> None:
    document = problem(client.post("/workflow/nested/plain", json=body), 400, "invalid-request")
    assert location in {fault["location"] for fault in document["errors"]}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_name_that_is_not_there_is_told_with_the_nearest(client: httpx.Client, method: str) -> None:
    document = problem(client.request(method, "/workflow/nested/plan", json={"input": {}}), 404, "not-found")
    assert 'did you mean "nested/plain"?' in document["detail"]


def test_a_broken_file_is_no_endpoint_and_the_others_are(daemon: Daemon, client: httpx.Client) -> None:
    problem(client.post("/workflow/broken", json={"input": {}}), 404, "not-found")
    assert daemon.log.wait_for("workflow.broken", file="broken.py")
    assert client.get("/ready").status_code == 200


def test_a_workflow_that_raises_is_the_authors_fault_and_its_text_stays_in_the_log(
    daemon: Daemon, client: httpx.Client
) -> None:
    answer = client.post("/workflow/raising", json={"input": {}})
    document = problem(answer, 500, "workflow-failed")
    assert "secret" not in answer.text
    assert "raising" in document["detail"]
    assert "a secret of the author's code" in daemon.log.wait_for("workflow.failed")["traceback"]


def test_a_workflow_can_be_a_job_that_is_answered_later(client: httpx.Client) -> None:
    body = {"input": {"colour": 9}, "id": "later"}
    answer = client.post("/workflow/nested/plain", json=body, headers={"prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    assert answer.json()["input"]["colour"] == 9
    job = client.get("/jobs/later", params={"wait": 15}).json()
    assert (job["state"], job["workflow"]) == ("succeeded", "nested/plain")
    assert [each["id"] for each in client.get("/jobs", params={"workflow": "nested/plain"}).json()["jobs"]] == ["later"]
    again = client.post("/workflow/nested/plain", json=body, headers={"prefer": "respond-async"})
    assert again.status_code == 202
    assert client.delete("/jobs/later").status_code == 204


def test_a_changed_file_is_taken_up_without_a_restart(folder: Path, daemon: Daemon, client: httpx.Client) -> None:
    file = folder / "fresh.json"
    file.write_text(json.dumps(GRAPH))
    _wait(lambda: client.get("/workflow/fresh").status_code == 200)
    file.unlink()
    _wait(lambda: client.get("/workflow/fresh").status_code == 404)


def _wait(condition: Callable[[], bool], within_s: float = 15) -> None:
    """The folder is looked at each second, and only its effect can be seen."""
    give_up_at = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
