"""What a caller may ask: the schema of ``POST /prompt``, one source for validation and OpenAPI."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar

import attrs
from msgspec import Meta

from comfyd.errors import Fault, InvalidValue
from comfyd.media.convert_options import ConvertOutput, parse_convert
from comfyd.storage.target import S3Target
from comfyd.wire import structure

ID_PATTERN: Final = r"^[A-Za-z0-9_:-][A-Za-z0-9._:-]{0,127}$"


@attrs.frozen(kw_only=True)
class JobOptions:
    """What may be said of a job beside its graph."""

    id: Annotated[
        Annotated[str, Meta(pattern=ID_PATTERN, max_length=128)] | None,
        Meta(
            description="Names the job; a new UUID by default. The idempotency key: the same id and body while the "
            "job is known joins that job, another body is a conflict.",
        ),
    ] = attrs.field(default=None)
    priority: Annotated[
        int, Meta(ge=-100, le=100, description="Higher runs first; equal ones in the order of arrival.")
    ] = 0
    timeout_s: (
        Annotated[float, Meta(gt=0, le=31_536_000, description="Seconds from submission to result, at most.")] | None
    ) = None
    extra_data: Annotated[
        dict[str, Any] | None,
        Meta(description="Passed on to ComfyUI (keys of partner nodes); never logged or answered."),
    ] = attrs.field(default=None, repr=False)
    s3: Annotated[
        S3Target | None, Meta(description="Upload the outputs to S3, and answer URLs in the place of base64.")
    ] = None
    webhook: Annotated[
        Annotated[str, Meta(min_length=1, max_length=8192)] | None,
        Meta(description="Answer 202 at once, and POST each output to this URL. Deprecated: use `webhook_v2`."),
    ] = attrs.field(default=None, repr=False)
    webhook_v2: Annotated[
        Annotated[str, Meta(min_length=1, max_length=8192)] | None,
        Meta(description="Answer 202 at once, and POST the whole result to this URL, signed."),
    ] = attrs.field(default=None, repr=False)
    convert_output: Annotated[
        dict[str, Any] | None,
        Meta(description='What pictures become: {"format": jpeg, jpg, webp, png or avif; "options"; "metadata"}.'),
    ] = None
    client_id: Annotated[
        Any, Meta(description="Accepted and ignored, so that ComfyUI's own clients can post here.")
    ] = None


@attrs.frozen(kw_only=True)
class PromptRequest(JobOptions):
    """The body of ``POST /prompt``."""

    prompt: Annotated[
        dict[str, Any],
        Meta(description='The graph in ComfyUI\'s API format: node id to {"class_type", "inputs"}.'),
    ]


@attrs.frozen(kw_only=True)
class WorkflowRequest(JobOptions):
    """The body of ``POST /workflow/<name>``. What *input* may hold is the workflow's matter."""

    input: Annotated[dict[str, Any], Meta(description="The workflow's inputs, by name.")] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Request:
    """A request that fits its schema. *conversion* is its ``convert_output``, understood.

    *echo* are the blocks that an answer repeats as they were sent.
    """

    prompt: Mapping[str, Any]
    id: str | None = None
    priority: int = 0
    timeout_s: float | None = None
    extra_data: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    s3: S3Target | None = None
    conversion: ConvertOutput | None = None
    webhook: str | None = attrs.field(default=None, repr=False)
    webhook_v2: str | None = attrs.field(default=None, repr=False)
    respond_async: bool = False
    """Whether the caller asked for a 202 by ``Prefer: respond-async``."""
    echo: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def detached(self) -> bool:
        """Whether the caller does not wait for the outcome: it gets a 202, and the job is journalled."""
        return (
            self.respond_async
            or self.webhook is not None
            or self.webhook_v2 is not None
            or (self.s3 is not None and self.s3.is_async)
        )

    @property
    def keeps_outputs(self) -> bool:
        """Whether comfyd keeps the outputs after the job's end: nobody waits, and no storage has them."""
        return self.detached and self.s3 is None

    @property
    def accepted_echo(self) -> Mapping[str, Any]:
        """The blocks that a 202 repeats as they were sent."""
        hooks = {"webhook": self.webhook, "webhook_v2": self.webhook_v2}
        return {**{name: url for name, url in hooks.items() if url is not None}, **self.echo}


def parse_request(body: Any) -> Request:
    """Structure a decoded body of ``POST /prompt``.

    Raises:
        InvalidValue: with every fault and its place.
    """
    parsed, conversion = _structure(PromptRequest, body)
    return _request(parsed, conversion, body, prompt=parsed.prompt)


def parse_workflow_request(body: Any) -> tuple[Request, Mapping[str, Any]]:
    """Structure a decoded body of ``POST /workflow/<name>``: a request that has no graph yet, and the input for one.

    Raises:
        InvalidValue: with every fault and its place; what is within ``input`` is not looked at.
    """
    parsed, conversion = _structure(WorkflowRequest, body)
    return _request(parsed, conversion, body, prompt={}), parsed.input


_Options = TypeVar("_Options", bound=JobOptions)


def _structure(cls: type[_Options], body: Any) -> tuple[_Options, ConvertOutput | None]:
    faults: list[Fault] = []
    conversion: ConvertOutput | None = None
    convert_output = body.get("convert_output") if isinstance(body, dict) else None
    if isinstance(convert_output, dict):
        try:
            conversion = parse_convert(convert_output)
        except InvalidValue as exc:
            faults.extend(exc.faults)
    try:
        parsed = structure(cls, body)
    except InvalidValue as exc:
        raise InvalidValue((*exc.faults, *faults)) from None
    if faults:
        raise InvalidValue(tuple(faults))
    return parsed, conversion


def _request(
    parsed: JobOptions, conversion: ConvertOutput | None, body: Mapping[str, Any], prompt: Mapping[str, Any]
) -> Request:
    return Request(
        prompt=prompt,
        id=parsed.id,
        priority=parsed.priority,
        timeout_s=parsed.timeout_s,
        extra_data=parsed.extra_data,
        s3=parsed.s3,
        conversion=conversion,
        webhook=parsed.webhook,
        webhook_v2=parsed.webhook_v2,
        echo={} if parsed.s3 is None else {"s3": body["s3"]},
    )
