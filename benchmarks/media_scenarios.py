"""The scenarios of pictures that come in and go out: conversions, URLs, base64, S3.

The pictures are made once, before anything is measured; the engine costs nothing (:mod:`benchmarks.media_engine`).
"""

import tempfile
from base64 import b64encode
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
import pyvips

from benchmarks.contenders import open_contenders
from benchmarks.effort import Effort, Numbers, ours
from benchmarks.graphs import copied, large, loaded
from benchmarks.load import Load
from benchmarks.processes import EMBEDDED, MEDIA, Cores, comfyd, remote
from benchmarks.report import Bound, Row, Values
from benchmarks.sockets import ask_once, request

_PHOTO_PX: Final = 3000
_CONVERSIONS: Final = 8
_AT_ONCE: Final = 4
_DOWNLOADS: Final = 32
_DOWNLOAD_PX: Final = 836
"""Without compression a PNG of 3 bands and this size has 2.0 MiB."""
_DELAY_S: Final = 0.2
_TEXT_PX: Final = 3873
"""As base64 an uncompressed PNG of this size has 60 MB."""
_UPLOAD_MB: Final = 500


def conversions(effort: Effort) -> list[Row]:
    """8 pictures of 3000 px from PNG to JPEG and WebP, 4 at once; half of the peer's memory, and not slower."""
    values = Values("conversions")
    with tempfile.TemporaryDirectory(prefix="comfyd-bench-") as name:
        photo = Path(name, "photo.png")
        _photo(_PHOTO_PX).pngsave(str(photo), compression=1)
        with open_contenders(MEDIA, Cores.everywhere()) as contenders:
            for server in contenders.servers.values():
                Path(server.folder, "input", photo.name).write_bytes(photo.read_bytes())
            for format_ in ("jpeg", "webp"):
                body = Path(name, f"{format_}.json")
                graph = {"prompt": copied(photo.name, "bench"), "convert_output": {"format": format_}}
                body.write_bytes(msgspec.json.encode(graph))
                for turn, contender, server in contenders.in_turn(effort.rounds):
                    server.forget_peak()
                    load = Load(mode="given", url=server.url, paths=[str(body)], total=_CONVERSIONS)
                    load.in_flight = _AT_ONCE
                    load.most_bytes = photo.stat().st_size  # the PNG itself, as base64, would be larger
                    measured = contenders.run(contender, load)
                    if measured and turn > 0:
                        values.add(f"8 to {format_.upper()}", contender, measured.elapsed_s)
                        values.add(f"8 to {format_.upper()}, peak RSS", contender, server.peak_rss_mb())
    half = Bound(limit=0.5, ratio=True, to="peer")
    return [
        values.row("8 to JPEG", "s", Bound(limit=0.9, ratio=True, to="peer")),
        values.row("8 to JPEG, peak RSS", "MB", half),
        values.row("8 to WEBP", "s", Bound(limit=1, ratio=True, to="peer")),
        values.row("8 to WEBP, peak RSS", "MB", half),
    ]


def inputs(effort: Effort) -> list[Row]:
    """32 inputs by URL in one job, each after 200 ms and 2 MB long; against getting all of them and keeping nothing."""
    numbers = Numbers()
    took: dict[str, list[float]] = {"raw": [], "comfyd": []}
    alone: list[float] = []
    with tempfile.TemporaryDirectory(prefix="comfyd-bench-") as name, ExitStack() as stack:
        picture = Path(name, "picture.png")
        _noise(_DOWNLOAD_PX).pngsave(str(picture), compression=0)
        url = stack.enter_context(remote("--picture", str(picture), "--delay-s", str(_DELAY_S)))
        daemon = stack.enter_context(comfyd(EMBEDDED, Cores.everywhere(), {"URL_ALLOW": "127.0.0.1"}))
        for turn in range(effort.rounds + 1):
            first = numbers.take(_DOWNLOADS)
            paths = [f"/picture/{first + place}" for place in range(_DOWNLOADS)]
            raw = daemon.run(Load(mode="download", url=url, paths=paths))
            single = daemon.run(Load(mode="download", url=url, paths=paths[:1]))
            body = Path(name, "body.json")
            graph = loaded([url + path for path in paths], f"bench-{first}")
            body.write_bytes(msgspec.json.encode({"prompt": graph}))
            measured = daemon.run(Load(mode="given", url=daemon.url, paths=[str(body)]))
            if turn > 0:
                took["raw"].append(raw.elapsed_s * 1000)
                took["comfyd"].append(measured.latencies_ms[0])
                alone.append(single.latencies_ms[0])
    # One after the other would be 32 delays; the raw client's time is the slowest download and the transfer of all.
    bound = Bound(limit=1.3, ratio=True)
    return [
        Row(scenario="inputs", measure="32 URLs in one job", unit="ms", values=took, bounds=(bound,)),
        Row(scenario="inputs", measure="one of them alone", unit="ms", values={"raw": alone}),
    ]


def base64_input(effort: Effort) -> list[Row]:
    """A picture of 60 MB of base64 in a request, while others ask the probe every 5 ms."""
    values = Values("base64-input")
    with tempfile.TemporaryDirectory(prefix="comfyd-bench-") as name:
        png = _noise(_TEXT_PX).pngsave_buffer(compression=0)
        body, small = Path(name, "body.json"), Path(name, "small.json")
        body.write_bytes(msgspec.json.encode({"prompt": loaded([b64encode(png).decode()], "bench")}))
        tiny = _noise(64).pngsave_buffer(compression=0)
        small.write_bytes(msgspec.json.encode({"prompt": loaded([b64encode(tiny).decode()], "bench")}))
        with open_contenders(EMBEDDED, Cores.shared_out()) as contenders:
            before_mb: dict[str, float] = {}
            for turn, contender, server in contenders.in_turn(effort.rounds):
                if turn == 0:
                    contenders.run(contender, Load(mode="given", url=server.url, paths=[str(small)], total=20))
                    before_mb[contender] = server.rss_mb()
                    continue
                server.forget_peak()
                load = Load(mode="given", url=server.url, paths=[str(body)], probes=True)
                if measured := contenders.run(contender, load):
                    values.add("growth of RSS", contender, server.peak_rss_mb() - before_mb[contender])
                    values.add("longest delay of a probe", contender, max(measured.probes_ms))
                    values.add("60 MB of base64, run", contender, measured.latencies_ms[0])
    return [
        values.row("growth of RSS", "MB", Bound(limit=130)),
        values.row("longest delay of a probe", "ms", Bound(limit=100)),
        values.row("60 MB of base64, run", "ms"),
    ]


def s3_upload(effort: Effort) -> list[Row]:
    """An output of 500 MB goes to S3, that is to a store that throws it away."""
    growth: list[float] = []
    stalls: list[float] = []
    rate: list[float] = []
    with tempfile.TemporaryDirectory(prefix="comfyd-bench-") as name, remote() as store:
        settings = {
            "AWS_ENDPOINT_URL": store,
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        target = {"s3": {"bucket": "bench", "prefix": "out/"}}
        body = Path(name, "body.json")
        body.write_bytes(msgspec.json.encode({"prompt": large(_UPLOAD_MB, "bench"), **target}))
        with comfyd(EMBEDDED, Cores.shared_out(), settings) as daemon:
            daemon.run(Load(mode="prompts", url=daemon.url, graph="tiny", total=20))
            before_mb = daemon.rss_mb()  # boto3 is not loaded yet, and counts
            for turn in range(effort.rounds):
                daemon.forget_peak()
                measured = daemon.run(Load(mode="given", url=daemon.url, paths=[str(body)], probes=True))
                growth.append(daemon.peak_rss_mb() - before_mb)
                stalls.append(max(measured.probes_ms))
                rate.append(_UPLOAD_MB / (measured.latencies_ms[0] / 1000))
                wanted = (turn + 1) * (_UPLOAD_MB << 20)
                if (stored := _stored_bytes(store)) != wanted:
                    raise RuntimeError(f"the store was given {stored} bytes, not {wanted}")
    return [
        ours("s3-upload", "growth of RSS", "MB", growth, Bound(limit=80)),
        ours("s3-upload", "longest delay of a probe", "ms", stalls, Bound(limit=100)),
        ours("s3-upload", "speed, run and uploaded", "MB/s", rate),
    ]


def _stored_bytes(store: str) -> int:
    answer: Any = msgspec.json.decode(ask_once(store, request("GET", "/stored")).body)
    return int(answer["bytes"])


def _photo(size_px: int) -> Any:
    """Make something like a photograph: soft shapes of several sizes, light from one side, and a sensor's noise."""
    shapes = pyvips.Image.perlin(size_px, size_px, cell_size=size_px // 5, seed=1)
    leaves = pyvips.Image.perlin(size_px, size_px, cell_size=16, seed=2)
    across = pyvips.Image.xyz(size_px, size_px)
    light = (across[0] + across[1]) * (40 / size_px) + shapes * 40 + 90
    bands = [
        light + leaves * (25 + 10 * band) + pyvips.Image.gaussnoise(size_px, size_px, sigma=10, seed=band)
        for band in range(3)
    ]
    return bands[0].bandjoin(bands[1:]).cast("uchar").copy(interpretation="srgb").copy_memory()


def _noise(size_px: int) -> Any:
    """Make a picture that no compression makes smaller."""
    bands = [pyvips.Image.gaussnoise(size_px, size_px, mean=128, sigma=60, seed=band) for band in range(3)]
    return bands[0].bandjoin(bands[1:]).cast("uchar").copy(interpretation="srgb")


MEDIA_SCENARIOS: Final[dict[str, Callable[[Effort], list[Row]]]] = {
    "conversions": conversions,
    "inputs": inputs,
    "base64-input": base64_input,
    "s3-upload": s3_upload,
}
