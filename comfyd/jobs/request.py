"""What a caller may ask: the schema of ``POST /prompt``, one source for validation and OpenAPI."""

from typing import Annotated, Any, Final

import attrs
from msgspec import Meta

from comfyd.wire import structure

ID_PATTERN: Final = r"^[A-Za-z0-9_:-][A-Za-z0-9._:-]{0,127}$"


@attrs.frozen(kw_only=True)
class PromptRequest:
    """The body of ``POST /prompt``."""

    prompt: Annotated[
        dict[str, Any],
        Meta(description='The graph in ComfyUI\'s API format: node id to {"class_type", "inputs"}.'),
    ]
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
    client_id: Annotated[
        Any, Meta(description="Accepted and ignored, so that ComfyUI's own clients can post here.")
    ] = None


def parse_request(body: Any) -> PromptRequest:
    """Structure a decoded body.

    Raises:
        InvalidValue: with every fault and its place.
    """
    return structure(PromptRequest, body)
