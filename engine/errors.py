"""Every error that pagellm raises on purpose, so that a caller can catch one class.

Each message names the place (file, field, parameter), the value found and the value expected.
"""

import reprlib

_SHOWN_CHARACTERS = 80

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _SHOWN_CHARACTERS
_repr.maxlevel = 3
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = _repr.maxfrozenset = 8


def named(name: str) -> str:
    """A name that a file gave to something, as an error message shows it: as it is where that is harmless."""
    return name if name.isprintable() and 0 < len(name) <= _SHOWN_CHARACTERS else found(name)


def found(value: object) -> str:
    """A value as an error message shows it: one short line, whatever its size."""
    try:
        text = _repr.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"an {type(value).__name__} too long to print"
    text = " ".join(text.splitlines())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def is_from_outside(error: BaseException) -> bool:
    """Whether an exception has nothing to do with what was being done: a handler of signals raised it.

    Such a handler, or a debugger's function, is called with the frame that it interrupts.
    """
    interrupted, traceback = None, error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if interrupted is not None:
            for value in frame.f_locals.values():
                values = value if isinstance(value, tuple) else (value,)
                if any(one is interrupted for one in values):
                    return True
        interrupted, traceback = frame, traceback.tb_next
    return False


class PagellmError(Exception):
    """Anything that pagellm refuses or cannot do."""


class ConfigError(PagellmError, ValueError):
    """A setting of the engine that is out of range or contradicts another one."""


class CheckpointError(PagellmError):
    """A model that cannot be found, read or supported."""


class RequestError(PagellmError, ValueError):
    """A request that cannot be served: a bad prompt or bad sampling parameters."""


class EngineError(PagellmError):
    """A call that an engine does not take: it is closed, in another call, or was forked at work."""


class PolicyError(PagellmError):
    """A policy that raised, or answered with what is no answer.

    failure: what it did. then: what happens now.
    """

    def __init__(self, failure: str, then: str) -> None:
        super().__init__(f"{failure}; {then}")
        self.failure = failure


class TraceError(PagellmError, ValueError):
    """A trace, or a description of one, that cannot be read or made."""


class ProfileError(PagellmError, ValueError):
    """A cost profile or a step log that cannot be read, or is of something else."""


class ReportError(PagellmError, ValueError):
    """A report of a replay, or a step log, that cannot be read or written."""
