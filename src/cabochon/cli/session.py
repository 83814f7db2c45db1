"""A chat's state and its slash commands, without a terminal and without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..chat.events import Reply
from ..chat.messages import Message, Part, Text, Tool, read_messages, read_tools
from ..errors import InputError
from . import inputs

HELP = """\
/think on|off     let the model think before it answers
/system [TEXT]    set the system prompt; without a text, remove it
/tools [FILE]     offer the tools declared in a JSON file; without a file, none
/file PATH        add an image, sound, video or text file to the next message
/image PATH|URL   add an image; /audio and /video likewise
/retry            forget the last reply and ask again
/new              forget the conversation
/save FILE        write the conversation to a JSON file
/load FILE        go on with a saved one
/quit             leave (so does Ctrl-D); Ctrl-C stops a reply
A line ending in \\ goes on in the next one; \"\"\" opens and closes a block of lines."""


@dataclass
class Session:
    """What has been said and how to go on."""

    thinking: bool = True
    system: str | None = None
    tools: tuple[Tool, ...] = ()
    messages: list[Message] = field(default_factory=list)
    attached: list[Part] = field(default_factory=list)
    over: bool = False

    def conversation(self) -> list[Message]:
        """The messages for the model."""
        opening = [Message("system", (Text(self.system),))] if self.system else []
        return opening + self.messages

    def ask(self, text: str) -> None:
        """The user speaks, with whatever was attached."""
        self.messages.append(Message("user", (*self.attached, Text(text))))
        self.attached = []

    def take(self, reply: Reply) -> None:
        """The model has spoken."""
        if reply.text or reply.tool_calls:
            self.messages.append(reply.message())

    def answer(self, call_id: str, result: str) -> None:
        """A tool call's result, as JSON if it is a JSON object, else as text."""
        try:
            value = json.loads(result)
        except ValueError:
            value = None
        if isinstance(value, dict):
            self.messages.append(Message("tool", tool_call_id=call_id, tool_responses=(("", value),)))
        else:
            self.messages.append(Message("tool", (Text(result),), tool_call_id=call_id))

    def command(self, line: str) -> tuple[str, bool]:
        """Carry out a slash command: (what to tell the user, must the model speak now?).

        Raises:
            InputError: no such command, or it can't be done; the session is as before.
        """
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], str]] = {
            "think": self._think,
            "system": self._system,
            "tools": self._tools,
            "file": self._file,
            "image": lambda rest: self._media("image", rest),
            "audio": lambda rest: self._media("audio", rest),
            "video": lambda rest: self._media("video", rest),
            "new": self._new,
            "save": self._save,
            "load": self._load,
            "help": lambda _: HELP,
            "quit": self._quit,
            "exit": self._quit,
            "retry": self._retry,
        }
        if name not in commands:
            raise InputError(f"There is no command /{name}; /help lists them.")
        return commands[name](rest.strip()), name == "retry"

    def _think(self, rest: str) -> str:
        if rest not in ("on", "off"):
            raise InputError(f"/think takes on or off, not {rest!r}; it is {'on' if self.thinking else 'off'} now.")
        self.thinking = rest == "on"
        return f"Thinking is {rest}."

    def _system(self, rest: str) -> str:
        self.system = rest or None
        return "The system prompt is set." if rest else "There is no system prompt now."

    def _tools(self, rest: str) -> str:
        self.tools = inputs.read_tools_file(Path(rest).expanduser()) if rest else ()
        names = ", ".join(tool.name for tool in self.tools)
        return f"The model may call {names}; you answer for them." if names else "There are no tools now."

    def _file(self, rest: str) -> str:
        if not rest:
            raise InputError("/file needs a path.")
        self.attached.append(inputs.read_part(Path(rest).expanduser()))
        return f"{rest} goes with the next message."

    def _media(self, kind: Literal["image", "video", "audio"], rest: str) -> str:
        if not rest:
            raise InputError(f"/{kind} needs a path or a URL.")
        self.attached += inputs.media(kind, [rest])
        return f"{rest} goes with the next message."

    def _new(self, rest: str) -> str:
        self.messages.clear()
        return "The conversation is empty."

    def _quit(self, rest: str) -> str:
        self.over = True
        return ""

    def _retry(self, rest: str) -> str:
        last = next((i for i in reversed(range(len(self.messages))) if self.messages[i].role == "user"), None)
        if last is None:
            raise InputError("There is nothing to retry yet.")
        del self.messages[last + 1 :]
        return ""

    def _save(self, rest: str) -> str:
        if not rest:
            raise InputError("/save needs a file name.")
        saved = {
            "thinking": self.thinking,
            "system": self.system,
            "tools": [_tool_as_dict(tool) for tool in self.tools],
            "messages": [message.as_dict() for message in self.messages],
        }
        try:
            Path(rest).expanduser().write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{rest} can't be written ({error.strerror}).") from None
        return f"{len(self.messages)} messages are in {rest}."

    def _load(self, rest: str) -> str:
        saved = inputs.read_json(Path(rest).expanduser())
        if not isinstance(saved, dict) or "messages" not in saved:
            raise InputError(f"{rest} isn't a conversation that /save wrote.")
        messages, tools = read_messages(saved["messages"]), read_tools(saved.get("tools"))
        self.messages, self.tools = list(messages), tools
        self.system, self.thinking = saved.get("system"), bool(saved.get("thinking"))
        return f"{len(self.messages)} messages are back."


def _tool_as_dict(tool: Tool) -> dict[str, object]:
    return {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "response": tool.response,
        "strict": tool.strict,
    }
