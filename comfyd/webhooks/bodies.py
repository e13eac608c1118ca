"""From a webhook's row and its job's record to the body that is sent, the same bytes on every attempt.

Receivers tell a repetition by its ``webhook-id``, and some by its bytes: nothing in here looks at the clock.
"""

from typing import Any, Final

from comfyd.errors import Failure, InvalidValue
from comfyd.http.problems import document_of
from comfyd.jobs.records import EndRecord, decode_end
from comfyd.jobs.results import is_stored, success_json
from comfyd.journal import JobRow, WebhookRow
from comfyd.media.json_files import JsonFiles
from comfyd.webhooks.rows import V1_FAILED, V1_OUTPUT, V2, iso_ms
from comfyd.wire import encode_json

NO_OUTPUT: Final = "the prompt made no output"


class NoSuchEvent(Exception):
    """A row speaks of what its job's record does not have: it can never be sent."""


def build_body(row: WebhookRow, job: JobRow) -> JsonFiles:
    """Build the body of *row* from its *job*'s record. Files are looked at when they are read. Takes time: thread.

    Raises:
        NoSuchEvent: the record does not have what *row* is about, or cannot be read (an older comfyd wrote it).
    """
    if job.key != row.job_key or job.outcome is None or job.ended_at is None:
        raise NoSuchEvent("the record of its job is gone")
    try:
        record = decode_end(job.outcome)
    except (InvalidValue, KeyError, TypeError, ValueError) as exc:  # what a document raises that is not as ours are
        raise NoSuchEvent("the record of its job cannot be read") from exc
    if row.kind == V2:
        return _v2(row.job_id, record, job.ended_at)
    if row.kind == V1_OUTPUT:
        return _v1_output(row, record)
    if row.kind == V1_FAILED:
        return _v1_failed(row.job_id, record)
    raise NoSuchEvent(f"its kind {row.kind!r} is not known to this version")


def _v1_output(row: WebhookRow, record: EndRecord) -> JsonFiles:
    success = record.outcome
    if isinstance(success, Failure) or row.place is None or not 0 <= row.place < len(success.outputs):
        raise NoSuchEvent("the record of its job has no such output")
    output = success.outputs[row.place]
    rest = {
        "id": row.job_id,
        "filename": output.filename,
        "prompt": record.graph,
        "stats": success.stats.as_dict(),
    }
    event = {"event": "output.complete"}
    if is_stored(success):
        return JsonFiles((encode_json(event | {"image": output.object_url} | rest),))
    return JsonFiles.around(encode_json(event)[:-1] + b',"image":', (output,), b"," + encode_json(rest)[1:])


def _v1_failed(job_id: str, record: EndRecord) -> JsonFiles:
    outcome = record.outcome
    error = outcome.detail if isinstance(outcome, Failure) else NO_OUTPUT
    return JsonFiles((encode_json({"event": "prompt.failed", "error": error, "id": job_id, "prompt": record.graph}),))


def _v2(job_id: str, record: EndRecord, ended_at: float) -> JsonFiles:
    outcome = record.outcome
    timestamp = iso_ms(ended_at)
    if not isinstance(outcome, Failure):
        return success_json(
            job_id, outcome, first={"type": "prompt.complete", "timestamp": timestamp}, echo=record.echo
        )
    problem = document_of(outcome, job_id=job_id)
    document: dict[str, Any] = {
        "type": "prompt.failed",
        "timestamp": timestamp,
        "id": job_id,
        "prompt": record.graph,
        "error": outcome.detail,
        # "type" is the event's here, so the problem's slug needs another name.
        "problem_type": problem["type"],
    }
    document.update((name, value) for name, value in problem.items() if name not in document)
    return JsonFiles((encode_json(document),))
