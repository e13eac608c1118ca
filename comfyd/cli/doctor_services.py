"""What ``comfyd doctor`` asks of others: S3, the receiver of system webhooks; and the folder of the workflows."""

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from comfyd.cli.finding import Finding, doubtful, failed, fine, skipped
from comfyd.config import WebhooksConfig
from comfyd.storage.s3_config import S3Config, make_client
from comfyd.storage.s3_errors import Diagnosis, Trouble, diagnose, handled_errors

CONNECT_S: Final = 5.0
_S3_SIGNS: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SHARED_CREDENTIALS_FILE",
)


# --- S3


def wants_s3(environ: Mapping[str, str], bucket: str | None) -> bool:
    """Whether anything says that S3 is to be used. A role of the machine says nothing; give a bucket then."""
    home = environ.get("HOME", "")
    return bool(
        bucket
        or any(environ.get(name) for name in _S3_SIGNS)
        or (home and (Path(home) / ".aws" / "credentials").is_file())
    )


def check_s3(config: S3Config, bucket: str | None) -> Finding:
    """Ask the store one cheap signed question: for *bucket*, else which buckets there are. Blocks; for a thread.

    A store that says "access denied" has looked at the signature: it is reached and knows the keys.
    """
    quick = attrs.evolve(config, connect_timeout_s=CONNECT_S, read_timeout_s=2 * CONNECT_S)
    try:
        client = make_client(quick)
    except ValueError:  # botocore's word for an endpoint that is no URL
        return failed("s3", "the settings do not work", "is AWS_ENDPOINT_URL a URL?")
    except Exception as exc:  # those that boto3 is known for, see make_client; the others are bugs
        if not isinstance(exc, handled_errors()):
            raise
        return failed("s3", diagnose(exc, "").cause, "see AWS_PROFILE and ~/.aws")
    try:
        endpoint = str(client.meta.endpoint_url)
        if bucket is not None and (found := _check_bucket(client, endpoint, bucket)) is not None:
            return found
        trouble = _trouble(client.list_buckets, endpoint)
    finally:
        client.close()
    match trouble:
        case None:
            what = f"{endpoint} answers and takes the keys"
        case Diagnosis(trouble=Trouble.ACCESS_DENIED):
            what = f"{endpoint} answers and knows the keys, which may not list buckets; try --bucket"
        case _:
            return failed("s3", trouble.cause, _advice(trouble))
    if bucket is not None:
        advice = "grant s3:ListBucket on it, if callers may name it; s3:PutObject alone is enough to write"
        return doubtful("s3", f"access to the bucket {bucket} is denied, or it is not there", advice)
    return fine("s3", what)


def _check_bucket(client: Any, endpoint: str, bucket: str) -> Finding | None:
    """Ask for the bucket by HEAD, whose answers have no body; None where only another question tells what is wrong."""
    trouble = _trouble(lambda: client.head_bucket(Bucket=bucket), endpoint, "404")
    match trouble:
        case None:
            return fine("s3", f"{endpoint} answers, and the bucket {bucket} is there")
        case Diagnosis(trouble=Trouble.WRONG_REGION, region=str() as region):
            return fine("s3", f"the bucket {bucket} is in region {region}, where comfyd follows")
        case Diagnosis(trouble=Trouble.ACCESS_DENIED):
            return None  # or the keys are wrong: 403 is all that HEAD says
        case Diagnosis(trouble=Trouble.NO_SUCH_BUCKET):
            return failed("s3", f"the bucket {bucket} does not exist", "create it, or name another")
        case _:
            return failed("s3", f"bucket {bucket}: {trouble.cause}", _advice(trouble))


def _trouble(question: Callable[[], Any], endpoint: str, no_such_bucket: str = "") -> Diagnosis | None:
    """Ask, and say what went wrong; None if nothing did. *no_such_bucket*: the code that HEAD has for it."""
    try:
        question()
    except handled_errors() as exc:
        answer = getattr(exc, "response", None)
        code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
        if no_such_bucket and code == no_such_bucket:
            return Diagnosis(trouble=Trouble.NO_SUCH_BUCKET, cause="the bucket does not exist")
        return diagnose(exc, endpoint)
    return None


def _advice(diagnosis: Diagnosis) -> str:
    match diagnosis.trouble:
        case Trouble.NO_CREDENTIALS | Trouble.BAD_CREDENTIALS:
            return "see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_PROFILE"
        case Trouble.UNREACHABLE | Trouble.TIMED_OUT | Trouble.BROKEN_OFF:
            return "see AWS_ENDPOINT_URL and the way there"
        case Trouble.CLOCK:
            return "set the clock"
        case _:
            return "see AWS_ENDPOINT_URL and AWS_REGION"


# --- system webhooks


async def check_webhook(config: WebhooksConfig) -> Finding:
    """Connect to the receiver of system webhooks, and say nothing to it."""
    import httpx

    from comfyd.net import display_url

    if config.system_url is None:
        return skipped("webhook", "SYSTEM_WEBHOOK_URL is not set")
    url = httpx.URL(config.system_url)
    shown = display_url(url)
    try:
        with trio.fail_after(CONNECT_S):
            stream = await trio.open_tcp_stream(url.host, url.port or (443 if url.scheme == "https" else 80))
        await trio.aclose_forcefully(stream)
    except trio.TooSlowError:
        return failed("webhook", f"{shown} does not answer within {CONNECT_S:g} s", "see SYSTEM_WEBHOOK_URL")
    except OSError as exc:
        return failed("webhook", f"no connection to {shown}: {_reason(exc)}", "see SYSTEM_WEBHOOK_URL")
    if not config.system_events:
        advice = "set it, to `all` for one"
        return doubtful("webhook", f"{shown} can be reached, but SYSTEM_WEBHOOK_EVENTS is empty", advice)
    return fine("webhook", f"{shown} can be reached")


def _reason(exc: OSError) -> str:
    """Return the system's word: trio says only that all attempts failed, and has the attempts in its cause."""
    cause = exc.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return (cause.strerror if isinstance(cause, OSError) else exc.strerror) or str(exc)


# --- workflows


@attrs.frozen(kw_only=True)
class WorkflowCheck:
    """What the folder of workflows says, and the node classes that those without code need, by route."""

    findings: tuple[Finding, ...]
    classes: Mapping[str, frozenset[str]] = attrs.field(factory=dict)


def check_workflows(folder: Path, *, required: bool) -> WorkflowCheck:
    """Read the folder as the daemon would, which runs its Python files. Blocks; for a thread."""
    from comfyd.workflows import load_catalogue
    from comfyd.workflows.json_workflow import JsonWorkflow

    with redirect_stdout(sys.stderr):  # what they print is none of our lines, and no JSON
        catalogue = load_catalogue(folder, required=required)
    findings = [
        doubtful("workflows", f"{problem.file}: {problem.message}", "it is left out; mend it")
        for problem in catalogue.problems
    ]
    count = len(catalogue.workflows)
    findings.append(fine("workflows", f"{count} {'workflow' if count == 1 else 'workflows'} in {folder}"))
    classes = {
        workflow.route: frozenset(node["class_type"] for node in workflow.graph.values())
        for workflow in catalogue.workflows
        if isinstance(workflow, JsonWorkflow)
    }
    return WorkflowCheck(findings=tuple(findings), classes=classes)
