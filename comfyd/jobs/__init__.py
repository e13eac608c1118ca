"""Jobs: what they are, where they wait, and the service that leads each to one outcome."""

from comfyd.jobs.model import Job, JobState, Outcome, Stats, Success
from comfyd.jobs.request import PromptRequest, Request, parse_request
from comfyd.jobs.serve import serve_jobs
from comfyd.jobs.service import JobService, ServiceConfig

__all__ = [
    "Job",
    "JobService",
    "JobState",
    "Outcome",
    "PromptRequest",
    "Request",
    "ServiceConfig",
    "Stats",
    "Success",
    "parse_request",
    "serve_jobs",
]
