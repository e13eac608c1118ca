"""What a websocket hears, in which order (reference E4)."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from embedded_kit import Listener, Peer, node, open_embedded, picture_graph, sleep_graph

from comfyd.embedded.app import Engine
from comfyd.embedded.settings import parse_command_line
from comfyd.http.server import FRAMES_TOGETHER


def kinds(events: Any) -> Any:
    return [event["type"] for event in events]


async def test_first_message_is_status_with_the_session_id(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening("abc", features=False) as listener:
        assert await listener.event() == {
            "type": "status",
            "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "abc"},
        }


async def test_a_client_without_an_id_is_given_one(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening(None, features=False) as listener:
        assert len((await listener.event())["data"]["sid"]) == 32


async def test_feature_flags_are_answered_only_as_first_message(tmp_path: Path) -> None:
    flags = json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
    async with open_embedded(tmp_path) as peer:
        async with peer.listening("first") as listener:
            await listener.event()
            answer = await listener.event()
            assert answer["type"] == "feature_flags"
            assert answer["data"] == {"supports_preview_metadata": True, "max_upload_size": 104857600}
        async with peer.listening("late", features=False) as listener:
            await listener.websocket.send_message("{}")
            await listener.websocket.send_message("not JSON")
            await listener.websocket.send_message(flags)
            await peer.submit(picture_graph(), "p", "late")
            assert "feature_flags" not in kinds(await listener.until_ended("p"))


async def test_events_of_a_prompt_come_in_the_order_of_comfyui(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await listener.until("feature_flags")
        answer = await peer.submit(picture_graph())
        assert answer.json() == {"prompt_id": "p", "number": 0, "node_errors": {}}
        events = await listener.until_ended("p")
        assert kinds(events) == [
            "status",
            "status",
            "execution_start",
            "execution_cached",
            *("progress_state", "executing", "progress_state"),
            *("progress_state", "executing", "executed", "progress_state"),
            "execution_success",
            "status",
            "executing",
        ]
        executed = next(event["data"] for event in events if event["type"] == "executed")
        record = {"filename": "out_00001_.png", "subfolder": "", "type": "output"}
        assert executed == {"node": "2", "display_node": "2", "output": {"images": [record]}, "prompt_id": "p"}


async def test_history_is_complete_when_the_last_event_arrives(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        for number in range(5):
            await peer.submit(picture_graph(f"a{number}"), f"p{number}")
            await listener.until_ended(f"p{number}")
            entry = await peer.history(f"p{number}")
            assert entry["status"]["status_str"] == "success"
            assert entry["status"]["completed"] is True
            assert [message[0] for message in entry["status"]["messages"]] == [
                "execution_start",
                "execution_cached",
                "execution_success",
            ]
            assert entry["prompt"][:2] == [number, f"p{number}"]
            assert entry["prompt"][3] == {"client_id": "me"}
            assert entry["prompt"][4] == ["2"]
            assert entry["outputs"]["2"]["images"][0]["filename"] == f"a{number}_00001_.png"
            assert entry["meta"]["2"]["node_id"] == "2"


async def test_progress_state_repeats_all_nodes_so_far(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await peer.submit(picture_graph())
        states = [event["data"] for event in await listener.until_ended("p") if event["type"] == "progress_state"]
        assert [{key: value["state"] for key, value in state["nodes"].items()} for state in states] == [
            {"1": "running"},
            {"1": "finished"},
            {"1": "finished", "2": "running"},
            {"1": "finished", "2": "finished"},
        ]
        assert states[-1]["nodes"]["1"] == {
            "value": 1.0,
            "max": 1.0,
            "state": "finished",
            "node_id": "1",
            "prompt_id": "p",
            "display_node_id": "1",
            "parent_node_id": None,
            "real_node_id": "1",
        }


async def test_events_go_to_the_prompts_client_and_status_to_all(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening("me") as mine, peer.listening("you") as yours:
        await yours.until("feature_flags")
        await mine.until("feature_flags")
        await peer.submit(picture_graph("a"), "p1", "me")
        await mine.until_ended("p1")
        await peer.submit(picture_graph("b"), "p2", "you")
        seen = await yours.until_ended("p2")
        assert {event["data"]["prompt_id"] for event in seen if event["type"] != "status"} == {"p2"}
        assert kinds(seen).count("status") == 6  # three for each prompt: queued, started, done


async def test_without_a_client_id_only_progress_is_heard_and_by_all(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening("you") as listener:
        await listener.until("feature_flags")
        await peer.submit(picture_graph("a"), "p1", client_id=None)
        await peer.submit(picture_graph("b"), "p2", "you")
        seen = await listener.until_ended("p2")
        heard = {event["type"] for event in seen if event["data"].get("prompt_id") == "p1"}
        assert heard == {"progress_state"}


async def test_a_client_that_connects_meanwhile_is_told_the_running_node(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening("other") as other:
        await peer.submit(sleep_graph(20), "p", "me")
        await other.until("status")
        async with peer.listening("me", features=False) as listener:
            while peer.engine.executor.node_id is None:
                await trio.testing.wait_all_tasks_blocked()
        async with peer.listening("me", features=False) as listener:
            assert (await listener.event())["type"] == "status"
            assert await listener.event() == {"type": "executing", "data": {"node": "1"}}
            await peer.http.post("/interrupt", json={"prompt_id": "p"})
            await listener.until_ended("p")


async def test_closing_an_old_socket_takes_a_newer_one_of_the_same_id_with_it(tmp_path: Path) -> None:
    """The reconnect trap of ComfyUI, which clients must know of."""
    async with open_embedded(tmp_path) as peer, peer.listening("new") as witness, peer.listening("same") as old:
        await old.event()
        async with peer.listening("same") as newer:
            await newer.until("feature_flags")
            await old.websocket.aclose()
            while "same" in peer.engine.hub.sockets:
                await trio.testing.wait_all_tasks_blocked()
            await peer.submit(picture_graph(), "p", "same")
            await witness.until("status", status={"exec_info": {"queue_remaining": 1}})
            with trio.move_on_after(0.2) as silence:
                await newer.event()
            assert silence.cancelled_caught


async def sampled(listener: Listener, peer: Peer, graph: Any) -> Any:
    await peer.submit(graph)
    return await listener.until_ended("p")


def sampler_graph(steps: int) -> Any:
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="pattern-v1.safetensors"),
        "2": node("CLIPTextEncode", text="gold", clip=["1", 1]),
        "3": node("EmptyLatentImage", width=64, height=48, batch_size=1),
        "4": node(
            "KSampler",
            model=["1", 0],
            seed=1,
            steps=steps,
            cfg=7,
            sampler_name="euler",
            scheduler="normal",
            positive=["2", 0],
            negative=["2", 0],
            latent_image=["3", 0],
            denoise=1,
        ),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("SaveImage", images=["5", 0], filename_prefix="s"),
    }


async def test_each_sampler_step_is_told_and_shown_with_its_ids(tmp_path: Path) -> None:
    flags = ("--preview-method", "auto", "--preview-size", "32")
    async with open_embedded(tmp_path, *flags) as peer, peer.listening() as listener:
        events = await sampled(listener, peer, sampler_graph(3))
        progress = [event["data"] for event in events if event["type"] == "progress"]
        assert progress == [{"value": n, "max": 3, "prompt_id": "p", "node": "4"} for n in (1, 2, 3)]
        assert len(listener.binary) == 3
        kind, length = struct.unpack(">II", listener.binary[0][:8])
        assert kind == 4
        head = json.loads(listener.binary[0][8 : 8 + length])
        assert head == {
            "node_id": "4",
            "prompt_id": "p",
            "display_node_id": "4",
            "parent_node_id": None,
            "real_node_id": "4",
            "image_type": "image/jpeg",
        }
        assert listener.binary[0][8 + length :].startswith(b"\xff\xd8\xff")


async def test_a_client_without_the_feature_gets_plain_previews(tmp_path: Path) -> None:
    flags = ("--preview-method", "taesd")
    async with open_embedded(tmp_path, *flags) as peer, peer.listening(features=False) as listener:
        await sampled(listener, peer, sampler_graph(2))
        assert [struct.unpack(">II", frame[:8]) for frame in listener.binary] == [(1, 1), (1, 1)]
        assert listener.binary[0][8:11] == b"\xff\xd8\xff"


async def test_previews_are_off_unless_asked_for(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await sampled(listener, peer, sampler_graph(2))
        assert listener.binary == []


async def test_a_nodes_text_is_sent_to_everybody(tmp_path: Path) -> None:
    graph = {
        "1": node("EmptyImage", width=5, height=4, batch_size=2, color=0),
        "2": node("GetImageSize", image=["1", 0]),
        "3": node("PreviewAny", source=["2", 2]),
    }
    async with open_embedded(tmp_path) as peer, peer.listening("you") as other, peer.listening() as listener:
        await other.until("feature_flags")
        await sampled(listener, peer, graph)
        await other.until("status", status={"exec_info": {"queue_remaining": 0}})
        expected = struct.pack(">II", 3, 1) + b"2" + b"width: 5, height: 4\n batch size: 2"
        assert listener.binary == [expected]
        assert (await peer.history("p"))["outputs"]["3"] == {"text": ["2"]}


async def test_a_failing_node_is_told_with_all_its_facts(tmp_path: Path) -> None:
    graph = {"1": node("Raise", message="boom"), "2": node("PreviewAny", source=["1", 0])}
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        events = await sampled(listener, peer, graph)
        assert kinds(events)[-3:] == ["execution_error", "status", "executing"]
        error = next(event["data"] for event in events if event["type"] == "execution_error")
        assert error["node_id"] == "1"
        assert error["node_type"] == "Raise"
        assert error["exception_message"] == "boom\n"
        assert error["exception_type"] == "comfyd.embedded.nodes.testing.RaisedOnDemand"
        assert any("testing.py" in line for line in error["traceback"])
        assert error["current_inputs"] == {"message": ["boom"]}
        assert error["executed"] == []
        entry = await peer.history("p")
        assert entry["status"]["status_str"] == "error"
        assert entry["status"]["completed"] is False
        assert entry["outputs"] == {}


async def test_only_a_client_that_does_not_read_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("comfyd.embedded.events.MAX_FRAMES_WAITING", 50)
    async with open_embedded(tmp_path, "--cost", "none") as peer, peer.listening("busy") as busy:
        await busy.until("feature_flags")
        slow = peer.engine.hub.connect("slow")  # nobody takes its frames
        for number in range(20):
            await peer.submit(picture_graph(f"a{number}"), f"p{number}", "busy")
            await busy.until_ended(f"p{number}")
        assert slow.overrun
        assert not await slow.take()


@pytest.mark.parametrize("together", [False, True])
async def test_frames_are_sent_together_where_the_server_can(tmp_path: Path, together: bool) -> None:
    """An ASGI server in memory, with and without the extension."""
    engine = Engine(parse_command_line(["--base-directory", str(tmp_path)]))
    sent: list[Any] = []
    to_app, from_client = trio.open_memory_channel[dict[str, Any]](8)
    scope = {
        "type": "websocket",
        "path": "/ws",
        "query_string": b"clientId=me",
        "headers": [],
        "extensions": {FRAMES_TOGETHER: {}} if together else {},
    }

    async def send(message: Any) -> None:
        sent.append(message)

    with to_app, from_client:
        async with trio.open_nursery() as nursery:
            to_app.send_nowait({"type": "websocket.connect"})
            nursery.start_soon(engine, scope, from_client.receive, send)
            await trio.testing.wait_all_tasks_blocked()
            engine.hub.send("one", {}, "me")
            engine.hub.send_text("7", "two")
            await trio.testing.wait_all_tasks_blocked()
            to_app.send_nowait({"type": "websocket.disconnect"})
    one, two = '{"type":"one","data":{}}', struct.pack(">II", 3, 1) + b"7two"
    assert sent[0] == {"type": "websocket.accept"}
    if together:
        assert [list(message["frames"]) for message in sent[2:]] == [[one, two]]
    else:
        assert sent[2:] == [{"type": "websocket.send", "text": one}, {"type": "websocket.send", "bytes": two}]
    assert engine.hub.sockets == {}
