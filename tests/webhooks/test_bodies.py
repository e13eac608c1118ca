"""Rows and bodies of webhooks: what is told of which end of a job, and that it never changes."""

import base64
import json
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import pytest
from outbox_kit import ENDED_AT, FAILURE, GRAPH, job_row, output, success

from comfyd.errors import Failure, FailureKind, Fault
from comfyd.jobs.model import Outcome
from comfyd.journal import JobRow, WebhookRow
from comfyd.webhooks import rows_for
from comfyd.webhooks.bodies import NoSuchEvent, build_body

V1, V2 = "http://v1.example/", "http://v2.example/"


def rows(outcome: Outcome, *, webhook: str | None = V1, webhook_v2: str | None = V2) -> tuple[WebhookRow, ...]:
    numbers = count(7)
    return rows_for(
        "job",
        "key-job",
        outcome,
        webhook=webhook,
        webhook_v2=webhook_v2,
        next_sequence=lambda: next(numbers),
        now=ENDED_AT,
    )


async def built(row: WebhookRow, job: JobRow) -> Any:
    body = build_body(row, job)
    data = await body.read_whole()
    assert len(data) == body.length
    with body.open(6) as pieces:
        assert b"".join([piece async for piece in pieces]) == data
    assert await build_body(row, job).read_whole() == data, "every attempt has the same bytes"
    return json.loads(data)


def test_a_success_has_a_v1_row_for_each_output_and_then_one_v2_row(tmp_path: Path) -> None:
    made = rows(success(output(tmp_path, "a.png", b"a"), output(tmp_path, "b.png", b"b")))
    assert [(row.kind, row.place, row.url, row.sequence) for row in made] == [
        ("v1-output", 0, V1, 7),
        ("v1-output", 1, V1, 8),
        ("v2", None, V2, 9),
    ]
    assert len({row.id for row in made}) == 3
    assert {(row.job_id, row.job_key, row.created_at, row.attempts, row.dead_at) for row in made} == {
        ("job", "key-job", ENDED_AT, 0, None)
    }


def test_a_failure_has_one_row_for_each_webhook() -> None:
    assert [(row.kind, row.url) for row in rows(FAILURE)] == [("v1-failed", V1), ("v2", V2)]


def test_who_named_no_webhook_gets_no_row(tmp_path: Path) -> None:
    made = success(output(tmp_path, "a.png", b"a"))
    assert [row.kind for row in rows(made, webhook=None)] == ["v2"]
    assert [row.kind for row in rows(made, webhook_v2=None)] == ["v1-output"]
    assert rows(made, webhook=None, webhook_v2=None) == ()


async def test_a_success_without_outputs_is_told_to_v1_as_a_failure() -> None:
    outcome = success()
    v1, v2 = rows(outcome)
    assert await built(v1, job_row(outcome)) == {
        "event": "prompt.failed",
        "error": "the prompt made no output",
        "id": "job",
        "prompt": GRAPH,
    }
    document = await built(v2, job_row(outcome))
    assert document["type"] == "prompt.complete"
    assert document["images"] == document["outputs"] == []


async def test_v1_tells_each_output_with_its_file(tmp_path: Path) -> None:
    outcome = success(output(tmp_path, "a.png", b"one"), output(tmp_path, "名.png", b""))
    for place, row in enumerate(rows(outcome, webhook_v2=None)):
        document = await built(row, job_row(outcome))
        assert list(document) == ["event", "image", "id", "filename", "prompt", "stats"]
        assert document["event"] == "output.complete"
        assert base64.b64decode(document["image"]) == (b"one", b"")[place]
        assert document["filename"] == ("a.png", "名.png")[place]
        assert document["prompt"] == GRAPH
        assert document["stats"]["attempts"] == 1


async def test_v2_is_the_answer_with_type_moment_and_echo(tmp_path: Path) -> None:
    outcome = success(output(tmp_path, "a.png", b"one"), output(tmp_path, "b.png", b"two"))
    (row,) = rows(outcome, webhook=None)
    block = {"bucket": "b", "async": True}
    document = await built(row, job_row(outcome, s3=block))
    assert list(document) == [
        *("type", "timestamp", "id", "prompt", "images", "filenames", "outputs", "stats", "s3"),
    ]
    assert document["type"] == "prompt.complete"
    assert document["timestamp"] == "2026-01-01T00:00:00.250Z"
    assert [base64.b64decode(image) for image in document["images"]] == [b"one", b"two"]
    assert document["filenames"] == ["a.png", "b.png"]
    assert document["s3"] == block
    assert str(tmp_path) not in json.dumps(document)


async def test_stored_outputs_are_told_by_url_and_their_files_are_not_needed(tmp_path: Path) -> None:
    stored = attrs.evolve(
        output(tmp_path, "a.png", b"one"), object_url="s3://b/a.png", url="https://b.example/a.png?signed"
    )
    stored.path.unlink()
    outcome = success(stored)
    v1, v2 = rows(outcome)
    assert (await built(v1, job_row(outcome)))["image"] == "s3://b/a.png"
    document = await built(v2, job_row(outcome))
    assert document["images"] == ["s3://b/a.png"]
    assert document["outputs"][0]["url"] == "https://b.example/a.png?signed"


async def test_a_failure_is_told_with_its_problem() -> None:
    v1, v2 = rows(FAILURE)
    assert await built(v1, job_row(FAILURE)) == {
        "event": "prompt.failed",
        "error": "node 1 raised",
        "id": "job",
        "prompt": GRAPH,
    }
    document = await built(v2, job_row(FAILURE))
    assert list(document)[:5] == ["type", "timestamp", "id", "prompt", "error"]
    assert document["type"] == "prompt.failed"
    assert document["timestamp"] == "2026-01-01T00:00:00.250Z"
    assert document["error"] == document["detail"] == "node 1 raised"
    assert (document["problem_type"], document["status"]) == ("execution-failed", 500)
    assert (document["node_id"], document["exception_type"]) == ("1", "ValueError")


async def test_what_a_failure_says_cannot_take_the_place_of_the_event(tmp_path: Path) -> None:
    failure = Failure(
        kind=FailureKind.INVALID_PROMPT,
        detail="no",
        faults=(Fault(location="prompt.1", message="no"),),
        facts={"type": "forged", "id": "forged", "timestamp": "forged", "problem_type": "forged", "node_errors": {}},
    )
    (row,) = rows(failure, webhook=None)
    document = await built(row, job_row(failure))
    assert "forged" not in (document["type"], document["id"], document["timestamp"])
    assert (document["location"], document["node_errors"]) == ("prompt.1", {})


@pytest.mark.parametrize(
    "outcome", [b"", b"not JSON", b"[]", b"{}", b'{"graph":{},"echo":{},"failure":{"kind":"a-later-kind"}}', b"null"]
)
def test_a_record_that_cannot_be_read_is_no_event(outcome: bytes) -> None:
    (row,) = rows(FAILURE, webhook=None)
    with pytest.raises(NoSuchEvent, match="cannot be read"):
        build_body(row, attrs.evolve(job_row(FAILURE), outcome=outcome))


def test_a_job_that_has_not_ended_or_is_another_has_no_event() -> None:
    (row,) = rows(FAILURE, webhook=None)
    for changes in ({"outcome": None}, {"ended_at": None}, {"key": "another"}):
        with pytest.raises(NoSuchEvent, match="is gone"):
            build_body(row, attrs.evolve(job_row(FAILURE), **changes))
