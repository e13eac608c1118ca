"""A workflow written in Python: its input class understood at load, its function called for each request."""

import inspect
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from types import ModuleType
from typing import Any, Final

import attrs
import trio

from comfyd.errors import ComfydError, Fault, InvalidValue
from comfyd.wire import json_schema, structure, unstructure
from comfyd.wire.words import got
from comfyd.workflows.author import DEFAULT, DEFAULT_WORDS, LIVE_DEFAULT, InputRefused
from comfyd.workflows.fields import MAX_LIVE_FAULTS, inlined, live_faults, with_choices
from comfyd.workflows.live import LiveInfo
from comfyd.workflows.model import Built, Workflow, WorkflowFailed, as_graph
from comfyd.workflows.modules import Modules

GENERATE_TIMEOUT_S: Final = 30.0
"""Writing a graph takes a millisecond; one that asks another service may wait, but not for ever."""
THREADS_PER_WORKFLOW: Final = 4
"""A thread cannot be cancelled: so many may hang in one workflow before its calls wait for a thread in vain. The
bound is each workflow's own, so that the others go on."""


class NotAWorkflow(ComfydError):
    """A file below the folder is no workflow; the text says what it lacks."""


@attrs.frozen(kw_only=True, eq=False)
class PythonWorkflow(Workflow):
    """A function from an attrs class to a graph."""

    function: Callable[..., Any]
    input_class: type
    takes_comfy: bool
    schema: Mapping[str, Any] = attrs.field(repr=False)
    """Without what only the engine knows."""
    modules: Modules = attrs.field(repr=False)
    """Kept, because the function's imports live as long as it."""
    timeout_s: float = GENERATE_TIMEOUT_S
    threads: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(THREADS_PER_WORKFLOW), repr=False)

    def input_schema(self, live: LiveInfo) -> dict[str, Any]:
        """Return the schema, with what this engine offers."""
        schema: dict[str, Any] = with_choices(self.schema, live)
        schema["required"] = list(schema.get("required", ()))
        for name, default in _live_defaults(self.input_class, live).items():
            schema["properties"][name]["default"] = default
            schema["required"].remove(name)
        return schema

    async def build(self, raw_input: Any, live: LiveInfo) -> Built:
        """Make the graph."""
        given = self._structure(raw_input, live)
        plain: dict[str, Any] = unstructure(given)
        faults = tuple(islice(live_faults(self.schema, plain, live, "input"), MAX_LIVE_FAULTS))
        if faults:
            raise InvalidValue(faults)
        made = await self._generate(given, live)
        return Built(prompt=as_graph(self.route, made), input=plain)

    def _structure(self, raw_input: Any, live: LiveInfo) -> Any:
        if type(raw_input) is not dict:
            raise InvalidValue((Fault(location="input", message=f"must be an object, got {got(raw_input)}"),))
        missing = {
            name: default
            for name, default in _live_defaults(self.input_class, live).items()
            if raw_input.get(name) is None
        }
        try:
            return structure(self.input_class, {**raw_input, **missing}, location="input")
        except InvalidValue as exc:
            # One answer for all: what the engine lacks is told beside what does not fit.
            places = {fault.location for fault in exc.faults}
            live_ones = islice(live_faults(self.schema, raw_input, live, "input"), MAX_LIVE_FAULTS)
            raise InvalidValue((*exc.faults, *(each for each in live_ones if each.location not in places))) from None
        except Exception as exc:
            raise self._raised(exc) from exc

    async def _generate(self, given: Any, live: LiveInfo) -> Any:
        arguments = (given, live) if self.takes_comfy else (given,)
        with trio.move_on_after(self.timeout_s):
            try:
                if inspect.iscoroutinefunction(self.function):
                    made = await self.function(*arguments)
                else:
                    # It may open files or ask somebody, so not on the Trio thread; a hop costs about 0.1 ms.
                    made = await trio.to_thread.run_sync(
                        self.function, *arguments, abandon_on_cancel=True, limiter=self.threads
                    )
                    if inspect.isawaitable(made):
                        made = await made
            except InputRefused as exc:
                raise InvalidValue((Fault(location=f"input.{exc.field}", message=exc.message),)) from None
            except (Exception, SystemExit) as exc:
                raise self._raised(exc) from exc
            else:
                return made
        raise WorkflowFailed(self.route, f"took longer than {self.timeout_s:g} s", timed_out=True)

    def _raised(self, exc: BaseException) -> WorkflowFailed:
        # Only the type: the text of an error may hold a path of the server.
        text = "".join(traceback.format_exception(exc))
        return WorkflowFailed(self.route, f"raised {type(exc).__name__}", traceback_text=text)


def _live_defaults(cls: Any, live: LiveInfo) -> dict[str, Any]:
    found = {
        field.name: field.metadata[LIVE_DEFAULT](live) for field in attrs.fields(cls) if LIVE_DEFAULT in field.metadata
    }
    return {name: default for name, default in found.items() if default is not None}


def python_workflow(module: ModuleType, *, route: str, modules: Modules) -> PythonWorkflow:
    """Understand a module that was loaded from a file.

    Raises:
        NotAWorkflow: it lacks the function or its input class.
        TypeError, ValueError: an annotation of the input class makes no sense; the text says which.
    """
    function = getattr(module, "workflow", None)
    if not callable(function):
        raise NotAWorkflow("has no function called workflow; see comfyd.workflow for an example")
    input_class, takes_comfy = _parameters(function)
    summary, _, description = inspect.cleandoc(module.__doc__ or "").partition("\n")
    return PythonWorkflow(
        route=route,
        summary=summary.strip() or route,
        description=description.strip(),
        tags=tuple(route.split("/")[:-1]),
        source="python",
        function=function,
        input_class=input_class,
        takes_comfy=takes_comfy,
        schema=_schema_of(input_class),
        modules=modules,
    )


def _parameters(function: Callable[..., Any]) -> tuple[type, bool]:
    signature = inspect.signature(function, eval_str=True)
    positional = [
        each
        for each in signature.parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if not 1 <= len(positional) <= 2 or len(positional) != len(signature.parameters):
        raise NotAWorkflow("workflow() must take the input and, if it likes, a Comfy; no other parameters")
    input_class = positional[0].annotation
    if not isinstance(input_class, type) or not attrs.has(input_class):
        raise NotAWorkflow(
            "the first parameter of workflow() must be annotated with an attrs class, such as one under @inputs"
        )
    return input_class, len(positional) == 2


def _schema_of(cls: type) -> dict[str, Any]:
    try:
        (schema,), components = json_schema(cls)
        whole: dict[str, Any] = inlined(schema, components)
    except RecursionError:
        raise NotAWorkflow("has an input class that contains itself; its schema would have no end") from None
    whole.pop("title", None)  # the name of the class, which is Input everywhere
    properties = whole["properties"]
    for field in attrs.fields(cls):
        prop = properties.pop(field.name, None)
        if prop is None:
            continue  # called otherwise in JSON
        properties[field.name] = prop  # in the author's order: msgspec puts what is required first
        if DEFAULT_WORDS in field.metadata:
            prop[DEFAULT] = field.metadata[DEFAULT_WORDS]
        elif field.default == attrs.Factory(list):
            prop["default"] = []
        # Types that cannot be told apart in JSON are found now. The class's own hook is made at its first call: that
        # takes 2 ms, which are half of what loading a file would cost.
        with suppress(InvalidValue):
            structure(field.type, None)
    return whole
