"""Inputs that a prompt names instead of bringing: URLs, S3, lists for folders, paths, loaders that nobody foresaw.

After each test no file is left, and at the end the daemon's log holds none of the secrets.
"""

import json
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import trio
from api_support import (
    INPUT_TIMEOUT_S,
    URL_PASSWORD,
    URL_SECRET,
    Graph,
    assert_no_secret,
    b64,
    blank,
    faults,
    graph_of,
    images,
    load_and_save,
    loader,
    node,
    open_client,
    pixel,
    png,
    prompt,
    saver,
    wait_folders_clean,
)
from daemon_support import Daemon, problem, submit
from fetch_servers import bad_server, endless, head, raw, redirect, silent, then_hang, when, whole
from media_kit import png as grey_png
from media_kit import png_header, wav
from storage_support import Peer

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)
PNG = png(colour=RED)


@pytest.fixture
async def client(media_daemon: Daemon) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(media_daemon) as client:
        yield client
        await wait_folders_clean(media_daemon)
        media_daemon.assert_no_bug()


# URLs


async def test_a_picture_behind_a_url_is_loaded(client: httpx.AsyncClient) -> None:
    async with bad_server({"/a.jpg": whole(PNG, Content_Type="text/plain")}) as server:
        response = await prompt(client, load_and_save([server.url("/a.jpg")]))
    assert [pixel(data) for data in images(response)] == [RED]
    assert server.requests == ["GET /a.jpg HTTP/1.1"]
    shown = response.json()["prompt"]["load-0"]["inputs"]["image"]
    assert shown.endswith(".png"), "the type is told by the content, and neither by the name nor by the server"


async def test_secrets_of_a_url_go_to_its_server_and_nowhere_else(
    client: httpx.AsyncClient, media_daemon: Daemon
) -> None:
    place = uuid.uuid4().hex
    async with bad_server({f"/{place}": whole(PNG), f"/no-{place}": whole(b"no", "403 Forbidden")}) as server:
        authority = f"user:{URL_PASSWORD}@127.0.0.1:{server.port}"
        good, bad = (f"http://{authority}/{path}?token={URL_SECRET}" for path in (place, f"no-{place}"))
        response = await prompt(client, load_and_save([good]), id=f"good-{place}")
        assert [pixel(data) for data in images(response)] == [RED]
        response = await prompt(client, load_and_save([good, bad]), id=f"bad-{place}")
    assert all(URL_SECRET in request for request in server.requests)
    assert all("authorization: basic" in each.lower() for each in server.heads)
    document = problem(response, 400, "invalid-input")
    assert list(faults(document).items()) == [
        ("prompt.load-1.inputs.image", f"{server.url(f'/no-{place}')} answered 403 Forbidden")
    ]
    assert_no_secret(response.text)
    await media_daemon.log.wait("job.ended", job_id=f"bad-{place}")
    await media_daemon.log.wait("input.not_fetched", url=lambda url: place in str(url))
    assert_no_secret(str(media_daemon.log))


async def test_a_redirect_is_followed(client: httpx.AsyncClient) -> None:
    async with bad_server({"/from": redirect("/to?page=2"), "/to": whole(PNG)}) as server:
        response = await prompt(client, load_and_save([server.url("/from")]))
    assert [pixel(data) for data in images(response)] == [RED]
    assert server.requests == ["GET /from HTTP/1.1", "GET /to?page=2 HTTP/1.1"]


async def test_the_same_url_in_50_nodes_is_one_request(client: httpx.AsyncClient) -> None:
    async with bad_server({"/": whole(PNG)}) as server:
        graph = graph_of(*(loader(f"load-{number}", server.url("/")) for number in range(50)), saver("save", "load-0"))
        response = await prompt(client, graph)
    assert len(images(response)) == 1
    names = {response.json()["prompt"][f"load-{number}"]["inputs"]["image"] for number in range(50)}
    assert len(names) == 1
    assert len(server.requests) == 1


async def test_two_jobs_at_once_share_a_download(client: httpx.AsyncClient, media_daemon: Daemon) -> None:
    go_on = trio.Event()
    async with bad_server(when(go_on, whole(PNG))) as server, trio.open_nursery() as nursery:
        graph = load_and_save([server.url("/shared.png")])
        jobs = [await submit(media_daemon, nursery, client, graph) for _ in range(2)]
        await _wait_job_folders(client, media_daemon, 2)
        go_on.set()
        for job in jobs:
            assert [pixel(data) for data in images(await job.wait())] == [RED]
        assert len(server.requests) == 1
        await wait_folders_clean(media_daemon)
        again = await prompt(client, graph)
        assert [pixel(data) for data in images(again)] == [RED]
        assert len(server.requests) == 2, "what nobody waits for any more is not kept"


async def _wait_job_folders(client: httpx.AsyncClient, daemon: Daemon, count: int) -> None:
    """Wait until so many jobs have their folder, and the daemon's loop has gone on from there."""
    while len(_job_folders(daemon)) != count:  # noqa: ASYNC110  # a folder cannot be waited for without inotify
        await trio.sleep(0.005)
    for _ in range(3):
        await client.get("/health")


def _job_folders(daemon: Daemon) -> list[Path]:
    return [path for path in (daemon.input_dir / "comfyd").glob("*/*") if path.is_dir() and path.name != "spool"]


async def test_all_bad_inputs_are_told_at_once_each_with_its_place_and_cause(client: httpx.AsyncClient) -> None:
    large = head(Content_Length=str(5 << 20)) + png_header(8, 8)
    noise = png(size_px=64)
    async with bad_server(
        {
            "/good": whole(PNG),
            "/404": whole(b"gone", "404 Not Found"),
            "/page": whole(b"<!doctype html><html><body>log in</body></html>", Content_Type="image/png"),
            "/empty": whole(b""),
            "/cut": raw(head(Content_Length="100000") + noise),
            "/large": raw(large),
            "/endless": endless(head() + png_header(8, 8)),
            "/bomb": whole(grey_png(30_000, 30_000)),
            "/slow": then_hang(head(Content_Length="100000") + noise),
            "/silent": silent(),
            "/metadata": redirect("http://169.254.169.254/latest/meta-data"),
            "/file": redirect("file:///etc/passwd"),
            "/circle": redirect("/circle"),
        }
    ) as server:
        dead = server.url("/", host="127.0.0.1").replace(str(server.port), "1")
        expected = {
            server.url("/404"): "answered 404 Not Found",
            server.url("/page"): "holds no picture",
            server.url("/empty"): "empty",
            server.url("/cut"): "truncated",
            server.url("/large"): "larger than 1 MB",
            server.url("/endless"): "larger than 1 MB",
            server.url("/bomb"): "30000 x 30000 pixels",
            server.url("/slow"): f"longer than {INPUT_TIMEOUT_S} s",
            server.url("/silent"): f"longer than {INPUT_TIMEOUT_S} s",
            server.url("/metadata"): "metadata service",
            server.url("/file"): "only http:// and https://",
            server.url("/circle"): "redirect",
            dead: "refuse",
            "http://no-such-host.invalid/a.png": "resolve",
            "s3://no-such-bucket-of-ours/a.png": "bucket",
            "s3://": "names no bucket",
            "no-such-file.png": "no input file",
            "../secret.png": "must lie in INPUT_DIR",
        }
        response = await prompt(client, load_and_save([server.url("/good"), *expected]))
    document = problem(response, 400, "invalid-input")
    told = faults(document)
    assert list(told) == [f"prompt.load-{number}.inputs.image" for number in range(1, len(expected) + 1)]
    wrong = {
        url: message
        for (url, cause), message in zip(expected.items(), told.values(), strict=True)
        if cause.lower() not in message.lower() or (urlsplit(url).scheme == "http" and url not in message)
    }
    assert wrong == {}
    assert document["detail"] == f"{len(expected)} inputs cannot be used"


POLICY = {
    "http://127.0.0.1:1/a.png": "loopback",
    "http://localhost/a.png": "loopback",
    "http://a.localhost./a.png": "loopback",
    "http://[::1]/a.png": "loopback",
    "http://[::ffff:127.0.0.1]/a.png": "loopback",
    "http://2130706433/a.png": "loopback",
    "http://0x7f.1/a.png": "loopback",
    "http://0.0.0.0/a.png": "unspecified",
    "http://169.254.169.254/latest/meta-data": "metadata service",
    "http://2852039166/latest/meta-data": "metadata service",
    "http://169.254.1.1/a.png": "link-local",
    "http://224.0.0.1/a.png": "multicast",
    "file:///etc/passwd": "file:// is not accepted",
    "ftp://example.com/a.png": "ftp:// is not accepted",
    "gopher://example.com/a.png": "gopher:// is not accepted",
}


async def test_what_the_policy_refuses_is_not_asked(shared_daemon: Daemon) -> None:
    async with open_client(shared_daemon) as client, bad_server({"/": whole(PNG)}) as server:
        response = await prompt(client, load_and_save([*POLICY, server.url("/")]))
        await wait_folders_clean(shared_daemon)
    told = faults(problem(response, 400, "invalid-input"))
    assert len(told) == len(POLICY) + 1
    expected = [*POLICY.values(), "loopback"]
    assert [m for m, cause in zip(told.values(), expected, strict=True) if cause not in m] == []
    assert server.requests == []


# Those who do not wait


async def test_a_client_that_leaves_stops_the_download(client: httpx.AsyncClient, media_daemon: Daemon) -> None:
    part = head(Content_Length="100000") + png_header(8, 8) + b"\0" * 20_000
    async with bad_server(then_hang(part)) as server, trio.open_nursery() as nursery:
        job = await submit(media_daemon, nursery, client, load_and_save([server.url("/slow.png")]))
        await server.asked.wait()
        left_at = trio.current_time()
        job.leave()
        await server.all_closed.wait()
        assert trio.current_time() - left_at < INPUT_TIMEOUT_S - 1, "it ended by its time-out only"
        await media_daemon.log.wait("job.abandoned", job_id=job.job_id, state="preparing")
        await wait_folders_clean(media_daemon)


async def test_a_client_that_leaves_does_not_stop_the_download_of_another_job(
    client: httpx.AsyncClient, media_daemon: Daemon
) -> None:
    go_on = trio.Event()
    async with bad_server(when(go_on, whole(PNG))) as server, trio.open_nursery() as nursery:
        graph = load_and_save([server.url("/wanted.png")])
        first, second = [await submit(media_daemon, nursery, client, graph) for _ in range(2)]
        await _wait_job_folders(client, media_daemon, 2)
        first.leave()
        await media_daemon.log.wait("job.abandoned", job_id=first.job_id)
        go_on.set()
        assert [pixel(data) for data in images(await second.wait())] == [RED]
    assert len(server.requests) == 1


async def test_a_job_times_out_during_a_download(client: httpx.AsyncClient) -> None:
    async with bad_server(silent()) as server:
        response = await prompt(client, load_and_save([server.url("/never.png")]), timeout_s=0.4)
        await server.all_closed.wait()
    document = problem(response, 504, "timeout")
    assert "0.4 s" in document["detail"]
    assert "preparing" in document["detail"]


# S3


async def test_an_object_is_loaded_whatever_its_key_holds(client: httpx.AsyncClient, s3_server: Peer) -> None:
    bucket = f"in-{uuid.uuid4().hex[:12]}"
    keys = ["a b.png", "a#b.png", "a?b=c&d.png", "100%.png", "a%20b.png", "a+b.png", "ünï/日本 ✓.png", "no-ending"]
    colours = [(10 * number, 0, 200) for number in range(len(keys))]

    def put() -> None:
        with s3_server.client() as s3:
            s3.create_bucket(Bucket=bucket)
            for key, colour in zip(keys, colours, strict=True):
                s3.put_object(Bucket=bucket, Key=key, Body=png(colour=colour))

    await trio.to_thread.run_sync(put)
    response = await prompt(client, load_and_save([f"s3://{bucket}/{key}" for key in keys]))
    assert [pixel(data) for data in images(response)] == colours
    response = await prompt(client, load_and_save([f"s3://{bucket}/a%20c.png", f"s3://{bucket}/a%23b.png"]))
    assert [message.rpartition(": ")[0] for message in faults(problem(response, 400, "invalid-input")).values()] == [
        f"s3://{bucket}/a%20c.png",
        f"s3://{bucket}/a%23b.png",
    ]


async def test_an_object_that_is_no_media_or_too_large_is_refused(client: httpx.AsyncClient, s3_server: Peer) -> None:
    bucket = f"in-{uuid.uuid4().hex[:12]}"

    def put() -> None:
        with s3_server.client() as s3:
            s3.create_bucket(Bucket=bucket)
            s3.put_object(Bucket=bucket, Key="text.png", Body=b"not a picture")
            s3.put_object(Bucket=bucket, Key="large.png", Body=PNG + bytes(2 << 20))
            s3.put_object(Bucket=bucket, Key="bomb.png", Body=grey_png(30_000, 30_000))

    await trio.to_thread.run_sync(put)
    response = await prompt(client, load_and_save([f"s3://{bucket}/{name}.png" for name in ("text", "large", "bomb")]))
    text, large, bomb = faults(problem(response, 400, "invalid-input")).values()
    assert text == f"s3://{bucket}/text.png is no picture, video or sound that we know"
    assert "larger than" in large
    assert "30000 x 30000 pixels" in bomb


# Loaders


async def test_a_loader_that_says_what_it_takes_is_served_whatever_its_name(client: httpx.AsyncClient) -> None:
    async with bad_server({"/": whole(PNG)}) as server:
        for value, colour in ((server.url("/"), RED), (b64(png(colour=BLUE)), BLUE)):
            graph = graph_of(node("1", "CustomLoader", picture=value), saver("2", "1"))
            assert [pixel(data) for data in images(await prompt(client, graph))] == [colour]


async def test_sounds_and_films_arrive_as_they_are(client: httpx.AsyncClient) -> None:
    film = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(1000)
    async with bad_server({"/film": whole(film)}) as server:
        graph = graph_of(
            node("1", "LoadAudio", audio=b64(wav())),
            node("2", "SaveAudio", audio=["1", 0], filename_prefix="audio/x"),
            node("3", "LoadVideo", file=server.url("/film")),
            node("4", "SaveVideo", video=["3", 0], filename_prefix="y", format="auto", codec="auto"),
        )
        response = await prompt(client, graph, id="sounds")
    assert images(response) == [wav(), film]
    assert response.json()["filenames"] == ["sounds_x_00001_.wav", "sounds_y_00001_.mp4"]
    assert response.json()["outputs"][1]["media_type"] == "video/mp4"


@pytest.mark.parametrize(
    "text", ["a cat on a mat", "cat.png", "see http://example.com/cat.png", "/etc/passwd", "../x", "a" * 400, "", "10%"]
)
async def test_a_text_that_is_called_image_stays_a_text(client: httpx.AsyncClient, text: str) -> None:
    graph = graph_of(
        node("1", "TextNode", image=text), node("2", "SaveTextFile", text=["1", 0], filename_prefix="text")
    )
    response = await prompt(client, graph)
    assert images(response) == [text.encode()]
    assert response.json()["prompt"]["1"]["inputs"]["image"] == text


async def test_a_text_that_is_called_image_and_is_a_url_is_fetched(client: httpx.AsyncClient) -> None:
    async with bad_server({"/": whole(PNG)}) as server:
        graph = graph_of(
            node("1", "TextNode", image=server.url("/")),
            node("2", "SaveTextFile", text=["1", 0], filename_prefix="text"),
        )
        (text,) = images(await prompt(client, graph))
    assert text.startswith(b"comfyd/")
    assert text.endswith(b".png")
    assert len(server.requests) == 1


async def test_a_link_into_a_media_input_stays_a_link(client: httpx.AsyncClient) -> None:
    graph = graph_of(
        node("1", "PrimitiveString", value="http://127.0.0.1:1/never-asked.png"),
        node("2", "TextNode", image=["1", 0]),
        node("3", "SaveTextFile", text=["2", 0], filename_prefix="text"),
    )
    response = await prompt(client, graph)
    assert images(response) == [b"http://127.0.0.1:1/never-asked.png"]
    assert response.json()["prompt"]["2"]["inputs"]["image"] == ["1", 0]


# Folders and paths


@pytest.fixture
async def named(media_daemon: Daemon) -> AsyncIterator[str]:
    """A green picture in a folder of INPUT_DIR."""
    folder = media_daemon.input_dir / f"of-the-operator-{uuid.uuid4().hex}"
    folder.mkdir()
    (folder / "green.png").write_bytes(png(colour=GREEN))
    yield f"{folder.name}/green.png"
    assert os.listdir(folder) == ["green.png"], "an input that the job did not bring was removed"
    (folder / "green.png").unlink()
    folder.rmdir()


def folder_graph(class_type: str, directory: object) -> Graph:
    return graph_of(node("1", class_type, directory=directory), saver("2", "1"))


@pytest.mark.parametrize("class_type", ["VHS_LoadImages", "VHS_LoadImagesPath"])
async def test_a_list_becomes_a_folder_in_its_order(
    client: httpx.AsyncClient, media_daemon: Daemon, s3_server: Peer, class_type: str, named: str
) -> None:
    bucket = f"in-{uuid.uuid4().hex[:12]}"
    white = (255, 255, 255)

    def put() -> None:
        with s3_server.client() as s3:
            s3.create_bucket(Bucket=bucket)
            s3.put_object(Bucket=bucket, Key="white.png", Body=png(colour=white))

    await trio.to_thread.run_sync(put)
    async with bad_server({"/red": whole(PNG)}) as server:
        red, blue = server.url("/red"), b64(png(colour=BLUE))
        values = [f"s3://{bucket}/white.png", red, blue, named, blue, named, red, *[blue] * 8]
        response = await prompt(client, folder_graph(class_type, values))
    with_blue = [white, RED, BLUE, GREEN, BLUE, GREEN, RED, *[BLUE] * 8]
    assert [pixel(data) for data in images(response)] == with_blue
    assert len(server.requests) == 1
    assert str(media_daemon.folder) not in response.text
    shown = response.json()["prompt"]["1"]["inputs"]["directory"]
    assert shown.startswith("comfyd/")


async def test_a_folder_by_name_is_read_where_it_is(
    client: httpx.AsyncClient, media_daemon: Daemon, named: str
) -> None:
    folder = named.partition("/")[0]
    for class_type in ("VHS_LoadImages", "VHS_LoadImagesPath"):
        response = await prompt(client, folder_graph(class_type, folder))
        assert [pixel(data) for data in images(response)] == [GREEN]
        assert response.json()["prompt"]["1"]["inputs"]["directory"] == folder
    for value, cause in (("no-such-folder", "no input folder"), ("..", "must lie in INPUT_DIR"), (named, "no input")):
        response = await prompt(client, folder_graph("VHS_LoadImagesPath", value))
        (message,) = faults(problem(response, 400, "invalid-input")).values()
        assert cause in message
        assert str(media_daemon.folder) not in response.text


async def test_bad_members_of_a_list_are_told_by_their_index_beside_other_bad_inputs(
    client: httpx.AsyncClient,
) -> None:
    async with bad_server({"/good": whole(PNG), "/bad": whole(b"", "410 Gone")}) as server:
        values = [server.url("/good"), server.url("/bad"), "nowhere.png", 7, b64(PNG), "file:///etc/passwd"]
        graph = graph_of(
            loader("before", "missing.png"),
            node("list", "VHS_LoadImages", directory=values),
            node("none", "VHS_LoadImages", directory=[]),
            loader("after", server.url("/bad")),
            saver("save", "list"),
        )
        response = await prompt(client, graph)
    told = faults(problem(response, 400, "invalid-input"))
    assert list(told) == [
        "prompt.before.inputs.image",
        "prompt.list.inputs.directory.1",
        "prompt.list.inputs.directory.2",
        "prompt.list.inputs.directory.3",
        "prompt.list.inputs.directory.5",
        "prompt.none.inputs.directory",
        "prompt.after.inputs.image",
    ]
    assert "410 Gone" in told["prompt.list.inputs.directory.1"]
    assert "must be a text" in told["prompt.list.inputs.directory.3"]


async def test_a_path_loader_gets_an_absolute_path_that_no_answer_shows(
    client: httpx.AsyncClient, media_daemon: Daemon, named: str
) -> None:
    # It looks from the engine's working folder, where nothing of this is: only an absolute path can be found.
    assert os.readlink(f"/proc/{media_daemon.engine_pid}/cwd") != str(media_daemon.input_dir)
    async with bad_server({"/": whole(PNG)}) as server:
        values = {server.url("/"): RED, b64(png(colour=BLUE)): BLUE, named: GREEN, f"{named} [input]": GREEN}
        for value, colour in values.items():
            graph = graph_of(node("1", "VHS_LoadImagePath", image=value), saver("2", "1"))
            response = await prompt(client, graph)
            assert [pixel(data) for data in images(response)] == [colour]
            assert str(media_daemon.folder) not in response.text
            shown = response.json()["prompt"]["1"]["inputs"]["image"]
            assert shown == named if colour == GREEN else shown.startswith("comfyd/")
    for value in ("/etc/passwd", str(media_daemon.input_dir / named)):
        graph = graph_of(node("1", "VHS_LoadImagePath", image=value), saver("2", "1"))
        (message,) = faults(problem(await prompt(client, graph), 400, "invalid-input")).values()
        assert "must lie in INPUT_DIR" in message


async def test_no_event_and_no_failure_of_a_path_loader_shows_the_path(
    client: httpx.AsyncClient, media_daemon: Daemon
) -> None:
    cut = png(size_px=64)[:-30]
    graph = graph_of(node("1", "VHS_LoadImagePath", image=b64(cut)), saver("2", "1"), blank("3"))
    response = await prompt(client, graph)
    document = problem(response, 500, "execution-failed")
    assert document["node_id"] == "1"
    assert str(media_daemon.folder) not in json.dumps(document)
