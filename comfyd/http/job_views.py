"""What is told of a job: where it is on its way, how far its graph is, and how it ended.

An end is told only once it is sure (:attr:`Job.outcome`): until then the job is in the state that it had before.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from comfyd.errors import Failure
from comfyd.http import problems
from comfyd.jobs import Job, JobService, Success
from comfyd.jobs.results import output_document
from comfyd.media.collect import OutputFile


def job_view(job: Job, service: JobService) -> dict[str, Any]:
    """Everything that is told of one job; once it has ended with its result."""
    view = _beginning(job) | _progress(job, service) | {"links": _links(job)}
    return view if job.outcome is None else view | job_result(job)


def listed_view(job: Job) -> dict[str, Any]:
    """What a list tells of a job: all that costs the same however many jobs wait and whatever it made."""
    view = _beginning(job) | {"percent": _percent(job), "links": _links(job)}
    if isinstance(job.outcome, Failure):
        document = problems.document_of(job.outcome)
        view["problem"] = {name: document[name] for name in ("type", "title", "status", "detail")}
    return view


def progress_view(job: Job, service: JobService) -> dict[str, Any]:
    """How far a job is, for its watchers."""
    return {"id": job.id, "state": job.state.value} | _progress(job, service)


def job_result(job: Job) -> dict[str, Any]:
    """How a job ended."""
    ending = {"id": job.id, "state": job.state.value}
    match job.outcome:
        case None:
            raise RuntimeError("asked for the result of a job that has none yet")
        case Failure() as failure:
            return ending | {"problem": problems.document_of(failure, job_id=job.id)}
        case Success() as success:
            return ending | {"outputs": output_documents(job, success), "stats": success.stats.as_dict()}


def output_documents(job: Job, success: Success) -> list[Mapping[str, Any]]:
    """The members of ``outputs``, each with the way to its file where there is one beside the answer of ``/prompt``."""
    return [
        {**output_document(output), "href": output_href(job, place)} if keeps(job, output) else output_document(output)
        for place, output in enumerate(success.outputs)
    ]


def output_href(job: Job, place: int) -> str:
    """Where output number *place* of a job is to be had."""
    return f"/jobs/{job.id}/outputs/{place}"


def keeps(job: Job, output: OutputFile) -> bool:
    """Whether comfyd has the file of *output* for whoever asks."""
    return job.request.keeps_outputs and output.object_url is None


def iso_time(unix_s: float) -> str:
    """A moment as RFC 3339 has it: UTC, with milliseconds."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _beginning(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "state": job.state.value,
        "workflow": job.workflow or None,
        "accepted_at": iso_time(job.accepted_at),
        "started_at": None if job.started_at is None else iso_time(job.started_at),
        "ended_at": None if job.ended_at is None or job.outcome is None else iso_time(job.ended_at),
        "attempts": job.attempts,
    }


def _progress(job: Job, service: JobService) -> dict[str, Any]:
    progress = job.progress.view
    node = job.graph.get(progress.node_id) if progress.node_id is not None else None
    title = ((node.get("_meta") or {}).get("title") or node.get("class_type")) if node else None
    eta_s = service.estimate_s(job)
    return {
        "position": service.queue.position(job),
        "percent": _percent(job),
        "node_id": progress.node_id,
        "node_title": title,
        "step": progress.step,
        "steps": progress.steps,
        "eta_s": None if eta_s is None else round(eta_s, 1),
    }


def _percent(job: Job) -> float:
    # A job that was read from the journal has seen no events.
    return 100.0 if isinstance(job.outcome, Success) else job.progress.view.percent


def _links(job: Job) -> dict[str, str]:
    own = f"/jobs/{job.id}"
    return {"self": own, "events": f"{own}/events", "outputs": f"{own}/outputs"}
