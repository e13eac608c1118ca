"""The benchmarks measure what they say: verdicts, tables and pictures are right, and each load does its work."""

import json
import signal
import socket
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks import __main__ as command_line
from benchmarks.chart import SHOWN, draw
from benchmarks.chart import main as chart_main
from benchmarks.contenders import Contenders, open_contenders, small_prompts
from benchmarks.effort import Effort, Numbers, percentile
from benchmarks.graphs import graph
from benchmarks.load import Load
from benchmarks.processes import EMBEDDED, Cores, LoadFailed, Server, sink, taken_by, wait_quiet
from benchmarks.report import Bound, Row, Values, read_json, table, this_machine, write_json
from benchmarks.scenarios import SCENARIOS, one_client
from benchmarks.webhook_scenarios import accepted


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """The command line handles SIGTERM, in this process too."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


LEAST = Effort(rounds=1, part=0.01)
TO_PEER = Bound(limit=0.5, ratio=True, to="peer")


def row(*bounds: Bound, **values: list[float]) -> Row:
    return Row(scenario="one-client", measure="added at median", unit="ms", values=values, bounds=bounds)


def test_a_ratio_is_that_of_the_medians() -> None:
    measured = row(comfyd=[1.0, 2.0, 90.0], peer=[8.0, 4.0, 1.0], raw=[1.0])

    assert measured.ratio(to="peer") == 0.5
    assert measured.ratio() == 2.0
    assert measured.ratio("peer") == 4.0


@pytest.mark.parametrize(
    ("bounds", "kept"),
    [
        pytest.param((Bound(limit=2),), True, id="at most, kept"),
        pytest.param((Bound(limit=1.9),), False, id="at most, missed"),
        pytest.param((Bound(limit=2.1, at_least=True),), False, id="at least, missed"),
        pytest.param((TO_PEER,), True, id="ratio, kept"),
        pytest.param((Bound(limit=3), Bound(limit=0.4, ratio=True, to="peer")), False, id="one of two missed"),
        pytest.param((Bound(limit=1, ratio=True),), None, id="no raw client to compare with"),
        pytest.param((Bound(limit=1, ratio=True), Bound(limit=1)), False, id="one missed, one not to be judged"),
        pytest.param((), None, id="nothing wanted"),
    ],
)
def test_a_verdict_counts_every_bound_that_can_be_judged(bounds: tuple[Bound, ...], kept: bool | None) -> None:
    assert row(*bounds, comfyd=[2.0], peer=[4.0]).kept is kept


def test_a_difference_of_nothing_or_less_is_no_scale_for_a_ratio() -> None:
    assert row(TO_PEER, comfyd=[1.0], peer=[0.0]).kept is None
    assert row(TO_PEER, comfyd=[1.0], peer=[-0.5]).ratio(to="peer") is None


@pytest.mark.parametrize(("part", "value"), [(0.5, 50.5), (0.9, 90), (0.99, 99), (0.991, 100), (1.0, 100), (0.0, 1)])
def test_a_percentile_is_a_value_that_was_measured(part: float, value: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], part) == value


def test_a_percentile_of_one_value_is_that_value() -> None:
    assert percentile([7.0], 0.99) == 7.0


def test_no_two_loads_have_a_prompt_in_common() -> None:
    numbers = Numbers()

    first, second, third = numbers.take(10), numbers.take(1), numbers.take(5)

    assert (second, third) == (first + 10, first + 11)


def test_a_table_shows_who_missed_what() -> None:
    lines = table([row(TO_PEER, comfyd=[3.0], peer=[4.0]), row(TO_PEER, comfyd=[1.0], peer=[4.0])]).splitlines()

    assert lines[0].split()[:2] == ["scenario", "measure"]
    assert lines[1].split()[-4:] == ["<=", "0.5x", "peer", "MISSED"]
    assert lines[2].split()[-4:] == ["<=", "0.5x", "peer", "kept"]


def test_results_are_written_with_the_machine_and_read_again(tmp_path: Path) -> None:
    rows = [row(TO_PEER, comfyd=[3.0, 5.0], peer=[4.0])]

    path = write_json(rows, this_machine(load_before=1.25), tmp_path / "results.json")

    written = json.loads(path.read_text())
    assert written["load_before"] == 1.25
    assert written["rows"][0]["kept"] is False
    [read], about = read_json(path)
    assert read.values == rows[0].values
    assert str(written["processors"]) in about


def test_a_picture_has_a_bar_for_each_contender_as_long_as_its_share_of_the_longest() -> None:
    picture = ET.fromstring(draw([row(comfyd=[2.0], peer=[8.0], raw=[1.0])], "a < b & c"))  # noqa: S314  # our own

    widths = {
        bar.attrib["class"]: float(bar.attrib["width"]) for bar in picture.iter("{http://www.w3.org/2000/svg}rect")
    }
    assert list(widths) == ["comfyd", "peer", "raw"]
    assert widths["peer"] == pytest.approx(4 * widths["comfyd"])
    assert widths["peer"] == pytest.approx(8 * widths["raw"])
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "2.00 ms" in texts
    assert "a < b & c" in texts


def test_a_picture_leaves_out_what_nobody_can_be_compared_with() -> None:
    assert "<rect" not in draw([row(comfyd=[2.0])], "")
    assert "<rect" not in draw([Row(scenario="other", measure="x", unit="s", values={"comfyd": [1], "raw": [1]})], "")


def test_bars_stay_within_the_picture_whatever_was_measured() -> None:
    picture = ET.fromstring(draw([row(comfyd=[-3.0], peer=[0.0])], ""))  # noqa: S314  # our own

    for bar in picture.iter("{http://www.w3.org/2000/svg}rect"):
        assert 0 < float(bar.attrib["width"]) < 600


def test_everything_that_is_drawn_names_a_scenario_that_exists() -> None:
    assert {scenario for scenario, _, _ in SHOWN} <= SCENARIOS.keys()


def test_several_runs_are_drawn_as_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Row(scenario="start", measure="idle RSS", unit="MB", values={"comfyd": [60.0], "peer": [180.0]})
    machine = this_machine(0.0)
    first = write_json([row(comfyd=[1.0], peer=[2.0])], machine, tmp_path / "1.json")
    second = write_json([other], machine, tmp_path / "2.json")
    picture = tmp_path / "picture.svg"
    monkeypatch.setattr("sys.argv", ["chart", str(first), str(second), str(picture)])

    assert chart_main() == 0

    assert picture.read_text().count("<rect") == 4


@pytest.mark.parametrize(("check", "code"), [([], 0), (["--check"], 1)])
def test_a_missed_bound_fails_the_run_only_where_that_is_asked_for(
    check: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, picture = tmp_path / "results.json", tmp_path / "picture.svg"
    monkeypatch.setitem(SCENARIOS, "one-client", lambda _effort: [row(Bound(limit=1), comfyd=[2.0], raw=[1.0])])
    arguments = ["one-client", "--quick", *check, "--json", str(results), "--chart", str(picture)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])

    assert command_line.main() == code

    assert "MISSED" in capsys.readouterr().out
    assert json.loads(results.read_text())["rows"][0]["medians"] == {"comfyd": 2.0, "raw": 1.0}
    assert "<rect" in picture.read_text()


def test_what_was_measured_before_a_failure_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_effort: Effort) -> list[Row]:
        raise LoadFailed("on purpose")

    results = tmp_path / "results.json"
    monkeypatch.setitem(SCENARIOS, "one-client", lambda _effort: [row(comfyd=[2.0], raw=[1.0])])
    monkeypatch.setitem(SCENARIOS, "start", fail)
    monkeypatch.setattr("sys.argv", ["benchmarks", "one-client", "start", "--json", str(results)])

    with pytest.raises(LoadFailed):
        command_line.main()

    assert [measured["scenario"] for measured in json.loads(results.read_text())["rows"]] == ["one-client"]


def stand_in(url: str = "") -> Server:
    return Server(pid=0, url=url, folder=Path(), started_in_s=0.0, cores=Cores.everywhere())


def test_each_round_begins_with_another_contender_and_all_have_their_turn() -> None:
    contenders = Contenders({name: stand_in() for name in ("raw", "comfyd", "peer")})

    order = [(turn, name) for turn, name, _ in contenders.in_turn(2)]

    assert order == [
        *((0, name) for name in ("raw", "comfyd", "peer")),
        *((1, name) for name in ("comfyd", "peer", "raw")),
        *((2, name) for name in ("peer", "raw", "comfyd")),
    ]


@pytest.fixture
def nobody_listens() -> Iterator[str]:
    """A URL that refuses connections for as long as the test lasts."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_peer_that_cannot_do_a_load_takes_no_further_part_and_comfyd_must(
    nobody_listens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    contenders = Contenders({"comfyd": stand_in(nobody_listens), "peer": stand_in(nobody_listens)})
    load = Load(mode="prompts", url=nobody_listens, graph="tiny")

    assert contenders.run("peer", load) is None
    assert list(contenders.servers) == ["comfyd"]
    assert "ConnectionRefusedError" in capsys.readouterr().err
    with pytest.raises(LoadFailed, match="ConnectionRefusedError"):
        contenders.run("comfyd", load)


def test_a_sink_counts_requests_of_any_size_and_framing_and_says_when_the_last_one_was() -> None:
    with sink() as url:
        with httpx.Client(trust_env=False) as client:
            for body in (b"", b"{}", b"x" * 3_000_000):
                assert client.post(f"{url}/hook", content=body).status_code == 204
            assert client.post(f"{url}/hook", content=iter([b"chun", b"ked"])).status_code == 204
        before = taken_by(url)
        assert before.taken == 4
        assert wait_quiet(url, quiet_s=0.05) == before
        assert wait_quiet(url, expected=4, quiet_s=1000.0) == before

        with pytest.raises(LoadFailed):
            wait_quiet(url, quiet_s=1000.0, most_s=0.1)


def test_a_sink_takes_requests_that_arrive_together_and_in_pieces() -> None:
    one = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
    with sink() as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sender:
            sender.sendall(one + one + one[:20])
            received = b""
            while received.count(b"204") < 2:
                received += sender.recv(1000)
            sender.sendall(one[20:])
            while received.count(b"204") < 3:
                received += sender.recv(1000)
        assert taken_by(url).taken == 3


def test_graphs_differ_where_a_cache_would_make_them_one() -> None:
    assert graph("picture", 1, "bench") != graph("picture", 2, "bench")
    with pytest.raises(ValueError, match="no graph"):
        graph("nothing", 1, "bench")


def test_one_client_is_measured_beside_a_raw_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEER_COMMAND", raising=False)

    rows = {row.measure: row for row in one_client(LEAST)}

    for measure in ("median", "p90", "p99"):
        assert rows[measure].values.keys() == {"raw", "comfyd"}
        assert all(value > 0 for values in rows[measure].values.values() for value in values)
        [added] = rows[f"added at {measure}"].values["comfyd"]
        [alone], [through] = rows[measure].values["raw"], rows[measure].values["comfyd"]
        assert added == pytest.approx(through - alone)


def test_jobs_that_are_accepted_are_all_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEER_COMMAND", raising=False)

    rows = {row.measure: row for row in accepted(LEAST)}

    assert rows["webhooks missing"].values == {"comfyd": [0.0]}
    assert rows["jobs, to the last webhook"].values["comfyd"][0] > 0


def test_a_load_that_is_paced_takes_its_time_and_large_outputs_are_probed_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PEER_COMMAND", raising=False)
    with open_contenders(EMBEDDED, Cores.everywhere()) as contenders:
        server = contenders.servers["comfyd"]
        load = Load(mode=small_prompts("comfyd"), url=server.url, graph="tiny", total=6, every_s=0.1)
        paced = server.run(load)
        assert paced.elapsed_s >= 0.5  # the sixth begins then
        assert paced.ended_at > paced.elapsed_s

        large = server.run(Load(mode="large", url=server.url, graph="large", first=100))
        assert large.probes_ms
        assert len(large.latencies_ms) == 1


def test_values_that_nobody_added_make_an_empty_row() -> None:
    empty = Values("x").row("y", "ms", TO_PEER)

    assert (empty.values, empty.kept) == ({}, None)
    assert "-" in table([empty])
