"""`cabochon chat` and `cabochon run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..chat.messages import Message, Text, ToolCall
from ..errors import CabochonError, InputError
from . import inputs
from .screen import Screen, reply_as_json, spell_call
from .session import Session

if TYPE_CHECKING:
    from ..engine.request import SamplingParams
    from ..llm import LLM

BANNER = (
    "pebble, a small demonstration model made for this package, without Google's weights: "
    "sums, a few tools, little else. For the real ones see: cabochon models"
)

Model = Annotated[str | None, typer.Argument(help="A folder, a repository or a short name; none: the bundled model.")]
System = Annotated[str | None, typer.Option("--system", "-s", help="The system prompt.")]
Tools = Annotated[Path | None, typer.Option(help="A JSON file with tool declarations.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or auto.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Context in tokens; less needs less memory.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; unset: what the checkpoint says.")]
TopP = Annotated[float | None, typer.Option()]
TopK = Annotated[int | None, typer.Option()]
MaxTokens = Annotated[int | None, typer.Option(help="End a reply after so many tokens.")]
Seed = Annotated[int | None, typer.Option(help="Draw the same reply again.")]


def chat(
    model: Model = None,
    system: System = None,
    tools: Tools = None,
    think: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
) -> None:
    """Talk to a model. Lines may be piped in as well, one message each."""
    screen = Screen()
    session = Session(think, system, inputs.read_tools_file(tools) if tools else ())
    llm = _load(screen, model, device, dtype, max_model_len)
    params = _params(temperature, top_p, top_k, max_tokens, seed)
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
            _turn(llm, session, screen, lines, params, line)


def run(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL] PROMPT", help="A single word group is the prompt.")
    ] = None,
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="Add a file; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole reply as one JSON object.")] = False,
    system: System = None,
    tools: Tools = None,
    think: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
) -> None:
    """Answer one prompt. Piped text is added to it; only the answer goes to stdout."""
    words = words or []
    if len(words) > 2:
        raise InputError(f"run takes [MODEL] PROMPT, but {len(words)} arguments came; put the prompt into quotes.")
    prompt = words[-1] if words else ""
    if inputs.piped():
        prompt = "\n\n".join(filter(str.strip, [prompt, inputs.read_stdin()]))
    content = tuple(inputs.parts(prompt, file or []))
    if not content:
        raise InputError("There is no prompt; give one as an argument or pipe it in.")
    opening = [Message("system", (Text(system),))] if system else []
    offered = inputs.read_tools_file(tools) if tools else ()
    screen = Screen(quiet=True)
    llm = _load(screen, words[0] if len(words) == 2 else None, device, dtype, max_model_len)
    params = _params(temperature, top_p, top_k, max_tokens, seed)
    events = llm.stream([*opening, Message("user", content)], tools=offered, thinking=think, params=params)
    if as_json:
        from ..chat.messages import Reply

        print(json.dumps(reply_as_json(Reply.of(events)), ensure_ascii=False))
        return
    reply = screen.show(events)
    if reply.tool_calls and not reply.text:
        print("\n".join(map(spell_call, reply.tool_calls)))


def _turn(llm: LLM, session: Session, screen: Screen, lines: inputs.Lines, params: SamplingParams, line: str) -> None:
    """One line of the user's, and what follows from it. What goes wrong is said; the chat goes on."""
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
        _reply(llm, session, screen, lines, params)
    except CabochonError as error:
        session.messages = before
        screen.complain(str(error))
        if inputs.piped():
            raise


def _reply(llm: LLM, session: Session, screen: Screen, lines: inputs.Lines, params: SamplingParams) -> None:
    """The model's reply, and again after its tool calls were answered, until it calls no more."""
    while True:
        stream = llm.stream(session.conversation(), tools=session.tools, thinking=session.thinking, params=params)
        reply = screen.show(stream)
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


def _load(screen: Screen, model: str | None, device: str, dtype: str, max_model_len: int | None) -> LLM:
    with screen.err.status(f"Loading {model or 'pebble'} ..."):
        from ..llm import LLM

        return LLM(model, device=device, dtype=dtype, max_model_len=max_model_len)


def _params(
    temperature: float | None, top_p: float | None, top_k: int | None, max_tokens: int | None, seed: int | None
) -> SamplingParams:
    from ..engine.request import SamplingParams

    wanted: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return SamplingParams(**wanted, max_tokens=max_tokens, seed=seed)
