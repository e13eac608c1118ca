"""Whether a graph may run: ComfyUI's checks at submission, with its error shapes and its blind spots.

The shapes are those of execution.py (``validate_prompt`` and ``validate_inputs``) of ComfyUI 0.3.64. Only nodes
upstream of an output are looked at, so a node that no output depends on may be malformed; such a graph is accepted, and
kills the worker later (see :mod:`comfyd.embedded.executor`). Clients must guard against that: so it is reproduced.
"""

import traceback
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from comfyd.embedded.nodes.registry import Input, Library, NodeType

# Longer lists of choices are left out of an error.
_MAX_LISTED_CHOICES: Final = 20

_COERCE: Final = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


@attrs.frozen(kw_only=True)
class Verdict:
    """What came of the checks. *error* is None when at least one output may run; *outputs* are those.

    *node_errors* may be non-empty all the same: outputs with errors are then left out of the run.
    """

    error: dict[str, Any] | None
    outputs: tuple[str, ...] = ()
    node_errors: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class _Checked:
    valid: bool
    errors: list[dict[str, Any]]


def validate_prompt(
    prompt: Mapping[str, Any], node_types: Mapping[str, NodeType], library: Library, only: Iterable[str] | None = None
) -> Verdict:
    """Check a graph and convert its values in place, so that the numbers in it are numbers afterwards.

    *only* are the outputs the caller wants (``partial_execution_targets``).

    Raises:
        TypeError, AttributeError: a node is no object; ComfyUI answers 500 then.
    """
    wanted = None if only is None else set(only)
    outputs = []
    for node_id in prompt:
        if "class_type" not in prompt[node_id]:
            return _invalid(node_id, "Cannot execute because a node is missing the class_type property.")
        class_type = prompt[node_id]["class_type"]
        node_type = node_types.get(class_type)
        if node_type is None:
            return _invalid(node_id, f"Cannot execute because node {class_type} does not exist.")
        if node_type.is_output and (wanted is None or node_id in wanted):
            outputs.append(node_id)
    if not outputs:
        return Verdict(error=error("prompt_no_outputs", "Prompt has no outputs"))
    check = _Check(prompt=prompt, node_types=node_types, library=library)
    good = []
    reasons: list[dict[str, Any]] = []
    node_errors: dict[str, Any] = {}
    for output in outputs:
        checked = check.output(output)
        if checked.valid:
            good.append(output)
        else:
            reasons += checked.errors
            _collect(check, output, node_errors)
    if good:
        return Verdict(error=None, outputs=tuple(good), node_errors=node_errors)
    details = "\n".join(f"{reason['message']}: {reason['details']}" for reason in reasons)
    failed = error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
    return Verdict(error=failed, node_errors=node_errors)


def error(kind: str, message: str, details: str = "", **extra_info: Any) -> dict[str, Any]:
    """Make an error in the shape that all of ComfyUI's have."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def _invalid(node_id: str, message: str) -> Verdict:
    return Verdict(error=error("invalid_prompt", message, f"Node ID '#{node_id}'"))


def _collect(check: "_Check", output: str, node_errors: dict[str, Any]) -> None:
    # As in ComfyUI, an output that failed is entered at every faulty node seen so far, its own or not. A node that is
    # only downstream of a fault has no errors of its own and is left out.
    for node_id, checked in check.done.items():
        if not checked.valid and checked.errors:
            entry = node_errors.setdefault(
                node_id,
                {"errors": checked.errors, "dependent_outputs": [], "class_type": check.prompt[node_id]["class_type"]},
            )
            entry["dependent_outputs"].append(output)


@attrs.define(eq=False, kw_only=True)
class _Check:
    """One walk over a graph; each node is checked once."""

    prompt: Mapping[str, Any]
    node_types: Mapping[str, NodeType]
    library: Library
    done: dict[str, _Checked] = attrs.field(factory=dict)

    def output(self, node_id: str) -> _Checked:
        try:
            return self.node(node_id)
        except Exception as exc:  # noqa: BLE001 - whatever a malformed node makes fail is an answer to the caller
            fault = error(
                "exception_during_validation",
                "Exception when validating node",
                str(exc),
                exception_type=type_name(type(exc)),
                traceback=traceback.format_tb(exc.__traceback__),
            )
            self.done[node_id] = _Checked(valid=False, errors=[fault])
            return self.done[node_id]

    def node(self, node_id: str) -> _Checked:
        if node_id in self.done:
            return self.done[node_id]
        node = self.prompt[node_id]
        inputs = node["inputs"]
        node_type = self.node_types[node["class_type"]]
        errors: list[dict[str, Any]] = []
        upstream_valid = True
        for item in node_type.inputs:
            if item.name not in inputs:
                if item.required:
                    errors.append(_fault("required_input_missing", "Required input is missing", item.name, item))
                continue
            value = inputs[item.name]
            if isinstance(value, list):
                fault = self._link_fault(item, value)
                if fault is None:
                    upstream_valid &= self._linked(item, value)
            else:
                fault = self._value_fault(item, value, inputs)
            if fault is not None:
                errors.append(fault)
        checked = _Checked(valid=upstream_valid and not errors, errors=errors)
        self.done[node_id] = checked
        return checked

    def _link_fault(self, item: Input, value: list[Any]) -> dict[str, Any] | None:
        if len(value) != 2:
            return _fault(
                "bad_linked_input",
                "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                item.name,
                item,
                input_config=self._config(item),
                received_value=value,
            )
        source = self.node_types[self.prompt[value[0]]["class_type"]]
        received = source.outputs[value[1]]
        wanted = item.wire_type(self.library)
        if types_match(received, wanted):
            return None
        return _fault(
            "return_type_mismatch",
            "Return type mismatch between linked nodes",
            f"{item.name}, received_type({received}) mismatch input_type({wanted})",
            item,
            input_config=self._config(item),
            received_type=received,
            linked_node=value,
        )

    def _linked(self, item: Input, value: list[Any]) -> bool:
        try:
            return self.node(value[0]).valid
        except Exception as exc:  # noqa: BLE001 - see output()
            fault = _fault(
                "exception_during_inner_validation",
                "Exception when validating inner node",
                str(exc),
                item,
                input_config=self._config(item),
                exception_message=str(exc),
                exception_type=type_name(type(exc)),
                traceback=traceback.format_tb(exc.__traceback__),
                linked_node=value,
            )
            self.done[value[0]] = _Checked(valid=False, errors=[fault])
            return False

    def _value_fault(self, item: Input, value: Any, inputs: dict[str, Any]) -> dict[str, Any] | None:
        # A list as a value must come wrapped, because a bare list is a link.
        if isinstance(value, dict) and "__value__" in value:
            value = inputs[item.name] = value["__value__"]
        try:
            if item.type in _COERCE:
                value = inputs[item.name] = _COERCE[item.type](value)
        except Exception as exc:  # noqa: BLE001 - int() and its like raise a handful of types; all mean the same
            return _fault(
                "invalid_input_type",
                f"Failed to convert an input value to a {item.type} value",
                f"{item.name}, {value}, {exc}",
                item,
                input_config=self._config(item),
                received_value=value,
                exception_message=str(exc),
            )
        if item.check is not None:
            wrong = item.check(self.library, value)
            if wrong is None:
                return None
            return _fault(
                "custom_validation_failed", "Custom validation failed for node", f"{item.name} - {wrong}", item
            )
        return self._bound_fault(item, value) or self._choice_fault(item, value)

    def _bound_fault(self, item: Input, value: Any) -> dict[str, Any] | None:
        options = item.options
        if "min" in options and value < options["min"]:
            kind, message = "value_smaller_than_min", f"Value {value} smaller than min of {options['min']}"
        elif "max" in options and value > options["max"]:
            kind, message = "value_bigger_than_max", f"Value {value} bigger than max of {options['max']}"
        else:
            return None
        return _fault(kind, message, item.name, item, input_config=self._config(item), received_value=value)

    def _choice_fault(self, item: Input, value: Any) -> dict[str, Any] | None:
        if not item.listed:
            return None
        choices = item.choices_now(self.library)
        if value in choices:
            return None
        few = len(choices) <= _MAX_LISTED_CHOICES
        shown = str(choices) if few else f"(list of length {len(choices)})"
        return _fault(
            "value_not_in_list",
            "Value not in list",
            f"{item.name}: '{value}' not in {shown}",
            item,
            input_config=self._config(item) if few else None,
            received_value=value,
        )

    def _config(self, item: Input) -> list[Any]:
        return [item.wire_type(self.library), item.wire_options(self.library)]


def _fault(kind: str, message: str, details: str, item: Input, **extra_info: Any) -> dict[str, Any]:
    return error(kind, message, details, input_name=item.name, **extra_info)


def types_match(received: str, wanted: str | list[str]) -> bool:
    """Whether an output may be linked to an input: equal, ``*``, or comma-separated lists with a common member.

    ComfyUI compares with ``!=`` and its ``*`` is unequal to nothing (comfy_execution/validation.py). A choice, whose
    type is the list of its values, takes no link.
    """
    if "*" in (received, wanted):
        return True
    if not isinstance(wanted, str):
        return False
    if received == wanted:
        return True
    ours, theirs = ({part.strip() for part in types.split(",")} for types in (received, wanted))
    return not ours.isdisjoint(theirs)


def type_name(kind: type[BaseException]) -> str:
    """Name an exception type as ComfyUI's messages do: with its module, unless it is a builtin."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
