"""The parts of ``comfyd submit`` that need no daemon: settings, bodies, names of files, words, the event stream."""

import base64
import io
import os
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.cli.progress_bar import ProgressBar
from comfyd.cli.sse import MAX_LINE_BYTES, BadEventStream, EventParser, ServerEvent
from comfyd.cli.submit.body import Attachments, Body
from comfyd.cli.submit.errors import BadUse, JobFailed, Refused
from comfyd.cli.submit.files import OutputFolder, numbered, safe_name
from comfyd.cli.submit.graph import find_place, read_request, set_input, value_of
from comfyd.cli.submit.show import Display
from comfyd.cli.submit.words import place_words, problem_lines, progress_words
from comfyd.wire import decode_json, encode_json

Graph = dict[str, dict[str, Any]]


@pytest.fixture
def graph() -> Graph:
    return {
        "3": {"class_type": "KSampler", "inputs": {"seed": 1, "model": ["4", 0]}, "_meta": {"title": "Sampler v1.5"}},
        "4": {"class_type": "LoadImage", "inputs": {"image": "a.png", "resize.width": 8}, "_meta": {"title": "Photo"}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a house"}, "_meta": {"title": "Prompt"}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly"}, "_meta": {"title": "Prompt"}},
        "8:1": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
    }


# --- places and values


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("3.seed", ("3", "seed")),
        ("Sampler v1.5.seed", ("3", "seed")),
        ("sampler V1.5.seed", ("3", "seed")),
        ("Photo.resize.width", ("4", "resize.width")),
        ("8:1.filename_prefix", ("8:1", "filename_prefix")),
        ("SaveImage.filename_prefix", ("8:1", "filename_prefix")),
    ],
)
def test_an_input_is_found_by_the_nodes_id_or_title_whatever_dots_are_in_it(
    graph: Graph, place: str, found: tuple[str, str]
) -> None:
    assert find_place(graph, place) == found


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("Prompt.text", '2 nodes have the title "Prompt"; name one by its id: 6, 7'),
        ("Fhoto.image", 'no node with the id or title "Fhoto"; did you mean "Photo" (node 4)?'),
        ("3.sed", 'node 3 ("Sampler v1.5") has no input "sed"; did you mean "seed"?'),
        ("6.width", 'node 6 ("Prompt") has no input "width"; it has text'),
        ("zzz.image", 'no node with the id or title "zzz"'),
        ("seed", "must be NODE.INPUT"),
    ],
)
def test_a_place_that_is_not_there_is_refused_with_the_nearest_one(graph: Graph, place: str, told: str) -> None:
    with pytest.raises(BadUse) as refused:
        set_input(graph, f"{place}=1", None)
    assert told in str(refused.value)
    assert f'--set "{place}"' in str(refused.value)


@pytest.mark.parametrize(
    ("setting", "node_id", "name", "value"),
    [
        ("3.seed=18446744073709551615", "3", "seed", 2**64 - 1),
        ("3.seed=-1.5", "3", "seed", -1.5),
        ('3.model=["4",0]', "3", "model", ["4", 0]),
        ("3.seed=randomly", "3", "seed", "randomly"),
        ("6.text=2024", "6", "text", "2024"),
        ("6.text=true", "6", "text", "true"),
        ('6.text="quoted"', "6", "text", "quoted"),
        ("6.text=a=b, c", "6", "text", "a=b, c"),
        ("6.text=", "6", "text", ""),
        ("6.text=@home", "6", "text", "@home"),
        ("6.text=NaN", "6", "text", "NaN"),
    ],
)
def test_a_value_is_json_where_it_is_some_but_text_stays_text(
    graph: Graph, setting: str, node_id: str, name: str, value: Any
) -> None:
    set_input(graph, setting, None)
    assert graph[node_id]["inputs"][name] == value
    assert type(graph[node_id]["inputs"][name]) is type(value)


def test_bytes_of_the_command_line_that_are_no_utf8_do_not_stop_it() -> None:
    assert value_of(os.fsdecode(b"caf\xe9"), None) == "caf\N{REPLACEMENT CHARACTER}"


# --- files of graphs


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"nodes": [], "links": [], "version": 0.4}', "Export (API)"),
        ('{"prompt": {"nodes": [], "links": []}}', "Export (API)"),
        ("[]", "is no graph in API format"),
        ("{}", "is no graph in API format"),
        ('{"1": {"inputs": {}}}', "is no graph in API format"),
        ("{", "not valid JSON"),
        ("", "is empty"),
    ],
)
def test_a_file_that_is_no_graph_is_refused_with_what_to_do(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "graph.json"
    file.write_text(content)
    with pytest.raises(BadUse) as refused:
        read_request(str(file))
    assert told in str(refused.value)
    assert str(file) in str(refused.value)


def test_a_node_may_be_called_prompt(tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    file.write_text('{"prompt": {"class_type": "SaveImage", "inputs": {}}}')
    assert list(read_request(str(file))["prompt"]) == ["prompt"]


# --- bodies


def sent(body: Body) -> bytes:
    return b"".join(body.pieces())


def test_files_go_into_the_body_as_base64_of_the_length_that_was_told(tmp_path: Path, graph: Graph) -> None:
    contents = {"empty": b"", "one": b"x", "large": os.urandom(2_000_001), "pieces": os.urandom(3 * (1 << 18))}
    files = Attachments()
    values = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        values[name] = value_of(f"@{tmp_path / name}", files)
    body = files.body({"prompt": graph, "input": {**values, "after": "ü"}})
    for _ in range(2):  # it may have to be sent again
        data = sent(body)
        assert len(data) == body.length
        given = decode_json(data)["input"]
        assert {name: base64.b64decode(given[name]) for name in contents} == contents
        assert given["after"] == "ü"


def test_a_pipe_is_read_to_its_end_and_a_doubled_at_is_a_text(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"from a pipe",))
    writer.start()
    files = Attachments()
    document = {"a": value_of(f"@{pipe}", files), "b": value_of("@@home", files)}
    writer.join(timeout=10)
    given = decode_json(sent(files.body(document)))
    assert given == {"a": base64.b64encode(b"from a pipe").decode(), "b": "@home"}


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(BadUse, match="cannot be read"):
            value_of(f"@{path}", Attachments())


def test_a_file_that_shrank_stops_the_sending_and_one_that_grew_is_sent_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"0123456789")
    files = Attachments()
    body = files.body({"a": value_of(f"@{file}", files)})
    file.write_bytes(b"0123456789 and more")
    assert base64.b64decode(decode_json(sent(body))["a"]) == b"0123456789"
    file.write_bytes(b"0123")
    with pytest.raises(BadUse, match="became shorter"):
        sent(body)


# --- names


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("a.png", "a.png"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\a.png", "a.png"),
        ("/etc/passwd", "passwd"),
        ("..", "output"),
        ("", "output"),
        ("a/", "output"),
        ("\x1b[2Ja\n.png", "_[2Ja_.png"),
        ("größe 図.png", "größe 図.png"),
    ],
)
def test_a_name_stays_in_its_folder_and_does_nothing_to_a_terminal(told: str, name: str) -> None:
    assert safe_name(told) == name


@given(st.text(max_size=300, alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_name_that_can_be_told_is_one_a_file_system_takes(told: str) -> None:
    name = safe_name(told)
    assert name not in {"", ".", ".."}
    assert not {"/", "\\", "\0"} & set(name)
    assert len(os.fsencode(numbered(name, 99_999))) <= 255


def test_a_long_name_keeps_its_ending() -> None:
    assert safe_name("図" * 200 + ".png").endswith("図.png")


def put(folder: OutputFolder, content: bytes, told: str) -> str:
    with folder.incoming() as (file, path):
        file.write(content)
        file.flush()
        return folder.put(path, told).name


def test_files_that_are_there_are_kept_or_with_force_replaced_but_never_the_jobs_own(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    kept = OutputFolder.make(tmp_path)
    assert [put(kept, b"new", "a.png"), put(kept, b"newer", "a.png")] == ["a-2.png", "a-3.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"
    forced = OutputFolder.make(tmp_path, force=True)
    assert [put(forced, b"1", "a.png"), put(forced, b"2", "a.png")] == ["a.png", "a-2.png"]
    assert [(tmp_path / name).read_bytes() for name in ("a.png", "a-2.png", "a-3.png")] == [b"1", b"2", b"newer"]
    assert sorted(os.listdir(tmp_path)) == ["a-2.png", "a-3.png", "a.png"]


def test_a_dangling_link_is_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    folder = OutputFolder.make(tmp_path / "out", force=True)
    (tmp_path / "out" / "a.png").symlink_to(tmp_path / "elsewhere")
    assert put(folder, b"1", "a.png") == "a.png"
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "out" / "a.png").read_bytes() == b"1"


def test_a_file_system_without_hard_links_does_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = OutputFolder.make(tmp_path)
    assert [put(folder, b"1", "a.png"), put(OutputFolder.make(tmp_path), b"2", "a.png")] == ["a.png", "a-2.png"]
    assert (tmp_path / "a.png").read_bytes() == b"1"


def test_an_output_that_did_not_come_whole_leaves_nothing(tmp_path: Path) -> None:
    folder = OutputFolder.make(tmp_path)

    def receive() -> None:
        with folder.incoming() as (file, _):
            file.write(b"half")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        receive()
    assert os.listdir(tmp_path) == []


def test_outputs_have_the_rights_that_the_user_gives_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        put(OutputFolder.make(tmp_path), b"1", "a.png")
    finally:
        os.umask(before)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


# --- words


def test_a_place_of_the_request_is_told_with_the_nodes_title(graph: Graph) -> None:
    assert place_words("prompt.3.inputs.seed", graph) == 'node 3 "Sampler v1.5", input seed'
    assert place_words("prompt.8:1", graph) == 'node 8:1 "SaveImage"'
    assert place_words("prompt.99.inputs.seed", graph) == "node 99, input seed"
    assert place_words("convert_output.options.quality", graph) == "convert_output.options.quality"
    assert place_words("prompt", graph) == ""


def test_a_failed_node_is_one_readable_line(graph: Graph) -> None:
    document = {
        "type": "execution-failed",
        "detail": "node 3 (KSampler) raised RuntimeError: CUDA\nout of memory",
        "node_id": "3",
        "node_type": "KSampler",
        "exception_type": "RuntimeError",
        "exception_message": "CUDA\nout of \x1b[31mmemory",
        "errors": [{"location": "prompt.3", "message": "CUDA"}],
    }
    line = 'node 3 "Sampler v1.5" raised RuntimeError: CUDA out of \\x1b[31mmemory'
    assert list(problem_lines(document, graph)) == [line]
    assert next(problem_lines(document, {})).startswith('node 3 "KSampler" raised')


def test_many_faults_are_cut_and_counted() -> None:
    faults = [{"location": f"prompt.{number}", "message": "wrong"} for number in range(13)]
    lines = list(problem_lines({"detail": "the graph is not valid", "errors": faults}, {}))
    assert lines[:2] == ["the graph is not valid", "  node 0: wrong"]
    assert lines[-1] == "  and 3 more"
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"state": "queued", "position": 0, "eta_s": None}, "queued: next"),
        ({"state": "queued", "position": 1, "eta_s": 8.25}, "queued: 1 job before it, about 8.2 s"),
        ({"state": "queued", "position": 40, "eta_s": 600}, "queued: 40 jobs before it, about 10 min"),
        ({"state": "running", "node_id": "3", "node_title": "Sampler", "step": 4, "steps": 20}, "Sampler 4/20"),
        ({"state": "running", "node_id": "3", "node_title": "a\x1b[2J", "step": 1, "steps": 1}, "a\\x1b[2J"),
        ({"state": "running", "node_id": None}, "running"),
        ({"state": "delivering"}, "delivering"),
    ],
)
def test_progress_is_told_in_a_few_words(view: dict[str, Any], words: str) -> None:
    assert progress_words(view) == words


@pytest.mark.parametrize(
    ("status", "refused", "failed"), [(400, 2, 2), (404, 2, 2), (413, 2, 2), (429, 3, 2), (503, 3, 1), (500, 1, 1)]
)
def test_the_exit_code_tells_bad_use_from_a_job_that_failed(status: int, refused: int, failed: int) -> None:
    assert Refused({"status": status}, status).exit_code == refused
    assert JobFailed({"status": status}).exit_code == failed
    assert JobFailed({"status": 409, "type": "job-cancelled"}).exit_code == 1


# --- the event stream

EVENTS = [ServerEvent("state", {"id": "a"}), ServerEvent("progress", {"node_title": "x\u2028y\u0085z\x0bé"})]
STREAM = b": ok\nretry: 100\n\n" + b"".join(
    b"id: n-%d\nevent: %b\r\ndata: %b\n\n" % (number, event.name.encode(), encode_json(event.data))
    for number, event in enumerate(EVENTS)
)


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=20))
def test_events_are_the_same_however_their_bytes_arrive(cuts: list[int]) -> None:
    parser = EventParser()
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[begin:end] for begin, end in pairwise(edges)]
    assert [event for piece in pieces for event in parser.feed_bytes(piece)] == EVENTS
    assert (parser.last_id, parser.retry_s) == ("n-1", 0.1)


@pytest.mark.parametrize("cut", range(1, len(STREAM)))
def test_what_a_cut_left_incomplete_is_forgotten_on_the_next_connection(cut: int) -> None:
    parser = EventParser()
    before = list(parser.feed_bytes(STREAM[:cut]))
    parser.begin()
    assert parser.last_id == {0: "", 1: "n-0", 2: "n-1"}[len(before)]
    assert list(parser.feed_bytes(b'data: "on"\n\n')) == [ServerEvent("message", "on")]
    assert parser.last_id == {0: "", 1: "n-0", 2: "n-1"}[len(before)], "an event without an id has not its own"


def test_a_line_without_an_end_and_bytes_that_are_no_text_are_refused() -> None:
    parser = EventParser()
    half = b"x" * (MAX_LINE_BYTES // 2)
    assert [*parser.feed_bytes(half), *parser.feed_bytes(half)] == []
    with pytest.raises(BadEventStream, match="line of more than"):
        list(parser.feed_bytes(b"x"))
    with pytest.raises(BadEventStream, match="not UTF-8"):
        list(EventParser().feed_bytes(b"data: \xff\n"))


# --- the bar


class Ascii(io.StringIO):
    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only there as well, but for typeshed
        return "iso-8859-1"

    def isatty(self) -> bool:
        return True


def test_a_terminal_without_block_characters_gets_a_bar_of_plain_ones() -> None:
    terminal = Ascii()
    ProgressBar(terminal).update(50, "a")
    terminal.getvalue().encode("iso-8859-1")
    assert terminal.getvalue().count("#") == 16


@pytest.mark.parametrize(("variable", "value", "expected"), [("NO_COLOR", "1", "\r"), ("TERM", "dumb", " ")])
def test_what_the_environment_says_of_the_terminal_is_heeded(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    terminal = Ascii()
    ProgressBar(terminal).update(50, "a")
    assert terminal.getvalue()[0] == expected
    assert "\x1b[36m" not in terminal.getvalue()


def test_clearing_leaves_an_empty_line_to_write_in() -> None:
    terminal = Ascii()
    bar = ProgressBar(terminal)
    bar.clear()
    assert terminal.getvalue() == ""
    bar.update(1, "a")
    bar.clear()
    bar.close()
    assert terminal.getvalue().endswith("\r\x1b[2K")


def test_a_line_of_progress_waits_for_the_node_that_it_is_about() -> None:
    err = io.StringIO()
    display = Display(err=err)
    running = {"state": "running", "percent": 33.3, "node_title": None, "step": None, "steps": None}
    display.watch(ServerEvent(name="progress", data={**running, "node_id": None}))
    display.watch(ServerEvent(name="progress", data={**running, "node_id": "2", "node_title": "A rest"}))
    assert err.getvalue() == "   33.3 %  A rest\n"
