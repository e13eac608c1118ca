"""The client that connects only where the policy permits, against servers on loopback."""

import contextlib
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

import attrs
import httpx
import pytest
import trio
import trio.testing
from fetch_servers import bad_server, head, redirect, self_signed, silent, then_hang, whole

from comfyd.net import RedirectRefused, UrlRefused, open_client, open_get, parse_policy
from comfyd.net.guarded import ConnectFailed


@attrs.define(eq=False)
class Resolver:
    """Answers with the next of its answers at each question, and with the last for good."""

    answers: list[Sequence[str]]
    asked: list[str] = attrs.field(factory=list)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        await trio.lowlevel.checkpoint()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture(autouse=True)
def proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose proxies nobody must use."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


async def test_a_name_that_resolves_to_loopback_is_not_connected_to() -> None:
    with trio.fail_after(5):
        async with bad_server(whole(b"secret")) as server:
            asked: list[str] = []
            for address in ("127.0.0.1", "::ffff:127.0.0.1", "0.0.0.0", "64:ff9b::7f00:1", "fe80::1%lo"):
                resolver = Resolver([[address]])
                async with open_client(parse_policy("guarded", ""), resolver=resolver) as client:
                    with pytest.raises(UrlRefused, match=r"inputs\.test resolves to an? .* address, which"):
                        await client.get(server.url(host="inputs.test"))
                asked += resolver.asked
        assert asked == ["inputs.test"] * 5
        assert server.requests == []


@pytest.mark.parametrize("url", ["ftp://inputs.test/", "http://localhost/", "http://inputs.test:0/", "http://a..b/"])
async def test_every_request_is_checked_before_a_name_is_resolved(url: str) -> None:
    resolver = Resolver([["127.0.0.1"]])
    async with open_client(parse_policy("guarded", ""), resolver=resolver) as client:
        with pytest.raises(UrlRefused):
            await client.post(url, content=b"a webhook")
    assert resolver.asked == []


async def test_a_refusal_does_not_tell_what_the_name_resolved_to() -> None:
    async with open_client(parse_policy("strict", ""), resolver=Resolver([["10.1.2.3"]])) as client:
        with pytest.raises(UrlRefused) as caught:
            await client.get("http://inputs.test/")
    assert "10.1" not in str(caught.value)


async def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """DNS rebinding: a second answer would lead elsewhere, and is never asked for."""
    with trio.fail_after(5):
        async with bad_server(whole(b"good")) as server, bad_server(whole(b"secret")) as other:
            resolver = Resolver([["127.0.0.1"], ["127.0.0.2"]])
            policy = parse_policy("guarded", server.allow)
            async with open_client(policy, resolver=resolver) as client:
                answer = await client.get(server.url(host="inputs.test"))
                assert answer.text == "good"
                assert resolver.asked == ["inputs.test"]
                with pytest.raises(UrlRefused):  # its connection was closed: resolved, and checked, again
                    await client.get(server.url(host="inputs.test"))
    assert f"\r\nHost: inputs.test:{server.port}\r\n" in server.heads[0]
    assert other.requests == []


async def test_of_several_addresses_only_the_permitted_are_tried() -> None:
    with trio.fail_after(5):
        async with bad_server(whole(b"good")) as server:
            resolver = Resolver([["::1", "169.254.169.254", "127.0.0.1"]])
            async with open_client(parse_policy("guarded", server.allow), resolver=resolver) as client:
                assert (await client.get(server.url(host="inputs.test"))).text == "good"


async def test_an_address_that_does_not_answer_does_not_hold_up_the_next() -> None:
    """The first address accepts nothing: its listener's backlog is full."""
    with trio.fail_after(5), socket.socket() as full, socket.socket() as filler, socket.socket() as filler2:
        async with bad_server(whole(b"good")) as server:
            full.bind(("127.0.0.2", server.port))
            full.listen(0)
            for each in (filler, filler2):
                each.setblocking(False)
                each.connect_ex(("127.0.0.2", server.port))
            resolver = Resolver([["127.0.0.2", "127.0.0.1"]])
            async with open_client(parse_policy("open", ""), resolver=resolver) as client:
                began = trio.current_time()
                assert (await client.get(server.url(host="inputs.test"))).text == "good"
                assert trio.current_time() - began < 2


async def test_host_and_certificate_name_stay_those_of_the_url(tmp_path: Path) -> None:
    tls, certificate = self_signed(tmp_path)
    ours = ssl.create_default_context(cafile=str(certificate))
    seen: list[str | None] = []
    tls.sni_callback = lambda _socket, name, _context: seen.append(name)
    with trio.fail_after(5):
        async with bad_server(whole(b"good"), tls=tls) as server:
            policy = parse_policy("guarded", "inputs.test,wrong.test")
            async with open_client(policy, ssl_context=ours, resolver=Resolver([["127.0.0.1"]])) as client:
                assert (await client.get(server.url(host="inputs.test"))).text == "good"
                with pytest.raises(httpx.ConnectError, match="its certificate is not accepted: Hostname mismatch"):
                    await client.get(server.url(host="wrong.test"))
    assert seen == ["inputs.test", "wrong.test"]


async def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    tls, _ = self_signed(tmp_path)
    with trio.fail_after(5):
        async with bad_server(whole(b"secret"), tls=tls) as server:
            policy = parse_policy("guarded", "inputs.test")
            async with open_client(policy, resolver=Resolver([["127.0.0.1"]])) as client:
                with pytest.raises(httpx.ConnectError, match=r"certificate is not accepted: self.signed") as caught:
                    await client.get(server.url(host="inputs.test"))
    cause = caught.value.__cause__
    assert isinstance(cause, ConnectFailed)
    assert not cause.passing


async def test_a_handshake_that_is_cancelled_closes_its_connection() -> None:
    with trio.fail_after(5):
        async with bad_server(silent()) as server, open_client(parse_policy("open", "")) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.get, f"https://127.0.0.1:{server.port}/")
                while server.open_connections == 0:  # noqa: ASYNC110  # accepted by the kernel, then by trio
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel("the test says so")
            await server.all_closed.wait()


async def test_a_refused_connection_and_a_server_without_tls_are_told_apart() -> None:
    with trio.fail_after(5), socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with open_client(parse_policy("open", "")) as client:
            with pytest.raises(httpx.ConnectError, match=r"^connection refused$"):
                await client.get(f"http://127.0.0.1:{closed.getsockname()[1]}/")
            async with trio.open_nursery() as nursery:
                listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
                await nursery.start(trio.serve_listeners, _answer_in_plain_text, listeners)
                with pytest.raises(httpx.ConnectError, match="TLS failed: it does not speak it"):
                    await client.get(f"https://127.0.0.1:{listeners[0].socket.getsockname()[1]}/")
                nursery.cancel_scope.cancel("the test is over")


async def _answer_in_plain_text(stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.receive_some(4096)


async def test_a_name_that_does_not_resolve_is_told_so() -> None:
    async def no_such_name(host: str, port: int) -> Sequence[str]:
        await trio.lowlevel.checkpoint()
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with open_client(parse_policy("open", ""), resolver=no_such_name) as client:
        with pytest.raises(httpx.ConnectError, match="its host name does not resolve"):
            await client.get("http://inputs.test/")


async def test_a_connection_time_out_covers_the_resolver(autojump_clock: trio.testing.MockClock) -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await trio.sleep_forever()
        raise AssertionError

    async with open_client(parse_policy("open", ""), resolver=never) as client:
        with pytest.raises(httpx.ConnectTimeout):
            await client.get("http://inputs.test/", timeout=httpx.Timeout(None, connect=3))
        assert trio.current_time() == pytest.approx(3)


async def test_cookies_of_one_request_do_not_go_out_with_the_next() -> None:
    with trio.fail_after(5):
        async with (
            bad_server(whole(b"x", Set_Cookie="a=b; Path=/")) as server,
            open_client(parse_policy("guarded", server.allow)) as client,
        ):
            await client.get(server.url())
            await client.get(server.url())
    assert not any("cookie" in each.lower() for each in server.heads)


async def test_redirects_are_followed_without_reading_their_bodies() -> None:
    body_that_never_ends = then_hang(head("302 Found", Location="/b", Content_Length="99999999") + b"x")
    answers = {"/a": body_that_never_ends, "/b": redirect("//127.0.0.1:{port}/c", "307 x"), "/c": whole(b"end")}
    with trio.fail_after(5):
        async with bad_server(answers) as server:
            answers["/b"] = redirect(f"//127.0.0.1:{server.port}/c", "307 Temporary Redirect")
            async with (
                open_client(parse_policy("guarded", server.allow)) as client,
                open_get(client, server.url("/a")) as answer,
            ):
                assert await answer.aread() == b"end"
    assert server.requests == ["GET /a HTTP/1.1", "GET /b HTTP/1.1", "GET /c HTTP/1.1"]


async def test_a_redirect_to_a_refused_address_is_not_followed() -> None:
    with trio.fail_after(5):
        async with (
            bad_server(whole(b"secret")) as inner,
            bad_server(redirect(inner.url())) as outer,
            open_client(parse_policy("guarded", outer.allow)) as client,
        ):
            with pytest.raises(RedirectRefused, match=r"it redirects to http://127\.0\.0\.1.*loopback address"):
                async with open_get(client, outer.url()):
                    pytest.fail("it was followed")
    assert inner.requests == []


async def test_a_redirect_to_a_name_of_a_refused_address_is_not_followed() -> None:
    with trio.fail_after(5):
        async with bad_server(whole(b"secret")) as inner, bad_server(redirect(inner.url(host="in.test"))) as outer:
            policy = parse_policy("guarded", outer.allow)
            async with open_client(policy, resolver=Resolver([["127.0.0.1"]])) as client:
                with pytest.raises(RedirectRefused, match=r"in\.test resolves to a loopback address"):
                    async with open_get(client, outer.url()):
                        pytest.fail("it was followed")
    assert inner.requests == []


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file:///etc/passwd", "only http:// and https:// are accepted"),
        ("ftp://127.0.0.1/x", "only http:// and https:// are accepted"),
        ("http://[::1/", "something that is no URL"),
        ("http://exa%00mple/", "has a % in it"),
        ("//127.0.0.1\\@example.com", "something that is no URL"),
        ("/loop", "redirects more than 5 times"),
    ],
)
async def test_redirects_to_nonsense_are_refused(location: str, reason: str) -> None:
    with trio.fail_after(5):
        async with (
            bad_server(redirect(location)) as server,
            open_client(parse_policy("guarded", server.allow)) as client,
        ):
            with pytest.raises(RedirectRefused, match=reason):
                async with open_get(client, server.url()):
                    pytest.fail("it was followed")
    assert len(server.requests) == (6 if location == "/loop" else 1)


async def test_a_redirect_from_https_to_http_is_not_followed(tmp_path: Path) -> None:
    tls, certificate = self_signed(tmp_path)
    ours = ssl.create_default_context(cafile=str(certificate))
    with trio.fail_after(5):
        async with bad_server(whole(b"x")) as plain, bad_server(redirect(plain.url()), tls=tls) as server:
            policy = parse_policy("open", "")
            async with open_client(policy, ssl_context=ours, resolver=Resolver([["127.0.0.1"]])) as client:
                with pytest.raises(RedirectRefused, match="from https to http"):
                    async with open_get(client, server.url(host="inputs.test")):
                        pytest.fail("it was followed")
    assert plain.requests == []


async def test_credentials_stay_with_their_origin() -> None:
    with trio.fail_after(5):
        async with bad_server(whole(b"end")) as other:
            answers = {"/a": redirect("/b"), "/b": redirect(other.url("/c"))}
            async with bad_server(answers) as server, open_client(parse_policy("open", "")) as client:
                url = server.url("/a").replace("http://", "http://user:pass@")
                async with open_get(client, url, headers={"X-Key": "k"}) as answer:
                    assert await answer.aread() == b"end"
    assert len(server.heads) == 2
    for each in server.heads:
        assert "\r\nAuthorization: Basic dXNlcjpwYXNz\r\n" in each
        assert "\r\nX-Key: k\r\n" in each
    assert "authorization" not in other.heads[0].lower()
    assert "x-key" not in other.heads[0].lower()


async def test_leaving_an_answer_half_read_closes_its_connection() -> None:
    with trio.fail_after(5):
        async with (
            bad_server(then_hang(head(Content_Length="100") + b"x")) as server,
            open_client(parse_policy("open", "")) as client,
        ):
            async with open_get(client, server.url()) as answer:
                assert answer.status_code == 200
            await server.all_closed.wait()
