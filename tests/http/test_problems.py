"""Problem documents: each kind has a row, and what a client reads of them."""

import json

import pytest

from comfyd.errors import Failure, FailureKind, Fault
from comfyd.http import problems
from comfyd.http.problems import document_of, problem

# API.md, "Errors".
STATUSES = {
    "invalid-request": 400,
    "no-output-node": 400,
    "invalid-input": 400,
    "invalid-prompt": 400,
    "not-found": 404,
    "method-not-allowed": 405,
    "body-too-large": 413,
    "unsupported-media-type": 415,
    "id-conflict": 409,
    "job-cancelled": 409,
    "queue-full": 429,
    "not-ready": 503,
    "draining": 503,
    "execution-failed": 500,
    "engine-crashed": 502,
    "storage-failed": 502,
    "unauthorized": 401,
    "range-not-satisfiable": 416,
    "webhook-pending": 409,
    "workflow-failed": 500,
    "timeout": 504,
    "internal-error": 500,
}


@pytest.mark.parametrize("kind", FailureKind)
def test_every_kind_has_the_status_of_the_contract_and_a_title(kind: FailureKind) -> None:
    document = document_of(Failure(kind=kind, detail="what happened"))
    assert document["type"] == kind.value
    assert document["status"] == STATUSES[kind.value]
    assert document["title"]
    assert document["detail"] == document["error"] == "what happened"


def test_a_document_has_no_members_that_say_nothing() -> None:
    document = document_of(Failure(kind=FailureKind.TIMEOUT, detail="d"))
    assert set(document) == {"type", "title", "status", "detail", "error"}


def test_faults_are_all_told_and_the_first_ones_place_stands_by_itself() -> None:
    faults = (Fault(location="prompt.3.inputs.w", message="m"), Fault(location="", message="n"))
    document = document_of(Failure(kind=FailureKind.INVALID_PROMPT, detail="d", faults=faults), job_id="job-1")
    assert document["id"] == "job-1"
    assert document["location"] == "prompt.3.inputs.w"
    assert document["errors"] == [
        {"location": "prompt.3.inputs.w", "message": "m"},
        {"location": "", "message": "n"},
    ]


def test_facts_are_members_of_the_document() -> None:
    failure = Failure(kind=FailureKind.EXECUTION_FAILED, detail="d", facts={"node_id": "3", "node_errors": {"3": []}})
    document = document_of(failure)
    assert document["node_id"] == "3"
    assert document["node_errors"] == {"3": []}


def test_an_answer_is_the_document_as_json_under_its_status() -> None:
    failure = Failure(kind=FailureKind.ID_CONFLICT, detail='名前 "quoted"')
    answer = problem(failure, job_id="x")
    assert answer.status == 409
    assert answer.headers == ()
    assert json.loads(answer.body) == document_of(failure, job_id="x")


@pytest.mark.parametrize(
    ("seconds", "header"), [(0.2, b"1"), (1.0, b"1"), (1.0001, b"2"), (5.0, b"5"), (3600.0, b"3600"), (0.0, b"0")]
)
def test_the_time_to_come_back_is_rounded_up_to_whole_seconds(seconds: float, header: bytes) -> None:
    answer = problem(Failure(kind=FailureKind.QUEUE_FULL, detail="d", retry_after_s=seconds))
    assert answer.headers == ((b"retry-after", header),)


def test_what_the_client_sent_is_shown_short_and_quoted() -> None:
    failure = problems.unsupported_media_type("text/" + "x" * 10_000 + "\r\n")
    assert len(failure.detail) < 200
    assert "\r" not in failure.detail


def test_the_limit_of_a_body_is_told_in_the_variables_own_unit() -> None:
    failure = problems.body_too_large(100 << 20)
    assert "100 MB (MAX_BODY_SIZE_MB)" in failure.detail
    assert "0.5 MB" in problems.body_too_large(1 << 19).detail
