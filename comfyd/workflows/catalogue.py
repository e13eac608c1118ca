"""All workflows of a folder at one moment, and what is wrong with the files that are none."""

import os
import stat
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Final

import attrs

from comfyd.errors import InvalidValue
from comfyd.wire import decode_json
from comfyd.workflows.json_workflow import NotAGraph, json_workflow
from comfyd.workflows.model import Workflow
from comfyd.workflows.modules import Modules
from comfyd.workflows.python_workflow import NotAWorkflow, python_workflow
from comfyd.workflows.sidecar import Sidecar, SidecarInput, read_sidecar

MAX_FILES: Final = 5000
"""Of all files below the folder; a bound on what a wrong folder (``/``) costs."""
MAX_FILE_BYTES: Final = 16 * 1024 * 1024
"""Of one workflow. The largest published graphs have some 100 kB; pictures inside a graph make it larger."""

_SIDECARS: Final = (".yaml", ".yml")

Signature = tuple[int, int, int]
"""What changes when a file does: modification time (ns), size, inode."""


@attrs.frozen(kw_only=True)
class WorkflowProblem:
    """A file that is no workflow. *message* has no path of the server in it; *traceback_text* is for the log only."""

    file: str
    message: str
    traceback_text: str | None = attrs.field(default=None, repr=False)


@attrs.frozen(kw_only=True)
class Listing:
    """The files below a folder, by path relative to it. Equal listings are of equal folders."""

    files: Mapping[PurePosixPath, Signature] = MappingProxyType({})
    problems: tuple[WorkflowProblem, ...] = ()


@attrs.frozen(kw_only=True, eq=False)
class WorkflowCatalogue:
    """A snapshot: it never changes, a change of the folder makes another one."""

    workflows: tuple[Workflow, ...] = ()
    problems: tuple[WorkflowProblem, ...] = ()
    listing: Listing = attrs.field(factory=Listing, repr=False)
    """The files that it was made from."""
    _by_route: Mapping[str, Workflow] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        by_route = MappingProxyType({workflow.route: workflow for workflow in self.workflows})
        object.__setattr__(self, "_by_route", by_route)

    def get(self, route: str) -> Workflow | None:
        """Return the workflow at *route* (``sd1.5/txt2img``), None if there is none."""
        return self._by_route.get(route)


def load_catalogue(folder: Path, *, required: bool = True) -> WorkflowCatalogue:
    """Read all workflows below *folder*. Blocks, and runs the Python files: call it in a thread.

    A broken file is a problem and stops no other one. A folder that is not there is one as well, unless it is not
    *required* (nobody configured it).
    """
    return load_listed(folder, list_folder(folder, required=required))


def list_folder(folder: Path, *, required: bool = True) -> Listing:
    """Look at all files below *folder*, without opening one. Hidden ones are left out, links are followed.

    (A Kubernetes ConfigMap is mounted as links into a hidden folder: only the links count.)
    """
    try:
        mode = folder.stat().st_mode
    except FileNotFoundError:
        return Listing(problems=(_problem(".", "the folder does not exist"),) if required else ())
    except OSError as exc:
        return Listing(problems=(_problem(".", f"the folder cannot be read: {exc.strerror}"),))
    if not stat.S_ISDIR(mode):
        return Listing(problems=(_problem(".", "is not a folder"),))
    problems: list[WorkflowProblem] = []
    files: dict[PurePosixPath, Signature] = {}
    seen: set[tuple[int, int]] = set()

    def unreadable(exc: OSError) -> None:
        relative = PurePosixPath(os.path.relpath(exc.filename or folder, folder))
        problems.append(_problem(str(relative), f"the folder cannot be read: {exc.strerror}"))

    for here, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        relative = PurePosixPath(os.path.relpath(here, folder))
        try:
            identity = _identity(here)
        except OSError as exc:  # it went meanwhile
            unreadable(exc)
            continue
        if identity in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not _ignored(name) and _is_text(name))
        for name in sorted(names):
            if _ignored(name):
                continue
            if not _is_text(name):
                shown = name.encode("utf-8", "replace").decode()
                problems.append(_problem(str(relative / shown), "the name is not UTF-8, so nobody could ask for it"))
                continue
            if len(files) >= MAX_FILES:
                problems.append(_problem(".", f"there are more than {MAX_FILES} files; the rest is left out"))
                return Listing(files=files, problems=tuple(problems))
            try:
                status = os.stat(os.path.join(here, name))
            except OSError as exc:
                problems.append(_problem(str(relative / name), f"cannot be read: {exc.strerror}"))
                continue
            files[relative / name] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return Listing(files=files, problems=tuple(problems))


def _ignored(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # how Python shows bytes of a name that are no UTF-8
        return False
    return True


def _private(file: PurePosixPath) -> bool:
    return any(part.startswith("_") for part in file.parts)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def load_listed(folder: Path, listing: Listing, before: WorkflowCatalogue | None = None) -> WorkflowCatalogue:
    """Read the workflows that *listing* found. Those of *before* whose files are the same are taken as they are."""
    loading = _Loading(folder=folder, listing=listing, before=before or WorkflowCatalogue())
    by_route: dict[str, list[PurePosixPath]] = {}
    for file in listing.files:
        if file.suffix in {".py", ".json"} and not _private(file):
            by_route.setdefault(str(file.with_suffix("")), []).append(file)
    workflows = []
    problems = list(listing.problems)
    for route, files in sorted(by_route.items()):
        try:
            workflows.append(loading.load(route, files))
        except _Broken as exc:
            problems += exc.problems
    for file in listing.files:
        if file.suffix in _SIDECARS and not _private(file) and file.with_suffix(".json") not in listing.files:
            problems.append(_problem(str(file), f"there is no {file.with_suffix('.json').name} that it could describe"))
    return WorkflowCatalogue(workflows=tuple(workflows), problems=tuple(problems), listing=listing)


def _helpers(listing: Listing) -> dict[PurePosixPath, Signature]:
    """Return all files that workflows in Python may import or read: those that are no workflow themselves."""
    return {
        file: signature
        for file, signature in listing.files.items()
        if file.suffix not in {".py", ".json", *_SIDECARS} or _private(file)
    }


class _Broken(Exception):
    """Files make no workflow."""

    def __init__(self, *problems: WorkflowProblem) -> None:
        super().__init__(*(f"{problem.file}: {problem.message}" for problem in problems))
        self.problems = problems


@attrs.define(kw_only=True, eq=False)
class _Loading:
    """One loading of a folder."""

    folder: Path
    listing: Listing
    before: WorkflowCatalogue
    modules: Modules = attrs.field(init=False)
    _same_helpers: bool = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.modules = Modules(self.folder)
        self._same_helpers = _helpers(self.listing) == _helpers(self.before.listing)

    def load(self, route: str, files: list[PurePosixPath]) -> Workflow:
        """Make the workflow of a route.

        Raises:
            _Broken: with the problems of its files.
        """
        if len(files) > 1:
            # Neither: which of them is the right one nobody can tell from outside, and the other is served in silence.
            both = " and ".join(str(file) for file in files)
            raise _Broken(*(_problem(str(file), f"{both} are the same route; none is served") for file in files))
        (file,) = files
        same = self._unchanged(route, file)
        if same is not None:
            return same
        size_bytes = self.listing.files[file][1]
        if size_bytes > MAX_FILE_BYTES:
            raise _Broken(_problem(str(file), f"has {size_bytes} bytes; at most {MAX_FILE_BYTES} are taken"))
        return self._python(route, file) if file.suffix == ".py" else self._json(route, file)

    def _unchanged(self, route: str, file: PurePosixPath) -> Workflow | None:
        parts = [file, *(file.with_suffix(suffix) for suffix in _SIDECARS if file.suffix == ".json")]
        now, then = self.listing.files, self.before.listing.files
        same = all(now.get(part) == then.get(part) for part in parts)
        return self.before.get(route) if same and (file.suffix == ".json" or self._same_helpers) else None

    def _python(self, route: str, file: PurePosixPath) -> Workflow:
        try:
            module = self.modules.load(file)
            return python_workflow(module, route=route, modules=self.modules)
        except NotAWorkflow as exc:
            raise _Broken(_problem(str(file), str(exc))) from None
        except SyntaxError as exc:
            raise _Broken(_problem(_file_of(exc, self.folder) or str(file), _syntax_text(exc), exc)) from exc
        except (Exception, SystemExit) as exc:  # whatever code of others raises is about that file only
            raise _Broken(_problem(str(file), f"raised {type(exc).__name__}: {self._told(exc)}", exc)) from exc

    def _told(self, exc: BaseException) -> str:
        return str(exc).replace(f"{self.folder}{os.sep}", "")

    def _json(self, route: str, file: PurePosixPath) -> Workflow:
        sidecar, wishes = self._sidecar(file)
        try:
            graph = decode_json((self.folder / file).read_bytes().removeprefix(b"\xef\xbb\xbf"))
        except OSError as exc:
            raise _Broken(_problem(str(file), f"cannot be read: {exc.strerror}")) from None
        except InvalidValue as exc:
            raise _Broken(_problem(str(file), exc.faults[0].message)) from None
        try:
            return json_workflow(graph, route=route, sidecar=sidecar, wishes=wishes)
        except NotAGraph as exc:
            raise _Broken(_problem(str(file), str(exc))) from None
        except InvalidValue as exc:
            raise _Broken(_problem(self._sidecar_names(file)[0], str(exc))) from None

    def _sidecar(self, file: PurePosixPath) -> tuple[Sidecar | None, Mapping[str, SidecarInput]]:
        names = self._sidecar_names(file)
        if not names:
            return None, {}
        if len(names) > 1:
            raise _Broken(*(_problem(name, f"{' and '.join(names)} both describe {file.name}") for name in names))
        try:
            return read_sidecar(self.folder / names[0])
        except OSError as exc:
            raise _Broken(_problem(names[0], f"cannot be read: {exc.strerror}")) from None
        except InvalidValue as exc:
            raise _Broken(_problem(names[0], str(exc))) from None

    def _sidecar_names(self, file: PurePosixPath) -> list[str]:
        beside = (file.with_suffix(suffix) for suffix in _SIDECARS)
        return [str(each) for each in beside if each in self.listing.files]


def _problem(file: str, message: str, exc: BaseException | None = None) -> WorkflowProblem:
    text = None if exc is None else "".join(traceback.format_exception(exc))
    return WorkflowProblem(file=file, message=message, traceback_text=text)


def _syntax_text(exc: SyntaxError) -> str:
    return f"line {exc.lineno}: {exc.msg}" if exc.lineno else exc.msg


def _file_of(exc: SyntaxError, folder: Path) -> str | None:
    """Find the file that has the error: it may be a helper that the workflow imports."""
    if not exc.filename or not Path(exc.filename).is_relative_to(folder):
        return None
    return Path(exc.filename).relative_to(folder).as_posix()


def new_problems(before: Iterable[WorkflowProblem], now: Iterable[WorkflowProblem]) -> list[WorkflowProblem]:
    """Return those that were not there before."""
    known: set[Any] = {(problem.file, problem.message) for problem in before}
    return [problem for problem in now if (problem.file, problem.message) not in known]
