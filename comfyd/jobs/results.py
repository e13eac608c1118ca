"""What of a job's success is told to its caller: the document of the 200, which is also what webhooks carry."""

from collections.abc import Mapping
from typing import Any

from comfyd.errors import NO_FACTS
from comfyd.jobs.model import Success
from comfyd.media.collect import OutputFile
from comfyd.media.json_files import JsonFiles
from comfyd.wire import encode_json


def success_json(
    job_id: str, success: Success, *, first: Mapping[str, Any] = NO_FACTS, echo: Mapping[str, Any] = NO_FACTS
) -> JsonFiles:
    """The whole document, with ``images`` as base64, or as URLs where the outputs were stored.

    *first* are members to begin with; *echo* are blocks of the request that are repeated at the end.
    """
    document = {**result_document(job_id, success), **echo, **first}
    head = {**first, "id": document.pop("id"), "prompt": document.pop("prompt")}
    for name in first:
        del document[name]
    outputs = success.outputs
    if is_stored(success):
        urls = {"images": [output.object_url for output in outputs]}
        return JsonFiles((encode_json(head | urls | document),))
    return JsonFiles.around(encode_json(head)[:-1] + b',"images":[', outputs, b"]," + encode_json(document)[1:])


def is_stored(success: Success) -> bool:
    """Whether the outputs are objects in a storage, and told by URL."""
    return any(output.object_url is not None for output in success.outputs)


def result_document(job_id: str, success: Success) -> dict[str, Any]:
    """Everything of the 200 but the files themselves."""
    return {
        "id": job_id,
        "prompt": success.graph,
        "filenames": [output.filename for output in success.outputs],
        "outputs": [output_document(output) for output in success.outputs],
        "stats": success.stats.as_dict(),
    }


def output_document(output: OutputFile) -> Mapping[str, Any]:
    """One member of ``outputs``."""
    document: dict[str, Any] = {
        "filename": output.filename,
        "node_id": output.node_id,
        "media_type": output.media_type,
        "size_bytes": output.size_bytes,
    }
    if output.converted is not None:
        document["converted"] = output.converted
    if output.url is not None:
        document["url"] = output.url
    return document
