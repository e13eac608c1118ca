"""Outputs that stay after their job: moved, found again, removed with their job and not before."""

import fcntl
from pathlib import Path

from comfyd.media.collect import OutputFile
from comfyd.media.kept import KeptOutputs


def output(folder: Path, name: str, data: bytes = b"data") -> OutputFile:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return OutputFile(path=path, filename=path.name, node_id="9", media_type="image/png", size_bytes=len(data))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_outputs_are_moved_in_their_order_and_keep_their_names_towards_callers(tmp_path: Path) -> None:
    kept = KeptOutputs.of_journal(tmp_path, "journal", durable=True)
    moved = kept.keep("key", (output(tmp_path, "b.png", b"first"), output(tmp_path, "sub/b.png", b"second")))
    assert [file.filename for file in moved] == ["b.png", "b.png"]
    assert [file.path.read_bytes() for file in moved] == [b"first", b"second"]
    assert files(tmp_path) == ["comfyd/journal/key/00000.png", "comfyd/journal/key/00001.png"]


def test_nothing_is_made_before_the_first_output_is_kept(tmp_path: Path) -> None:
    kept = KeptOutputs.of_journal(tmp_path / "output", "journal", durable=True)
    assert kept.keys() == frozenset()
    kept.close()
    assert not (tmp_path / "output").exists()


def test_the_files_of_jobs_that_nobody_knows_are_swept(tmp_path: Path) -> None:
    kept = KeptOutputs.of_journal(tmp_path, "journal", durable=True)
    for key in ("known", "unknown"):
        kept.keep(key, (output(tmp_path, f"{key}.png"),))
    other = KeptOutputs.of_journal(tmp_path, "another-daemons", durable=True)
    other.keep("theirs", (output(tmp_path, "theirs.png"),))
    assert kept.keys() == {"known", "unknown"}
    kept.remove(kept.keys() - {"known"})
    assert files(tmp_path / "comfyd") == ["another-daemons/theirs/00000.png", "journal/known/00000.png"]


def test_pictures_that_were_converted_go_and_what_was_made_of_them_stays(tmp_path: Path) -> None:
    kept = KeptOutputs.of_journal(tmp_path, "journal", durable=True)
    original, untouched = kept.keep("key", (output(tmp_path, "a.png"), output(tmp_path, "b.txt")))
    converted = kept.folder("key") / "converted" / "00000"
    converted.parent.mkdir()
    converted.write_bytes(b"jpeg")
    kept.only("key", {converted, untouched.path})
    assert not original.path.exists()
    assert files(kept.root) == ["key/00001.txt", "key/converted/00000"]
    kept.only("key", set())
    assert files(kept.root) == []


def test_a_journal_in_memory_takes_its_outputs_with_it(tmp_path: Path) -> None:
    kept = KeptOutputs.of_journal(tmp_path, "journal", durable=False)
    kept.keep("key", (output(tmp_path, "a.png"),))
    kept.close()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_on_disk_leaves_its_outputs_for_the_next_start(tmp_path: Path) -> None:
    kept = KeptOutputs.of_journal(tmp_path, "journal", durable=True)
    kept.keep("key", (output(tmp_path, "a.png"),))
    kept.close()
    again = KeptOutputs.of_journal(tmp_path, "journal", durable=True)
    assert files(again.folder("key")) == ["00000.png"]
    again.remove(["key"])
    again.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_daemon_without_a_journal_left_is_removed_and_what_a_living_one_has_is_not(
    tmp_path: Path,
) -> None:
    dead, alive = (tmp_path / "comfyd" / f"memory-{number:032x}" for number in range(2))
    half_removed = dead.with_name(f"memory-{2:032x}")
    for folder in (dead, alive, half_removed):
        (folder / "key").mkdir(parents=True)
        if folder is not half_removed:
            (folder / ".lock").touch()
    with (alive / ".lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        KeptOutputs.of_journal(tmp_path, "journal", durable=True)
        assert not dead.exists()
        assert not half_removed.exists()
        assert alive.exists()
