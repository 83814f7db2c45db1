"""What comes in: standard input, typed lines, files given by name."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ..chat.messages import Media, Part, Text, Tool, read_tools
from ..errors import InputError, MediaError

_KINDS = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac"),
    "video": (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"),
}


def piped() -> bool:
    """True if standard input is a pipe or a file instead of a terminal."""
    return not sys.stdin.isatty()


def read_stdin() -> str:
    """All of standard input as text."""
    return _utf8(sys.stdin.buffer.read(), "Standard input")


def _utf8(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = f"byte 0x{raw[error.start]:02x} at position {error.start}"
        raise InputError(f"{name} isn't UTF-8 text ({at}); convert it first, for example with iconv.") from None


class Lines:
    r"""User input, one message at a time, from a terminal (with history) or a pipe.

    A line that ends in a backslash goes on in the next one, and `\"\"\"` opens and closes a block of lines.
    """

    def __init__(self) -> None:
        self._terminal = not piped()
        if self._terminal:
            _remember_history()

    def ask(self, prompt: str) -> str | None:
        """The next message; None at the end of input."""
        line = self._line(prompt)
        if line is None:
            return None
        if line.lstrip().startswith('"""'):
            return self._block(line.lstrip()[3:])
        while line.endswith("\\"):
            more = self._line("... ")
            line = line[:-1] + ("" if more is None else "\n" + more)
        return line

    def _block(self, first: str) -> str:
        lines, line = [], first
        while '"""' not in line:
            lines.append(line)
            more = self._line("... ")
            if more is None:
                return "\n".join(lines)
            line = more
        lines.append(line[: line.index('"""')])
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if self._terminal:
            try:
                return input(prompt)
            except EOFError:
                return None
            except UnicodeDecodeError as error:
                raise InputError(f"The line typed isn't UTF-8 text ({error.reason}).") from None
        raw = sys.stdin.buffer.readline()
        return _utf8(raw, "Standard input").rstrip("\r\n") if raw else None


def _remember_history() -> None:
    """Arrow keys, and the lines of earlier chats."""
    try:
        import readline
    except ImportError:  # not on Windows
        return
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    history = home / "cabochon" / "history"
    with contextlib.suppress(OSError):
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        readline.read_history_file(history)
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, history)


def read_tools_file(path: Path) -> tuple[Tool, ...]:
    """Tools from a JSON file: a list of declarations, or one."""
    raw = read_json(path)
    return read_tools(raw if isinstance(raw, list) else [raw], str(path))


def read_json(path: Path) -> Any:
    """A JSON file's value."""
    try:
        return json.loads(_utf8(_bytes(path), str(path)))
    except ValueError as error:
        raise InputError(f"{path} isn't JSON ({error}).") from None


def read_part(path: Path) -> Part:
    """A file as a part of a message: media by its ending, anything else as text."""
    for kind in ("image", "audio", "video"):
        if path.suffix.lower() in _KINDS[kind]:
            if not path.is_file():
                raise MediaError(f"There is no file {path}.")
            return Media(kind, str(path))
    return Text(f"{path.name}:\n{_utf8(_bytes(path), str(path))}\n\n")


def media(kind: Literal["image", "video", "audio"], sources: Sequence[str] | None) -> list[Media]:
    """Parts from paths and URLs; a path must exist."""
    for source in sources or ():
        if ":" not in source and not Path(source).expanduser().is_file():
            raise MediaError(f"There is no file {source}.")
    return [Media(kind, source) for source in sources or ()]


def picture(content: Sequence[Part]) -> Media:
    """The one image of a message, for drawing into."""
    images = [part for part in content if isinstance(part, Media) and part.kind == "image"]
    if len(images) != 1:
        raise InputError(
            f"--draw needs exactly one image to draw into, but there are {len(images)}; add it with --image."
        )
    return images[0]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}).") from None


def parts(prompt: str, files: list[Path]) -> Iterator[Part]:
    """A message of files and text; media first, as the model was trained."""
    read = [read_part(path) for path in files]
    yield from sorted(read, key=lambda part: isinstance(part, Text))
    if prompt:
        yield Text(prompt)
