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
