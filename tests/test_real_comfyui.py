"""The whole daemon with real ComfyUI behind it, on a processor and without models. Runs when COMFYUI_DIR is set."""

import os
import re
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
from real_comfyui_support import (
    COMFYUI_DIR,
    Daemon,
    Graph,
    as_base64,
    checked_pattern,
    color_of,
    decoded,
    empty_image,
    files_below,
    node,
    picture,
    pixels,
    running_daemon,
    save_image,
    scale,
    slow_graph,
)

from comfyd.engine.guard import read_stat

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(not COMFYUI_DIR, reason="COMFYUI_DIR is not set"),
]

RED, GREEN, BLUE = 0xFF0000, 0x00FF00, 0x0000FF
PATIENCE_S = 120.0
"""For one prompt; the machines of a CI are slow, and nothing here waits for the sake of waiting."""
SETTLE_S = 15.0
"""For what comfyd does after its answer: removing files, clearing ComfyUI's history."""


@attrs.frozen
class Client:
    """A caller of one daemon."""

    http: httpx.AsyncClient
    daemon: Daemon
    input_files: list[Path] = attrs.field(factory=list)

    def put_input(self, name: str, data: bytes) -> str:
        """Put a file into ComfyUI's input folder for the time of the test; return its name."""
        path = self.daemon.input_dir / name
        path.write_bytes(data)
        self.input_files.append(path)
        return name

    async def post(self, graph: Graph, **fields: Any) -> httpx.Response:
        with trio.fail_after(PATIENCE_S):
            return await self.http.post("/prompt", json={"prompt": graph, **fields})

    async def run(self, graph: Graph, **fields: Any) -> dict[str, Any]:
        """Run a graph that succeeds; return the answer."""
        response = await self.post(graph, **fields)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        assert len(answer["images"]) == len(answer["filenames"]) == len(answer["outputs"])
        for data, name, output in zip(decoded(answer), answer["filenames"], answer["outputs"], strict=True):
            assert output["filename"] == name
            assert output["size_bytes"] == len(data) > 0
        return answer

    async def refused(self, graph: Graph, status: int, slug: str) -> dict[str, Any]:
        """Run a graph that does not succeed; return the problem."""
        response = await self.post(graph)
        problem: dict[str, Any] = response.json()
        assert (response.status_code, problem["type"]) == (status, slug), response.text
        assert response.headers["content-type"] == "application/problem+json"
        assert COMFYUI_DIR not in response.text
        assert str(self.daemon.input_dir.parent) not in response.text
        assert "Traceback" not in response.text
        assert "traceback" not in response.text
        return problem

    async def accepted(self, job_id: str) -> None:
        """Wait until the daemon has taken a job."""
        await self.daemon.logged("job.accepted", where=lambda entry: entry["job_id"] == job_id)

    async def wait_running(self, job_id: str) -> None:
        """Wait until ComfyUI is at work on the nodes of a job."""
        with trio.fail_after(PATIENCE_S):
            await self.accepted(job_id)
            address = httpx.URL(self.daemon.url)
            assert address.port is not None
            seen = b""
            # By hand, as an HTTP client's generators do not like to be left before their end.
            async with await trio.open_tcp_stream(address.host, address.port) as stream:
                await stream.send_all(b"GET /jobs/%b/events HTTP/1.1\r\nHost: comfyd\r\n\r\n" % job_id.encode())
                while not re.search(rb'"state":"running".*"node_id":"', seen):
                    data = await stream.receive_some()
                    assert data, f"the job ended before it was seen at work: {seen!r}"
                    seen += data

    async def engine(self, path: str) -> Any:
        async with httpx.AsyncClient(base_url=self.daemon.engine_url, trust_env=False) as http:
            return (await http.get(path)).json()

    async def becomes(self, description: str, state: Callable[[], bool]) -> None:
        """Wait for what comfyd does in its own time and does not announce."""
        with trio.move_on_after(SETTLE_S):
            while not state():  # noqa: ASYNC110  # of another process
                await trio.sleep(0.02)
        assert state(), description


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("comfyui")
    with running_daemon(folder, ALWAYS_RESTART_COMFYUI="true") as running:
        yield running
    assert running.process.returncode == 0
    errors = [entry for entry in running.log if entry.get("level") in {"error", "fatal"}]
    assert not [entry for entry in errors if entry["event"] != "engine.output"]  # those are ComfyUI's own


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[Client]:
    """A caller; after the test the daemon must have left no file of it, in whatever way it ended."""
    async with open_client(daemon) as opened:
        yield opened
        mine = sorted(path.name for path in opened.input_files)
        await opened.becomes("files are left in OUTPUT_DIR", lambda: not files_below(daemon.output_dir))
        # Those that were there before are not comfyd's to remove.
        await opened.becomes("the files in INPUT_DIR changed", lambda: files_below(daemon.input_dir) == mine)
        for path in opened.input_files:
            path.unlink()


@asynccontextmanager
async def open_client(daemon: Daemon) -> AsyncIterator[Client]:
    """Connect to a daemon."""
    # Time-outs are set around each step.
    async with httpx.AsyncClient(base_url=daemon.url, timeout=None, trust_env=False) as http:  # noqa: S113  # see above
        yield Client(http, daemon)


# --- what comes back


async def test_a_picture_comes_back_with_its_name_node_and_type(client: Client) -> None:
    answer = await client.run(picture(RED), id="first")
    (output,) = answer["outputs"]
    assert output["filename"] == "first_ComfyUI_00001_.png"
    assert (output["node_id"], output["media_type"]) == ("2", "image/png")
    assert color_of(decoded(answer)[0]) == RED
    assert answer["prompt"]["2"]["inputs"]["filename_prefix"] == "first_ComfyUI"
    assert set(answer["stats"]["comfy_execution"]["nodes"]) <= {"1", "2"}
    assert answer["stats"]["attempts"] == 1


async def test_a_batch_comes_back_in_its_order(client: Client) -> None:
    graph = {
        **{str(color): empty_image(color) for color in (BLUE, RED, GREEN)},
        "pair": node("ImageBatch", image1=[str(BLUE), 0], image2=[str(RED), 0]),
        "all": node("ImageBatch", image1=["pair", 0], image2=[str(GREEN), 0]),
        "save": save_image("all"),
    }
    answer = await client.run(graph, id="batch")
    assert [color_of(data) for data in decoded(answer)] == [BLUE, RED, GREEN]
    assert answer["filenames"] == [f"batch_ComfyUI_{number:05}_.png" for number in (1, 2, 3)]


async def test_outputs_come_in_the_order_of_the_graph_and_not_of_execution(client: Client) -> None:
    graph = {
        "late": save_image("far", "late"),
        "far": scale("mid", 32, "nearest-exact"),
        "mid": scale("red", 24, "nearest-exact"),
        "red": empty_image(RED),
        "early": save_image("blue", "early"),
        "blue": empty_image(BLUE),
        "animated": node("SaveAnimatedPNG", images=["blue", 0], filename_prefix="moving", fps=6, compress_level=1),
    }
    answer = await client.run(graph)
    assert [output["node_id"] for output in answer["outputs"]] == ["late", "early", "animated"]
    assert [color_of(data) for data in decoded(answer)] == [RED, BLUE, BLUE]


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("plain", "{id}_plain_00001_.png"),
        ("deep/er/name", "{id}_name_00001_.png"),
        ("folder/", "{id}__00001_.png"),
        ("", "{id}__00001_.png"),
        ("ends_", "{id}_ends__00001_.png"),
        ("%width%x%height%", "{id}_16x16_00001_.png"),
        ("ünï çødé", "{id}_ünï çødé_00001_.png"),
        (5, "{id}_5_00001_.png"),
        (2.5, "{id}_2.5_00001_.png"),
        (True, "{id}_True_00001_.png"),
    ],
)
async def test_a_prefix_keeps_its_folder_and_gets_the_id_before_its_name(
    client: Client, prefix: Any, expected: str
) -> None:
    job_id = uuid.uuid4().hex
    answer = await client.run({"1": empty_image(GREEN), "2": save_image("1", prefix)}, id=job_id)
    assert answer["filenames"] == [expected.format(id=job_id)]
    assert color_of(decoded(answer)[0]) == GREEN


async def test_jobs_that_save_into_the_same_folder_do_not_take_it_from_each_other(client: Client) -> None:
    # ComfyUI makes the folder, then encodes the picture, then writes it: meanwhile another job's files are removed.
    async with trio.open_nursery() as nursery:
        for _ in range(40):
            graph = {"1": empty_image(GREEN, size_px=1024), "2": save_image("1", "shared/name")}
            nursery.start_soon(client.run, graph)


async def test_a_prefix_from_another_node_gets_the_id_before_it(client: Client) -> None:
    graph = {
        "1": empty_image(BLUE),
        "name": node("PrimitiveString", value="linked"),
        "2": save_image("1", ["name", 0]),
    }
    answer = await client.run(graph, id="with-link")
    assert answer["filenames"] == ["with-link_linked_00001_.png"]
    again = await client.run(graph, id="with-another")
    assert again["filenames"] == ["with-another_linked_00001_.png"]


async def test_a_linked_prefix_may_name_a_folder(client: Client) -> None:
    graph = {
        "1": empty_image(BLUE),
        "name": node("PrimitiveString", value="sub/name"),
        "2": save_image("1", ["name", 0]),
    }
    answer = await client.run(graph, id="linked-folder")
    assert answer["filenames"] == ["name_00001_.png"]
    await client.becomes(
        "the job's own folder is left", lambda: not list(client.daemon.output_dir.glob("linked-folder*"))
    )


async def test_two_saving_nodes_that_say_the_same_make_one_file(client: Client) -> None:
    # ComfyUI runs only one of them and reports its file for both.
    answer = await client.run({"1": empty_image(BLUE), "2": save_image("1"), "3": save_image("1")})
    assert [output["node_id"] for output in answer["outputs"]] == ["2"]


async def test_prefixes_outside_of_the_output_folder_are_refused(client: Client) -> None:
    problem = await client.refused({"1": empty_image(), "2": save_image("1", "../../outside")}, 400, "invalid-request")
    assert problem["location"] == "prompt.2.inputs.filename_prefix"
    linked = {"name": node("PrimitiveString", value="../../../outside"), "1": empty_image()}
    problem = await client.refused({**linked, "2": save_image("1", ["name", 0])}, 500, "execution-failed")
    assert problem["node_id"] == "2"


AUDIO: dict[str, tuple[dict[str, Any], str, bytes | tuple[bytes, ...]]] = {
    "SaveAudio": ({}, "audio/flac", b"fLaC"),
    "SaveAudioMP3": ({"quality": "128k"}, "audio/mpeg", (b"ID3", b"\xff\xfb")),
    "SaveAudioOpus": ({"quality": "64k"}, "audio/ogg", b"OggS"),
}


@pytest.mark.parametrize("saver", AUDIO)
async def test_audio_comes_back(client: Client, saver: str) -> None:
    options, media_type, magic = AUDIO[saver]
    graph = {
        "1": node("EmptyAudio", duration=0.5, sample_rate=48000, channels=2),
        "2": node(saver, audio=["1", 0], filename_prefix="audio/sound", **options),
    }
    answer = await client.run(graph)
    (data,) = decoded(answer)
    assert data.startswith(magic)
    assert answer["outputs"][0]["media_type"] == media_type


FRAMES = {"1": empty_image(RED, size_px=64, count=4)}
MOVING: dict[str, tuple[Graph, str, str]] = {
    "SaveVideo": (
        {
            "v": node("CreateVideo", images=["1", 0], fps=8),
            "2": node("SaveVideo", video=["v", 0], filename_prefix="video/film", format="mp4", codec="h264"),
        },
        "video/mp4",
        "ftyp",
    ),
    "SaveWEBM": (
        {"2": node("SaveWEBM", images=["1", 0], filename_prefix="film", codec="vp9", fps=8, crf=40)},
        "video/webm",
        "\x1a\x45\xdf\xa3",
    ),
    "SaveAnimatedWEBP": (
        {
            "2": node(
                "SaveAnimatedWEBP",
                images=["1", 0],
                filename_prefix="film",
                fps=8,
                lossless=True,
                quality=80,
                method="fastest",
            )
        },
        "image/webp",
        "WEBP",
    ),
    "SaveAnimatedPNG": (
        {"2": node("SaveAnimatedPNG", images=["1", 0], filename_prefix="film", fps=8, compress_level=1)},
        "image/png",
        "PNG",
    ),
}


@pytest.mark.parametrize("saver", MOVING)
async def test_moving_pictures_come_back_as_one_file(client: Client, saver: str) -> None:
    graph, media_type, magic = MOVING[saver]
    answer = await client.run(FRAMES | graph)
    (data,) = decoded(answer)
    assert magic.encode("latin-1") in data[:16]
    assert answer["outputs"][0]["media_type"] == media_type


async def test_text_beside_a_picture_is_no_file(client: Client) -> None:
    graph = {**picture(RED), "3": node("PreviewAny", source=["1", 0])}
    answer = await client.run(graph)
    assert [output["node_id"] for output in answer["outputs"]] == ["2"]


async def test_previews_are_not_delivered(client: Client) -> None:
    graph = {"0": node("PreviewImage", images=["1", 0]), **picture(BLUE)}
    answer = await client.run(graph)
    assert [output["node_id"] for output in answer["outputs"]] == ["2"]
    assert color_of(decoded(answer)[0]) == BLUE


@pytest.mark.parametrize("shower", ["PreviewAny", "PreviewImage", "SaveImageWebsocket"])
async def test_a_graph_that_saves_no_file_is_refused(client: Client, shower: str) -> None:
    socket = "source" if shower == "PreviewAny" else "images"
    graph = {"1": empty_image(), "2": node(shower, **{socket: ["1", 0]})}
    problem = await client.refused(graph, 400, "no-output-node")
    assert problem["location"] == "prompt"


async def test_a_64_bit_seed_arrives_exactly(client: Client) -> None:
    seed = 2**64 - 1
    graph = {
        **picture(),
        "noise": node("RandomNoise", noise_seed=seed),
        "shown": node("PreviewAny", source=["noise", 0]),
    }
    answer = await client.run(graph)
    assert answer["prompt"]["noise"]["inputs"]["noise_seed"] == seed
    # ComfyUI writes the graph as it has it into the PNG.
    assert f'"noise_seed": {seed}'.encode() in decoded(answer)[0]
    over = {**graph, "noise": node("RandomNoise", noise_seed=2**64)}
    problem = await client.refused(over, 400, "invalid-prompt")
    assert problem["location"] == "prompt.noise.inputs.noise_seed"


# --- what a job brings


def loading_picture(value: str) -> Graph:
    return {"1": node("LoadImage", image=value), "2": save_image("1")}


async def test_a_picture_is_loaded_by_the_name_of_an_input_file(client: Client) -> None:
    pattern = checked_pattern()
    name = client.put_input("mine.png", pattern)
    answer = await client.run(loading_picture(name))
    assert pixels(decoded(answer)[0]) == pixels(pattern)
    annotated = await client.run(loading_picture(f"{name} [input]"))
    assert pixels(decoded(annotated)[0]) == pixels(pattern)


@pytest.mark.parametrize("form", ["{}", "data:image/png;base64,{}"])
async def test_a_picture_in_the_request_comes_back_pixel_by_pixel(client: Client, form: str) -> None:
    pattern = checked_pattern()
    graph = loading_picture(form.format(as_base64(pattern)))
    answer = await client.run(graph)
    assert pixels(decoded(answer)[0]) == pixels(pattern)
    assert as_base64(pattern) not in str(answer["prompt"])


async def test_the_same_picture_in_two_nodes_and_another_in_a_third(client: Client) -> None:
    pattern, plain = checked_pattern(), decoded(await client.run(picture(GREEN)))[0]
    graph = {
        "1": node("LoadImage", image=as_base64(pattern)),
        "2": node("LoadImage", image=as_base64(plain)),
        "3": node("LoadImage", image=as_base64(pattern)),
        **{f"s{source}": save_image(source, f"from{source}") for source in "123"},
    }
    answer = await client.run(graph)
    assert [pixels(data) for data in decoded(answer)] == [pixels(pattern), pixels(plain), pixels(pattern)]


async def test_audio_in_the_request_is_loaded(client: Client) -> None:
    silence = {"1": node("EmptyAudio", duration=0.5, sample_rate=44100, channels=1)}
    save = {"2": node("SaveAudio", audio=["1", 0], filename_prefix="sound")}
    (sound,) = decoded(await client.run(silence | save))
    answer = await client.run({"1": node("LoadAudio", audio=as_base64(sound))} | save)
    assert decoded(answer)[0].startswith(b"fLaC")


async def test_video_in_the_request_is_loaded(client: Client) -> None:
    graph, _, _ = MOVING["SaveVideo"]
    (film,) = decoded(await client.run(FRAMES | graph))
    answer = await client.run({"v": node("LoadVideo", file=as_base64(film)), "2": graph["2"]})
    assert decoded(answer)[0][4:8] == b"ftyp"


@pytest.mark.parametrize(
    "value",
    [
        "/etc/passwd",
        "../../outside.png",
        "not-there.png",
        "anything.png [output]",
        "file:///etc/passwd",
        as_base64(b"no picture at all, whatever it says" * 10),
        "data:image/png;base64,####",
    ],
)
async def test_what_is_no_input_is_refused_before_comfyui_sees_it(client: Client, value: str) -> None:
    problem = await client.refused(loading_picture(value), 400, "invalid-input")
    assert problem["location"] == "prompt.1.inputs.image"


# --- ComfyUI's cache


async def test_the_same_graph_under_other_ids_runs_only_its_saving_node_again(client: Client) -> None:
    color = 0x123456
    for number in range(3):
        answer = await client.run(picture(color), id=f"other-{number}")
        assert color_of(decoded(answer)[0]) == color
        assert answer["stats"]["attempts"] == 1
        ran = set(answer["stats"]["comfy_execution"]["nodes"])
        assert ran == ({"1", "2"} if number == 0 else {"2"})


async def test_the_same_graph_under_the_same_id_has_its_file_each_time(client: Client) -> None:
    color = 0x654321
    for number in range(3):
        answer = await client.run(picture(color), id="again")
        assert color_of(decoded(answer)[0]) == color
        assert answer["filenames"] == ["again_ComfyUI_00001_.png"]
        if number > 0:
            assert "1" not in answer["stats"]["comfy_execution"]["nodes"]
        await client.becomes("the file is left", lambda: not files_below(client.daemon.output_dir))


# --- graphs that ComfyUI does not take


INVALID: dict[str, tuple[Graph, str, str]] = {
    "required_input_missing": (
        {"1": empty_image(), "2": node("SaveImage", images=["1", 0])},
        "prompt.2.inputs.filename_prefix",
        "missing",
    ),
    "bad_linked_input": (
        {"1": empty_image(), "2": node("SaveImage", images=["1"], filename_prefix="x")},
        "prompt.2.inputs.images",
        "length-2",
    ),
    "return_type_mismatch": (
        {
            "1": node("EmptyAudio", duration=1, sample_rate=44100, channels=1),
            "2": save_image("1"),
        },
        "prompt.2.inputs.images",
        "AUDIO",
    ),
    "invalid_input_type": (
        {
            "1": {**empty_image(), "inputs": {"width": "wide", "height": 8, "batch_size": 1, "color": 0}},
            "2": save_image("1"),
        },
        "prompt.1.inputs.width",
        "wide",
    ),
    "value_smaller_than_min": (
        {"1": node("EmptyImage", width=8, height=0, batch_size=1, color=0), "2": save_image("1")},
        "prompt.1.inputs.height",
        "smaller",
    ),
    "value_bigger_than_max": (picture(count=5000), "prompt.1.inputs.batch_size", "bigger"),
    "value_not_in_list": (
        {"1": empty_image(), "3": scale("1", 8, "guessing"), "2": save_image("3")},
        "prompt.3.inputs.upscale_method",
        "guessing",
    ),
    "custom_validation_failed": (
        {
            "1": node("LoadLatent", latent="no.latent"),
            "2": node("SaveLatent", samples=["1", 0], filename_prefix="x"),
        },
        "prompt.1.inputs.latent",
        "no.latent",
    ),
    "exception_during_validation": (
        {"1": empty_image(), "2": node("SaveImage", images=["1", 7], filename_prefix="x")},
        "prompt.2",
        "index out of range",
    ),
}


@pytest.mark.parametrize("error", INVALID)
async def test_what_comfyui_refuses_is_told_with_its_place(client: Client, error: str) -> None:
    graph, location, words = INVALID[error]
    problem = await client.refused(graph, 400, "invalid-prompt")
    assert problem["location"] == location
    assert words in problem["errors"][0]["message"]
    assert error in str(problem["node_errors"])


async def test_all_faults_are_told_at_once(client: Client) -> None:
    graph = {"1": node("EmptyImage", width="x", height=0, batch_size=5000, color=-1), "2": save_image("1")}
    problem = await client.refused(graph, 400, "invalid-prompt")
    locations = {fault["location"] for fault in problem["errors"]}  # ComfyUI's order is that of a set
    assert locations == {f"prompt.1.inputs.{name}" for name in ("width", "height", "batch_size", "color")}
    assert problem["location"] in locations


async def test_a_link_to_nowhere_is_refused(client: Client) -> None:
    problem = await client.refused({"1": empty_image(), "2": save_image("nowhere")}, 400, "invalid-request")
    assert problem["location"] == "prompt.2.inputs.images"


async def test_a_graph_of_which_only_a_part_is_valid_is_refused_as_a_whole(client: Client) -> None:
    graph = {**picture(), "3": node("SaveImage", filename_prefix="bad")}
    problem = await client.refused(graph, 400, "invalid-prompt")
    assert problem["location"] == "prompt.3.inputs.images"
    assert list(problem["node_errors"]) == ["3"]


async def test_a_valid_part_that_takes_long_is_stopped_when_the_graph_is_refused(client: Client) -> None:
    graph = {**slow_graph(0x010101), "bad": node("SaveImage", filename_prefix="bad")}
    began = trio.current_time()
    await client.refused(graph, 400, "invalid-prompt")
    assert trio.current_time() - began < 6, "it ran to its end, which takes ten seconds"
    answer = await client.run(picture(GREEN))
    assert answer["stats"]["queue_time"] < 5000
    assert await client.engine("/queue") == {"queue_running": [], "queue_pending": []}


@pytest.mark.parametrize(("wrong", "hint"), [("SaveImag", '"SaveImage"'), ("NothingLikeIt", None)])
async def test_an_unknown_class_is_refused_with_the_nearest_name(client: Client, wrong: str, hint: str | None) -> None:
    problem = await client.refused({**picture(), "3": node(wrong)}, 400, "invalid-prompt")
    assert problem["location"] == "prompt.3.class_type"
    message = problem["errors"][0]["message"]
    assert f"did you mean {hint}?" in message if hint else "did you mean" not in message


async def test_a_node_that_raises_is_named_with_its_exception(client: Client) -> None:
    name = client.put_input("corrupt.png", b"nothing of a picture" * 20)
    graph = {**loading_picture(name), **{f"good{key}": value for key, value in picture().items()}}
    graph["good2"] = save_image("good1")
    problem = await client.refused(graph, 500, "execution-failed")
    assert (problem["node_id"], problem["node_type"]) == ("1", "LoadImage")
    assert problem["exception_type"].endswith("UnidentifiedImageError")
    assert problem["location"] == "prompt.1"
    assert (await client.run(picture(RED)))["stats"]["attempts"] == 1


async def test_a_node_without_inputs_does_not_kill_comfyuis_worker(client: Client) -> None:
    # ComfyUI 0.3.64 accepts this graph and its only worker thread dies of it, for good.
    pid = client.daemon.engine_pid()
    await client.run({**picture(RED), "3": {"class_type": "ImageInvert"}})
    await client.run({**picture(GREEN), "3": {"class_type": "ImageInvert", "inputs": None}})
    answer = await client.run(picture(BLUE))
    assert color_of(decoded(answer)[0]) == BLUE
    assert client.daemon.engine_pid() == pid


# --- stopping and order


async def wait_interrupted(client: Client, job_id: str, state: str, since: int) -> None:
    """Wait until a prompt is stopped in ComfyUI too; *since* is a place of the log before it began."""
    ended = await client.daemon.logged("job.ended", where=lambda entry: entry["job_id"] == job_id)
    assert ended["state"] == state
    answer = await client.run(picture(GREEN), id=f"{job_id}-after")
    assert answer["stats"]["attempts"] == 1
    queue = await client.engine("/queue")
    assert queue == {"queue_running": [], "queue_pending": []}
    await client.daemon.logged("engine.output", since=since, where=lambda entry: "interrupted" in entry["text"])


async def test_a_caller_who_leaves_stops_the_running_prompt(client: Client) -> None:
    since = len(client.daemon.log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: client.post(slow_graph(0x020202), id="left-alone"))
        await client.wait_running("left-alone")
        nursery.cancel_scope.cancel("the caller leaves")
    with trio.fail_after(PATIENCE_S):
        await wait_interrupted(client, "left-alone", "cancelled", since)


async def test_a_prompt_that_runs_out_of_its_time_is_stopped(client: Client) -> None:
    since = len(client.daemon.log)
    began = trio.current_time()
    response = await client.post(slow_graph(0x030303, steps=60), id="too-slow", timeout_s=1.5)
    took_s = trio.current_time() - began
    assert (response.status_code, response.json()["type"]) == (504, "timeout")
    assert took_s < 5
    with trio.fail_after(PATIENCE_S):
        await wait_interrupted(client, "too-slow", "failed", since)


async def test_a_caller_who_leaves_the_queue_is_never_run(client: Client) -> None:
    since = len(client.daemon.log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: client.run(slow_graph(0x040404, steps=2), id="blocker"))
        await client.wait_running("blocker")
        async with trio.open_nursery() as leaving:
            leaving.start_soon(lambda: client.post(picture(RED), id="never-run"))
            await client.accepted("never-run")
            leaving.cancel_scope.cancel("the caller leaves")
    await client.run(picture(GREEN))
    ended = await client.daemon.logged("job.ended", since=since, where=lambda entry: entry["job_id"] == "never-run")
    assert (ended["state"], ended["attempts"]) == ("cancelled", 0)


async def test_higher_priority_runs_first_and_equals_in_order_of_arrival(client: Client) -> None:
    began: dict[str, float] = {}

    async def run(job_id: str, priority: int) -> None:
        answer = await client.run(picture(len(began)), id=job_id, priority=priority)
        began[job_id] = answer["stats"]["comfy_execution"]["start"]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: client.run(slow_graph(0x050505, steps=2), id="priority-blocker"))
        await client.wait_running("priority-blocker")
        for job_id, priority in (("p-low", -5), ("p-first", 0), ("p-second", 0), ("p-high", 5)):
            nursery.start_soon(run, job_id, priority)
            await client.accepted(job_id)
    assert sorted(began, key=lambda job_id: began[job_id]) == ["p-high", "p-first", "p-second", "p-low"]


async def test_a_prompt_under_which_comfyui_dies_is_run_again(client: Client) -> None:
    answers: list[dict[str, Any]] = []

    async def run() -> None:
        answers.append(await client.run(slow_graph(0x060606, steps=5), id="survivor"))

    async def run_behind() -> None:
        answers.append(await client.run(picture(RED), id="behind"))

    since = len(client.daemon.log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await client.wait_running("survivor")
        nursery.start_soon(run_behind)
        await client.accepted("behind")
        os.kill(client.daemon.engine_pid(), signal.SIGKILL)
    survivor, behind = answers
    assert (survivor["id"], survivor["stats"]["attempts"]) == ("survivor", 2)
    assert (behind["id"], behind["stats"]["attempts"]) == ("behind", 1)
    assert (await client.daemon.logged("job.requeued", since=since))["crashes"] == 1
    assert (await client.http.get("/ready")).status_code == 200


# --- beside prompts


async def test_comfyuis_history_does_not_grow(client: Client) -> None:
    for number in range(5):
        await client.run(picture(number))
    remaining = ["not asked yet"]
    with trio.move_on_after(SETTLE_S):
        while remaining:
            remaining = list(await client.engine("/history"))
            await trio.sleep(0.1)
    assert remaining == []


async def test_models_are_those_of_comfyui(client: Client) -> None:
    response = await client.http.get("/models")
    assert response.status_code == 200
    models = response.json()
    assert set(models) == set(await client.engine("/models"))
    assert "checkpoints" in models
    assert all(isinstance(names, list) for names in models.values())


# --- ends of the daemon; each has one of its own


async def test_sigterm_lets_the_running_prompt_end_and_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sigterm")
    statuses: dict[str, tuple[int, str | None]] = {}

    async def run(client: Client) -> None:
        response = await client.post(slow_graph(RED, steps=4), id="last")
        statuses["last"] = (response.status_code, response.json().get("type"))

    with running_daemon(folder) as daemon:
        async with open_client(daemon) as client, trio.open_nursery() as nursery:
            nursery.start_soon(run, client)
            await client.wait_running("last")
            daemon.process.send_signal(signal.SIGTERM)
            await daemon.logged("daemon.stopping")
            ready = await client.http.get("/ready")
            late = await client.post(picture())
        assert await trio.to_thread.run_sync(daemon.wait_ended) == 0
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert (late.status_code, late.json()["type"]) == (503, "draining")
    assert int(late.headers["retry-after"]) >= 1
    assert statuses["last"] == (200, None)
    assert read_stat(daemon.engine_pid()) is None
    assert files_below(daemon.output_dir) == files_below(daemon.input_dir) == []


async def test_without_restarts_the_death_of_comfyui_is_told_and_ends_the_daemon(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("no-restart")
    problems: list[tuple[int, str]] = []

    async def run(client: Client, job_id: str) -> None:
        response = await client.post(slow_graph(RED), id=job_id)
        problems.append((response.status_code, response.json()["type"]))

    with running_daemon(folder) as daemon:
        async with open_client(daemon) as client, trio.open_nursery() as nursery:
            nursery.start_soon(run, client, "running")
            await client.wait_running("running")
            nursery.start_soon(run, client, "waiting")
            await client.accepted("waiting")
            os.kill(daemon.engine_pid(), signal.SIGKILL)
        assert await trio.to_thread.run_sync(daemon.wait_ended) == 1
    assert problems == [(502, "engine-crashed")] * 2
    assert files_below(daemon.output_dir) == files_below(daemon.input_dir) == []
