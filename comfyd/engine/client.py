"""ComfyUI's HTTP side, as far as comfyd uses it.

Routes and answers: ComfyUI 0.3.64, ``server.py``. Every method raises :class:`EngineUnavailable` when the engine does
not answer or answers nonsense. Time-outs are the caller's, by a cancel scope.
"""

import ssl
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import attrs
import msgspec

from comfyd.engine.submit_link import SubmitLink
from comfyd.errors import EngineUnavailable

if TYPE_CHECKING:
    import httpx


@attrs.frozen(kw_only=True)
class Refusal:
    """ComfyUI did not take a prompt, or not all of it.

    *error* is ComfyUI's own ``{type, message, details, extra_info}``; *node_errors* maps node ids to
    ``{errors: [...], dependent_outputs, class_type}``. *may_be_queued*: the answer does not exclude that the engine
    runs (some of) it all the same.
    """

    error: Mapping[str, Any]
    node_errors: Mapping[str, Any]
    may_be_queued: bool = False


@attrs.frozen(kw_only=True)
class QueueContent:
    """Which prompt ids the engine runs, and which wait in its own queue."""

    running: frozenset[str]
    pending: frozenset[str]


class EngineClient:
    """One engine's HTTP interface. An async context manager: leaving it closes the connections."""

    def __init__(self, base_url: str) -> None:
        import httpx  # a tenth of a second, in which the engine's process is starting already

        self._errors = httpx.HTTPError
        self._http = httpx.AsyncClient(
            base_url=base_url,
            timeout=None,  # noqa: S113  # time-outs are the caller's, by cancel scope
            # Few connections: one runner submits, and control calls (interrupt, history) are rare. A long list would
            # cost time, as httpcore walks its whole pool for each request.
            limits=httpx.Limits(max_connections=8, max_keepalive_connections=4, keepalive_expiry=30),
            trust_env=False,  # the engine is our child on this machine: never through a proxy
            # It speaks plain http. Left to itself httpx reads all certificates of the machine, 20 ms of a new engine.
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            follow_redirects=False,
        )
        url = httpx.URL(base_url)
        self._submit = SubmitLink(host=url.host, port=url.port or 80, path="/prompt")

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self._submit.end()
        await self._http.aclose()

    async def system_stats(self) -> dict[str, Any]:
        """``GET /system_stats``: versions, argv, devices."""
        return _object(await self._get("/system_stats"))

    async def object_info(self) -> dict[str, Any]:
        """``GET /object_info``: every node class with its inputs; some 300 kB and more with custom nodes."""
        return _object(await self._get("/object_info"))

    async def models(self) -> dict[str, list[str]]:
        """``GET /models`` and one ``GET /models/<type>`` each: file names by model type."""
        kinds = await self._get("/models")
        if not isinstance(kinds, list):
            raise EngineUnavailable("the engine answered /models with something else than a list")
        found = {}
        for kind in kinds:
            names = await self._get(f"/models/{kind}")
            if not isinstance(names, list):
                raise EngineUnavailable(f"the engine answered /models/{kind} with something else than a list")
            found[str(kind)] = names
        return found

    async def submit(
        self, *, prompt: Mapping[str, Any], prompt_id: str, client_id: str, extra_data: Mapping[str, Any]
    ) -> Refusal | None:
        """``POST /prompt``. None means accepted whole.

        A partial acceptance (200 with ``node_errors``: ComfyUI silently skips the outputs that do not validate) is
        returned as a refusal; the prompt is then queued all the same, and the caller must take it off again.
        """
        body = msgspec.json.encode(
            {"prompt": prompt, "prompt_id": prompt_id, "client_id": client_id, "extra_data": extra_data}
        )
        answer = await self._submit.post(body)
        if answer.status == 200:
            node_errors = _object(_json(answer.body)).get("node_errors")
            if not node_errors:
                return None
            return Refusal(
                error={
                    "type": "prompt_outputs_failed_validation",
                    "message": "Prompt outputs failed validation",
                    "details": "some outputs of the graph are not valid",
                },
                node_errors=_object(node_errors),
                may_be_queued=True,
            )
        if answer.status == 400:
            refusal = _object(_json(answer.body))
            error = refusal.get("error")
            return Refusal(
                error=error if isinstance(error, dict) else {"type": "invalid_prompt", "message": str(error)},
                node_errors=_object(refusal.get("node_errors") or {}),
            )
        if answer.status == 413:
            return Refusal(
                error={"type": "prompt_too_large", "message": "The graph is larger than the engine takes"},
                node_errors={},
            )
        if answer.status >= 500:  # a custom node's own validation raised, or the graph's shape surprised ComfyUI
            return Refusal(
                error={"type": "engine_error", "message": f"The engine failed on the graph ({answer.status})"},
                node_errors={},
                may_be_queued=True,
            )
        raise EngineUnavailable(f"the engine answered POST /prompt with status {answer.status}")

    async def history(self, prompt_id: str) -> dict[str, Any] | None:
        """``GET /history/<id>``: the finished prompt's entry, or None while there is none."""
        entry = _object(await self._get(f"/history/{prompt_id}")).get(prompt_id)
        return entry if isinstance(entry, dict) else None

    async def queue(self) -> QueueContent:
        """``GET /queue``, reduced to ids. It returns whole graphs, so it is asked only when in doubt."""
        answer = _object(await self._get("/queue"))
        return QueueContent(
            running=frozenset(_queue_ids(answer.get("queue_running"))),
            pending=frozenset(_queue_ids(answer.get("queue_pending"))),
        )

    async def delete_queued(self, prompt_id: str) -> None:
        """``POST /queue``: take a waiting prompt off; no effect on a running or unknown one."""
        await self._post("/queue", {"delete": [prompt_id]})

    async def interrupt(self, prompt_id: str) -> None:
        """``POST /interrupt``: stop the prompt if it is the running one; without effect otherwise."""
        await self._post("/interrupt", {"prompt_id": prompt_id})

    async def forget(self, prompt_ids: Iterable[str]) -> None:
        """``POST /history``: drop finished entries, each of which holds a whole graph in the engine's memory."""
        await self._post("/history", {"delete": list(prompt_ids)})

    async def free(self) -> None:
        """``POST /free``: empty the node cache before the next prompt. Models stay loaded."""
        await self._post("/free", {"free_memory": True})

    async def _get(self, path: str) -> Any:
        response = await self._request("GET", path)
        if response.status_code != 200:
            raise EngineUnavailable(f"the engine answered GET {path} with status {response.status_code}")
        return _json(response.content)

    async def _post(self, path: str, body: Mapping[str, Any]) -> None:
        response = await self._request("POST", path, content=msgspec.json.encode(body))
        if response.status_code >= 300:
            raise EngineUnavailable(f"the engine answered POST {path} with status {response.status_code}")

    async def _request(self, method: str, path: str, content: bytes | None = None) -> "httpx.Response":
        if self._http.is_closed:  # the engine has ended, and the caller is about to learn it
            raise EngineUnavailable(f"{method} {path}: the engine is gone")
        headers = {"content-type": "application/json"} if content is not None else None
        try:
            return await self._http.request(method, path, content=content, headers=headers)
        except self._errors as exc:
            raise EngineUnavailable(f"{method} {path}: {str(exc) or type(exc).__name__}") from exc


def _json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise EngineUnavailable(f"the engine's answer is not JSON: {exc}") from exc


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EngineUnavailable("the engine's answer is not an object")
    return value


def _queue_ids(items: Any) -> list[str]:
    """Prompt ids of queue items, which are lists [number, prompt_id, graph, ...] (``execution.py``)."""
    if not isinstance(items, list):
        return []
    return [item[1] for item in items if isinstance(item, list) and len(item) > 1 and isinstance(item[1], str)]
