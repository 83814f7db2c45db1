"""`cabochon chat` and `cabochon run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..chat.events import Reply
from ..chat.messages import Message, Text, ToolCall
from ..errors import CabochonError, InputError
from . import inputs
from .choices import Choices, with_choices
from .draw import check_target, draw_answer
from .screen import CUT, Screen, reply_as_json, spell_call
from .session import Session
from .speaker import Speaker, open_speaker

BANNER = (
    "pebble, a small demonstration model made for this package, without Google's weights.\n"
    "It knows sums, shapes, a few tools, little else. For the real ones see: cabochon models"
)

Model = Annotated[str | None, typer.Argument(help="A folder, a repository or a short name; none: the bundled model.")]
System = Annotated[str | None, typer.Option("--system", "-s", help="The system prompt.")]
Tools = Annotated[Path | None, typer.Option(help="A JSON file with tool declarations.")]


@with_choices
def chat(
    model: Model = None,
    system: System = None,
    tools: Tools = None,
    think: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = True,
    *,
    choices: Choices,
) -> None:
    """Talk to a model. Lines may be piped in as well, one message each."""
    screen = Screen()
    session = Session(think, system, inputs.read_tools_file(tools) if tools else ())
    speaker = open_speaker(screen, model, choices)
    if model is None:
        screen.say(BANNER)
    if not inputs.piped():
        screen.say("/help lists the commands.")
    lines = inputs.Lines()
    while not session.over:
        try:
            line = lines.ask("> ")
        except KeyboardInterrupt:
            screen.say("\nCtrl-D or /quit leaves.")
            continue
        if line is None:
            break
        if line.strip():
            _turn(speaker, session, screen, lines, line)


@with_choices
def run(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL] PROMPT", help="A single argument is the prompt.")
    ] = None,
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="Add a file; may be repeated.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="Show an image, a path or a URL; may be repeated.")] = None,
    audio: Annotated[list[str] | None, typer.Option(help="Play a sound, a path or a URL; may be repeated.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Show a video, a path or a URL; may be repeated.")] = None,
    draw: Annotated[
        Path | None, typer.Option(help="Draw the boxes of the answer into the image; save it here.")
    ] = None,
    schema: Annotated[Path | None, typer.Option(help="The answer must be JSON that fits this JSON schema.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole reply as one JSON object.")] = False,
    system: System = None,
    tools: Tools = None,
    think: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = False,
    *,
    choices: Choices,
) -> None:
    """Answer one prompt. Piped text is added to it; only the answer goes to stdout."""
    words = words or []
    if len(words) > 2:
        raise InputError(f"run takes [MODEL] PROMPT, but {len(words)} arguments came; put the prompt into quotes.")
    prompt = words[-1] if words else ""
    if inputs.piped():
        prompt = "\n\n".join(filter(str.strip, [prompt, inputs.read_stdin()]))
    shown = [*inputs.media("image", image), *inputs.media("audio", audio), *inputs.media("video", video)]
    content = (*shown, *inputs.parts(prompt, file or []))
    if draw is not None:
        inputs.picture(content)  # said before the model runs
        check_target(draw)
    if not content:
        raise InputError("There is no prompt; give one as an argument or pipe it in.")
    opening = [Message("system", (Text(system),))] if system else []
    offered = inputs.read_tools_file(tools) if tools else ()
    wanted = inputs.read_json(schema) if schema else None
    screen = Screen(quiet=True)
    speaker = open_speaker(screen, words[0] if len(words) == 2 else None, choices)
    events = speaker.events([*opening, Message("user", content)], offered, think, wanted)
    if as_json:
        reply = Reply.of(events)
        print(json.dumps(reply_as_json(reply), ensure_ascii=False))
    else:
        reply = screen.show(events)
        if reply.tool_calls and not reply.text:
            print("\n".join(map(spell_call, reply.tool_calls)))
    if wanted is not None and reply.finish_reason in CUT:
        raise typer.Exit(1)  # half a JSON text must not look like a whole one
    if draw is not None:
        count = draw_answer(inputs.picture(content).source, reply.text, draw)
        screen.say(f"{count} boxes are drawn into {draw}.")


def _turn(speaker: Speaker, session: Session, screen: Screen, lines: inputs.Lines, line: str) -> None:
    """One line of the user's, and what follows from it. What goes wrong at a terminal is said, and the chat goes on."""
    before = list(session.messages)
    try:
        if line.startswith("/"):
            told, speak = session.command(line)
            if told:
                screen.say(told)
            if not speak:
                return
        else:
            session.ask(line)
        _reply(speaker, session, screen, lines)
    except CabochonError as error:
        session.messages = before
        if inputs.piped():
            raise
        screen.complain(str(error))


def _reply(speaker: Speaker, session: Session, screen: Screen, lines: inputs.Lines) -> None:
    """The model's reply, and again after its tool calls were answered, until it calls no more."""
    while True:
        reply = screen.show(speaker.events(session.conversation(), session.tools, session.thinking))
        session.take(reply)
        if reply.finish_reason != "tool_calls" or not _answer_calls(session, lines, reply.tool_calls):
            return


def _answer_calls(session: Session, lines: inputs.Lines, calls: tuple[ToolCall, ...]) -> bool:
    """Ask the user for every call's result; false at the end of input."""
    for call in calls:
        result = lines.ask(f"{call.name} answers: ")
        if result is None:
            return False
        session.answer(call.id, result)
    return True
