"""The page and the document over HTTP: nothing from elsewhere, nothing stale, and whole below any prefix."""

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import attrs
import httpx
import pytest
import trio
import yaml
from api_support import open_client
from daemon_support import Daemon
from http_server_kit import TOO_LONG_S
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from jobs_kit import warm_engine
from workflows_kit import MINIMAL, live_info, load

from comfyd.http.asgi import Exchange, guarded
from comfyd.http.docs import DocsEndpoint, is_docs_path
from comfyd.workflows import Built, LiveInfo, Workflow, WorkflowCatalogue, Workflows
from comfyd.workflows.live_source import LiveSource

DIGESTS = {
    "swagger-ui-bundle.js": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    "swagger-ui.css": "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
    "swagger-ui.LICENSE.txt": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
}
ASSETS = ("docs.css", "docs.js", "swagger-ui.css", "swagger-ui-bundle.js")


@attrs.define(eq=False, kw_only=True)
class HandLive(LiveSource):
    """What the engine has is what the test says."""

    now: LiveInfo = attrs.field(factory=LiveInfo)
    ages: list[float] = attrs.field(factory=list)

    async def get(self, *, max_age_s: float = float("inf")) -> LiveInfo:
        self.ages.append(max_age_s)
        return self.now


@attrs.frozen
class Site:
    client: httpx.AsyncClient
    workflows: Workflows
    live: HandLive
    endpoint: DocsEndpoint

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(path, headers=headers)


@asynccontextmanager
async def open_site(catalogue: WorkflowCatalogue | None = None, **options: Any) -> AsyncIterator[Site]:
    workflows = Workflows(catalogue or WorkflowCatalogue())
    live = HandLive(engine=warm_engine())
    endpoint = DocsEndpoint(workflows=workflows, live=live, **options)

    async def app(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        assert scope["type"] == "http"
        await guarded(send, lambda noted: endpoint(Exchange(scope, receive, noted)))

    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # httpx has its own words for the same types
    async with httpx.AsyncClient(transport=transport, base_url="http://host", timeout=TOO_LONG_S) as client:
        yield Site(client, workflows, live, endpoint)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with open_site() as it:
        yield it


async def test_the_document_is_the_same_in_all_its_forms_but_for_the_way_to_the_daemon(site: Site) -> None:
    first = await site.get("/openapi.json")
    assert first.headers["content-type"].startswith("application/json")
    second, third = await site.get("/docs/json"), await site.get("/docs/yaml")
    assert third.headers["content-type"] == "application/yaml"
    document = first.json()
    for other in (second.json(), yaml.safe_load(third.text)):
        assert other.pop("servers") == [{"url": ".."}]
        assert other == {name: value for name, value in document.items() if name != "servers"}
    assert document["servers"] == [{"url": "."}]


@pytest.mark.parametrize("root", ["http://host/", "https://proxy/comfy/v2/"])
async def test_the_server_is_found_from_each_form_below_any_prefix(site: Site, root: str) -> None:
    for path in ("openapi.json", "docs/json", "docs/yaml"):
        document = yaml.safe_load((await site.get(f"/{path}")).text)  # JSON is YAML too
        (server,) = document["servers"]
        assert urljoin(f"{root}{path}", server["url"]).rstrip("/") == root.rstrip("/")


async def test_the_yaml_has_no_anchors(site: Site) -> None:
    assert not re.search(r"(^|\s)[&*]id\d", (await site.get("/docs/yaml")).text)


async def test_it_is_made_once_and_again_when_the_workflows_change(site: Site, tmp_path: Path) -> None:
    first = await site.get("/openapi.json")
    again = await site.get("/openapi.json")
    assert again.headers["etag"] == first.headers["etag"]
    made = site.endpoint._forms["/openapi.json"]
    await site.get("/openapi.json")
    assert site.endpoint._forms["/openapi.json"] is made
    site.workflows.replace(load(tmp_path, {"w.py": MINIMAL}))
    changed = await site.get("/openapi.json")
    assert "/workflow/w" in changed.json()["paths"]
    assert changed.headers["etag"] != first.headers["etag"]


async def test_it_is_made_again_when_the_engine_has_something_else(site: Site, tmp_path: Path) -> None:
    sampler = MINIMAL.replace("width: int = 512", 'sampler: Sampler = "euler"').replace(
        "inputs\n", "Sampler, inputs\n", 1
    )
    sampler = sampler.replace("given.width", "given.sampler")
    site.workflows.replace(load(tmp_path, {"w.py": sampler}))

    async def shown() -> Any:
        document = (await site.get("/openapi.json")).json()
        return document["components"]["schemas"]["Input_w"]["properties"]["sampler"].get("enum")

    assert await shown() is None
    site.live.now = live_info(tmp_path)
    assert "euler" in await shown()
    assert max(site.live.ages) <= 60, "models that were added are seen within a minute"


async def test_who_has_it_is_told_so(site: Site) -> None:
    for path in ("/openapi.json", "/docs/yaml", "/docs", "/docs/assets/swagger-ui-bundle.js"):
        etag = (await site.get(path)).headers["etag"]
        unchanged = await site.get(path, **{"if-none-match": etag})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["etag"] == etag
        assert (await site.get(path, **{"if-none-match": '"other"'})).status_code == 200


async def test_options_of_the_configuration_reach_the_document(tmp_path: Path) -> None:
    async with open_site(load(tmp_path, {"w.py": MINIMAL}), api_keys=True, markdown=False, metrics=False) as site:
        document = (await site.get("/openapi.json")).json()
    assert "securitySchemes" in document["components"]
    assert "/metrics" not in document["paths"]
    assert "|" not in document["paths"]["/workflow/w"]["post"]["description"]


async def test_the_page_names_only_what_is_served_here(site: Site) -> None:
    page = await site.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    ours = [address for address in addresses if address != "data:,"]
    assert len(ours) == 5
    for address in ours:
        for root in ("http://host/", "http://host/prefix/"):
            assert urljoin(f"{root}docs", address).startswith(root)
        assert (await site.get(urljoin("/docs", address))).status_code == 200, address


async def test_the_page_s_policy_allows_only_what_is_ours_and_the_page_keeps_to_it(site: Site) -> None:
    page = await site.get("/docs")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert all(
        source in {"'self'", "'none'", "data:", "blob:"} for value in policy.values() for source in value.split()
    )
    assert page.headers["x-content-type-options"] == "nosniff"
    assert re.findall(r"<script[^>]*>([^<]+)", page.text) == []
    assert "<style" not in page.text
    assert not re.search(r"\son\w+=|\sstyle=", page.text)


async def test_our_own_script_names_nobody_else(site: Site) -> None:
    script = (await site.get("/docs/assets/docs.js")).text
    assert not re.search(r"https?://", script)
    assert "validatorUrl: null" in script


@pytest.mark.parametrize("name", ASSETS)
async def test_an_asset_has_its_type_and_is_what_the_package_holds(site: Site, name: str) -> None:
    asset = await site.get(f"/docs/assets/{name}")
    assert asset.content == (files("comfyd.http") / "assets" / name).read_bytes()
    assert asset.headers["content-type"] == f"text/{'css' if name.endswith('css') else 'javascript'}; charset=utf-8"
    assert asset.headers["x-content-type-options"] == "nosniff"


def test_swagger_ui_is_as_it_was_published() -> None:
    """Npm's swagger-ui-dist 5.35.0, unchanged, with its licence."""
    digests = {
        name: hashlib.sha256((files("comfyd.http") / "assets" / name).read_bytes()).hexdigest()
        for name in ("swagger-ui-bundle.js", "swagger-ui.css", "swagger-ui.LICENSE.txt")
    }
    assert digests == DIGESTS


@pytest.mark.parametrize(
    "path",
    [
        "/docs/nothing",
        "/docs/assets/",
        "/docs/assets/docs.html",
        "/docs/assets/../docs.py",
        "/docs/assets/%2e%2e/docs.py",
        "/docs/json/",
    ],
)
async def test_what_is_not_there_is_a_problem(site: Site, path: str) -> None:
    assert is_docs_path(path)
    answer = await site.client.get(httpx.URL("http://host", raw_path=path.encode()))
    assert answer.status_code == 404
    assert answer.json()["type"] == "not-found"


async def test_the_page_with_a_slash_leads_to_the_one_without(site: Site) -> None:
    answer = await site.get("/docs/")
    assert answer.status_code == 308
    assert urljoin("http://host/docs/", answer.headers["location"]) == "http://host/docs"
    assert urljoin("http://host/prefix/docs/", answer.headers["location"]) == "http://host/prefix/docs"


async def test_other_methods_are_refused(site: Site) -> None:
    answer = await site.client.post("/openapi.json")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(("path", "ours"), [("/docs", True), ("/openapi.json", True), ("/docsx", False), ("/", False)])
def test_only_its_own_paths_are_its_own(path: str, ours: bool) -> None:
    assert is_docs_path(path) is ours


@attrs.frozen(kw_only=True, eq=False)
class Counted(Workflow):
    """A workflow that notes how often its input was asked for."""

    asked: list[LiveInfo] = attrs.field(factory=list)

    def input_schema(self, live: LiveInfo) -> dict[str, Any]:
        self.asked.append(live)
        return {"type": "object", "properties": {}}

    async def build(self, raw_input: Any, live: LiveInfo) -> Built:
        raise NotImplementedError


async def test_many_who_ask_at_once_wait_for_one_making() -> None:
    workflow = Counted(route="w", summary="", description="", tags=(), source="json")
    bodies: list[bytes] = []

    async def ask(site: Site) -> None:
        bodies.append((await site.get("/openapi.json")).content)

    async with open_site(WorkflowCatalogue(workflows=(workflow,))) as site, trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask, site)
    assert len(workflow.asked) == 1
    assert len(bodies) == 10
    assert len(set(bodies)) == 1


async def test_a_daemon_serves_both(shared_daemon: Daemon) -> None:
    async with open_client(shared_daemon) as client:
        assert (await client.get("/docs")).headers["content-type"].startswith("text/html")
        document = (await client.get("/openapi.json")).json()
        health = (await client.get("/health")).json()
    assert document["info"]["version"] == health["version"]
    assert "/prompt" in document["paths"]
