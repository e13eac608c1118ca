"""Named workflows: files below ``WORKFLOW_DIR`` as endpoints with typed inputs. Knows no HTTP."""

from comfyd.workflows.catalogue import WorkflowCatalogue, WorkflowProblem, load_catalogue
from comfyd.workflows.fields import InputField
from comfyd.workflows.live import LiveInfo
from comfyd.workflows.model import Built, Workflow, WorkflowFailed
from comfyd.workflows.serve import Workflows, serve_workflows

__all__ = [
    "Built",
    "InputField",
    "LiveInfo",
    "Workflow",
    "WorkflowCatalogue",
    "WorkflowFailed",
    "WorkflowProblem",
    "Workflows",
    "load_catalogue",
    "serve_workflows",
]
