"""One exception tree.

    CabochonError
    ├── InputError            what the user gave can't be used            exit 2, HTTP 400
    │   ├── CheckpointError   a folder or file is damaged or incomplete
    │   │   └── ConfigError   config.json names something unknown or contradictory
    │   ├── RequestError      a prompt, a parameter, a message, a schema (`field` names it)
    │   │   └── ContextError  prompt plus reply can't fit in the context
    │   └── MediaError        an image, a video or a sound can't be read or is not allowed
    ├── UnknownModelError     no such model, reply or file                exit 2, HTTP 404
    ├── AccessError           a key or a licence is missing               exit 2, HTTP 401
    ├── NetworkError          the Hub can't be reached or broke off       exit 1, HTTP 503
    ├── BusyError             the queue is full; try again later          exit 1, HTTP 429
    └── EngineError           a fault of ours; one request fails, not all exit 1, HTTP 500

Every message is one sentence for a person: what came, what was allowed, what to do.
"""

import reprlib

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80
_SHOWN.maxlist = 8


def brief(value: object) -> str:
    """A stranger's value as messages show it: like `repr`, but cut where it gets long."""
    return _SHOWN.repr(value)


class CabochonError(Exception):
    """Root of every error that the package raises on purpose."""

    status = 500
    exit_code = 1


class InputError(CabochonError):
    """What the user gave can't be used as it is."""

    status = 400
    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint folder or file is damaged, incomplete or of an unknown kind."""


class ConfigError(CheckpointError):
    """A config.json can't be understood."""


class RequestError(InputError):
    """A prompt, a message, a parameter or a schema can't be served.

    `field` is the name of the offending field as the caller spelt it, for example `messages[0].role`.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ContextError(RequestError):
    """Prompt plus reply can't fit; the message holds both numbers."""


class MediaError(InputError):
    """An image, a video or a sound can't be read, is too large or comes from a forbidden place."""


class UnknownModelError(CabochonError):
    """No model (or stored reply) of that name."""

    status = 404
    exit_code = 2


class AccessError(CabochonError):
    """A key, a token or an accepted licence is missing."""

    status = 401
    exit_code = 2


class NetworkError(CabochonError):
    """The Hub can't be reached, or a download broke off."""

    status = 503


class BusyError(CabochonError):
    """The queue is full. `retry_after` is in seconds."""

    status = 429

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(CabochonError):
    """A fault inside the engine; the request that met it fails, the others go on."""
