"""pagellm: a paged LLM inference engine for CPUs, and its simulator. The names of `engine` are here as well.

The three packages lie side by side at the top of the repository, and are installed beneath this one; in a
checkout three links stand here for them, so that Python, type checkers and editors find the same names.
Nothing is imported before it is used: the simulator alone needs little of the engine.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in `typing`, which need not be imported for it
if TYPE_CHECKING:
    from pagellm.engine import *  # noqa: F403


def __getattr__(name: str) -> object:
    """Imports a public name of `pagellm.engine` on its first use."""
    from importlib import import_module

    engine = import_module("pagellm.engine")
    if name not in engine.__all__:
        raise AttributeError(f"module 'pagellm' has no attribute {name!r}")
    return getattr(engine, name)
