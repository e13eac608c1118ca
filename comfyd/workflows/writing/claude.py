"""A workflow file written by Claude: asked, tried, and asked again with what was wrong.

The official package ``anthropic`` (2.12.0, the extra ``claude``) speaks to the API. Only one function here knows it:
:func:`anthropic_api`.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.resources import files
from typing import Any, Final

import attrs

from comfyd.errors import ComfydError
from comfyd.wire import encode_json
from comfyd.workflows.live import LiveInfo
from comfyd.workflows.writing.dry_run import prove_apart

DEFAULT_MODEL: Final = "claude-opus-5-5"
"""The one of the package's own README (2.12.0)."""
MAX_ATTEMPTS: Final = 4
"""A file that is wrong after three corrections is not getting better, and each attempt costs money."""
MAX_TOKENS: Final = 16_000
"""Of one answer: a file of some 1,000 lines. Without streaming, 2.12.0 takes 21,333 (``_base_client.py``)."""
MAX_QUESTION_CHARACTERS: Final = 600_000
"""Some 200,000 tokens, at three characters each; a bound on what one attempt may cost."""
ANSWER_TIMEOUT_S: Final = 300.0
RETRIES: Final = 2
"""Of the package, for answers that say "later" (429, 5xx) and for broken connections."""
_SHOWN_CHOICES: Final = 20
_TOOL: Final = {
    "name": "write_workflow",
    "description": "Hand in the workflow file. It is loaded and run with the example input.",
    "input_schema": {
        "type": "object",
        "properties": {
            "source": {"type": "string", "description": "The whole Python file."},
            "example_input": {"type": "object", "description": "The input of which it makes the graph."},
        },
        "required": ["source", "example_input"],
    },
}

Api = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Sends the body of ``POST /v1/messages``, returns the body of the answer. Blocks. Raises :class:`ClaudeFailed`."""
Prove = Callable[[str, Mapping[str, Any], Mapping[str, Any]], list[str]]


class ClaudeFailed(ComfydError):
    """No file came of it. The text says why, without the key."""


@attrs.frozen(kw_only=True)
class Question:
    """What Claude is asked: a graph, the *draft* that comfyd writes of it by itself, and what its user wishes."""

    graph: Mapping[str, Any]
    draft: str
    wish: str = ""

    def text(self, live: LiveInfo) -> str:
        """Put it into words, with what *live* knows of the graph's node classes.

        Raises:
            ClaudeFailed: it is too long.
        """
        classes = {node["class_type"] for node in self.graph.values()}
        infos = {name: _shortened(live.object_info[name]) for name in sorted(classes) if name in live.object_info}
        parts = {
            "graph": encode_json(self.graph).decode(),
            "node_classes": encode_json(infos).decode(),
            "draft": self.draft,
            "wish": self.wish or "None; choose as you think best.",
        }
        text = "\n\n".join(f"<{name}>\n{part}\n</{name}>" for name, part in parts.items())
        if len(text) > MAX_QUESTION_CHARACTERS:
            raise ClaudeFailed(
                f"the graph and its node classes are {len(text)} characters; at most {MAX_QUESTION_CHARACTERS} are sent"
            )
        return text


def write_with_claude(
    question: Question,
    live: LiveInfo,
    api: Api,
    *,
    model: str = DEFAULT_MODEL,
    tell: Callable[[str], object],
    prove: Prove = prove_apart,
) -> str:
    """Have the file written, and return it: it loads, and makes the graph. *tell* hears how it goes. Blocks.

    Raises:
        ClaudeFailed: the API did not answer, or no attempt was right.
        DryRunFailed: the files could not be tried.
    """
    messages: list[Any] = [{"role": "user", "content": question.text(live)}]
    request = {
        "model": model,
        "max_tokens": MAX_TOKENS,
        "system": files(__package__).joinpath("claude_prompt.md").read_text(encoding="utf-8"),
        "tools": [_TOOL],
        "messages": messages,
    }
    faults: list[str] = []
    for attempt in range(1, MAX_ATTEMPTS + 1):
        tell(f"asking {model}, attempt {attempt} of {MAX_ATTEMPTS}")
        answer = api(request)
        calls = _calls(answer)
        faults = ["call the tool write_workflow with the whole file and the example input"]
        for call in calls:
            source, example = call["input"].get("source"), call["input"].get("example_input")
            if isinstance(source, str) and isinstance(example, dict):
                faults = prove(source, question.graph, example)
                if not faults:
                    return source if source.endswith("\n") else f"{source}\n"
        for fault in faults:
            tell(f"  {fault}")
        messages += ({"role": "assistant", "content": answer["content"]}, _reply(calls, faults))
    raise ClaudeFailed(f"none of {MAX_ATTEMPTS} attempts was right; the last: {'; '.join(faults[:3])}")


def _calls(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    reason = answer.get("stop_reason")
    if reason == "refusal":
        raise ClaudeFailed("the model refused to write this file")
    if reason in ("max_tokens", "model_context_window_exceeded"):
        raise ClaudeFailed(f"the answer was cut ({reason}): the graph is too large for it")
    content = answer.get("content")
    if not isinstance(content, list) or not content:
        raise ClaudeFailed("the answer was empty")
    blocks = (block for block in content if isinstance(block, Mapping) and block.get("type") == "tool_use")
    return [block for block in blocks if isinstance(block.get("input"), Mapping)]


def _reply(calls: list[Mapping[str, Any]], faults: list[str]) -> dict[str, Any]:
    text = "\n".join(faults)
    if not calls:
        return {"role": "user", "content": text}
    # The API wants an answer to each call of a tool.
    results = [{"type": "tool_result", "tool_use_id": call["id"], "is_error": True, "content": text} for call in calls]
    return {"role": "user", "content": results}


def _shortened(info: Any) -> Any:
    """Cut long lists of choices: file names by the thousand say nothing, and cost."""
    if isinstance(info, Mapping):
        return {name: _shortened(value) for name, value in info.items() if name not in ("input_order", "python_module")}
    if isinstance(info, list | tuple):
        more = len(info) - _SHOWN_CHOICES
        return [*map(_shortened, info[:_SHOWN_CHOICES]), *([f"... and {more} more"] if more > 0 else [])]
    return info


def anthropic_api(api_key: str, base_url: str | None = None) -> Api:
    """Reach the API by the official package.

    Raises:
        ClaudeFailed: the package is not installed.
    """
    try:
        anthropic: Any = import_module("anthropic")
    except ImportError as exc:
        raise ClaudeFailed(
            "--claude needs the package anthropic, which is not installed: pip install 'comfyd[claude]' "
            "(the one-file program does not have it)"
        ) from exc
    client = anthropic.Anthropic(api_key=api_key, base_url=base_url, timeout=ANSWER_TIMEOUT_S, max_retries=RETRIES)

    def ask(request: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            message = client.messages.create(**request)
        except anthropic.APIStatusError as exc:
            raise ClaudeFailed(f"the API answered {exc.status_code}: {exc.api_message or 'no reason given'}") from exc
        except anthropic.APITimeoutError as exc:
            raise ClaudeFailed(f"the API did not answer within {ANSWER_TIMEOUT_S:g} s") from exc
        except anthropic.APIConnectionError as exc:
            raise ClaudeFailed(f"the API cannot be reached: {exc.__cause__ or exc}") from exc
        except anthropic.AnthropicError as exc:
            raise ClaudeFailed(f"the API could not be used: {exc}") from exc
        answer: dict[str, Any] = message.model_dump(mode="json", exclude_unset=True)
        return answer

    return ask
