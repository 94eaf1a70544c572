"""A scheduling policy of the user's own, which may lie in the working directory."""

import os
import sys
from importlib import import_module

from pagellm.engine.errors import ConfigError


def import_policy(name: object) -> None:
    """Imports the module of a policy that is named as module:Class, so that a scheduler can load it.

    The module, and what it imports at its top, may be in the working directory, after all other places. Only
    here is anything looked for there, because what lies in a directory may be anybody's. A name of another
    form is left to the scheduler. Raises `ConfigError` if the module cannot be imported.
    """
    module = name.partition(":")[0] if isinstance(name, str) and ":" in name else ""
    if not module or module in sys.modules or "/" in module or module.endswith(".py"):
        return
    here = os.path.abspath(os.curdir)
    is_added = here not in sys.path
    if is_added:
        sys.path.append(here)
    try:
        import_module(module)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ConfigError(f"policy: {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        if is_added and here in sys.path:
            sys.path.remove(here)
