"""The error tree. A message says what happened, where, and what to do about it.

::

    NanoflowError
    +-- ConfigError             an option or setting is unknown or has a bad value
    +-- ModelLoadError          weights or configuration cannot be found, read or trusted
    +-- UnsupportedGraphError   the model does something that we cannot represent
    +-- InvalidProgramError     a step broke the rule of its value (``where`` names the step)
    +-- CaptureError            a step cannot be captured as a CUDA graph
    +-- OutOfBlocksError        the KV cache cannot hold what was asked
    +-- EngineDeadError         the engine stopped by itself, with all that it was running
    +-- RequestError            one request is refused
        +-- EmptyPromptError    the prompt has no tokens
        +-- PromptTooLongError  the prompt exceeds the model's or the cache's limit
        +-- EngineClosedError   the engine no longer accepts requests
"""

__all__ = [
    "CaptureError",
    "ConfigError",
    "EmptyPromptError",
    "EngineClosedError",
    "EngineDeadError",
    "InvalidProgramError",
    "ModelLoadError",
    "NanoflowError",
    "OutOfBlocksError",
    "PromptTooLongError",
    "RequestError",
    "UnsupportedGraphError",
]


class NanoflowError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(NanoflowError, ValueError):
    """An option or setting is unknown or has a value that cannot be used."""


class ModelLoadError(NanoflowError):
    """Weights, tokenizer or configuration cannot be found, read or trusted."""


class UnsupportedGraphError(NanoflowError):
    """The model does something that the compiler cannot represent."""


class InvalidProgramError(NanoflowError):
    """A step broke the rule of the value that it made.

    ``where`` is the name of the step (a pass, or ``"parse"``, ``"run"``).
    """

    def __init__(self, message: str, *, where: str) -> None:
        super().__init__(f"{where}: {message}")
        self.where = where


class CaptureError(NanoflowError):
    """A step cannot be captured as a CUDA graph; it runs, launched one operation at a time."""


class OutOfBlocksError(NanoflowError):
    """The KV cache cannot hold what was asked of it."""


class EngineDeadError(NanoflowError):
    """The engine stopped by itself; every request that it was running is lost."""


class RequestError(NanoflowError, ValueError):
    """One request is refused; the engine goes on."""


class EmptyPromptError(RequestError):
    """The prompt has no tokens."""


class PromptTooLongError(RequestError):
    """The prompt exceeds the model's context or the whole KV cache."""


class EngineClosedError(RequestError):
    """The engine is closed and accepts no more requests."""
