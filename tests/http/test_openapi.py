"""The OpenAPI document: valid by a public judge, true of what the daemon takes and answers, and without an own copy."""

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_support import open_client
from attrs import evolve
from daemon_support import Daemon, open_daemon, picture, raising
from jobs_http_kit import open_api
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it ships no types
from openapi_spec_validator import OpenAPIV31SpecValidator
from outbox_kit import ENDED_AT, job_row, output, success
from workflows_kit import MINIMAL, live_info, load, write

from comfyd.errors import Failure, FailureKind, Fault, InvalidValue
from comfyd.http import problems
from comfyd.http.interrupt import InterruptRequest
from comfyd.http.openapi import build_openapi
from comfyd.http.openapi.schemas import accepts_null, nullable
from comfyd.http.openapi.workflow_paths import operation_names
from comfyd.jobs import JobState, Outcome, parse_request
from comfyd.jobs.request import parse_workflow_request
from comfyd.journal import WebhookRow
from comfyd.media.convert_options import parse_convert
from comfyd.variables import SYSTEM_EVENTS
from comfyd.webhooks import rows_for
from comfyd.webhooks.bodies import build_body
from comfyd.wire import structure
from comfyd.workflows import LiveInfo, Workflow, load_catalogue

SHIPPED = Path(__file__).parents[2] / "workflows"
METHODS = {"get", "post", "delete", "put", "patch"}
Document = dict[str, Any]


@cache
def shipped() -> tuple[Workflow, ...]:
    catalogue = load_catalogue(SHIPPED)
    assert catalogue.problems == ()
    return catalogue.workflows


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> LiveInfo:
    return live_info(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def document(live: LiveInfo) -> Document:
    return build_openapi("1.2.3", shipped(), live)


def operations(document: Document) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for kind in ("paths", "webhooks"):
        for path, item in document[kind].items():
            for method in METHODS & item.keys():
                yield path, method, item[method]


def media_types(document: Document) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema that has examples beside it, with its place."""
    for path, method, operation in operations(document):
        place = f"{method} {path}"
        for name, media in operation.get("requestBody", {}).get("content", {}).items():
            yield f"{place} {name}", media
        for status, response in operation["responses"].items():
            for name, media in resolved(document, response).get("content", {}).items():
                yield f"{place} {status} {name}", media
        for parameter in (
            *operation.get("parameters", ()),
            *document.get("paths", {}).get(path, {}).get("parameters", ()),
        ):
            yield f"{place} {parameter['name']}", parameter


def resolved(document: Document, response: dict[str, Any]) -> dict[str, Any]:
    """The answer itself, where it is one that several operations share."""
    if "$ref" not in response:
        return response
    shared: dict[str, Any] = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
    return shared


def examples_of(media: dict[str, Any]) -> list[Any]:
    return [
        *([media["example"]] if "example" in media else []),
        *(each["value"] for each in media.get("examples", {}).values()),
    ]


def judge(document: Document, schema: Any) -> Draft202012Validator:
    """A validator of *schema*, which may refer to the components of *document*."""
    whole = {"components": document["components"], "allOf": [schema]}  # so that its references lead somewhere
    return Draft202012Validator(whole, format_checker=Draft202012Validator.FORMAT_CHECKER)


def errors(document: Document, schema: Any, value: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in judge(document, schema).iter_errors(value)]


def closed(schema: Any) -> Any:
    """*schema* with every object closed: what a document does not tell of is then an error."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "allOf" in schema:  # what its members say together
        return {**schema, "unevaluatedProperties": False}
    copy = {key: value if key in {"example", "examples", "enum"} else closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        copy["unevaluatedProperties"] = False
    return copy


def answer_schema(document: Document, operation_id: str, status: int, media_type: str) -> Any:
    (operation,) = (each for _, _, each in operations(document) if each["operationId"] == operation_id)
    return resolved(document, operation["responses"][str(status)])["content"][media_type]["schema"]


def strict(document: Document, *left_open: str) -> Document:
    """*document* with all components closed, but those that others build on, and those named."""
    schemas = document["components"]["schemas"]
    bases = {"Problem", "Node", *left_open}
    return {
        **document,
        "components": {
            "schemas": {name: schema if name in bases else closed(schema) for name, schema in schemas.items()}
        },
    }


def assert_as_told(document: Document, operation_id: str, response: httpx.Response) -> Any:
    """Hold an answer against what the document says of it; return its body."""
    media_type = response.headers["content-type"].partition(";")[0]
    schema = answer_schema(document, operation_id, response.status_code, media_type)
    found = errors(strict(document), schema, response.json())
    assert found == [], f"{operation_id} {response.status_code}: {found}"
    return response.json()


class TestDocument:
    @pytest.mark.parametrize("api_keys", [False, True])
    @pytest.mark.parametrize("markdown", [False, True])
    def test_is_valid_by_the_public_validator(self, live: LiveInfo, api_keys: bool, markdown: bool) -> None:
        two = shipped()[:2]
        document = build_openapi("1.2.3", two, live, api_keys=api_keys, markdown=markdown)
        assert [str(error) for error in OpenAPIV31SpecValidator(document).iter_errors()] == []

    def test_is_the_same_each_time(self, live: LiveInfo) -> None:
        first, second = (json.dumps(build_openapi("1", shipped(), live)) for _ in range(2))
        assert first == second

    def test_every_reference_leads_somewhere_and_every_component_is_used(self, document: Document) -> None:
        used = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
        have = set(document["components"]["schemas"])
        named_in_text = {"JobStateEvent", "JobProgressEvent", "JobResultEvent"}  # of a stream, which has no schema
        other_kinds = {problem_name for problem_name in have if problem_name.endswith("Problem")}
        assert used - have == set()
        assert have - used - named_in_text - other_kinds == set()
        assert all(name in json.dumps(document["paths"]) for name in named_in_text)

    def test_operation_ids_are_unique_and_fit_for_code(self, document: Document) -> None:
        ids = [operation["operationId"] for _, _, operation in operations(document)]
        assert len(ids) == len(set(ids))
        assert all(re.fullmatch(r"[a-z][A-Za-z0-9_]*", each) for each in ids)

    def test_operation_ids_are_promises(self, document: Document) -> None:
        ids = {operation["operationId"] for _, _, operation in operations(document)}
        assert {each for each in ids if "Workflow_" not in each} == {
            "runPrompt", "listWorkflows", "interruptJob", "listJobs", "getJob", "deleteJob", "streamJobEvents",
            "listJobOutputs", "getJobOutput", "listModels", "getHealth", "getReadiness", "getMetrics", "getOpenApi",
            "getOpenApiAsJson", "getOpenApiAsYaml", "getDocs",
            "onOutputComplete", "onOutputFailed", "onPromptComplete", "onPromptFailed", "onSystemEvent",
        }  # fmt: skip
        assert "runWorkflow_sd1_5_txt2img" in ids
        assert "describeWorkflow_sdxl_txt2img_with_refiner" in ids

    def test_every_example_fits_its_schema(self, document: Document) -> None:
        checked = 0
        for place, media in media_types(document):
            for example in examples_of(media):
                checked += 1
                assert errors(document, media["schema"], example) == [], place
        assert checked > 200

    def test_every_operation_that_takes_or_gives_json_has_an_example(self, document: Document) -> None:
        without = {place for place, media in media_types(document) if not examples_of(media)}
        json_without = {place for place in without if "application/json" in place or "problem+json" in place}
        assert json_without == {  # what they would show is the document itself, or what is at GET
            "get /openapi.json 200 application/json",
            "get /docs/json 200 application/json",
            "delete /jobs/{id} 200 application/json",
        }

    def test_answers_that_several_operations_have_are_there_once(self, document: Document) -> None:
        shared = document["components"]["responses"]
        assert {"Accepted", "WorkflowResult", "NotFoundProblem", "Problems400"} <= shared.keys()
        used = re.findall(r'"#/components/responses/([^"]+)"', json.dumps(document))
        assert set(used) == set(shared)
        assert all(used.count(name) > 1 for name in shared)

    def test_metrics_that_are_on_a_port_of_their_own_are_not_told_of(self) -> None:
        assert "/metrics" in build_openapi("1", ())["paths"]
        assert "/metrics" not in build_openapi("1", (), metrics=False)["paths"]

    def test_servers_are_relative_unless_given(self) -> None:
        assert build_openapi("1", ())["servers"] == [{"url": "."}]
        assert build_openapi("1", (), servers=("https://a", "https://b"))["servers"] == [
            {"url": "https://a"},
            {"url": "https://b"},
        ]


class TestProblems:
    def test_every_kind_is_told_with_its_own_status(self, document: Document) -> None:
        schemas = document["components"]["schemas"]
        assert schemas["ProblemType"]["enum"] == [kind.value for kind in FailureKind]
        for kind in FailureKind:
            example = problems.document_of(Failure(kind=kind, detail="x"))
            (name,) = (
                name
                for name, schema in schemas.items()
                if name.endswith("Problem")
                and schema.get("allOf", [{}, {}])[-1].get("properties", {}).get("type", {}).get("const") == kind.value
            )
            assert errors(document, {"$ref": f"#/components/schemas/{name}"}, example) == []
            wrong_status = {**example, "status": 299}
            assert errors(document, {"$ref": f"#/components/schemas/{name}"}, wrong_status) != []

    def test_a_status_tells_which_of_its_types_it_is(self, document: Document) -> None:
        schema = answer_schema(document, "runPrompt", 400, "application/problem+json")
        told = problems.document_of(Failure(kind=FailureKind.INVALID_INPUT, detail="x"))
        other = problems.document_of(Failure(kind=FailureKind.NOT_FOUND, detail="x"))
        assert errors(document, schema, told) == []
        assert errors(document, schema, other) != []

    def test_keys_are_asked_for_only_where_they_are(self, live: LiveInfo) -> None:
        without = build_openapi("1", shipped()[:1], live)
        assert "security" not in without
        assert "securitySchemes" not in without["components"]
        assert not [path for path, _, operation in operations(without) if "401" in operation["responses"]]
        document = build_openapi("1", shipped()[:1], live, api_keys=True)
        assert document["security"] == [{"bearer": []}, {"apiKey": []}]
        guarded = {
            path
            for path, item in document["paths"].items()
            for m in METHODS & item.keys()
            if "401" in item[m]["responses"]
        }
        assert set(document["paths"]) - guarded == {"/health", "/ready", "/metrics"}
        for path in ("/health", "/ready", "/metrics"):
            assert document["paths"][path]["get"]["security"] == []


PROMPT = {"1": {"class_type": "SaveImage", "inputs": {}}}
TAKEN: list[dict[str, Any]] = [
    {},
    {"id": None, "priority": None, "timeout_s": None, "s3": None, "convert_output": None, "client_id": None},
    {"id": "a.b", "priority": -100, "timeout_s": 0.5, "extra_data": {"a": [1]}, "client_id": [1]},
    {"s3": {"bucket": "abc", "prefix": None, "async": None, "presign_s": None}},
    {"s3": {"bucket": "abc", "prefix": "x/", "async": True, "presign_s": 604800}},
    {"webhook": "https://a.example/x", "webhook_v2": "https://a.example/y"},
    {"convert_output": {"format": "jpg", "options": None, "metadata": None}},
    {"convert_output": {"format": "jpeg", "options": {"quality": 100, "background": [0, 255, 7], "progressive": None}}},
    {"convert_output": {"format": "webp", "options": {"preset": "icon", "loop": 0}}},
    {"convert_output": {"format": "png", "options": {"colours": 2, "dither": 0}}},
    {"convert_output": {"format": "avif", "options": {"effort": 9, "quality": None}, "metadata": "keep"}},
]
REFUSED: list[dict[str, Any]] = [
    {"id": ".a"}, {"id": ""}, {"id": "a" * 129}, {"id": 7}, {"priority": 101}, {"priority": 1.5}, {"priority": True},
    {"timeout_s": 0}, {"timeout_s": "1"}, {"extra_data": []}, {"webhook": ""}, {"webhook_v2": 1}, {"prioritty": 1},
    {"s3": {}}, {"s3": {"bucket": "a"}}, {"s3": {"bucket": "abc", "async": 1}}, {"s3": {"bucket": None}},
    {"s3": {"bucket": "abc", "prefix": "a\u0007"}}, {"s3": {"bucket": "abc", "presign_s": 0}},
    {"s3": {"bucket": "abc", "x": 1}},
    {"convert_output": {}}, {"convert_output": {"format": "gif"}}, {"convert_output": {"format": None}},
    {"convert_output": {"format": "jpeg", "options": {"quality": 0}}},
    {"convert_output": {"format": "jpeg", "options": {"lossless": True}}},
    {"convert_output": {"format": "jpeg", "options": {"background": "red"}}},
    {"convert_output": {"format": "webp", "options": {"quality": 101}}},
    {"convert_output": {"format": "png", "options": {"effort": 0}}},
    {"convert_output": {"format": "avif", "options": {"effort": 10}}},
    {"convert_output": {"format": "avif", "metadata": "some"}},
]  # fmt: skip


class TestRequests:
    """One source: what the document takes the parser takes, and what it refuses the parser refuses."""

    @pytest.mark.parametrize("fields", TAKEN, ids=str)
    def test_what_is_taken_fits_the_document(self, document: Document, fields: dict[str, Any]) -> None:
        body = {"prompt": PROMPT, **fields}
        parse_request(body)
        assert errors(document, {"$ref": "#/components/schemas/PromptRequest"}, body) == []

    @pytest.mark.parametrize("fields", REFUSED, ids=str)
    def test_what_is_refused_does_not_fit_the_document(self, document: Document, fields: dict[str, Any]) -> None:
        body = {"prompt": PROMPT, **fields}
        with pytest.raises(InvalidValue):
            parse_request(body)
        assert errors(document, {"$ref": "#/components/schemas/PromptRequest"}, body) != []

    def test_a_workflow_s_request_is_taken_and_refused_alike(self, document: Document) -> None:
        schema = {"$ref": "#/components/schemas/Request_sd1_5_txt2img"}
        for fields in TAKEN:
            body = {"input": {"prompt": "a cat"}, **fields}
            parse_workflow_request(body)
            assert errors(document, schema, body) == []
        for fields in REFUSED:
            body = {"input": {"prompt": "a cat"}, **fields}
            with pytest.raises(InvalidValue):
                parse_workflow_request(body)
            assert errors(document, schema, body) != []

    def test_every_field_and_every_option_is_told_of(self, document: Document) -> None:
        schemas = document["components"]["schemas"]
        for name, schema in schemas["PromptRequest"]["properties"].items():
            assert schema.get("description"), name
        for options in ("JpegOptions", "WebpOptions", "PngOptions", "AvifOptions"):
            assert all(prop.get("description") for prop in schemas[options]["properties"].values())
        with pytest.raises(InvalidValue, match="unknown"):
            parse_convert({"format": "png", "options": {"nothing": 1}})

    def test_nothing_that_is_null_by_default_says_so(self, document: Document) -> None:
        assert '"default": null' not in json.dumps(document["components"])

    def test_an_interrupt_wants_an_id(self, document: Document) -> None:
        schema = {"$ref": "#/components/schemas/InterruptRequest"}
        assert structure(InterruptRequest, {"id": "x"}).id == "x"
        assert errors(document, schema, {"id": "x"}) == []
        assert errors(document, schema, {"id": None}) != []

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "string"}, {"type": ["string", "null"]}, {"enum": ["a", 1]}, {"type": "string", "enum": ["a"]},
            {"const": 1}, {"type": "integer", "const": 1}, {"anyOf": [{"type": "string"}, {"type": "integer"}]}, {},
            {"$ref": "#/components/schemas/A", "description": "x"}, {"oneOf": [{"type": "string"}]},
        ],
        ids=str,
    )  # fmt: skip
    def test_nullable_takes_null_and_refuses_no_more_than_before(self, schema: dict[str, Any]) -> None:
        document = {"components": {"schemas": {"A": {"type": "string"}}}}
        assert errors(document, nullable(schema), None) == []
        assert accepts_null(schema) == (errors(document, schema, None) == [])
        values: list[Any] = ["a", 1, 2.5, [], {}]
        for value in values:
            assert (errors(document, schema, value) == []) == (errors(document, nullable(schema), value) == [])


class TestWorkflows:
    def test_each_has_its_input_with_what_the_engine_offers(self, document: Document, live: LiveInfo) -> None:
        given = document["components"]["schemas"]["Input_sd1_5_txt2img"]
        assert given["properties"]["sampler_name"]["enum"] == [*live.samplers, None]
        assert given["required"] == ["prompt"]
        body = document["paths"]["/workflow/sd1.5/txt2img"]["post"]["requestBody"]
        assert body["required"] is True
        schema = body["content"]["application/json"]["schema"]
        assert errors(document, schema, {"input": {"prompt": "a cat", "steps": None}}) == []
        assert errors(document, schema, {}) != []
        assert errors(document, schema, {"input": {}}) != []
        assert errors(document, schema, {"input": {"prompt": "a cat", "widht": 8}}) != []

    def test_without_an_engine_any_name_fits(self) -> None:
        document = build_openapi("1", shipped())
        schema = {"$ref": "#/components/schemas/Request_sd1_5_txt2img"}
        assert (
            errors(document, schema, {"input": {"prompt": "a cat", "checkpoint": "any", "sampler_name": "any"}}) == []
        )

    async def test_its_examples_are_taken_by_it(self, document: Document, live: LiveInfo) -> None:
        for workflow in shipped():
            media = document["paths"][f"/workflow/{workflow.route}"]["post"]["requestBody"]["content"][
                "application/json"
            ]
            found = examples_of(media)
            assert found
            for example in found:
                if (
                    "flux" not in workflow.route and "refiner" not in workflow.route
                ):  # the small engine has no such models
                    await workflow.build(example["input"], live)

    def test_one_that_needs_nothing_needs_no_body(self, tmp_path: Path) -> None:
        document = build_openapi("1", load(tmp_path, {"w.py": MINIMAL}).workflows)
        assert document["paths"]["/workflow/w"]["post"]["requestBody"]["required"] is False
        bodies: list[dict[str, Any]] = [{}, {"input": None}, {"input": {}}, {"input": {"width": 3}}]
        for body in bodies:
            assert errors(document, {"$ref": "#/components/schemas/Request_w"}, body) == []

    def test_the_table_says_truthfully_what_is_required(self, document: Document, live: LiveInfo) -> None:
        for workflow in shipped():
            text = document["paths"][f"/workflow/{workflow.route}"]["post"]["description"]
            lines = [line for line in text.splitlines() if line.startswith("|")]
            assert lines[0] == "| Field | Type | Required | Default | Description |"
            rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]
            schema = workflow.input_schema(live)
            assert {row[0].strip("`") for row in rows if row[2] == "yes"} == set(schema["required"])
            assert [row[0].strip("`") for row in rows] == list(schema["properties"])
            assert all(row[3] == "-" for row in rows if row[2] == "yes")

    def test_the_table_is_left_out_where_it_is_not_wanted(self, live: LiveInfo) -> None:
        workflow = shipped()[0]
        document = build_openapi("1", [workflow], live, markdown=False)
        assert document["paths"][f"/workflow/{workflow.route}"]["post"]["description"] == workflow.description

    def test_names_that_would_be_one_in_code_are_told_apart(self) -> None:
        names = operation_names(["a-b", "a_b", "c", "d/e"])
        assert names["c"] == "c"
        assert names["d/e"] == "d_e"
        assert names["a-b"] != names["a_b"]
        assert {names["a-b"][:4], names["a_b"][:4]} == {"a_b_"}

    def test_odd_names_are_written_as_a_url_has_them(self, tmp_path: Path) -> None:
        document = build_openapi("1", load(tmp_path, {"bäume {id}.py": MINIMAL}).workflows)
        assert "/workflow/b%C3%A4ume%20%7Bid%7D" in document["paths"]
        assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []


class TestAnswersOfADaemon:
    """Every object closed: neither a member too many nor one too few."""

    async def test_of_prompts(self, document: Document, shared_daemon: Daemon) -> None:
        async with open_client(shared_daemon) as client:
            result = await client.post("/prompt", json={"prompt": picture()})
            assert_as_told(document, "runPrompt", result)
            assert result.json()["outputs"]
            converted = {"format": "jpeg"}
            assert_as_told(
                document,
                "runPrompt",
                await client.post("/prompt", json={"prompt": picture(), "convert_output": converted}),
            )
            failed = await client.post("/prompt", json={"prompt": raising()})
            assert assert_as_told(document, "runPrompt", failed)["type"] == "execution-failed"
            bodies: list[dict[str, Any]] = [
                {},
                {"prompt": {}},
                {"prompt": {"1": {"class_type": "EmptyImage"}}},
                {"prompt": {"1": {"class_type": "No"}}},
            ]
            for body in bodies:
                assert_as_told(document, "runPrompt", await client.post("/prompt", json=body))
            text = await client.post("/prompt", content=b"x", headers={"content-type": "text/plain"})
            assert_as_told(document, "runPrompt", text)

    async def test_of_a_job_from_its_acceptance_to_its_end(self, document: Document, shared_daemon: Daemon) -> None:
        prefer = {"prefer": "respond-async"}
        async with open_client(shared_daemon) as client:
            accepted = await client.post("/prompt", json={"prompt": picture()}, headers=prefer)
            job_id = assert_as_told(document, "runPrompt", accepted)["id"]
            told_headers = resolved(document, document["paths"]["/prompt"]["post"]["responses"]["202"])["headers"]
            assert {name.lower() for name in told_headers} <= accepted.headers.keys()
            ended = await client.get(f"/jobs/{job_id}?wait=20")
            assert assert_as_told(document, "getJob", ended)["state"] == "succeeded"
            assert assert_as_told(document, "listJobOutputs", await client.get(f"/jobs/{job_id}/outputs"))["outputs"][
                0
            ]["href"]
            file = await client.get(f"/jobs/{job_id}/outputs/0")
            told_headers = document["paths"]["/jobs/{id}/outputs/{place}"]["get"]["responses"]["200"]["headers"]
            assert {name.lower() for name in told_headers} <= file.headers.keys()
            beyond = await client.get(f"/jobs/{job_id}/outputs/0", headers={"range": "bytes=99999999-"})
            assert_as_told(document, "getJobOutput", beyond)
            assert assert_as_told(document, "listJobs", await client.get("/jobs?limit=1"))["jobs"]
            assert_as_told(document, "interruptJob", await client.post("/interrupt", json={"id": job_id}))
            assert (await client.delete(f"/jobs/{job_id}")).status_code == 204
            assert_as_told(document, "getJob", await client.get(f"/jobs/{job_id}"))

            failing = await client.post("/prompt", json={"prompt": raising()}, headers=prefer)
            job_id = failing.json()["id"]
            failed = assert_as_told(document, "getJob", await client.get(f"/jobs/{job_id}?wait=20"))
            assert failed["problem"]["type"] == "execution-failed"
            assert_as_told(document, "listJobs", await client.get("/jobs?state=failed"))
            waiting = await client.post("/prompt", json={"prompt": picture(seconds=10)}, headers=prefer)
            cancelled = await client.post("/interrupt", json={"id": waiting.json()["id"]})
            assert assert_as_told(document, "interruptJob", cancelled)["interrupted"] == "success"

    async def test_of_a_job_s_events(self, document: Document, shared_daemon: Daemon) -> None:
        told: dict[str, list[Any]] = {}
        async with open_client(shared_daemon) as client:
            for graph in (picture(seconds=0.3), raising()):
                accepted = await client.post("/prompt", json={"prompt": graph}, headers={"prefer": "respond-async"})
                events = await client.get(f"/jobs/{accepted.json()['id']}/events")
                assert events.headers["content-type"] == "text/event-stream"
                for block in events.text.split("\n\n"):
                    fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
                    if "event" in fields:
                        told.setdefault(fields["event"], []).append(json.loads(fields["data"]))
                await client.delete(f"/jobs/{accepted.json()['id']}")
        assert told.keys() == {"state", "progress", "result"}
        for kind, data in told.items():
            schema = {"$ref": f"#/components/schemas/Job{kind.capitalize()}Event"}
            assert [error for each in data for error in errors(strict(document), schema, each)] == []

    async def test_of_workflows(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "workflows", {"odd name/picture-1.py": PICTURE})
        document = build_openapi("1.2.3", load_catalogue(folder).workflows)
        url = next(path for path in document["paths"] if path.startswith("/workflow/"))
        run, describe = "runWorkflow_odd_name_picture_1", "describeWorkflow_odd_name_picture_1"
        async with (
            open_daemon(tmp_path / "home", environ={"WORKFLOW_DIR": str(folder)}) as daemon,
            open_client(daemon) as client,
        ):
            made = assert_as_told(document, run, await client.post(url, json={"input": {"color": 7}}))
            assert made["input"] == {"color": 7, "width": 8}
            prefer = {"prefer": "respond-async"}
            accepted = await client.post(url, json={"input": {"color": 8, "width": None}}, headers=prefer)
            job_id = assert_as_told(document, run, accepted)["id"]
            assert (await client.get(f"/jobs/{job_id}?wait=20")).json()["workflow"] == "odd name/picture-1"
            assert (await client.delete(f"/jobs/{job_id}")).status_code == 204
            inputs: list[Any] = [{}, {"color": "red"}, None]
            for wrong in inputs:
                refused = await client.post(url, json={"input": wrong})
                assert refused.status_code == 400
                assert_as_told(document, run, refused)
            assert assert_as_told(document, describe, await client.get(url))["source"] == "python"

    async def test_of_all_else(self, document: Document, shared_daemon: Daemon) -> None:
        async with open_client(shared_daemon) as client:
            for operation_id, path in (
                ("getHealth", "/health"),
                ("getReadiness", "/ready"),
                ("listModels", "/models"),
                ("listWorkflows", "/workflows"),
            ):
                answer = await client.get(path)
                assert answer.status_code == 200
                assert_as_told(document, operation_id, answer)

    async def test_the_bounds_of_a_query_are_those_of_the_daemon(self, document: Document) -> None:
        parameters = {each["name"]: each for each in document["paths"]["/jobs"]["get"]["parameters"]}
        limit = parameters["limit"]["schema"]
        wait = document["paths"]["/jobs/{id}"]["get"]["parameters"][0]["schema"]
        async with open_api() as api:
            api.submit("a")
            for value, status in ((limit["maximum"], 200), (limit["maximum"] + 1, 400), (limit["minimum"] - 1, 400)):
                assert (await api.client.get(f"/jobs?limit={value}")).status_code == status
            for state in parameters["state"]["schema"]["items"]["enum"]:
                assert (await api.client.get(f"/jobs?state={state}")).status_code == 200
            unknown = await api.client.get("/jobs?status=x")
            told = unknown.json()["errors"][0]["message"]
            assert "unknown parameter" in told
            assert (await api.client.get(f"/jobs/a?wait={wait['maximum'] + 1}")).status_code == 400
            assert (await api.client.get(f"/jobs/a?wait={wait['minimum']}")).status_code == 200


V1, V2 = "https://v1.example/", "https://v2.example/"


class TestWebhooks:
    @pytest.mark.parametrize("stored", [False, True])
    async def test_of_a_success_are_as_told(self, document: Document, tmp_path: Path, stored: bool) -> None:
        made = output(tmp_path, "a.png", b"a")
        if stored:
            made = evolve(made, url="https://b.example/a.png", object_url="s3://b/a.png")
        outcome = success(made)
        names = [await told_name(document, row, outcome) for row in rows_of(outcome)]
        assert names == ["outputComplete", "promptComplete"]

    @pytest.mark.parametrize("kind", FailureKind, ids=lambda kind: kind.value)
    async def test_of_a_failure_are_as_told(self, document: Document, kind: FailureKind) -> None:
        outcome = Failure(kind=kind, detail="x", faults=(Fault(location="prompt.1", message="x"),))
        assert [await told_name(document, row, outcome) for row in rows_of(outcome)] == ["outputFailed", "promptFailed"]


def rows_of(outcome: Outcome) -> tuple[WebhookRow, ...]:
    numbers = count()
    return rows_for(
        "job", "key-job", outcome, webhook=V1, webhook_v2=V2, next_sequence=lambda: next(numbers), now=ENDED_AT
    )


async def told_name(document: Document, row: WebhookRow, outcome: Outcome) -> str:
    """The one webhook of the document that the body of *row* is."""
    body = json.loads(await build_body(row, job_row(outcome)).read_whole())
    whole = strict(document)
    (name,) = (
        name
        for name, item in document["webhooks"].items()
        if not errors(whole, item["post"]["requestBody"]["content"]["application/json"]["schema"], body)
    )
    return str(name)


PICTURE = '''
"""A picture of one colour."""
from typing import Annotated

from comfyd.workflow import Field, Graph, inputs


@inputs
class Input:
    color: Annotated[int, Field(ge=0, le=0xFFFFFF)]
    width: int = 8


def workflow(given: Input) -> Graph:
    graph = Graph()
    picture = graph.node("EmptyImage", width=given.width, height=8, batch_size=1, color=given.color)
    graph.node("SaveImage", images=picture, filename_prefix="x")
    return graph
'''


class TestNames:
    def test_states_and_events_are_those_that_there_are(self, document: Document) -> None:
        schemas = document["components"]["schemas"]
        assert schemas["JobState"]["enum"] == [state.value for state in JobState]
        assert schemas["SystemEvent"]["properties"]["event"]["enum"] == [f"comfy.{name}" for name in SYSTEM_EVENTS]
