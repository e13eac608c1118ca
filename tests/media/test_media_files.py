"""Files: what is within a folder, whose files are whose, and the sweep of what a crash left."""

import fcntl
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs_kit import write_files

from comfyd.media.collect import Collection, collect, media_type, records
from comfyd.media.files import InputStore, confined, remove_folder, remove_outputs

HOLD_THE_LOCK = """
import fcntl, sys
lock = open(sys.argv[1], "wb")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def remove(output_dir: Path, made: Iterable[str], prefixes: Iterable[str], job_id: str = "a") -> None:
    remove_outputs(output_dir, [output_dir / name for name in made], prefixes, job_id=job_id)


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


# The store of inputs


def test_a_store_is_a_locked_folder_of_its_own_and_goes_with_everything_in_it(tmp_path: Path) -> None:
    store = InputStore.open(tmp_path / "not yet" / "there")
    folder = store.new_folder("key")
    (folder / "001.png").write_bytes(b"x")
    assert folder.parent == store.root
    assert store.name_for_comfyui(folder / "001.png") == f"comfyd/{store.root.name}/key/001.png"
    with (store.root / ".lock").open("rb") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    store.close()
    assert list((tmp_path / "not yet" / "there").iterdir()) == []


def test_two_stores_in_one_folder_do_not_touch_each_other(tmp_path: Path) -> None:
    first = InputStore.open(tmp_path)
    (first.new_folder("key") / "001.png").write_bytes(b"x")
    second = InputStore.open(tmp_path)
    assert first.root != second.root
    second.close()
    assert (first.root / "key" / "001.png").exists()
    first.close()
    assert list(tmp_path.iterdir()) == []


OTHER = "0123456789abcdef" * 2


@pytest.fixture
def other_daemon(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that holds the lock of a store's folder, as another comfyd does."""
    folder = tmp_path / "comfyd" / OTHER
    folder.mkdir(parents=True)
    (folder / "001.png").write_bytes(b"x")
    with subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD_THE_LOCK, str(folder / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_the_folder_of_a_living_daemon_is_left_and_that_of_a_dead_one_is_swept(
    tmp_path: Path, other_daemon: "subprocess.Popen[bytes]"
) -> None:
    InputStore.open(tmp_path).close()
    assert files_in(tmp_path / "comfyd" / OTHER) == [".lock", "001.png"]
    other_daemon.kill()
    other_daemon.wait(10)
    InputStore.open(tmp_path).close()
    assert not (tmp_path / "comfyd").exists()


def test_what_is_not_a_stores_folder_is_never_swept(tmp_path: Path) -> None:
    write_files(tmp_path / "comfyd", ["callers.png", "callers/deep.png"])
    store = InputStore.open(tmp_path)
    store.close()
    assert files_in(tmp_path) == ["comfyd/callers.png", "comfyd/callers/deep.png"]


def test_a_folder_that_cannot_be_made_is_an_error_to_the_caller(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        InputStore.open(tmp_path / "file")


def test_a_jobs_folder_goes_whole_and_may_be_gone_already(tmp_path: Path) -> None:
    write_files(tmp_path / "key", ["001.png", "deep/002.png"])
    remove_folder(tmp_path / "key")
    remove_folder(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


# Within a folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    write_files(folder, ["a.png", "sub/b.png"])
    write_files(tmp_path, ["outside.png", "root2/c.png"])
    (folder / "out").symlink_to(tmp_path)
    (folder / "out.png").symlink_to(tmp_path / "outside.png")
    (folder / "in.png").symlink_to(folder / "a.png")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


@pytest.mark.parametrize(
    ("parts", "within"),
    [
        (("a.png",), "a.png"),
        (("sub", "b.png"), "sub/b.png"),
        (("sub", "../a.png"), "a.png"),
        (("", "a.png"), "a.png"),
        (("in.png",), "a.png"),
        (("new", "x.png"), "new/x.png"),
        (("..a.png",), "..a.png"),
        (("...",), "..."),
        (("ä/名",), "ä/名"),
    ],
)
def test_what_lies_in_a_folder_is_found_with_links_resolved(root: Path, parts: tuple[str, ...], within: str) -> None:
    assert confined(root, *parts) == root.resolve() / within


@pytest.mark.parametrize(
    "parts",
    [
        (),
        ("",),
        (".",),
        ("..",),
        ("../outside.png",),
        ("sub/../../outside.png",),
        ("../root2/c.png",),
        ("/etc/passwd",),
        ("sub", "/etc/passwd"),
        ("out.png",),
        ("out", "outside.png"),
        ("a\0.png",),
        ("sub", "\0"),
    ],
)
def test_what_leaves_a_folder_is_nothing(root: Path, parts: tuple[str, ...]) -> None:
    assert confined(root, *parts) is None


def test_a_folder_that_is_itself_a_link_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert confined(tmp_path / "link", "a.png") == root.resolve() / "a.png"
    assert confined(tmp_path / "link", "..", "outside.png") is None


def test_the_root_of_the_file_system_is_a_folder_too() -> None:
    assert confined(Path("/"), "etc", "passwd") is not None


# Removing what a job made


def test_reported_files_go_and_their_emptied_folders_but_only_if_those_are_the_jobs_own(tmp_path: Path) -> None:
    write_files(tmp_path, ["job_7/1.png", "of job_7/2.png", "of job_7/others.png", "shared/3.png", "4.png"])
    made = ["job_7/1.png", "of job_7/2.png", "shared/3.png", "4.png", "gone.png"]
    remove(tmp_path, made, [], job_id="job_7")
    assert files_in(tmp_path) == ["of job_7/others.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of job_7", "shared"]


def test_the_output_folder_itself_stays_when_it_becomes_empty(tmp_path: Path) -> None:
    write_files(tmp_path, ["1.png"])
    remove(tmp_path, ["1.png"], ["a_pic"], job_id=tmp_path.name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_removed_does_not_keep_the_others(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_files(tmp_path, ["1.png", "a_pic_00001_.png"])
    with pytest.raises(OSError, match="folder"):
        remove(tmp_path, ["folder", "1.png"], ["a_pic"])
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("prefix", "name", "taken"),
    [
        ("a_pic", "a_pic_00001_.png", True),
        ("a_pic", "a_pic_00001.mp4", True),
        ("a_pic", "a_pic_123456_.tar.gz", True),
        ("a_pic", "a_b_pic_00001_.png", False),
        ("a_pic", "a_pic_b_00001_.png", False),
        ("a_pic", "a_pic_0001_.png", False),
        ("a_pic", "a_pic.png", False),
        ("a_pic", "a_pic_00001_", False),
        ("a_pic", "xa_pic_00001_.png", False),
        ("a_", "a__00001_.png", True),
        ("a_", "a_b_00001_.png", False),
        ("a_p.c", "a_pic_00001_.png", False),
        ("a_[x]", "a_[x]_00001_.png", True),
        ("a_%width%x%height%", "a_512x768_00001_.png", True),
        ("a_%year%-%month%-%day%_%hour%%minute%%second%", "a_2026-11-22_123456_00001_.png", True),
        ("a_%batch_num%", "a_0_00001_.png", True),
        ("a_%width%", "a_b_00001_.png", False),
        ("a_%width%", "a_b_512_00001_.png", False),
        ("a_100%", "a_100%_00001_.png", True),
        ("a_%node.seed%", "a_%node.seed%_00001_.png", True),
        ("a_%node.seed%", "a_b_00001_.png", False),
    ],
)
def test_a_prefix_takes_the_files_of_its_job_and_never_anothers(
    tmp_path: Path, prefix: str, name: str, taken: bool
) -> None:
    write_files(tmp_path, [name])
    remove(tmp_path, [], [prefix])
    assert (files_in(tmp_path) == []) is taken


def test_a_prefix_with_a_folder_takes_from_that_folder_only(tmp_path: Path) -> None:
    write_files(tmp_path, ["x/y/a_pic_00001_.png", "x/a_pic_00001_.png", "a_pic_00001_.png"])
    remove(tmp_path, [], ["x/y/a_pic"])
    assert files_in(tmp_path) == ["a_pic_00001_.png", "x/a_pic_00001_.png"]


def test_folders_and_links_that_are_named_like_a_jobs_files_stay(tmp_path: Path) -> None:
    write_files(tmp_path, ["target", "a_pic_00001_.folder/x"])
    (tmp_path / "a_pic_00002_.png").symlink_to(tmp_path / "target")
    remove(tmp_path, [], ["a_pic"])
    assert files_in(tmp_path) == ["a_pic_00001_.folder/x", "a_pic_00002_.png", "target"]


@pytest.mark.parametrize("prefix", ["../a_pic", "/etc/a_pic", "out/a_pic", "absent/a_pic", "a\0b/a_pic"])
def test_a_prefix_never_reaches_out_of_the_output_folder(tmp_path: Path, prefix: str) -> None:
    output_dir = tmp_path / "output"
    output_dir.mkdir()
    write_files(tmp_path, ["a_pic_00001_.png"])
    (output_dir / "out").symlink_to(tmp_path)
    remove(output_dir, [], [prefix])
    assert files_in(tmp_path) == ["a_pic_00001_.png"]


# Collecting

GRAPH: dict[str, Any] = {"9": {}, "1": {}, "10": {}}


def image(filename: object, **more: object) -> dict[str, object]:
    return {"filename": filename, "subfolder": "", "type": "output", **more}


def test_files_come_in_the_graphs_order_then_in_the_nodes_own(tmp_path: Path) -> None:
    write_files(tmp_path, ["z.png", "y.png", "x.mp4", "w.png", "v.txt", "u.png"])
    outputs = {
        "7:2": {"images": [image("u.png")]},
        "1": {"images": [image("w.png")], "gifs": [image("x.mp4")]},
        "10": {"result": [image("v.txt")]},
        "9": {"images": [image("z.png"), image("y.png")]},
    }
    found = collect(GRAPH, outputs, tmp_path).found
    assert [(one.node_id, one.filename) for one in found] == [
        ("9", "z.png"),
        ("9", "y.png"),
        ("1", "w.png"),
        ("1", "x.mp4"),
        ("10", "v.txt"),
        ("7:2", "u.png"),
    ]
    assert {one.size_bytes for one in found} == {4}
    assert [one.media_type for one in found][3:5] == ["video/mp4", "text/plain"]


def test_a_file_that_is_reported_twice_is_delivered_once_at_its_first_place(tmp_path: Path) -> None:
    write_files(tmp_path, ["sub/a.png", "b.png"])
    outputs = {
        "9": {"images": [image("a.png", subfolder="sub"), image("b.png")], "again": [image("sub/a.png")]},
        "1": {"images": [image("b.png")]},
    }
    found = collect(GRAPH, outputs, tmp_path).found
    assert [(one.node_id, one.filename) for one in found] == [("9", "a.png"), ("9", "b.png")]


def test_files_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.png", "sub/a.png"])
    outputs = {"9": {"images": [image("a.png"), image("a.png", subfolder="sub")]}}
    assert [one.path.relative_to(tmp_path.resolve()).as_posix() for one in collect({}, outputs, tmp_path).found] == [
        "a.png",
        "sub/a.png",
    ]


def test_previews_inputs_and_odd_records_are_passed_over(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.png"])
    odd: list[object] = [
        image("a.png", type="temp"),
        image("a.png", type="input"),
        image(None),
        image(5),
        image(""),
        image("a.png", subfolder=5),
        {"type": "output"},
        "a.png",
        None,
        ["a.png"],
        True,
    ]
    outputs = {"9": {"images": odd, "text": ["a.png"], "animated": [False], "more": "a.png", "other": None, "n": 5}}
    assert collect(GRAPH, outputs, tmp_path) == Collection(found=(), missing=(), refused=())


def test_a_record_without_type_or_subfolder_is_an_output(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.png"])
    outputs = {"9": {"video": [{"filename": "a.png"}, {"filename": "a.png", "subfolder": None}]}}
    assert [one.filename for one in collect(GRAPH, outputs, tmp_path).found] == ["a.png"]


def test_what_is_not_there_or_no_file_is_missing_in_order(tmp_path: Path) -> None:
    write_files(tmp_path, ["b.png", "folder.png/x"])
    outputs = {
        "1": {"images": [image("c.png"), image("folder.png")]},
        "9": {"images": [image("a.png"), image("b.png")]},
    }
    collection = collect(GRAPH, outputs, tmp_path)
    assert collection.missing == (("9", "a.png"), ("1", "c.png"), ("1", "folder.png"))
    assert [one.filename for one in collection.found] == ["b.png"]


def test_what_lies_outside_is_refused_and_never_looked_at(root: Path) -> None:
    reported = [
        image("outside.png", subfolder=".."),
        image("../outside.png"),
        image("/etc/passwd"),
        image("passwd", subfolder="/etc"),
        image("out.png"),
        image("outside.png", subfolder="out"),
        image("a\0.png"),
        image(".."),
    ]
    collection = collect(GRAPH, {"9": {"images": reported}}, root)
    assert collection.found == ()
    assert collection.missing == ()
    assert [name for _, name in collection.refused] == [
        "outside.png",
        "outside.png",
        "passwd",
        "passwd",
        "out.png",
        "outside.png",
        "a\0.png",
        "..",
    ]
    assert all(record.path is None for record in records(GRAPH, {"9": {"images": reported}}, root))


def test_an_absurdly_long_name_is_missing_and_no_error(tmp_path: Path) -> None:
    collection = collect(GRAPH, {"9": {"images": [image("x" * 5000)]}}, tmp_path)
    assert collection.missing == (("9", "x" * 5000),)


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("a.png", "image/png"),
        ("a.PNG", "image/png"),
        ("a.jpg", "image/jpeg"),
        ("a.webp", "image/webp"),
        ("a.avif", "image/avif"),
        ("a.mp4", "video/mp4"),
        ("a.webm", "video/webm"),
        ("a.mkv", "video/x-matroska"),
        ("a.flac", "audio/flac"),
        ("a.opus", "audio/ogg"),
        ("a.glb", "model/gltf-binary"),
        ("a.latent", "application/octet-stream"),
        ("a.unheardof", "application/octet-stream"),
        ("noending", "application/octet-stream"),
        (".png", "application/octet-stream"),
    ],
)
def test_the_media_type_is_that_of_the_ending(filename: str, expected: str) -> None:
    assert media_type(filename) == expected
