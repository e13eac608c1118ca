"""The OpenAPI document: every route, workflow, problem and webhook, from the classes that validate."""

from comfyd.http.openapi.document import OPENAPI_VERSION, build_openapi

__all__ = ["OPENAPI_VERSION", "build_openapi"]
