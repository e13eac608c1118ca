"""Workflow files as modules of their own, apart from all others and from the ones loaded before.

Python's own import would write ``__pycache__`` beside the files, which may lie in a read-only folder, and would give a
helper that was changed since as it was. So each loading of the folder has a package of its own in ``sys.modules``,
below which relative imports work as usual; it goes when the last workflow of that loading is gone. What is imported
must begin with ``_``: then a change of one workflow is about no other one.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import linecache
import os
import sys
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import CodeType, ModuleType
from typing import Any, Final

_PREFIX: Final = "comfyd_workflows_"
_generations: Final = itertools.count(1)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the source each time; compiled code is neither read nor written."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return compile(self.get_data(path), path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules below our packages, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del target
        if not fullname.startswith(_PREFIX) or path is None:
            return None
        stem = fullname.rpartition(".")[2]
        for folder in path:
            file = os.path.join(folder, f"{stem}.py")
            if os.path.isfile(file):
                if not any(part.startswith("_") for part in fullname.split(".")):
                    raise ImportError(
                        f"{stem}.py is a workflow; what several share must be in a file that begins with _ (_{stem}.py)"
                    )
                return _spec(fullname, file)
            below = os.path.join(folder, stem)
            if os.path.isdir(below):
                return _package(fullname, below)
        return None


_FINDER: Final = _Finder()


def _spec(name: str, file: str) -> importlib.machinery.ModuleSpec:
    spec = importlib.machinery.ModuleSpec(name, _Loader(name, file), origin=file)
    spec.has_location = True  # or the module had no __file__
    return spec


def _package(name: str, folder: str) -> importlib.machinery.ModuleSpec:
    init = os.path.join(folder, "__init__.py")
    has_init = os.path.isfile(init)
    spec = _spec(name, init) if has_init else importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [folder]
    return spec


class Modules:
    """The modules of one loading of *folder*. What was loaded keeps working for as long as this object lives."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = f"{_PREFIX}{next(_generations)}"
        if _FINDER not in sys.meta_path:
            # First, as the usual finder would find the same files by their package's path.
            sys.meta_path.insert(0, _FINDER)
        weakref.finalize(self, _forget, self._root)

    def load(self, relative: PurePosixPath) -> ModuleType:
        """Run the file *relative*, once.

        Raises:
            BaseException: whatever the file raises, a SyntaxError too.
        """
        package = self._package_of(relative.parent)
        name = f"{package}.{_module_name(relative.stem)}-workflow"  # no name that can be imported
        path = str(self._folder / relative)
        module = importlib.util.module_from_spec(_spec(name, path))
        sys.modules[name] = module  # before it runs: attrs and typing look a class's module up there
        try:
            _Loader(name, path).exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)
            raise
        return module

    def _package_of(self, folder: PurePosixPath) -> str:
        name = self._root
        here = self._folder
        self._make_package(name, here)
        for part in folder.parts:
            name = f"{name}.{_module_name(part)}"
            here = here / part
            self._make_package(name, here)
        return name

    def _make_package(self, name: str, folder: Path) -> None:
        if name not in sys.modules:
            module: Any = ModuleType(name)
            module.__path__ = [str(folder)]
            module.__package__ = name
            sys.modules[name] = module


def _module_name(part: str) -> str:
    """Make a name without dots of ``sd1.5``; the checksum keeps it apart from ``sd1_5``."""
    if part.isidentifier():
        return part
    plain = "".join(c if c.isalnum() else "_" for c in part)
    return f"{plain}_{zlib.crc32(part.encode('utf-8', 'surrogateescape')):08x}"


def _forget(root: str) -> None:
    for name in [name for name in linecache.cache if f"{root}." in name]:  # attrs puts the code it generates there
        linecache.cache.pop(name, None)
    for name in [name for name in sys.modules if name == root or name.startswith(f"{root}.")]:
        sys.modules.pop(name, None)
