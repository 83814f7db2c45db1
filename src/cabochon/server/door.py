"""The address that a server listens on, taken before the model is loaded: what is wrong with it shows at once."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack

from ..errors import InputError


def take(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of `host`, which nobody can connect to yet; port 0 is one that is free.

    Raises:
        InputError: this machine has no such address, or the port is taken or not allowed.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"The port is {port}, but must be between 1 and 65535, or 0 for one that is free.")
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise InputError(
            f"The host {host!r} is no address of this machine; take 127.0.0.1, or 0.0.0.0 for all."
        ) from None
    with ExitStack() as bound:
        doors = [bound.enter_context(_bound(family, place)) for family, _, _, _, place in dict.fromkeys(places)]
        bound.pop_all()
    return doors


def _bound(family: int, place: tuple[object, ...]) -> socket.socket:
    door = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # a server that has just left keeps its port for a while; elsewhere the option is theft
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        door.bind(place)
    except OSError as error:
        door.close()
        raise refused(error, place) from None
    return door


def refused(error: OSError, place: tuple[object, ...]) -> InputError:
    """Why the address can't be had, for a person."""
    host, port = place[:2]
    match error.errno:
        case errno.EADDRINUSE:
            return InputError(f"Port {port} of {host} is in use; stop what uses it, or take another with --port.")
        case errno.EADDRNOTAVAIL:
            return InputError(f"{host} is no address of this machine; take 127.0.0.1, or 0.0.0.0 for all.")
        case errno.EACCES:
            return InputError(f"Port {port} is not allowed to this user; take one above 1023 with --port.")
    return InputError(f"{host}:{port} can't be listened on ({error.strerror}); choose with --host and --port.")
