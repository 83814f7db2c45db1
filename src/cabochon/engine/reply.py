"""How a reply grows by a drawn token, by those that a constraint forces after it, and when it ends."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .track import Track


def extend(track: Track, token: int) -> None:
    """Append a drawn token and those that are forced after it; ends the reply where one of them does."""
    constraint = track.constraint
    track.append(token)
    try:
        if constraint is not None:
            constraint.advance(token)
        _see_end(track, token)
        if constraint is not None and track.finish is None:
            for forced in constraint.forced():
                track.append(forced)
                constraint.advance(forced)
                _see_end(track, forced)
                if track.finish is not None:
                    break
    except RequestError as error:
        track.end("error", error=error)
    except Exception as error:  # a foreign object: whatever it raises ends this request only
        track.end("error", error=f"The constraint of this request failed: {error}")


def _see_end(track: Track, token: int) -> None:
    request, params = track.request, track.request.params
    if (token in request.eos_ids and not params.ignore_eos) or token in params.stop_token_ids:
        track.end("stop", stop=token)
    elif track.constraint is not None and track.constraint.done():
        track.end("stop")
    elif track.generated >= (params.max_tokens or 1):
        track.end("length")
    elif request.loop_guard and track.generated % 16 == 0 and loops(track.ids, request.loop_guard, track.generated):
        track.end("loop")


def loops(ids: NDArray[np.int64], window: int, generated: int) -> bool:
    """Do the last `window` tokens of a reply repeat a cycle of at most a quarter of them?"""
    if generated < window:
        return False
    tail = ids[-window:]
    return any(bool((tail[period:] == tail[:-period]).all()) for period in range(1, window // 4 + 1))
