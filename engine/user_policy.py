"""A policy of the user's own: a module that may lie in the working directory, or a file by its path."""

import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import xxhash

from pagellm.engine.errors import ConfigError

_files: dict[tuple[str, bytes], ModuleType] = {}  # by path and by what the file holds


def import_policy(name: object, setting: str = "policy") -> None:
    """Imports the module of a policy that is named as module:Class, so that a scheduler can load it.

    The module, and what it imports at its top, may be in the working directory, after all other places. Only
    here is anything looked for there, because what lies in a directory may be anybody's. A name of another
    form is left to the scheduler. Raises `ConfigError` if the module cannot be imported.
    """
    module = name.rpartition(":")[0] if isinstance(name, str) else ""
    if not module or module in sys.modules or _is_file(module) or "/" in module:
        return
    here = os.path.abspath(os.curdir)
    is_added = here not in sys.path
    if is_added:
        sys.path.append(here)
    try:
        import_module(module)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ConfigError(f"{setting}: {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        if is_added and here in sys.path:
            sys.path.remove(here)


def user_module(name: str) -> ModuleType:
    """A module by its name as in an import, or by the path of its file, which ends in .py.

    A file is run once for each content that it has had. Raises whatever it or an import raises.
    """
    if not _is_file(name):
        return import_module(name)
    path = os.path.abspath(name)
    source = Path(path).read_bytes()
    key = path, source
    if key not in _files:
        module = ModuleType(f"{Path(path).stem}_{xxhash.xxh32_hexdigest(os.fsencode(path))}")
        module.__file__ = path
        sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
        exec(compile(source, path, "exec"), module.__dict__)
        _files[key] = module
    return _files[key]


def _is_file(module: str) -> bool:
    return module.endswith(".py")
