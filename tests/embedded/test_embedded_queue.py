"""Queue, history, cache, interrupt, and the graph that kills the worker (references E2, E3, E5, E6)."""

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from embedded_kit import Peer, node, open_embedded, picture_graph, sleep_graph


def cached(entry: Any) -> Any:
    return next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")


async def running(peer: Peer, prompt_id: Any = "p") -> None:
    """Wait until a prompt is inside a node."""
    with trio.fail_after(10):
        while peer.engine.queue.running is None or peer.engine.executor.node_id is None:
            await trio.testing.wait_all_tasks_blocked(0.005)
    assert peer.engine.queue.running[1] == prompt_id


async def test_waiting_prompts_run_by_number_then_arrival_and_front_comes_first(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await peer.submit(sleep_graph(20), "busy")
        await running(peer, "busy")
        bodies: dict[str, dict[str, Any]] = {
            "b": {},
            "c": {},
            "front": {"front": True},
            "first": {"number": -10},
        }
        numbers = {
            name: (await peer.submit(picture_graph(name), name, **body)).json()["number"]
            for name, body in bodies.items()
        }
        assert numbers == {"b": 1, "c": 2, "front": -3, "first": -10.0}
        assert (await peer.http.get("/prompt")).json() == {"exec_info": {"queue_remaining": 5}}
        queue = (await peer.http.get("/queue")).json()
        assert [item[1] for item in queue["queue_running"]] == ["busy"]
        assert {item[1] for item in queue["queue_pending"]} == {"b", "c", "front", "first"}
        await peer.http.post("/interrupt", json={})
        events = await listener.until_ended("c")
        ended = [e["data"]["prompt_id"] for e in events if e["type"] == "executing" and e["data"]["node"] is None]
        assert ended == ["busy", "first", "front", "b", "c"]


async def test_a_deleted_prompt_leaves_no_trace(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await peer.submit(sleep_graph(20), "busy")
        await running(peer, "busy")
        await peer.submit(picture_graph("a"), "a")
        await peer.submit(picture_graph("b"), "b")
        assert (await peer.http.post("/queue", json={"delete": ["a", "unknown"]})).status_code == 200
        await peer.http.post("/interrupt", json={"prompt_id": "busy"})
        events = await listener.until_ended("b")
        assert "a" not in {event["data"].get("prompt_id") for event in events}
        assert (await peer.http.get("/history/a")).json() == {}


async def test_clearing_the_queue_leaves_the_running_prompt(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await peer.submit(sleep_graph(20), "busy")
        await running(peer, "busy")
        await peer.submit(picture_graph("a"), "a")
        await peer.http.post("/queue", json={"clear": True})
        assert peer.engine.queue.remaining() == 1


async def test_the_same_number_and_id_is_a_500_and_queued_all_the_same(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await peer.submit(sleep_graph(20), "busy")
        await running(peer, "busy")
        await peer.submit(picture_graph("a"), "same", number=5)
        await peer.submit(picture_graph("b"), "same", number=5, status=500)
        assert len(peer.engine.queue.snapshot()["queue_pending"]) == 2


async def test_an_interrupt_by_id_hits_only_the_running_prompt(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await peer.submit(sleep_graph(20), "busy")
        await running(peer, "busy")
        await peer.submit(picture_graph("next"), "next")
        assert (await peer.http.post("/interrupt", json={"prompt_id": "next"})).status_code == 200
        assert not peer.engine.executor.interrupted.is_set()
        assert (await peer.http.post("/interrupt", json={"prompt_id": "busy"})).status_code == 200
        await listener.until("execution_interrupted", prompt_id="busy", node_id="1", node_type="Sleep")
        await listener.until_ended("busy")
        entry = await peer.history("busy")
        assert (entry["status"]["status_str"], entry["status"]["completed"]) == ("error", False)
        assert entry["status"]["messages"][-1][0] == "execution_interrupted"
        await listener.until_ended("next")
        assert (await peer.history("next"))["status"]["completed"] is True


async def test_an_interrupt_without_a_body_is_global(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await peer.submit(sleep_graph(20))
        await running(peer)
        assert (await peer.http.post("/interrupt")).status_code == 200
        await listener.until_ended("p")


async def test_an_uninterruptible_node_ends_by_itself_and_then_the_interrupt_counts(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await peer.submit(sleep_graph(0.3, uninterruptible=True))
        await running(peer)
        await peer.http.post("/interrupt")
        events = await listener.until_ended("p")
        assert "execution_interrupted" in {event["type"] for event in events}
        assert (await peer.history("p"))["status"]["messages"][-1][1]["executed"] == ["1"]


async def test_an_interrupt_while_idle_does_not_hit_the_next_prompt(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await peer.http.post("/interrupt")
        assert (await peer.run(picture_graph()))["status"]["completed"] is True


async def test_an_unchanged_graph_runs_nothing_and_lists_the_old_files(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening("me") as listener:
        first = await peer.run(picture_graph(), "p1")
        await listener.until("feature_flags")
        peer.saved(first, "2")[0].unlink()
        await peer.submit(picture_graph(), "p2")
        events = await listener.until_ended("p2")
        kinds = [event["type"] for event in events if event["data"].get("prompt_id") == "p2"]
        assert kinds == [
            "execution_start",
            "execution_cached",
            "executed",
            "progress_state",
            "execution_success",
            "executing",
        ]
        second = await peer.history("p2")
        assert cached(second) == ["1", "2"]
        assert second["outputs"] == first["outputs"]
        assert not peer.saved(second, "2")[0].exists()


async def test_freeing_memory_makes_everything_run_again(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await peer.run(picture_graph(), "p1")
        answer = await peer.http.post("/free", json={"unload_models": True, "free_memory": True})
        assert answer.status_code == 200
        again = await peer.run(picture_graph(), "p2")
        assert cached(again) == []
        assert peer.saved(again, "2")[0].name == "out_00002_.png"


async def test_another_prefix_runs_only_the_save_node(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await peer.run(picture_graph("a"), "p1")
        assert cached(await peer.run(picture_graph("b"), "p2")) == ["1"]


async def test_node_ids_do_not_matter_to_the_cache(tmp_path: Path) -> None:
    renamed = {"x": picture_graph()["1"], "y": node("SaveImage", images=["x", 0], filename_prefix="out")}
    async with open_embedded(tmp_path) as peer:
        await peer.run(picture_graph(), "p1")
        entry = await peer.run(renamed, "p2")
        assert cached(entry) == ["x", "y"]
        assert list(entry["outputs"]) == ["y"]


async def test_the_classic_cache_keeps_only_the_last_graph(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await peer.run(picture_graph("a"), "p1")
        await peer.run(picture_graph("b", width=17), "p2")
        assert cached(await peer.run(picture_graph("a"), "p3")) == []


async def test_the_lru_cache_keeps_more(tmp_path: Path) -> None:
    async with open_embedded(tmp_path, "--cache-lru", "4") as peer:
        await peer.run(picture_graph("a"), "p1")
        await peer.run(picture_graph("b", width=17), "p2")
        assert cached(await peer.run(picture_graph("a"), "p3")) == ["1", "2"]
        await peer.run(picture_graph("c", width=18), "p4")
        await peer.run(picture_graph("d", width=19), "p5")
        await peer.run(picture_graph("e", width=20), "p6")
        assert cached(await peer.run(picture_graph("a"), "p7")) == []


async def test_without_a_cache_everything_runs_each_time(tmp_path: Path) -> None:
    async with open_embedded(tmp_path, "--cache-none") as peer:
        await peer.run(picture_graph("a"), "p1")
        assert cached(await peer.run(picture_graph("a"), "p2")) == []


async def test_a_changed_file_under_the_same_name_is_loaded_again(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        made = peer.saved(await peer.run(picture_graph("a", color=0xFF0000), "p1"), "2")[0]
        other = peer.saved(await peer.run(picture_graph("b", color=0x00FF00), "p2"), "2")[0]
        target = peer.engine.settings.folders.input / "x.png"
        graph = {"1": node("LoadImage", image="x.png"), "2": node("PreviewImage", images=["1", 0])}
        target.write_bytes(made.read_bytes())
        await peer.run(graph, "p3")
        assert cached(await peer.run(graph, "p4")) == ["1", "2"]
        target.write_bytes(other.read_bytes())
        assert cached(await peer.run(graph, "p5")) == []


async def test_the_poison_graph_kills_the_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A node without inputs that nobody needs: accepted, then nothing runs any more, and the server answers on."""
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await peer.submit(picture_graph() | {"9": {"class_type": "EmptyImage"}}, "poison")
        await listener.until("execution_start", prompt_id="poison")
        await peer.submit(picture_graph("later"), "later")
        queue = (await peer.http.get("/queue")).json()
        assert [item[1] for item in queue["queue_running"]] == ["poison"]
        assert [item[1] for item in queue["queue_pending"]] == ["later"]
        assert (await peer.http.get("/system_stats")).status_code == 200
        assert (await peer.http.get("/history")).json() == {}
        with trio.move_on_after(0.2) as silence:
            await listener.until("executing")
        assert silence.cancelled_caught
    stderr = capsys.readouterr().err
    assert "Exception in thread Thread-1 (prompt_worker)" in stderr
    assert "KeyError: 'inputs'" in stderr


async def test_history_is_listed_limited_and_deleted(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        for name in "abcd":
            await peer.run(picture_graph(name), name)
        assert list((await peer.http.get("/history")).json()) == ["a", "b", "c", "d"]
        assert list((await peer.http.get("/history?max_items=2")).json()) == ["c", "d"]
        assert list((await peer.http.get("/history?max_items=2&offset=1")).json()) == ["b", "c"]
        await peer.http.post("/history", json={"delete": ["b", "nope"]})
        assert list((await peer.http.get("/api/history")).json()) == ["a", "c", "d"]
        await peer.http.post("/history", json={"clear": True})
        assert (await peer.http.get("/history")).json() == {}


async def test_a_repeated_id_replaces_the_earlier_entry(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await peer.run(picture_graph("a"), "same")
        entry = await peer.run(picture_graph("b"), "same")
        assert peer.saved(entry, "2")[0].name == "b_00001_.png"
        assert len((await peer.http.get("/history")).json()) == 1


async def test_ids_may_hold_slashes_and_spaces(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await peer.submit(picture_graph(), "a/b c")
        await listener.until_ended("a/b c")
        assert list((await peer.http.get("/history/a%2Fb%20c")).json()) == ["a/b c"]


async def test_partner_keys_are_in_the_queue_but_not_in_history(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await peer.submit(sleep_graph(20), extra_data={"api_key_comfy_org": "secret", "other": 1})
        await running(peer)
        assert "secret" in (await peer.http.get("/queue")).text
        await peer.http.post("/interrupt")
        await listener.until_ended("p")
        assert (await peer.history("p"))["prompt"][3] == {"other": 1, "client_id": "me"}


@pytest.mark.parametrize("path", ["/queue", "/history", "/free"])
async def test_control_routes_answer_500_to_malformed_json(tmp_path: Path, path: Any) -> None:
    async with open_embedded(tmp_path) as peer:
        assert (await peer.http.post(path, content=b"{")).status_code == 500


async def test_a_sleep_is_never_taken_from_the_cache(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await peer.run(sleep_graph(0), "p1")
        assert cached(await peer.run(sleep_graph(0), "p2")) == []


async def test_a_malformed_number_is_a_500(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await peer.submit(picture_graph(), number="soon", status=500)
        assert peer.engine.queue.remaining() == 0
