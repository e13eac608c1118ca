"""The webhooks: what comfyd sends to receivers of others, and what it makes of their answers."""

from typing import Any

from comfyd.http.openapi.examples import WEBHOOK_EXAMPLES
from comfyd.http.openapi.schemas import STRING, ref

_TEXTS = {
    "OutputComplete": (
        "outputComplete",
        "A file is there (v1)",
        "To `webhook`, one for each output of a job that succeeded. Deprecated: use `webhook_v2`.",
    ),
    "OutputFailed": (
        "outputFailed",
        "A job failed (v1)",
        "To `webhook`, if the job failed or made no file. Deprecated: use `webhook_v2`.",
    ),
    "PromptComplete": (
        "promptComplete",
        "A job succeeded",
        "To `webhook_v2`: all that a waiting caller gets. With storage, URLs in the place of base64.",
    ),
    "PromptFailed": (
        "promptFailed",
        "A job failed",
        "To `webhook_v2`: why, with the members of the problem; its `type` is `problem_type` here.",
    ),
    "SystemEvent": (
        "systemEvent",
        "An event of ComfyUI",
        "To `SYSTEM_WEBHOOK_URL`, in order. Progress that newer progress outdates is left out.",
    ),
}
_DEPRECATED = frozenset({"OutputComplete", "OutputFailed"})
_HEADERS = (
    ("webhook-id", True, "Unique for each event, and the same on every attempt."),
    ("webhook-timestamp", True, "Unix seconds of this attempt."),
    (
        "webhook-signature",
        False,
        "By Standard Webhooks: `v1,<base64>` for each of `WEBHOOK_SECRET`, with spaces between. Left out without one.",
    ),
)


def webhook_items() -> dict[str, Any]:
    """The path items of all webhooks, by name."""
    return {name: {"post": _webhook(schema, name, *texts)} for schema, (name, *texts) in _TEXTS.items()}


def _webhook(schema: str, name: str, summary: str, text: str) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "operationId": f"on{name[0].upper()}{name[1:]}",
        "summary": summary,
        "description": f"{text} At least once: tell repetitions by `webhook-id`.",
        "parameters": [
            {"name": header, "in": "header", "required": always, "description": words, "schema": dict(STRING)}
            for header, always, words in _HEADERS
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ref(schema), "example": WEBHOOK_EXAMPLES[schema]}},
        },
        "security": [],
        "responses": {
            "2XX": {"description": "It was taken."},
            "410": {"description": "It is not wanted: it is not sent again."},
            "default": {
                "description": "It was not taken: it is sent again, after longer and longer times, of which "
                "`Retry-After` may say how long. Redirects are not followed."
            },
        },
    }
    if schema in _DEPRECATED:
        whole["deprecated"] = True
    return whole
