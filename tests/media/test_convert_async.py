"""The converter: in threads of its own, several at once, and stopped when nobody wants the picture any more."""

import os
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from convert_kit import opened, picture

from comfyd.media.convert import ConversionFailed, Converted, Converter, Unchanged
from comfyd.media.convert_options import parse_convert

JPEG = parse_convert({"format": "jpeg"})
SLOW = parse_convert({"format": "webp", "options": {"effort": 6, "quality": 100}})
"""Many seconds for a picture of :func:`large`."""

EFFORTLESS: dict[str, dict[str, int]] = {"jpeg": {}, "webp": {"effort": 0}, "png": {}, "avif": {"effort": 0}}


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that takes long."""
    path = tmp_path_factory.mktemp("large") / "large.png"
    picture(4000, 4000).pngsave(str(path), compression=0)
    return path


async def wait_begun(target: Path) -> None:
    """Wait until a thread has begun with *target*; that it has is seen on the disk only."""
    while not await trio.Path(target).exists():  # noqa: ASYNC110  # hence there is no event
        await trio.sleep(0.005)


def test_there_are_as_many_at_once_as_there_are_cores() -> None:
    assert Converter().limiter.total_tokens == len(os.sched_getaffinity(0))


async def test_it_converts_and_tells_what_it_did(tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    picture().pngsave(str(source))
    (tmp_path / "note.txt").write_text("hello")
    converter = Converter()
    with trio.fail_after(30):
        done = await converter.convert(source, tmp_path / "b", JPEG)
        other = await converter.convert(tmp_path / "note.txt", tmp_path / "c", JPEG)
    assert done == Converted(path=tmp_path / "b", media_type="image/jpeg", size_bytes=(tmp_path / "b").stat().st_size)
    assert isinstance(other, Unchanged)
    assert converter.limiter.borrowed_tokens == 0


@pytest.mark.parametrize("format_", ["jpeg", "webp", "png", "avif"])
async def test_it_converts_to_every_format_from_whatever_thread_libvips_asks(tmp_path: Path, format_: str) -> None:
    source = tmp_path / "a.png"
    picture(500, 500).pngsave(str(source))
    with trio.fail_after(30):
        await Converter().convert(
            source, tmp_path / "b", parse_convert({"format": format_, "options": EFFORTLESS[format_]})
        )
    assert opened(tmp_path / "b").width == 500


async def test_several_are_converted_at_once_and_each_gets_its_own(tmp_path: Path) -> None:
    converter = Converter(limiter=trio.CapacityLimiter(3))
    sizes = range(20, 32)
    for size in sizes:
        picture(size, size).pngsave(str(tmp_path / f"{size}.png"))

    async def one(size: int) -> None:
        await converter.convert(tmp_path / f"{size}.png", tmp_path / f"{size}.jpeg", JPEG)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for size in sizes:
                nursery.start_soon(one, size)
    assert [opened(tmp_path / f"{size}.jpeg").width for size in sizes] == list(sizes)


async def test_a_failure_comes_out_as_one(tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    picture().pngsave(str(source))
    source.write_bytes(source.read_bytes()[:2000])
    with trio.fail_after(30), pytest.raises(ConversionFailed, match=r"a\.png could not be converted: it is damaged"):
        await Converter().convert(source, tmp_path / "b", JPEG)
    assert not (tmp_path / "b").exists()


async def test_its_limit_of_pixels_counts(tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    picture().pngsave(str(source))
    with trio.fail_after(30), pytest.raises(ConversionFailed, match=r"limited to 0\.0 million"):
        await Converter(max_pixels=1000).convert(source, tmp_path / "b", JPEG)


async def test_cancelled_in_the_middle_it_stops_and_leaves_neither_file_nor_thread(large: Path, tmp_path: Path) -> None:
    converter, target = Converter(), tmp_path / "b"
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(converter.convert, large, target, SLOW)
            await wait_begun(target)
            begun = trio.current_time()
            nursery.cancel_scope.cancel("the test has seen it begin")
    assert trio.current_time() - begun < 3
    assert not target.exists()
    assert converter.limiter.borrowed_tokens == 0


@pytest.mark.parametrize("format_", ["jpeg", "webp", "png"])
@pytest.mark.parametrize("after_s", [0.02, 0.1, 0.4])
async def test_cancelled_at_any_moment_it_is_over_soon(
    large: Path, tmp_path: Path, format_: str, after_s: float
) -> None:
    converter, target = Converter(), tmp_path / "b"
    with trio.fail_after(30), trio.move_on_after(after_s) as scope:
        await converter.convert(large, target, parse_convert({"format": format_}))
    assert trio.current_time() < scope.deadline + 3
    assert target.exists() != scope.cancelled_caught
    assert converter.limiter.borrowed_tokens == 0


async def test_cancelled_about_when_it_is_done_there_is_either_a_result_or_no_file(tmp_path: Path) -> None:
    source, target, converter = tmp_path / "a.png", tmp_path / "b", Converter()
    picture(200, 200).pngsave(str(source))
    with trio.fail_after(30):
        begun = trio.current_time()
        await converter.convert(source, target, JPEG)
        usual_s = trio.current_time() - begun
        for attempt in range(50):
            target.unlink()
            result = None
            with trio.move_on_after(usual_s * attempt / 25):
                result = await converter.convert(source, target, JPEG)
            assert target.exists() == (result is not None)
            target.touch()


async def test_cancelled_before_its_turn_it_has_done_nothing(tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    picture().pngsave(str(source))
    converter = Converter(limiter=trio.CapacityLimiter(1))
    with trio.fail_after(30):
        async with converter.limiter, trio.open_nursery() as nursery:
            nursery.start_soon(converter.convert, source, tmp_path / "b", JPEG)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel("before its turn")
    assert not (tmp_path / "b").exists()


async def test_the_loop_goes_on_while_a_picture_is_converted(large: Path, tmp_path: Path) -> None:
    converter, target = Converter(), tmp_path / "b"
    ticks = 0
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(converter.convert, large, target, SLOW)
            await wait_begun(target)
            for ticks in range(1, 101):  # noqa: B007  # counted to show that it got there
                await trio.lowlevel.checkpoint()
            assert target.exists()
            nursery.cancel_scope.cancel("seen")
    assert ticks == 100
