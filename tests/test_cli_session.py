"""A chat's state and screen, without a process: commands, files, tools answered by hand, what is printed where."""

import io
import json
import os
import signal
import sys

import pytest

from cabochon.chat.events import Finish, Reply, TextDelta, ThinkingDelta, ToolCallDelta, Warned
from cabochon.chat.messages import Media, Message, Text, ToolCall
from cabochon.cli import inputs, talk
from cabochon.cli.screen import Screen
from cabochon.cli.session import Session
from cabochon.errors import InputError

TOOL = {
    "name": "weather",
    "description": "Look.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def test_a_session_saves_and_loads(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    (tmp_path / "notes.txt").write_text("Rain.")
    session = Session()
    session.command("/system Be brief.")
    session.command("/think off")
    assert "weather" in session.command(f"/tools {tmp_path / 'tools.json'}")[0]
    session.command(f"/file {tmp_path / 'notes.txt'}")
    session.ask("Weather?")
    session.take(Reply("", "Hm.", (ToolCall("weather", {"city": "Oslo"}, "1"),), "tool_calls"))
    session.answer("1", '{"sky": "clear"}')
    session.take(Reply("Clear."))
    session.command(f"/save {tmp_path / 'chat.json'}")
    other = Session()
    other.command(f"/load {tmp_path / 'chat.json'}")
    assert other == session
    assert [message.role for message in other.conversation()] == ["system", "user", "assistant", "tool", "assistant"]
    assert other.conversation()[1].content == (Text("notes.txt:\nRain.\n\n"), Text("Weather?"))
    assert other.conversation()[3].tool_responses == (("", {"sky": "clear"}),)
    other.command("/new")
    other.command("/system")
    other.command("/tools")
    assert (other.conversation(), other.tools) == ([], ())


def test_retry_forgets_the_last_reply():
    session = Session()
    with pytest.raises(InputError, match="nothing to retry"):
        session.command("/retry")
    session.ask("Hi")
    session.take(Reply("Hello."))
    assert session.command("/retry") == ("", True)
    assert [message.text for message in session.messages] == ["Hi"]
    session.take(Reply(""))
    assert len(session.messages) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/think maybe", "takes on or off, not 'maybe'; it is on now"),
        ("/file", "needs a path"),
        ("/save", "needs a file name"),
        ("/save /no/such/folder/x", "can't be written"),
        ("/tools nowhere.json", "can't be read"),
        ("/file nowhere.png", "no file nowhere.png"),
        ("/load pyproject.toml", "isn't JSON"),
    ],
)
def test_commands_that_cannot_be_carried_out(line, words):
    with pytest.raises(InputError, match=words):
        Session().command(line)


def test_files_become_parts(tmp_path):
    for name in ("cat.png", "song.mp3", "film.mp4", "a.py"):
        (tmp_path / name).write_text("x = 1")
    found = list(inputs.parts("Look", [tmp_path / name for name in ("a.py", "cat.png", "song.mp3", "film.mp4")]))
    assert [part.kind if isinstance(part, Media) else part.text for part in found] == [
        *("image", "audio", "video", "a.py:\nx = 1\n\n", "Look"),
    ]


def test_lines_that_go_on(monkeypatch):
    typed = b'one\\\ntwo\n"""\nthree\n\nfour\n"""\n"""five"""\nsix\\\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    lines = inputs.Lines()
    assert [lines.ask("> ") for _ in range(5)] == ["one\ntwo", "three\n\nfour", "five", "six", None]


class Scripted:
    """Says one list of events after the other, and remembers what it was asked."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.asked = []

    def events(self, messages, tools, thinking, schema=None):
        self.asked.append([message.role for message in messages])
        return iter(self.replies.pop(0))


def test_the_user_answers_tool_calls(monkeypatch, capsys):
    call = ToolCallDelta(0, ToolCall("weather", {"city": "Oslo"}, "1"))
    speaker = Scripted([call, Finish("tool_calls")], [TextDelta("Rain."), Finish("stop")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"rain\n")))
    session = Session()
    talk._turn(speaker, session, Screen(), inputs.Lines(), "Weather?")
    assert speaker.asked == [["user"], ["user", "assistant", "tool"]]
    assert session.messages[2] == Message("tool", (Text("rain"),), tool_call_id="1")
    assert capsys.readouterr().out == '→ weather(city="Oslo")\nRain.\n'


def test_thinking_text_and_warnings_keep_apart(capsys):
    events = [ThinkingDelta("Hm"), ThinkingDelta("."), TextDelta("A"), TextDelta("B"), Warned("odd"), TextDelta("C")]
    reply = Screen(quiet=True).show([*events, Finish("stop")])
    assert reply == Reply("ABC", "Hm.", warnings=("odd",))
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("AB\nC\n", "Hm.\nodd\n")


def test_a_model_cannot_steer_the_terminal():
    screen = Screen()
    screen.out.file = io.StringIO()
    screen.out._force_terminal = True
    screen.show([TextDelta("\x1b]0;owned\x07\x1b[2Jok\n\ttab\x9b"), Finish("stop")])
    assert screen.out.file.getvalue() == "␛]0;owned␇␛[2Jok\n\ttab\ufffd\n"


def test_ctrl_c_ends_the_reply_and_keeps_what_came(capsys):
    closed = []

    def reply():
        try:
            yield TextDelta("one ")
            os.kill(os.getpid(), signal.SIGINT)
            yield TextDelta("two ")
            yield TextDelta("never")
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGINT)
    assert Screen().show(reply()).text == "one two "
    assert closed == [True]
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out == "one two \n"
