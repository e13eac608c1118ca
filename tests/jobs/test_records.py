"""What is written of jobs into the journal: it says the same when it is read again, and nothing that it must not."""

from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.engine import Completed, ExecutionTimes, NodeTime
from comfyd.errors import Failure, FailureKind, Fault
from comfyd.jobs.model import Clock, Stats, Success
from comfyd.jobs.records import (
    EndRecord,
    MadeRecord,
    decode_end,
    decode_made,
    encode_end,
    encode_made,
    presentable,
)
from comfyd.media.collect import OutputFile

GRAPH: dict[str, Any] = {"3": {"class_type": "KSampler", "inputs": {"seed": 2**64 - 1, "cfg": 7.5, "model": ["4", 0]}}}
TIMES = ExecutionTimes(
    start_ms=1.5, end_ms=99.25, nodes={"3": NodeTime(start_ms=2.0, duration_ms=5.5), "4": NodeTime(start_ms=8.0)}
)
OUTPUT = OutputFile(
    path=Path("/data/output/a ü.png"), filename="a ü.png", node_id="9", media_type="image/png", size_bytes=12
)
STATS = Stats(
    preprocess_time=1.0,
    queue_time=2.0,
    comfy_round_trip_time=3.0,
    postprocess_time=4.0,
    upload_time=5.0,
    total_time=15.0,
    attempts=2,
    times=TIMES,
)
FAILURE = Failure(
    kind=FailureKind.EXECUTION_FAILED,
    detail="node 3 raised",
    faults=(Fault(location="prompt.3", message="it raised"), Fault(location="", message="and more")),
    facts={"node_id": "3", "exception_type": "ValueError"},
)


@pytest.mark.parametrize(
    "outputs",
    [
        (),
        (OUTPUT, attrs.evolve(OUTPUT, converted=True)),
        (attrs.evolve(OUTPUT, converted=False, object_url="s3://b/k", url="https://store.test/k?sig"),),
    ],
)
def test_a_success_is_read_as_it_was_written(outputs: tuple[OutputFile, ...]) -> None:
    success = Success(graph=GRAPH, outputs=outputs, stats=STATS)
    record = EndRecord(outcome=success, graph=GRAPH, echo={"s3": {"bucket": "b"}})
    assert decode_end(encode_end(record)) == record


def test_a_failure_is_read_as_it_was_written_but_for_when_to_come_back() -> None:
    outcome = attrs.evolve(FAILURE, retry_after_s=5.0)
    read = decode_end(encode_end(EndRecord(outcome=outcome, graph=GRAPH, echo={})))
    assert read == EndRecord(outcome=FAILURE, graph=GRAPH, echo={})


@pytest.mark.parametrize("kind", list(FailureKind))
def test_every_kind_of_failure_can_be_written(kind: FailureKind) -> None:
    record = EndRecord(outcome=Failure(kind=kind, detail="so it is"), graph={}, echo={})
    assert decode_end(encode_end(record)) == record


def test_what_was_made_is_read_as_it_was_written() -> None:
    record = MadeRecord(
        graph=GRAPH,
        prefixes=("job_a", "b/job_c"),
        reported=({"9": {"images": [{"filename": "a ü.png", "subfolder": "", "type": "output"}]}},),
        outputs=(OUTPUT,),
        execution=Completed(outputs={"9": {"images": []}}, times=TIMES),
        clock=Clock(prepare_s=1.0, engine_s=2.5).as_dict(),
    )
    assert decode_made(encode_made(record)) == record


def test_a_clock_goes_on_from_where_it_was() -> None:
    clock = Clock(prepare_s=1.0, engine_s=2.5)
    resumed = Clock.resumed(clock.as_dict())
    assert (resumed.prepare_s, resumed.engine_s) == (1.0, 2.5)
    assert resumed.accepted == pytest.approx(clock.accepted, abs=0.5)


def test_a_failure_repeats_neither_passwords_in_urls_nor_whole_pictures() -> None:
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "https://me:hunter2secret@pictures.test/a.png"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "data:image/png;base64," + "A" * 100_000}},
        "3": {"class_type": "LoadImages", "inputs": {"images": ["s3://bucket/key", "https://a.test/x?token=hunter2"]}},
    }
    written = encode_end(EndRecord(outcome=FAILURE, graph=graph, echo={}))
    assert b"hunter2" not in written
    assert len(written) < 2000
    read = decode_end(written).graph
    assert read["2"]["inputs"]["image"].startswith("data:image/png;base64,AAAA")
    assert read["2"]["inputs"]["image"].endswith("(100022 characters)")
    assert read["3"]["inputs"]["images"][0] == "s3://bucket/key"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@given(_json)
def test_what_has_no_secret_and_is_short_is_presented_unchanged(value: Any) -> None:
    assert presentable(value) == value
