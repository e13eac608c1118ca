"""The dashboard, the alert rules and their README speak of the metrics that there are, and of all of them."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
import yaml
from metrics_kit import Scene, make_scene

from comfyd.host.metrics import Metrics
from comfyd.http.access_log import Access

GRAFANA: Final = Path(__file__).parents[1] / "deploy" / "grafana"
FROM_SCRAPING: Final = frozenset({"instance", "job", "namespace", "pod"})
"""Labels that Prometheus adds to every series."""
_METRIC: Final = re.compile(r"\b((?:comfyd|process)_[a-z0-9_]+)\b(?:\{([^}]*)\})?")
_MATCHER: Final = re.compile(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"')
_GROUPING: Final = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")


@attrs.frozen
class Family:
    """A metric: what a README says of it, and its labels."""

    name: str
    kind: str
    text: str
    labels: frozenset[str]


@pytest.fixture(scope="module")
def scene() -> Scene:
    """Metrics of which each has a sample."""
    scene = make_scene(engine_pid=lambda engine: os.getpid(), folders={"output": Path("/")})
    scene.engine.restarts_by_cause["hung"] += 1
    metrics = scene.metrics
    metrics._job_s["succeeded",].observe(1)
    metrics._stage_s["queue",].observe(1)
    metrics._node_s["KSampler",].observe(1)
    metrics.uploaded(1)
    metrics.downloaded("https://h/x", 1)
    metrics.request_served(Access(route="/prompt", method="POST", status=200, body_bytes=1, took_s=1))
    return scene


@pytest.fixture(scope="module")
def families(scene: Scene) -> dict[str, Family]:
    """Every metric by the name that the README lists it under."""
    trio.run(scene.metrics.render)
    metrics: Metrics = scene.metrics
    found = {}
    for metric in metrics.registry.collect():
        labels = frozenset(label for sample in metric.samples for label in sample.labels) - {"le"}
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        found[name] = Family(name=name, kind=metric.type, text=metric.documentation, labels=labels)
    return found


def family_of(series: str, families: dict[str, Family]) -> Family:
    """The metric of which *series* is a series."""
    if series in families:
        return families[series]
    base = re.sub(r"_(bucket|sum|count)$", "", series)
    assert base in families, f"there is no metric {series}"
    assert families[base].kind == "histogram", f"{series} is no series of {base}"
    return families[base]


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((GRAFANA / "comfyd.json").read_text())
    return document


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Every query, with where it stands."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for annotation in dashboard()["templating"]["list"]:
        yield annotation["name"], annotation.get("definition", "")
    for annotation in dashboard()["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for rule in rules():
        yield rule["alert"], rule["expr"]


def test_every_query_is_of_metrics_and_labels_that_there_are(families: dict[str, Family]) -> None:
    asked = set()
    for where, expression in expressions():
        used = [(family_of(series, families), series, matchers) for series, matchers in _METRIC.findall(expression)]
        assert used or where == "datasource", f"{where} asks for nothing"
        for family, series, matchers in used:
            asked.add(family.name)
            labels = family.labels | FROM_SCRAPING | ({"le"} if series.endswith("_bucket") else set())
            assert set(_MATCHER.findall(matchers)) <= labels, f"{where}: {series} has only {labels}"
        known = frozenset[str]().union(*(family.labels for family, _, _ in used)) | FROM_SCRAPING | {"le"}
        for grouping in _GROUPING.findall(expression):
            assert {label.strip() for label in grouping.split(",")} <= known, f"{where}: {grouping}"
    assert len(asked) > 30


def test_counters_are_asked_for_their_increase_and_gauges_for_their_value(families: dict[str, Family]) -> None:
    for where, expression in expressions():
        for found in _METRIC.finditer(expression):
            family = family_of(found[1], families)
            is_counted = family.kind in {"counter", "histogram"}
            over_time = expression[found.end() :].lstrip().startswith("[")
            before = re.search(r"(\w+)\($", expression[: found.start()])
            if is_counted:
                assert over_time, f"{where}: {found[1]}"
                assert before, f"{where}: {found[1]}"
                assert before[1] in {"rate", "increase", "changes"}, f"{where}: {before[1]}({found[1]})"
            elif over_time:
                assert before, f"{where}: {found[1]}"
                assert before[1] == "deriv", f"{where}: {before[1]}({found[1]})"


def test_brackets_are_in_pairs() -> None:
    for where, expression in expressions():
        for pair in ("()", "[]", "{}"):
            assert expression.count(pair[0]) == expression.count(pair[1]), where


def test_every_metric_of_ours_is_on_the_dashboard(families: dict[str, Family]) -> None:
    asked = {family_of(series, families).name for _, text in expressions() for series, _ in _METRIC.findall(text)}
    assert {name for name in families if name.startswith("comfyd_")} <= asked


def test_the_readme_lists_every_metric_as_it_is(families: dict[str, Family]) -> None:
    rows = {
        f"| `{family.name}` | {family.kind} | {', '.join(sorted(family.labels))} | {family.text} |"
        for family in families.values()
        if family.name.startswith("comfyd_")
    }
    listed = {line for line in (GRAFANA / "README.md").read_text().splitlines() if line.startswith("| `comfyd_")}
    assert listed == rows


def test_the_readme_lists_every_alert() -> None:
    text = (GRAFANA / "README.md").read_text()
    assert set(re.findall(r"^\| `(Comfyd\w+)` \|", text, re.MULTILINE)) == {rule["alert"] for rule in rules()}


def test_names_follow_the_rules_of_prometheus(families: dict[str, Family]) -> None:
    """https://prometheus.io/docs/practices/naming/: base units, and ``_total`` for counters only."""
    for family in families.values():
        if family.name.startswith("comfyd_"):
            assert not re.search(r"_(ms|milliseconds|kb|mb|minutes|percent)(_|$)", family.name), family.name
            assert family.name.endswith("_total") == (family.kind == "counter"), family.name
            assert family.text.endswith("."), family.name


def test_the_dashboard_asks_whatever_data_source_is_chosen() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert variables["instance"]["datasource"] == chosen
    for panel in panels():
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])
        assert all("$instance" in target["expr"] for target in panel["targets"]), panel["title"]


def test_panels_do_not_overlap_and_fit_the_grid() -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_alert_says_how_bad_it_is_and_what_to_look_at() -> None:
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found)
    for rule in found:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert {"summary", "description"} <= rule["annotations"].keys()
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"], rule["alert"]
        assert re.fullmatch(r"\d+m", rule.get("for", "0m"))
