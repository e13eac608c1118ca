"""The engine as a child process: its command line, its exits, and --cost none."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import pyvips
import trio
from embedded_kit import node, open_embedded, picture_graph, sleep_graph

import comfyd.embedded
from comfyd.embedded.nodes.pictures import SMALL_PNG
from comfyd.embedded.settings import parse_command_line

COMMAND = [sys.executable, "-m", "comfyd.embedded"]
DEMO = Path(comfyd.embedded.__path__[0]) / "demo"


@asynccontextmanager
async def started(folder: Any, *flags: Any) -> AsyncIterator[Any]:
    """Start an engine on a free port and wait for the line that tells its address."""
    argv = [*COMMAND, "--port", "0", "--base-directory", str(folder), *flags]
    start = partial(trio.run_process, argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(start)
            seen = b""
            while not (found := re.search(rb"To see the GUI go to: (\S+)\n", seen)):
                received = await process.stdout.receive_some()
                assert received, "the engine ended before it was ready"
                seen += received
            yield process, found[1].decode()
            nursery.cancel_scope.cancel("the test is over")


async def ended(*flags: Any) -> Any:
    """Run an engine that is expected to end by itself."""
    with trio.fail_after(30):
        return await trio.run_process([*COMMAND, *flags], capture_stdout=True, capture_stderr=True, check=False)


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, 0)])
async def test_signals_end_it_as_they_end_comfyui(tmp_path: Path, sent: Any, code: Any, busy: Any) -> None:
    async with started(tmp_path, "--cost", "none") as (process, url), httpx.AsyncClient(base_url=url) as http:
        assert (await http.get("/prompt")).status_code == 200
        if busy:
            await http.post("/prompt", json={"prompt": sleep_graph(20)})
        process.send_signal(sent)
        assert await process.wait() == code
        assert (tmp_path / "temp").exists() is (sent == signal.SIGTERM)


async def test_temp_is_wiped_at_start_and_arguments_are_shown(tmp_path: Path) -> None:
    left = tmp_path / "temp" / "left.png"
    left.parent.mkdir()
    left.touch()
    unique = str(tmp_path / "unique-output")
    flags = ("--output-directory", unique, "--cost", "none", "--disable-metadata")
    async with started(tmp_path, *flags) as (_, url), httpx.AsyncClient(base_url=url) as http:
        assert not left.exists()
        assert unique in (await http.get("/system_stats")).json()["system"]["argv"]


async def test_an_unknown_flag_is_exit_2() -> None:
    result = await ended("--no-such-flag")
    assert result.returncode == 2
    assert b"unrecognized arguments: --no-such-flag" in result.stderr


async def test_a_port_in_use_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        result = await ended("--port", port, "--base-directory", str(tmp_path))
        assert result.returncode == 1
        assert port.encode() in result.stderr
        assert b"To see the GUI" not in result.stdout


async def test_comfyuis_other_flags_are_taken(tmp_path: Path) -> None:
    flags = (
        "--listen --port 0 --cpu --disable-auto-launch --disable-all-custom-nodes --whitelist-custom-nodes a b --fast "
        "--cuda-device 0 --reserve-vram 0.5 --database-url sqlite:///:memory: --extra-model-paths-config x.yaml "
        "--enable-cors-header --front-end-version a/b@latest --lowvram --cache-lru 3 --verbose --log-stdout "
        "--preview-method latent2rgb --preview-size 256 --max-upload-size 5 --quick-test-for-ci"
    )
    result = await ended("--base-directory", str(tmp_path), *flags.split())
    assert result.returncode == 0, result.stderr
    assert b"not diffusion" in result.stdout


def test_flags_become_settings(tmp_path: Path) -> None:
    settings = parse_command_line(
        ["--base-directory", str(tmp_path), "--listen", "127.0.0.1,::1", "--temp-directory", "/x/../y"]
    )
    assert settings.hosts == ("127.0.0.1", "::1")
    assert settings.folders.input == tmp_path / "input"
    assert settings.folders.temp == Path("/y/temp")
    assert parse_command_line(["--listen"]).hosts == ("0.0.0.0", "::")
    assert parse_command_line([]).port == 8188


@pytest.mark.parametrize(
    "flags", [["--preview-method", "nope"], ["--step-delay-s", "-1"], ["--user-directory", "/nope"]]
)
def test_a_bad_value_is_exit_2(flags: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(flags)
    assert exit_.value.code == 2
    assert flags[0] in capsys.readouterr().err


async def test_without_cost_the_protocol_is_the_same_and_libvips_is_not_loaded(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from comfyd.embedded import __main__ as m\n"
        "sys.argv += ['--cost', 'none', '--quick-test-for-ci', '--base-directory', sys.argv[1]]; del sys.argv[1]\n"
        "assert m.main() == 0\n"
        "assert 'pyvips' not in sys.modules\n"
    )
    await trio.run_process([sys.executable, "-c", program, str(tmp_path)])
    events = {}
    for cost in ("none", "real"):
        async with open_embedded(tmp_path / cost, "--cost", cost) as peer, peer.listening() as listener:
            await peer.submit(picture_graph())
            events[cost] = [event["type"] for event in await listener.until_ended("p")]
            saved = peer.saved(await peer.history("p"), "2")[0]
            assert (saved.read_bytes() == SMALL_PNG) is (cost == "none")
            assert pyvips.Image.new_from_file(str(saved)).width == (8 if cost == "none" else 16)
    assert events["none"] == events["real"]


async def test_without_cost_names_are_counted_and_any_graph_runs(tmp_path: Path) -> None:
    async with open_embedded(tmp_path, "--cost", "none") as peer:
        for number, name in ((1, "a"), (2, "b")):
            await peer.http.post("/free", json={"free_memory": True})
            entry = await peer.run(picture_graph("sub/x", batch_size=1, color=number), name)
            assert peer.saved(entry, "2")[0].name == f"x_0000{number}_.png"
        graph = json.loads((DEMO / "prompt.json").read_text())
        (peer.engine.settings.folders.input / "input.jpg").write_bytes((DEMO / "input.jpg").read_bytes())
        async with peer.listening() as listener:
            await peer.submit(graph, "demo")
            kinds = [event["type"] for event in await listener.until_ended("demo")]
            assert kinds.count("progress") == 20
        graph = {
            "1": node("EmptyImage", width=10, height=10, batch_size=3, color=0),
            "2": node("ImageScale", image=["1", 0], upscale_method="area", width=20, height=0, crop="disabled"),
            "3": node("GetImageSize", image=["2", 0]),
            "4": node("PreviewAny", source=["3", 1]),
            "5": node("PreviewImage", images=["2", 0]),
        }
        entry = await peer.run(graph, "sizes")
        assert entry["outputs"]["4"]["text"] == ["20"]
        assert len(entry["outputs"]["5"]["images"]) == 3


async def test_the_demo_paints_a_picture_that_is_neither_its_input_nor_flat(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        (peer.engine.settings.folders.input / "input.jpg").write_bytes((DEMO / "input.jpg").read_bytes())
        graph = json.loads((DEMO / "prompt.json").read_text())
        entry = await peer.run(graph)
        assert entry["status"]["completed"] is True, entry["status"]
        painted = pyvips.Image.new_from_file(str(peer.saved(entry, "8")[0]))
        original = pyvips.Image.new_from_file(str(DEMO / "input.jpg"))
        assert (painted.width, painted.height) == (original.width, original.height) == (768, 512)
        away = (painted.cast("float") - original.cast("float")).abs().avg()
        assert 5 < away < 40
        assert painted.deviate() > 30
