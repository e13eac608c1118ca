"""The access log: a line for each request, true in what it says, and few labels whatever is asked for."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from http_server_kit import serving
from structlog.testing import LogCapture

from comfyd.http.access_log import Access, AccessLog, note_job, route_of
from comfyd.http.asgi import send_empty, send_whole

App = Callable[[Any, Any, Any], Awaitable[None]]


async def stays() -> Any:
    """A client that stays."""
    await trio.sleep_forever()


async def leaves() -> Any:
    """A client that has left."""
    await trio.lowlevel.checkpoint()
    return {"type": "http.disconnect"}


async def takes(message: Any) -> None:
    await trio.lowlevel.checkpoint()


async def refuses(message: Any) -> None:
    await trio.lowlevel.checkpoint()
    raise ConnectionError("the client has left")


async def ask(app: App, method: str = "GET", path: str = "/jobs", **more: Any) -> list[Access]:
    """Serve one request by *app*; returns what was counted. *more*: ``receive``, ``send``, ``client``, ``query``."""
    counted: list[Access] = []
    scope: Any = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": more.get("query", b""),
        "headers": [(b"x-forwarded-for", b"6.6.6.6")],
        "client": more.get("client", ("10.0.0.7", 1234)),
    }
    await AccessLog(app, counted.append)(scope, more.get("receive", stays), more.get("send", takes))
    return counted


def line(log_output: LogCapture) -> dict[str, Any]:
    """The one line of the access log."""
    (found,) = [entry for entry in log_output.entries if entry["event"] == "http.request"]
    return dict(found)


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send_whole(send, 201, b"hello")


async def absent(scope: Any, receive: Any, send: Any) -> None:
    await send_whole(send, 404, b"there is no such job")


async def test_a_request_is_a_line_with_status_bytes_and_time(log_output: LogCapture) -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep(0.02)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"x" * 10, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    (counted,) = await ask(slow, query=b"token=secret")
    found = line(log_output)
    took_ms = found.pop("took_ms")
    assert 20 <= took_ms < 5000
    assert found == {
        "event": "http.request",
        "log_level": "info",
        "method": "GET",
        "path": "/jobs",
        "status": 200,
        "bytes": 30,
        "client": "10.0.0.7",
    }
    assert (counted.route, counted.method, counted.status, counted.body_bytes) == ("/jobs", "GET", 200, 30)
    assert counted.took_s * 1000 == pytest.approx(took_ms, abs=0.01)


async def test_the_answer_to_head_has_no_bytes(log_output: LogCapture) -> None:
    (counted,) = await ask(answer, "HEAD")
    assert (line(log_output)["bytes"], counted.body_bytes) == (0, 0)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
async def test_what_machines_ask_all_the_time_is_debug_and_counted(log_output: LogCapture, path: str) -> None:
    (counted,) = await ask(answer, path=path)
    assert line(log_output)["log_level"] == "debug"
    assert counted.route == path


async def test_the_job_is_told_from_the_path_or_by_the_handler(log_output: LogCapture) -> None:
    async def noting(scope: Any, receive: Any, send: Any) -> None:
        async def child() -> None:
            note_job("job-1")

        async with trio.open_nursery() as nursery:  # tasks of the handler belong to its request
            nursery.start_soon(child)
            nursery.start_soon(trio.lowlevel.checkpoint)
        await send_empty(send, 204)

    await ask(noting, "POST", "/prompt")
    await ask(answer, path="/jobs/job-2/events")
    await ask(absent, path="/jobs/whatever")
    await ask(answer, "POST", "/prompt")
    assert [entry.get("job_id") for entry in log_output.entries] == ["job-1", "job-2", None, None]
    note_job("nobody's")  # outside of any request: without effect


async def test_requests_at_the_same_time_keep_their_jobs_apart(
    log_output: LogCapture, autojump_clock: trio.testing.MockClock
) -> None:
    async def noting(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep(1)
        note_job(scope["client"][0])
        await trio.sleep(1)
        await send_empty(send, 204)

    async def one(number: int) -> None:
        await ask(noting, "POST", "/prompt", client=(f"job-{number}", 1))

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(one, number)
    assert all(entry["job_id"] == entry["client"] for entry in log_output.entries)
    assert len(log_output.entries) == 5


async def test_a_client_that_left_before_the_answer_is_told(log_output: LogCapture) -> None:
    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    (counted,) = await ask(waits, receive=leaves)
    found = line(log_output)
    assert (found["cut"], found["status"], counted.status) == ("disconnected", None, 0)


async def test_a_client_that_left_within_the_answer_is_told(log_output: LogCapture) -> None:
    async def begins(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        await receive()

    await ask(begins, receive=leaves)
    found = line(log_output)
    assert (found["cut"], found["status"], found["bytes"]) == ("disconnected", 200, 3)


async def test_a_send_that_finds_the_client_gone_is_told_and_passed_on(log_output: LogCapture) -> None:
    with pytest.raises(ConnectionError):
        await ask(answer, send=refuses)
    found = line(log_output)
    assert (found["cut"], found["status"], found["bytes"]) == ("disconnected", None, 0)


async def test_leaving_after_the_whole_answer_is_no_cut(log_output: LogCapture) -> None:
    async def then_listens(scope: Any, receive: Any, send: Any) -> None:
        await answer(scope, receive, send)
        await receive()

    await ask(then_listens, receive=leaves)
    assert "cut" not in line(log_output)


@pytest.mark.parametrize("tasks", [0, 2])
async def test_a_cancelled_request_is_told_and_the_cancel_passes(
    log_output: LogCapture, autojump_clock: trio.testing.MockClock, tasks: int
) -> None:
    async def waits(scope: Any, receive: Any, send: Any) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(trio.sleep_forever)
            await trio.sleep_forever()

    with trio.move_on_after(3) as scope:
        await ask(waits)
    assert scope.cancelled_caught
    assert line(log_output)["cut"] == "cancelled"


async def test_a_bug_beside_a_cancel_is_no_cancel(log_output: LogCapture) -> None:
    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise KeyError("bug")

    with pytest.RaisesGroup(KeyError):
        await ask(breaks)
    assert line(log_output)["cut"] == "failed"


async def test_over_a_real_connection_both_ends_of_a_request_are_told(log_output: LogCapture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/health":
            await answer(scope, receive, send)
        else:
            begun.set()
            while (await receive())["type"] != "http.disconnect":
                pass

    begun = trio.Event()
    counted: list[Access] = []
    async with serving(AccessLog(app, counted.append)) as server:
        async with await server.connect() as client:
            await client.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await client.receive_some(1000)).startswith(b"HTTP/1.1 201")
            await client.send_all(b"POST /prompt?token=secret HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
            await begun.wait()  # else the server may hear of the end first, and ask nobody
        await server.wait_at_rest()
    lines = [entry for entry in log_output.entries if entry["event"] == "http.request"]
    assert [(entry["path"], entry["status"], entry["bytes"], entry.get("cut")) for entry in lines] == [
        ("/health", 201, 5, None),
        ("/prompt", None, 0, "disconnected"),
    ]
    assert {entry["client"] for entry in lines} == {"127.0.0.1"}
    assert [access.status for access in counted] == [201, 0]


@pytest.mark.parametrize("raises", [False, True])
async def test_an_application_that_does_not_answer_has_failed(log_output: LogCapture, raises: bool) -> None:
    async def forgets(scope: Any, receive: Any, send: Any) -> None:
        await trio.lowlevel.checkpoint()
        if raises:
            raise KeyError("bug")

    if raises:
        with pytest.raises(KeyError):
            await ask(forgets)
    else:
        await ask(forgets)
    assert line(log_output)["cut"] == "failed"


async def test_a_client_on_a_unix_socket_has_no_address(log_output: LogCapture) -> None:
    await ask(answer, client=None)
    assert line(log_output)["client"] is None


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
async def test_what_is_no_request_passes_through(log_output: LogCapture, kind: str) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await trio.lowlevel.checkpoint()
        seen.append((scope, receive, send))

    scope: Any = {"type": kind}
    await AccessLog(app)(scope, stays, takes)
    assert seen == [(scope, stays, takes)]
    assert not log_output.entries


async def test_methods_are_bounded_for_the_metrics_and_true_in_the_log(log_output: LogCapture) -> None:
    (counted,) = await ask(answer, "BREW")
    assert (counted.method, line(log_output)["method"]) == ("other", "BREW")


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/prompt", "/prompt"),
        ("/jobs", "/jobs"),
        ("/jobs/abc", "/jobs/{id}"),
        ("/jobs/abc/events", "/jobs/{id}/events"),
        ("/jobs/abc/outputs", "/jobs/{id}/outputs"),
        ("/jobs/abc/outputs/3", "/jobs/{id}/outputs/{place}"),
        ("/jobs/abc/outputs/3/4", "other"),
        ("/jobs/abc/other", "other"),
        ("/workflow/a", "/workflow/{path}"),
        ("/workflows/a/b/c/d/e", "/workflow/{path}"),
        ("/docs", "/docs"),
        ("/docs/json", "/docs/{path}"),
        ("/workflow", "/workflow/{path}"),
        ("/", "other"),
        ("", "other"),
        ("*", "other"),
        ("jobs/abc", "other"),
        ("/wp-login.php", "other"),
        ("//jobs/abc", "other"),
    ],
)
def test_a_path_belongs_to_one_of_a_few_routes(path: str, route: str) -> None:
    assert route_of(path) == route


@pytest.mark.parametrize("bounds", [False, True])
def test_the_server_is_told_what_the_application_says_of_bodies(bounds: bool) -> None:
    class App:
        bounds_bodies = bounds

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    assert AccessLog(App()).bounds_bodies is bounds
