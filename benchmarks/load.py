"""The load generator: a process of its own, so that it takes no time from what it measures.

It reads one JSON document on stdin (:class:`Load`) and writes one on stdout (:class:`Measured`).
"""

import os
import select
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from benchmarks.graphs import graph
from benchmarks.sockets import Answer, BadAnswer, HttpConnection, WebSocket, request

_FEATURE_FLAGS: Final = b'{"type":"feature_flags","data":{"supports_preview_metadata":true}}'
_RAW_CONNECTIONS: Final = 8
"""Over which a raw client submits; it listens on one socket for all its prompts."""
_PROBE_EVERY_S: Final = 0.005
_WAIT_S: Final = 120.0
"""Without anything happening: then something is broken, and the measurement with it."""


class Load(msgspec.Struct, kw_only=True):
    """What is to be done, and on which processors."""

    mode: Literal["prompts", "raw", "large", "given", "download", "accepted"]
    url: str
    graph: str = ""
    """A name of :mod:`benchmarks.graphs`."""
    paths: list[str] = []  # msgspec copies it
    """For *given*: files that hold the bodies to post, used in turn. For *download*: what to ask *url* for."""
    most_bytes: int = 1 << 60
    """For *given*: what a right answer is not larger than."""
    probes: bool = False
    """For *given*: ask the readiness probe every 5 ms meanwhile."""
    webhook: str = ""
    """For *accepted*: where the outcome of each prompt is to be told."""
    total: int = 1
    in_flight: int = 1
    every_s: float = 0.0
    """For *prompts*, one in flight: how far apart they begin at least."""
    output_dir: str = ""
    """Where a raw client finds its files."""
    cores: list[int] = []  # msgspec copies it
    first: int = 0
    """The first prompt's number: graphs of different numbers are not in the engine's cache."""


class Measured(msgspec.Struct, kw_only=True):
    """What was measured. Latencies are in milliseconds, in the order in which prompts ended."""

    elapsed_s: float
    latencies_ms: list[float]
    ended_at: float = 0.0
    """By ``CLOCK_MONOTONIC``, which all processes share."""
    probes_ms: list[float] = []  # msgspec copies it
    beside_ms: list[float] = []  # msgspec copies it


def main() -> None:
    """Do what stdin says."""
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    if load.cores:
        os.sched_setaffinity(0, load.cores)
    measured = MODES[load.mode](load)
    measured.ended_at = time.perf_counter()
    sys.stdout.buffer.write(msgspec.json.encode(measured))


def _prompt(load: Load, number: int) -> bytes:
    return request("POST", "/prompt", msgspec.json.encode({"prompt": graph(load.graph, number, "bench")}))


def _check(answer: Answer) -> None:
    if answer.status != 200 or b'"images":["' not in answer.body[:200_000]:
        raise BadAnswer(f"status {answer.status}: {answer.body[:500]!r}")


def _check_large(answer: Answer) -> None:
    if answer.status != 200 or answer.body_bytes < 1 << 20:
        raise BadAnswer(f"status {answer.status}, {answer.body_bytes} bytes: {answer.body[:500]!r}")


def _check_downloaded(answer: Answer) -> None:
    if answer.status != 200 or not answer.body_bytes:
        raise BadAnswer(f"status {answer.status}, {answer.body_bytes} bytes")


def run_prompts(load: Load) -> Measured:
    """Run prompts through a server that answers each with its files, so many at once."""
    return _post_all(load, lambda sent: _prompt(load, load.first + sent), _check)


def run_accepted(load: Load) -> Measured:
    """Hand prompts over to a server that answers at once and tells the outcome later, so many at once."""

    def body_of(sent: int) -> bytes:
        graph_of = graph(load.graph, load.first + sent, "bench")
        return request("POST", "/prompt", msgspec.json.encode({"prompt": graph_of, "webhook_v2": load.webhook}))

    def check(answer: Answer) -> None:
        if answer.status != 202:
            raise BadAnswer(f"status {answer.status}: {answer.body[:500]!r}")

    return _post_all(load, body_of, check)


def run_given(load: Load) -> Measured:
    """Post bodies that were made before, so many at once."""
    # Made before anything is measured: a body is joined to its head once, and the same bytes are sent each time.
    requests = [request("POST", "/prompt", Path(path).read_bytes()) for path in load.paths]
    probing = _Probing(load.url) if load.probes else None

    def check(answer: Answer) -> None:
        if answer.status != 200 or not 0 < answer.body_bytes <= load.most_bytes:
            raise BadAnswer(f"status {answer.status}, {answer.body_bytes} bytes: {answer.body[:500]!r}")

    try:
        measured = _post_all(load, lambda sent: requests[sent % len(requests)], check)
    finally:
        probes = probing.stop() if probing else []
    measured.probes_ms = probes
    return measured


def run_download(load: Load) -> Measured:
    """Get everything at once, and keep nothing: as fast as it can come."""
    latencies: list[float] = []
    failures: list[BaseException] = []

    def get(path: str) -> None:
        try:
            sent_at = time.perf_counter()
            answer = HttpConnection.open(load.url).ask(request("GET", path))
            latencies.append((time.perf_counter() - sent_at) * 1000)
            _check_downloaded(answer)
        except (BadAnswer, OSError) as exc:
            failures.append(exc)

    threads = [threading.Thread(target=get, args=[path]) for path in load.paths]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Measured(elapsed_s=time.perf_counter() - began, latencies_ms=latencies)


def _post_all(load: Load, request_of: Callable[[int], bytes], check: Callable[[Answer], None]) -> Measured:
    """Post what *request_of* says for 0, 1, ..., as many at once as *load* says, and *check* each answer."""
    poll = select.epoll()
    connections: dict[int, HttpConnection] = {}
    for _ in range(load.in_flight):
        connection = HttpConnection.open(load.url)
        connections[connection.socket.fileno()] = connection
        poll.register(connection.socket, select.EPOLLIN)
    sent_at: dict[int, float] = {}
    latencies: list[float] = []
    began = time.perf_counter()
    sent = 0

    def pace() -> float:
        """Wait until the next one may begin; return when that is. With one in flight nobody else has to wait."""
        if load.every_s:
            time.sleep(max(0.0, began + sent * load.every_s - time.perf_counter()))
        return time.perf_counter()

    for number, connection in connections.items():
        if sent < load.total:
            sent_at[number] = time.perf_counter()
            connection.send(request_of(sent))
            sent += 1
    while len(latencies) < load.total:
        ready = poll.poll(_WAIT_S)
        if not ready:
            raise BadAnswer(f"nothing happened for {_WAIT_S:g} s")
        for number, _ in ready:
            answer = connections[number].receive()
            if answer is None:
                continue
            check(answer)
            now = time.perf_counter()
            latencies.append((now - sent_at[number]) * 1000)
            if sent < load.total:
                sent_at[number] = pace()
                connections[number].send(request_of(sent))
                sent += 1
    return Measured(elapsed_s=time.perf_counter() - began, latencies_ms=latencies)


class _RawClient:
    """What a careful client of ComfyUI does itself: submit, listen until the end, read the file, remove it."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._client_id = f"benchmark-{os.getpid()}"
        self.listener = WebSocket.open(load.url, f"/ws?clientId={self._client_id}", _FEATURE_FLAGS)
        self.submitters = [HttpConnection.open(load.url) for _ in range(min(load.in_flight, _RAW_CONNECTIONS))]
        self.idle = list(self.submitters)
        self.sent_at: dict[str, float] = {}
        self.latencies: list[float] = []
        self._files: dict[str, list[str]] = {}
        self._sent = 0

    def submit_what_fits(self) -> None:
        while self.idle and self._sent < self._load.total and len(self.sent_at) < self._load.in_flight:
            number = self._load.first + self._sent
            prompt_id = f"{self._client_id}-{number}"
            body = {
                "prompt": graph(self._load.graph, number, prompt_id),
                "prompt_id": prompt_id,
                "client_id": self._client_id,
            }
            self.sent_at[prompt_id] = time.perf_counter()
            self.idle.pop().send(request("POST", "/prompt", msgspec.json.encode(body)))
            self._sent += 1

    def submitted(self, submitter: HttpConnection) -> None:
        answer = submitter.receive()
        if answer is not None:
            if answer.status != 200:
                raise BadAnswer(f"status {answer.status}: {answer.body[:500]!r}")
            self.idle.append(submitter)

    def heard(self) -> None:
        for frame in self.listener.receive():
            message = msgspec.json.decode(frame)
            data: dict[str, Any] = message["data"]
            match message["type"]:
                case "executed":
                    records = (item for items in data["output"].values() for item in items if isinstance(item, dict))
                    self._files[data["prompt_id"]] = [f"{item['subfolder']}/{item['filename']}" for item in records]
                case "execution_error":
                    raise BadAnswer(str(data))
                case "executing" if data["node"] is None:
                    self._ended(data["prompt_id"])

    def _ended(self, prompt_id: str) -> None:
        names = self._files.pop(prompt_id)
        for name in names:
            path = Path(self._load.output_dir, name.lstrip("/"))
            if not path.read_bytes():
                raise BadAnswer(f"{name} is empty")
            path.unlink()
        self.latencies.append((time.perf_counter() - self.sent_at.pop(prompt_id)) * 1000)


def run_raw(load: Load) -> Measured:
    """Run prompts as a client of ComfyUI itself, so many at once: the floor that any server before it stands on."""
    client = _RawClient(load)
    poll = select.epoll()
    poll.register(client.listener.socket, select.EPOLLIN)
    submitters = {submitter.socket.fileno(): submitter for submitter in client.submitters}
    for number in submitters:
        poll.register(number, select.EPOLLIN)
    began = time.perf_counter()
    client.submit_what_fits()
    while len(client.latencies) < load.total:
        ready = poll.poll(_WAIT_S)
        if not ready:
            raise BadAnswer(f"nothing happened for {_WAIT_S:g} s")
        for number, _ in ready:
            if number in submitters:
                client.submitted(submitters[number])
            else:
                client.heard()
        client.submit_what_fits()
    elapsed_s = time.perf_counter() - began
    # Its history would stay in the engine, whole graphs of it; comfyd's contender has that cleared as well.
    HttpConnection.open(load.url).ask(request("POST", "/history", b'{"clear":true}'))
    return Measured(elapsed_s=elapsed_s, latencies_ms=client.latencies)


def run_large(load: Load) -> Measured:
    """Take one large answer, and while it comes, ask the readiness probe every 5 ms and run small prompts."""
    large = HttpConnection.open(load.url)
    begun, ended = threading.Event(), threading.Event()
    latencies: list[float] = []
    failures: list[BaseException] = []

    def take() -> None:
        try:
            sent_at = time.perf_counter()
            large.send(_prompt(load, load.first))
            while True:
                answer = large.receive()
                if large.answer_begun:
                    begun.set()
                if answer is not None:
                    break
            latencies.append((time.perf_counter() - sent_at) * 1000)
            _check_large(answer)
        except (BadAnswer, OSError) as exc:
            failures.append(exc)
        finally:
            begun.set()
            ended.set()

    beside: list[float] = []

    def run_beside() -> None:
        connection = HttpConnection.open(load.url)
        begun.wait(_WAIT_S)  # until then the engine works for the large one, and a prompt rightly waits
        number = load.first + 1
        while not ended.is_set():
            sent_at = time.perf_counter()
            body = msgspec.json.encode({"prompt": graph("tiny", number, "bench")})
            _check(connection.ask(request("POST", "/prompt", body)))
            beside.append((time.perf_counter() - sent_at) * 1000)
            number += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=take), threading.Thread(target=run_beside)]
    for thread in threads:
        thread.start()
    probes = _probe_until(ended, load.url)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Measured(elapsed_s=time.perf_counter() - began, latencies_ms=latencies, probes_ms=probes, beside_ms=beside)


class _Probing:
    """Probes the readiness of a server, in a thread, until it is told to stop."""

    def __init__(self, url: str) -> None:
        self._ended = threading.Event()
        self._found: list[float] = []
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._probe, args=[url])
        self._thread.start()

    def stop(self) -> list[float]:
        """Return how long each probe took, in milliseconds."""
        self._ended.set()
        self._thread.join()
        if self._failed:
            raise self._failed[0]
        return self._found

    def _probe(self, url: str) -> None:
        try:
            self._found = _probe_until(self._ended, url)
        except (BadAnswer, OSError) as exc:
            self._failed.append(exc)


def _probe_until(ended: threading.Event, url: str) -> list[float]:
    """Ask for readiness every 5 ms, or as soon as the last answer is there."""
    connection = HttpConnection.open(url)
    ready = request("GET", "/ready")
    latencies = []
    while not ended.is_set():
        sent_at = time.perf_counter()
        connection.ask(ready)
        took_s = time.perf_counter() - sent_at
        latencies.append(took_s * 1000)
        ended.wait(max(0.0, _PROBE_EVERY_S - took_s))
    return latencies


MODES: Final[dict[str, Callable[[Load], Measured]]] = {
    "prompts": run_prompts,
    "raw": run_raw,
    "large": run_large,
    "given": run_given,
    "download": run_download,
    "accepted": run_accepted,
}


if __name__ == "__main__":
    main()
