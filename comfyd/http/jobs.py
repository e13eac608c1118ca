"""``GET /jobs/<id>``: where a job is, and how it ended, for as long as it is known."""

from quart import Response

from comfyd.http import problems
from comfyd.http.events import job_result, job_view
from comfyd.http.responses import json_response, problem_response
from comfyd.http.server import HardenedQuart
from comfyd.jobs import JobService


def add_jobs(app: HardenedQuart, service: JobService) -> None:
    """Add the route to *app*."""

    @app.get("/jobs/<job_id>")
    async def job(job_id: str) -> Response:
        """State and progress of a job, with its outputs or its problem once it has ended."""
        found = service.get(job_id)
        if found is None:
            return problem_response(problems.not_found("such job"))
        if found.outcome is not None:
            return json_response(job_result(found), 200)
        return json_response(job_view(found, service), 200)
