"""A folder of workflows: which files are endpoints, and what a broken one leaves standing."""

import os
import sys
from pathlib import Path

import pytest
from workflows_kit import MINIMAL, load, load_one, reasons, txt2img, write

from comfyd.workflows import LiveInfo, load_catalogue
from comfyd.workflows import catalogue as catalogue_module
from comfyd.workflows.catalogue import list_folder, load_listed


def test_routes_mirror_folders_and_texts_come_from_the_docstring(tmp_path: Path) -> None:
    catalogue = load(
        tmp_path,
        {"a.py": MINIMAL, "sd1.5/txt2img-with-x.py": MINIMAL, "deep/er/b.json": txt2img(), "_x.py": "", "_d/y.py": "",
         ".h.py": "", "note.txt": "", "__pycache__/z.py": ""},
    )  # fmt: skip
    assert catalogue.problems == ()
    assert [workflow.route for workflow in catalogue.workflows] == ["a", "deep/er/b", "sd1.5/txt2img-with-x"]
    workflow = catalogue.get("sd1.5/txt2img-with-x")
    assert workflow is not None
    assert (workflow.summary, workflow.description) == ("A summary.", "A description.")
    assert (workflow.source, workflow.tags) == ("python", ("sd1.5",))
    assert catalogue.get("b") is None
    assert catalogue.get("sd1.5/txt2img-with-x.py") is None


BROKEN = {
    "syntax.py": ("def workflow(:\n", "line 1: invalid syntax"),
    "raises.py": ("1 / 0", "raised ZeroDivisionError: division by zero"),
    "exits.py": ("import sys; sys.exit(3)", "raised SystemExit: 3"),
    "imports.py": ("import no_such_module", "raised ModuleNotFoundError: No module named 'no_such_module'"),
    "empty.py": ("", "has no function called workflow"),
    "untyped.py": ("def workflow(given): ...", "must be annotated with an attrs class"),
    "wrong_type.py": ("def workflow(given: dict): ...", "must be annotated with an attrs class"),
    "unknown_name.py": ("def workflow(given: 'Inptu'): ...", "raised NameError"),
    "no_parameter.py": ("def workflow(): ...", "must take the input"),
    "too_many.py": (f"{MINIMAL}\ndef workflow(given: Input, comfy, x): ...", "must take the input"),
    "keyword.py": (f"{MINIMAL}\ndef workflow(given: Input, *, x=1): ...", "must take the input"),
    "bound.py": (
        MINIMAL.replace("int = 512", "Annotated[str, Field(ge=1)] = 'x'").replace(
            "import Graph", "import Field, Graph\nfrom typing import Annotated\nfrom comfyd.workflow import Graph"
        ),
        "raised TypeError",
    ),
    "endless.py": (
        MINIMAL.replace("int = 512", "'Input | None' = None"),
        "has an input class that contains itself",
    ),
    "alike.py": (MINIMAL.replace("int = 512", "list[int] | tuple[str, ...] = ()"), "raised TypeError"),
    "nul.py": ("x = '\0'", "null bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_of_and_stops_no_other_one(tmp_path: Path, name: str) -> None:
    source, said = BROKEN[name]
    catalogue = load(tmp_path, {"good.py": MINIMAL, name: source})
    assert [workflow.route for workflow in catalogue.workflows] == ["good"]
    (problem,) = catalogue.problems
    assert problem.file == name
    assert said in problem.message
    assert str(tmp_path) not in problem.message
    assert (problem.traceback_text is not None) is ("raised" in said or name in {"syntax.py", "nul.py"})


def test_a_syntax_error_in_a_helper_names_the_helper(tmp_path: Path) -> None:
    catalogue = load(tmp_path, {"w.py": "from ._help import x", "_help.py": "\n\nx = ="})
    assert reasons(catalogue) == {"_help.py": "line 3: invalid syntax"}


def test_two_files_for_one_route_are_both_told_of_and_none_is_served(tmp_path: Path) -> None:
    catalogue = load(tmp_path, {"a/w.py": MINIMAL, "a/w.json": txt2img(), "b.py": MINIMAL})
    assert [workflow.route for workflow in catalogue.workflows] == ["b"]
    message = "a/w.json and a/w.py are the same route; none is served"
    assert reasons(catalogue) == {"a/w.py": message, "a/w.json": message}


def test_sidecars_without_a_graph_or_two_for_one_are_told_of(tmp_path: Path) -> None:
    catalogue = load(
        tmp_path, {"a.yaml": "", "b.py": MINIMAL, "b.yml": "", "c.json": txt2img(), "c.yaml": "", "c.yml": ""}
    )
    assert reasons(catalogue) == {
        "a.yaml": "there is no a.json that it could describe",
        "b.yml": "there is no b.json that it could describe",
        "c.yaml": "c.yaml and c.yml both describe c.json",
        "c.yml": "c.yaml and c.yml both describe c.json",
    }


def test_a_missing_folder_is_a_problem_only_if_somebody_asked_for_it(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert reasons(load_catalogue(missing)) == {".": "the folder does not exist"}
    assert load_catalogue(missing, required=False).problems == ()
    file = tmp_path / "file"
    file.write_text("")
    assert reasons(load_catalogue(file, required=False)) == {".": "is not a folder"}


def test_a_folder_that_is_a_link_to_itself_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "f").symlink_to("f")
    message = "the folder cannot be read: Too many levels of symbolic links"
    assert reasons(load_catalogue(tmp_path / "f", required=False)) == {".": message}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    write(tmp_path, {"good.py": MINIMAL, "shut/w.py": MINIMAL})
    (tmp_path / "shut").chmod(0)
    try:
        catalogue = load_catalogue(tmp_path)
    finally:
        (tmp_path / "shut").chmod(0o700)
    assert reasons(catalogue) == {"shut": "the folder cannot be read: Permission denied"}
    assert [workflow.route for workflow in catalogue.workflows] == ["good"]


def test_links_are_followed_but_not_in_circles_and_dangling_ones_are_told_of(tmp_path: Path) -> None:
    # As Kubernetes mounts a ConfigMap: ..data -> ..2026, w.py -> ..data/w.py
    write(tmp_path, {"..2026/w.py": MINIMAL})
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "w.py").symlink_to("..data/w.py")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "gone.py").symlink_to("nowhere.py")
    catalogue = load_catalogue(tmp_path)
    assert [workflow.route for workflow in catalogue.workflows] == ["w"]
    assert reasons(catalogue) == {"gone.py": "cannot be read: No such file or directory"}


def test_a_name_that_is_not_text_is_told_of(tmp_path: Path) -> None:
    write(tmp_path, {"w.py": MINIMAL})
    (tmp_path / "w.py").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.py"))
    assert reasons(load_catalogue(tmp_path)) == {"?.py": "the name is not UTF-8, so nobody could ask for it"}


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "MAX_FILE_BYTES", 10)
    assert reasons(load(tmp_path, {"w.py": MINIMAL}))["w.py"].endswith("at most 10 are taken")


def test_more_files_than_the_bound_are_left_out_and_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "MAX_FILES", 2)
    catalogue = load(tmp_path, {"a.py": MINIMAL, "b.py": MINIMAL, "c.py": MINIMAL})
    assert len(catalogue.workflows) == 2
    assert reasons(catalogue) == {".": "there are more than 2 files; the rest is left out"}


async def test_helpers_are_imported_by_relative_names_from_any_folder(tmp_path: Path) -> None:
    workflow = load_one(
        tmp_path,
        {
            "sd1.5/w.py": """
                from comfyd.workflow import inputs
                from .._common import SIZE
                from ._near import class_type
                from .._lib.inner import LIB
                @inputs
                class Input:
                    width: int = SIZE + LIB
                def workflow(given: Input):
                    from ._late import LATE
                    return {"1": {"class_type": class_type(), "inputs": {"w": given.width, "late": LATE}}}
                """,
            "sd1.5/_near.py": "from .._common import SIZE\ndef class_type(): return f'A{SIZE}'",
            "sd1.5/_late.py": "LATE = True",
            "_common.py": "SIZE = 8",
            "_lib/inner.py": "LIB = 1",
        },
        "sd1.5/w",
    )
    built = await workflow.build({}, LiveInfo())
    assert built.prompt == {"1": {"class_type": "A8", "inputs": {"w": 9, "late": True}}}


def test_no_compiled_code_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    load_one(tmp_path, {"w.py": f"{MINIMAL}\nfrom ._h import x", "_h.py": "x = 1"})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["_h.py", "w.py"]


def test_one_workflow_cannot_import_another_one(tmp_path: Path) -> None:
    catalogue = load(tmp_path, {"a.py": MINIMAL, "b.py": "from .a import Input"})
    assert "what several share must be in a file that begins with _ (_a.py)" in reasons(catalogue)["b.py"]


def test_workflows_of_one_name_in_two_folders_do_not_meet(tmp_path: Path) -> None:
    other = MINIMAL.replace("A summary", "Another one")
    catalogue = load(tmp_path, {"a.b/w.py": MINIMAL, "a_b/w.py": other})
    assert [workflow.summary for workflow in catalogue.workflows] == ["A summary.", "Another one."]


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    files = {
        "a.py": MINIMAL,
        "b.py": MINIMAL,
        "c.json": txt2img(),
        "d.json": txt2img(),
        "d.yaml": "summary: D",
        "_h.py": "",
    }
    first = load(tmp_path, files)

    def changed() -> set[str]:
        now = load_listed(tmp_path, list_folder(tmp_path), first)
        return {workflow.route for workflow in now.workflows if first.get(workflow.route) is not workflow}

    assert changed() == set()
    write(tmp_path, {"a.py": MINIMAL + "\n"})
    assert changed() == {"a"}
    write(tmp_path, {"d.yaml": "summary: Dd"})
    assert changed() == {"a", "d"}
    (tmp_path / "d.yaml").unlink()
    assert changed() == {"a", "d"}
    write(tmp_path, {"_h.py": "x = 1"})
    assert changed() == {"a", "b", "d"}
    write(tmp_path, {"data.csv": "1"})  # code may read it
    assert changed() == {"a", "b", "d"}


def test_the_modules_of_a_catalogue_that_is_gone_are_forgotten(tmp_path: Path) -> None:
    def ours() -> set[str]:
        return {
            name
            for name in sys.modules
            if name.startswith("comfyd_workflows_") and name.endswith("forgettable-workflow")
        }

    before = ours()
    catalogue = load(tmp_path, {"forgettable.py": MINIMAL})
    assert len(ours() - before) == 1
    del catalogue
    assert ours() - before == set()
