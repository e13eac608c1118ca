"""Whatever stands in a sidecar or a graph: it is a workflow, or a problem that is told of."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from workflows_kit import load, txt2img

from comfyd.workflows import LiveInfo

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2**70),
    st.floats(),
    st.sampled_from(["", "3.seed", "6.text", "3.model", "x"]),
)
_KEYS = st.sampled_from(
    ["summary", "tags", "inputs", "others", "hide", "target", "default", "min", "max", "step", "choices", "random", "3"]
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_KEYS, inner, max_size=4)),
    max_leaves=12,
)
_WISHES = st.dictionaries(
    st.sampled_from(["target", "default", "min", "max", "step", "choices", "random", "required", "group"]), _SCALARS
).map(lambda wish: {"target": "3.steps", **wish})
_SIDECARS = st.one_of(
    _VALUES,
    st.dictionaries(_KEYS, _VALUES),
    st.fixed_dictionaries({"inputs": st.dictionaries(st.sampled_from(["a", "b"]), _WISHES, min_size=1)}),
)


@given(_SIDECARS)
@settings(deadline=None)
def test_any_sidecar_is_understood_or_told_of(sidecar: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        catalogue = load(Path(folder), {"w.json": txt2img(), "w.yaml": json.dumps(sidecar)})
    assert (len(catalogue.workflows), len(catalogue.problems)) in {(1, 0), (0, 1)}
    for workflow in catalogue.workflows:
        json.dumps(workflow.input_schema(LiveInfo()))
        assert len(workflow.fields(LiveInfo())) == len(workflow.input_schema(LiveInfo())["properties"])


_NODES = st.one_of(
    _VALUES,
    st.fixed_dictionaries(
        {"class_type": st.sampled_from(["KSampler", ""])},
        optional={"inputs": st.dictionaries(_KEYS, _VALUES, max_size=3), "_meta": _VALUES},
    ),
)


@given(st.one_of(_VALUES, st.dictionaries(st.sampled_from(["1", "2", "nodes"]), _NODES, max_size=3)))
@settings(deadline=None)
def test_any_json_is_a_graph_or_told_of(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        catalogue = load(Path(folder), {"w.json": json.dumps(content)})
    assert (len(catalogue.workflows), len(catalogue.problems)) in {(1, 0), (0, 1)}
    for workflow in catalogue.workflows:
        workflow.input_schema(LiveInfo())
