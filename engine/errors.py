"""Every error that pagellm raises on purpose, so that a caller can catch one class.

Each message names the place (file, field, parameter), the value found and the value expected.
"""


class PagellmError(Exception):
    """Anything that pagellm refuses or cannot do."""


class ConfigError(PagellmError, ValueError):
    """A setting of the engine that is out of range or contradicts another one."""


class CheckpointError(PagellmError):
    """A model that cannot be found, read or supported."""


class RequestError(PagellmError, ValueError):
    """A request that cannot be served: a bad prompt or bad sampling parameters."""


class PolicyError(PagellmError):
    """A scheduling policy that raised, or answered with what is no answer."""


class TraceError(PagellmError, ValueError):
    """A trace, or a description of one, that cannot be read or made."""


class ProfileError(PagellmError, ValueError):
    """A cost profile or a step log that cannot be read, or is of something else."""


class ReportError(PagellmError, ValueError):
    """A report of a replay, or a step log, that cannot be read or written."""
