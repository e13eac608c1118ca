"""Answers of Quart's routes."""

from collections.abc import Mapping
from typing import Any

from quart import Response

from comfyd.errors import Failure
from comfyd.http import problems
from comfyd.wire import encode_json


def json_response(document: Mapping[str, Any], status: int) -> Response:
    """Answer *document* as JSON."""
    return Response(encode_json(document), status=status, content_type="application/json; charset=utf-8")


def problem_response(failure: Failure) -> Response:
    """Answer *failure* as a problem document."""
    answer = problems.problem(failure)
    response = Response(answer.body, status=answer.status, content_type=problems.CONTENT_TYPE)
    for name, value in answer.headers:
        response.headers[name.decode()] = value.decode()
    return response
