"""Writing workflow files: what is written loads, makes its graph again, and is as a person would have written it."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any, Final

import attrs
import pytest
import trio
from workflows_kit import live_info, node, node_class, object_info, txt2img, write

from comfyd.wire import decode_json
from comfyd.workflows import LiveInfo, Workflow, load_catalogue
from comfyd.workflows.json_workflow import NotAGraph
from comfyd.workflows.sidecar import read_sidecar
from comfyd.workflows.writing import (
    CircularGraph,
    ClaudeFailed,
    DryRunFailed,
    NoNodeClasses,
    Question,
    check_folder,
    choose,
    prove,
    python_input,
    read_classes,
    write_python,
    write_sidecar,
    write_with_claude,
)
from comfyd.workflows.writing.checking import sample_of
from comfyd.workflows.writing.claude import MAX_ATTEMPTS
from comfyd.workflows.writing.dry_run import prove_apart, run_apart
from comfyd.workflows.writing.python_file import running_order
from comfyd.workflows.writing.same_graph import differences
from comfyd.workflows.writing.screen import objections

ROOT: Final = Path(__file__).parents[2]
EXAMPLES: Final = ROOT / "workflows"
ROUTES: Final = tuple(
    sorted(
        file.relative_to(EXAMPLES).with_suffix("").as_posix()
        for pattern in ("*.py", "*.json")
        for file in EXAMPLES.rglob(pattern)
        if not file.name.startswith("_")
    )
)
SMALL: Final = node_class(
    seed=["INT", {"min": 0, "max": 2**32 - 1, "control_after_generate": True, "tooltip": "A long tooltip. " * 30}],
    amount=["INT", {"min": 0, "max": 100, "step": 10}],
    fraction=["FLOAT", {"min": 0.0, "max": 1e38, "step": 0.01}],
    mode=[["one", "two", "a rather long name", "another one that is long", "and a third that is long"], {}],
    count=["COMBO", {"options": [1, 2, 3]}],
    upscaler=[["4x.pth"], {}],
    big=["INT", {"min": -(2**70), "max": 2**80}],
)
ODD: Final = txt2img(
    **{
        "20": node(
            "Odd Node!", "input: class", text='say "hi"\\ \n\tline — ünï \'x\' """', **{"lambda": 3, "a b": "x"}
        ),
        "21": node("PrimitiveInt", "int", value=5, list=[1, [2, {"k": None}]], empty={}),
        "22": node("PrimitiveInt", "Größe der Welt", value=-3),
        "23": node("Small", "small", seed=7, amount=500, fraction=0.5, mode="one", count=3, upscaler="no.pth"),
        "24": node("Many", "many", x="abc " * 60, y="x" * 130, z="word " * 19 + "end", flag=True, self=1),
        "25": node("Use", None, a=["24", 0], b=["24", 7], c=["24", 2], d=["23", 3], e=["8:2", 0]),
        "26": node("SaveImage", "Keep", filename_prefix="日本語" * 30, images=["8", 0]),
        "27": {"class_type": "Nothing"},
        "28": node("SaveImage", "Keep", filename_prefix="a", images=["8", 0]),
        "29": node("LoadImage", "input: picture", image="x.png"),
        "30": node("Small", "seedling", seed=3, mode="unheard of", count=9, amount=1.0, fraction=2, big=2**70),
        "8:2": node("LoadImage", image=""),
    }
)


def example_graph(folder: Path, route: str) -> dict[str, Any]:
    """The graph of a shipped example, with something for what must be given."""
    file = EXAMPLES / f"{route}.json"
    if file.exists():
        return json.loads(file.read_text())  # type: ignore[no-any-return]
    workflow = load_catalogue(EXAMPLES).get(route)
    assert workflow is not None
    live = live_info(folder)
    schema = workflow.input_schema(live)
    given = {name: sample_of(schema["properties"][name]) for name in schema["required"]}
    return trio.run(workflow.build, given, live).prompt


def loaded(folder: Path, source: str) -> Workflow:
    folder.mkdir()
    (folder / "w.py").write_text(source)
    catalogue = load_catalogue(folder)
    assert catalogue.problems == ()
    (workflow,) = catalogue.workflows
    return workflow


def written(graph: Any, live: LiveInfo, *, every: bool = False) -> str:
    return write_python(choose(graph, live, every=every), live, summary="A summary.", description="")


def renamed(graph: Mapping[str, Any], ids: Mapping[str, str]) -> dict[str, Any]:
    """The graph with other ids and without titles: what equality is of, told without our own comparison."""

    def value(item: Any) -> Any:
        return [ids[item[0]], item[1]] if isinstance(item, list) and len(item) == 2 and item[0] in ids else item

    return {
        ids[node_id]: {
            "class_type": each["class_type"],
            "inputs": {name: value(item) for name, item in (each.get("inputs") or {}).items()},
        }
        for node_id, each in graph.items()
    }


@pytest.mark.parametrize("every", [False, True], ids=["usual", "every widget"])
@pytest.mark.parametrize("route", ROUTES)
def test_the_python_of_an_example_makes_the_examples_graph(tmp_path: Path, route: str, every: bool) -> None:
    graph, live = example_graph(tmp_path, route), live_info(tmp_path)
    chosen = choose(graph, live, every=every)
    assert chosen.offers
    workflow = loaded(tmp_path / "w", write_python(chosen, live, summary="x", description="y"))
    drawn = {each.name for each in chosen.offers if each.drawn or each.required}
    given = {name: value for name, value in python_input(chosen).items() if name in drawn}
    made = trio.run(workflow.build, given, LiveInfo()).prompt
    ids = {node_id: str(number) for number, node_id in enumerate(running_order(graph), 1)}
    assert renamed(made, {each: each for each in made}) == renamed(graph, ids)
    assert drawn == {name for name in python_input(chosen) if "seed" in name or name == "image"}


@pytest.mark.parametrize("every", [False, True], ids=["usual", "every widget"])
@pytest.mark.parametrize("known", [False, True], ids=["unknown classes", "known classes"])
def test_a_graph_of_odd_names_and_values_comes_back_whole(tmp_path: Path, known: bool, every: bool) -> None:
    live = live_info(tmp_path, Small=SMALL) if known else LiveInfo()
    chosen = choose(ODD, live, every=every)
    source = write_python(chosen, live, summary='A "hard" \\ one', description="x")
    assert prove(source, ODD, python_input(chosen)) == []
    sidecar = write_sidecar(chosen, summary='So: "x" #')
    assert prove(sidecar, ODD, chosen.own_input(), suffix=".yaml") == []


def test_what_is_written_is_formatted_and_typed(tmp_path: Path) -> None:
    live = live_info(tmp_path, Small=SMALL)
    files = []
    graphs = {"odd": ODD, **{route.replace("/", "_"): example_graph(tmp_path, route) for route in ROUTES}}
    for name, graph in graphs.items():
        for every in (False, True):
            path = tmp_path / f"{''.join(c if c.isalnum() else '_' for c in name)}_{every}.py"
            path.write_text(written(graph, live, every=every))
            files.append(str(path))
    assert len(files) == 2 * (len(ROUTES) + 1)
    ruff = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=120", "--diff", *files]
    formatted = subprocess.run(ruff, check=False, capture_output=True, text=True, timeout=60)
    assert (formatted.returncode, formatted.stdout) == (0, "")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    mypy.append(f"--cache-dir={tmp_path / 'cache'}")
    typed = subprocess.run([*mypy, *files], check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert typed.stdout.startswith("Success: no issues found"), typed.stdout


def test_the_file_reads_like_one_written_by_hand(tmp_path: Path) -> None:
    source = written(txt2img(), live_info(tmp_path))
    assert source.startswith('"""A summary."""\n\nfrom typing import Annotated\n\nfrom comfyd.workflow import ')
    lines = [line.strip() for line in source.splitlines()]
    assert "width: Annotated[int, Field(ge=16, le=16384, multiple_of=8)] = 512" in lines
    assert 'model, clip, vae = graph.node("CheckpointLoaderSimple", ckpt_name=given.ckpt_name).outputs(3)' in lines
    assert 'positive = graph.node("CLIPTextEncode", text=given.prompt, clip=clip)' in lines
    assert 'picture = graph.node("VAEDecode", samples=sampled, vae=vae)' in lines
    assert 'graph.node("SaveImage", filename_prefix="ComfyUI", images=picture)' in lines


def test_names_come_from_titles_and_are_the_ones_of_the_json_workflow(tmp_path: Path) -> None:
    graph = txt2img(**{"5": node("EmptyLatentImage", "The canvas", width=64, height=64, batch_size=1)})
    live = live_info(tmp_path)
    source = written(graph, live)
    assert 'the_canvas = graph.node("EmptyLatentImage", width=given.width, height=given.height, batch_size=1)' in source
    assert '.titled("The canvas")' in source
    json_names = {
        field.name for field in load_catalogue(write(tmp_path / "j", {"w.json": graph})).workflows[0].fields(live)
    }
    assert {field.name for field in loaded(tmp_path / "p", source).fields(live)} == json_names


def test_enumerations_and_bounds_are_the_engines_and_let_the_graphs_own_value_pass(tmp_path: Path) -> None:
    live = live_info(tmp_path, Small=SMALL)
    values: dict[str, Any] = {
        "seed": 7,
        "amount": 500,
        "fraction": 0.5,
        "mode": "one",
        "count": 3,
        "upscaler": "no.pth",
        "big": 1,
    }
    workflow = loaded(tmp_path / "w", written({"1": node("Small", **values)}, live, every=True))
    found = workflow.input_schema(LiveInfo())["properties"]
    assert {"one", "two"} < set(found["mode"]["enum"])
    assert "enum" not in found["upscaler"], "a list of files is asked of the engine that is there"
    assert workflow.input_schema(live)["properties"]["upscaler"]["enum"] == ["4x.pth"]
    assert (found["amount"]["minimum"], found["amount"].get("maximum")) == (0, None)
    assert (found["seed"]["minimum"], found["seed"]["maximum"]) == (0, 2**32 - 1)
    built = [trio.run(workflow.build, {}, LiveInfo()).input["seed"] for _ in range(20)]
    assert max(built) < 2**32
    assert len(set(built)) > 1, "drawn anew for each call"


def test_a_primitive_keeps_its_value_although_comfyui_could_draw_it(tmp_path: Path) -> None:
    source = written({"1": node("PrimitiveInt", "input: steps_of_both", value=30)}, live_info(tmp_path))
    assert "steps_of_both: int = 30" in source


def test_a_chain_of_thousands_of_nodes_is_no_trouble() -> None:
    graph = {str(n): node("Step", **({"x": [str(n + 1), 0]} if n < 4999 else {"x": 1})) for n in range(5000)}
    assert running_order(graph)[0] == "4999"
    assert differences(graph, copy.deepcopy(graph)) == []


def test_a_graph_that_runs_in_a_circle_is_refused() -> None:
    graph = {"1": node("A", x=["2", 0]), "2": node("B", x=["1", 0]), "3": node("Save", x=["1", 0])}
    with pytest.raises(CircularGraph, match="1 -> 2 -> 1"):
        written(graph, LiveInfo())


def test_a_file_saved_by_the_editor_is_refused_with_what_to_do() -> None:
    with pytest.raises(NotAGraph, match=r"Export \(API\)"):
        choose({"nodes": [], "links": [], "last_node_id": 3}, LiveInfo())


def test_a_sidecar_holds_what_the_engine_says_and_reads_back(tmp_path: Path) -> None:
    graph = txt2img(**{"10": node("LoadImage", "input: yes", image="x.png")})
    chosen = choose(graph, live_info(tmp_path), every=True)
    (tmp_path / "w.yaml").write_text(write_sidecar(chosen, summary="On: off"))
    sidecar, inputs = read_sidecar(tmp_path / "w.yaml")
    assert sidecar.summary == "On: off"
    assert list(inputs) == [offer.name for offer in chosen.offers]
    assert inputs["yes"].required
    assert (inputs["width"].targets, inputs["width"].min, inputs["width"].step) == (("5.width",), 16, 8)


@attrs.frozen
class Change:
    name: str
    change: Callable[[dict[str, Any]], object]
    told: str


CHANGES: Final = (
    Change("value", lambda graph: graph["3"]["inputs"].update(cfg=7.5), 'node "3" (KSampler): cfg must be 8, is 7.5'),
    Change("class", lambda graph: graph["8"].update(class_type="X"), 'node "8" (VAEDecode) is missing'),
    Change("more", lambda graph: graph.update(x=node("SaveImage")), "there is one SaveImage too many"),
    Change("less", lambda graph: graph.pop("9"), 'node "9" (SaveImage) is missing'),
    Change("left out", lambda graph: graph["5"]["inputs"].pop("width"), "width must be 512, is left out"),
    Change("bool", lambda graph: graph["5"]["inputs"].update(batch_size=True), "batch_size must be 1, is true"),
    Change(
        "link",
        lambda graph: graph["3"]["inputs"].update(positive=["7", 0], negative=["6", 0]),
        "must be linked so: model to ['4', 0]",
    ),
    Change("output", lambda graph: graph["8"]["inputs"].update(vae=["4", 1]), "must be linked so: samples to"),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_a_graph_that_differs_is_told_where(change: Change) -> None:
    graph = txt2img()
    change.change(graph)
    assert change.told in "\n".join(differences(txt2img(), graph))


def test_a_node_made_twice_is_not_the_node_used_twice() -> None:
    shared = {"1": node("L"), "2": node("S", a=["1", 0]), "3": node("T", a=["1", 0])}
    twice = {**shared, "4": node("L"), "3": node("T", a=["4", 0])}
    assert differences(shared, twice) == ["there is one L too many"]


def test_ids_titles_and_ways_to_write_a_number_do_not_count() -> None:
    graph = renamed(txt2img(), {each: f"n{each}" for each in txt2img()})
    graph["n3"]["inputs"]["cfg"] = 8
    assert differences(txt2img(), graph) == []


# What a model wrote


HARMLESS: Final = """
from comfyd.workflow import Graph, inputs


@inputs
class Input:
    a: int = 1


def workflow(given: Input) -> Graph:
    graph = Graph()
    {line}
    graph.node("Save", a=given.a)
    return graph
"""
GRAPH: Final = {"1": node("Save", a=1)}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("import os", "line 12: import os is not allowed"),
        ("import typing", "line 12: import typing is not allowed"),
        ("from typing import sys", "line 12: typing has no sys to import"),
        ("from os import path", "line 12: the import from os is not allowed"),
        ("from . import _shared", "line 12: the import from a neighbour is not allowed"),
        ("open('x')", "line 12: open must not be used"),
        ("graph.__class__", "line 12: .__class__ must not be used"),
        ("'{0.x}'.format(graph)", "line 12: .format must not be used"),
        ("eval('1')", "line 12: eval must not be used"),
        ("x: 'int' = 1", "line 12: an annotation must not be a string"),
        ("x = (", "line 12: '(' was never closed"),
    ],
)
def test_source_that_reaches_further_than_a_workflow_is_not_run(line: str, told: str) -> None:
    (objection,) = objections(HARMLESS.format(line=line))
    assert objection.startswith(told)


def test_every_example_that_stands_alone_passes_the_screen(tmp_path: Path) -> None:
    for route in ROUTES:
        assert objections(written(example_graph(tmp_path, route), live_info(tmp_path))) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("print('on stdout, which is not the answer')", []),
        ("import os; os.system('true')", "os.system"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "socket.getaddrinfo"),
        ("open('{folder}/made', 'w')", "it tried open"),
        ("import os; os.environ['ANTHROPIC_API_KEY']", "KeyError"),
        ("raise ValueError('in line twelve')", "in line 12: in line twelve"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_a_file_that_is_run_apart_can_do_nothing_but_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, told: Any
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    source = HARMLESS.format(line=line.replace("{folder}", str(tmp_path)))
    try:
        found = run_apart(source, GRAPH, {})
    except DryRunFailed as exc:
        found = [str(exc)]
    assert found == told if isinstance(told, list) else told in "\n".join(found)
    assert not list(tmp_path.iterdir())


def test_a_file_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comfyd.workflows.writing.dry_run.APART_TIMEOUT_S", 0.5)
    assert prove_apart("while True:\n    pass\n", GRAPH, {}) == ["it did not make its graph within 0.5 s"]


@attrs.define
class Scripted:
    """The API as a list of answers. Requests are kept as they were when they came."""

    answers: list[dict[str, Any]]
    requests: list[dict[str, Any]] = attrs.field(factory=list)

    def __call__(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        self.requests.append(copy.deepcopy(dict(request)))
        return self.answers[len(self.requests) - 1]


def tool_use(source: str, example: Any, call_id: str = "toolu_1") -> dict[str, Any]:
    call = {"source": source, "example_input": example}
    block = {"type": "tool_use", "id": call_id, "name": "write_workflow", "input": call}
    return {"stop_reason": "tool_use", "content": [{"type": "text", "text": "Here."}, block]}


def ask(answers: list[dict[str, Any]], **given: Any) -> tuple[str, Scripted, list[str]]:
    api, told = Scripted(answers), list[str]()
    question = Question(graph=GRAPH, draft="# draft", wish="offer little")
    return write_with_claude(question, LiveInfo(), api, tell=told.append, prove=prove, **given), api, told


RIGHT: Final = HARMLESS.format(line="")


def test_a_right_file_is_taken_at_once_and_the_question_holds_all_that_is_known(tmp_path: Path) -> None:
    source, api, told = ask([tool_use(RIGHT, {"a": 1})], model="claude-x")
    assert source == RIGHT
    (request,) = api.requests
    assert request["model"] == "claude-x"
    assert "write_workflow" in request["system"]
    (message,) = request["messages"]
    assert "<wish>\noffer little\n</wish>" in message["content"]
    assert "<draft>\n# draft\n</draft>" in message["content"]
    assert json.dumps(GRAPH, separators=(",", ":")) in message["content"]
    assert told == [f"asking claude-x, attempt 1 of {MAX_ATTEMPTS}"]


def test_what_is_wrong_is_told_until_it_is_right() -> None:
    wrong, no_call = tool_use(RIGHT, {"a": 2}), {"stop_reason": "end_turn", "content": [{"type": "text", "text": "?"}]}
    source, api, told = ask([wrong, no_call, tool_use(RIGHT, {})])
    assert source == RIGHT
    assert api.requests[1]["messages"][1:] == [
        {"role": "assistant", "content": wrong["content"]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "is_error": True,
                    "content": 'node "1" (Save): a must be 1, is 2',
                }
            ],
        },
    ]
    assert api.requests[2]["messages"][-1]["content"].startswith("call the tool write_workflow")
    assert '  node "1" (Save): a must be 1, is 2' in told


def test_after_some_attempts_it_is_given_up() -> None:
    with pytest.raises(ClaudeFailed, match=f"none of {MAX_ATTEMPTS} attempts was right; the last: .*a must be 1, is 3"):
        ask([tool_use(RIGHT, {"a": 3})] * MAX_ATTEMPTS)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"stop_reason": "refusal", "content": []}, "refused"),
        ({"stop_reason": "max_tokens", "content": [{"type": "text", "text": "x"}]}, "was cut"),
        ({"stop_reason": "end_turn", "content": []}, "empty"),
    ],
)
def test_an_answer_that_can_come_to_nothing_ends_it(answer: dict[str, Any], told: str) -> None:
    with pytest.raises(ClaudeFailed, match=told):
        ask([answer])


def test_a_question_that_no_model_takes_is_not_sent() -> None:
    question = Question(graph={"1": node("Save", a="x" * 700_000)}, draft="")
    with pytest.raises(ClaudeFailed, match="at most 600000"):
        question.text(LiveInfo())


def test_long_lists_of_an_engine_are_cut_in_the_question() -> None:
    live = LiveInfo.from_object_info({"Save": node_class(a=[[f"{n}.pth" for n in range(500)], {}])})
    text = Question(graph=GRAPH, draft="").text(live)
    assert "19.pth" in text
    assert "... and 480 more" in text
    assert "20.pth" not in text


# Checking a folder


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    head = dedent(
        """
        from comfyd.workflow import Graph, InputRefused, inputs


        @inputs
        class Input:
            a: int
            b: int = 1


        def workflow(given: Input) -> Graph:
        """
    )
    return write(
        tmp_path / "broken",
        {
            "raises.py": "x = 1\n\nraise ValueError('no')\n",
            "late.py": f"{head}    return undefined\n",
            "helped.py": "from . import _helper\n",
            "_helper.py": "\n\nboom\n",
            "syntax.py": "x = 1\ndef f(:\n",
            "signature.py": "\n\ndef workflow(a, b, c): pass\n",
            "own_default.py": f"{head}    raise InputRefused('b', 'must be 2')\n",
            "sampled.py": f"{head}    raise InputRefused('a', 'must be even')\n",
            "comma.json": '{"1": {\n "class_type": "X",\n }}',
            "shape.json": '{"1": {"class_type": "X"},\n "2": {\n "inputs": {}}}',
            "side.json": txt2img(),
            "side.yaml": "tags: []\ninputs:\n  a:\n    target: 6.text\n  b:\n    target: 3.cfg\n    min: 5\n    max: 2",
        },
    )


def test_each_fault_has_its_file_and_line(broken: Path) -> None:
    found = {(each.file, each.line): each.message for each in check_folder(broken, LiveInfo())}
    assert found.pop(("sampled.py", 1)) == "", "what it has against an input that was made up is no fault of its"
    assert {place: message.partition(";")[0][:40] for place, message in found.items()} == {
        ("raises.py", 3): "raised ValueError: no",
        ("late.py", 12): "raised NameError: name 'undefined' is no",
        ("_helper.py", 3): "raised NameError: name 'boom' is not def",
        ("syntax.py", 2): "invalid syntax",
        ("signature.py", 3): "workflow() must take the input and, if i",
        ("own_default.py", 11): "a call without input.b fails: must be 2",
        ("comma.json", 3): "not valid JSON: trailing comma in object",
        ("shape.json", 2): "is not a graph in API format: prompt.2.c",
        ("side.yaml", 7): "inputs.b.min: must be <= max (2), got 5",
    }


def test_with_an_engine_known_its_classes_and_choices_count(tmp_path: Path) -> None:
    live = live_info(tmp_path)
    old = txt2img(**{"4": node("CheckpointLoaderSimple", ckpt_name="gone.safetensors")})
    shown = {"1": node("PreviewImage", images=["2", 0]), "2": node("EmptyImage", width=8, height=8)}
    folder = write(
        tmp_path / "w",
        {"ok.json": txt2img(), "class.json": {"1": node("KSampleer")}, "model.json": old, "show.json": shown},
    )
    found = {each.file: each.message for each in check_folder(folder, live)}
    assert found["ok.json"] == ""
    assert 'needs the node class "KSampleer" (node "1")' in found["class.json"]
    assert found["model.json"].startswith("a call without input.ckpt_name fails:")
    assert found["show.json"] == "no node of its graph saves anything, so each call is refused"
    assert all(not each.message for each in check_folder(folder, LiveInfo()))


def test_all_shipped_examples_are_in_order() -> None:
    checked = check_folder(EXAMPLES, LiveInfo())
    assert len(checked) == len(ROUTES)
    assert all(not each.message for each in checked)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{}", "has no node class"),
        ("[1", "not valid JSON"),
        ('{"a": 1}', "has no node class"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_object_info_is_refused(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "info.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NoNodeClasses, match=told):
        read_classes(path)


def test_a_saved_object_info_is_what_the_engine_answered(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    path.write_text(json.dumps(object_info(tmp_path)))
    assert read_classes(path) == decode_json(path.read_bytes())
