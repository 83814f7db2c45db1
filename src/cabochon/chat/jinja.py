"""Chat templates that a checkpoint brings along: known ones are rendered natively, others through sandboxed Jinja.

Jinja writes one string, in which a control token typed by a user could not be told from one that the template wrote. So
before rendering, the characters that control tokens are made of are replaced in the conversation by stand-ins, one by
one (a token may be spelt by two strings that the template joins), and put back when the rendered string is tokenised.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError, RequestError
from .callsyntax import Writer
from .messages import Conversation, Media, Message, ParserState, Prompt, Tool, read_messages, read_tools
from .template import ChatTemplate, Family, Template, settle_thinking
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

KNOWN: dict[str, Family] = {
    "0a2c8073c878ab1da004bee933a998606537bbb62016310352c7285c3f01c5b5": "small",  # July 2026
    "ae53464bf3be25802b3a5b37def7fd89667067d7577049b3b2d74c4d8de4c6d4": "large",  # July 2026
}
"""sha256 of the published templates that the native one equals -> family."""

OUTDATED: dict[str, Family] = {
    "2dfbfc7d538912f4ea11d29d85b4e25d7bc26386e53f57529f1d707c28b5828c": "large",  # April 2026, 26B-A4B
    "85a08664d16d8f3be4416c92427b3ac10df1024ac566cc0b4bc3bab409393f98": "large",  # May 2026, 31B
}
"""Published earlier and replaced since, because tool loops went wrong with them."""

_HIDE = str.maketrans("<|>", "\ufdd0\ufdd1\ufdd2", "\ufdd0\ufdd1\ufdd2")
_SHOW = str.maketrans("\ufdd0\ufdd1\ufdd2", "<|>")
"""The stand-ins are no characters at all in Unicode, so nobody misses them where they came in by themselves."""


def template_for(
    folder: Path | None, tokenizer: Tokenizer, family: Family, template_file: Path | None = None
) -> ChatTemplate:
    """The template that a checkpoint's conversations are rendered with.

    Args:
        folder: the checkpoint; None if it has none.
        family: what the checkpoint's shape says, for a folder without a chat template.
        template_file: a Jinja file of the user's choice, taken as it is.

    Raises:
        CheckpointError: the file can't be read, or isn't Jinja.
    """
    if template_file is not None:
        return JinjaTemplate(_read(template_file), tokenizer, str(template_file))
    source = published_template(folder) if folder is not None else None
    return template_from(source, str(folder), tokenizer, family)


def template_from(source: str | None, origin: str, tokenizer: Tokenizer, family: Family) -> ChatTemplate:
    """The template for a checkpoint that carries the Jinja text `source` (None: none); `origin` is for messages."""
    if source is None:
        return Template(tokenizer, family)
    digest = hashlib.sha256(source.encode()).hexdigest()
    if digest in KNOWN:
        return Template(tokenizer, KNOWN[digest])
    if digest in OUTDATED:
        log.warning("%s carries an outdated chat template; the one of July 2026 is used instead.", origin)
        return Template(tokenizer, OUTDATED[digest])
    log.warning(
        "%s carries a chat template of its own (sha256 %s...); it is rendered through Jinja.", origin, digest[:12]
    )
    return JinjaTemplate(source, tokenizer, origin)


def published_template(folder: Path) -> str | None:
    """The Jinja source that a checkpoint folder carries, in chat_template.jinja or in tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return _read(folder / "chat_template.jinja")
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        source = json.loads(_read(config)).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} isn't a JSON object ({error}).") from None
    return source if isinstance(source, str) else None


def describe_template(folder: Path) -> str:
    """How a folder's conversations are rendered, in a few words."""
    source = published_template(folder)
    if source is None:
        return "none of its own; rendered natively"
    digest = hashlib.sha256(source.encode()).hexdigest()
    if digest in KNOWN:
        return f"July 2026, {KNOWN[digest]} models; rendered natively"
    if digest in OUTDATED:
        return "outdated; the one of July 2026 is used instead"
    return f"its own (sha256 {digest[:12]}...); rendered through Jinja"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"The chat template {path} can't be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"The chat template {path} isn't UTF-8 text; save it as UTF-8.") from None


class JinjaTemplate:
    """A chat template in Jinja, given the names that `transformers` gives it."""

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "chat template") -> None:
        self.tokenizer = tokenizer
        self.name = name
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _tojson
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"{name} isn't a Jinja template ({error}).") from None
        self._ids = {spelling: i for i, spelling in tokenizer.control.items()}
        self._spelling = re.compile("|".join(re.escape(s) for s in sorted(self._ids, key=len, reverse=True)))
        self._media = {tokenizer.image, tokenizer.audio, tokenizer.video}

    def render(
        self,
        messages: Conversation,
        *,
        tools: Iterable[Tool | Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        preserve_thinking: bool = False,
    ) -> Prompt:
        """See `ChatTemplate.render`. What the template itself refuses is a `RequestError` too."""
        read, thinks, notices = settle_thinking(read_messages(messages), thinking)
        try:
            text = self._template.render(
                messages=[_hidden(_as_template_dict(message)) for message in read],
                tools=[_hidden(_as_declaration(tool)) for tool in read_tools(tools)] or None,
                enable_thinking=thinks,
                preserve_thinking=preserve_thinking,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.tokenizer.control[self.tokenizer.bos],
                eos_token=self.tokenizer.control[self.tokenizer.eos],
            )
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise RequestError(f"{self.name} can't render this conversation ({error}).") from None
        out = Writer(self.tokenizer)
        self._write(text, out, [part for message in read for part in message.content if isinstance(part, Media)])
        boundary = out.mark()
        return Prompt(tuple(out.ids), self._state(out.ids), (boundary,), tuple(out.slots), tuple(notices))

    def _write(self, text: str, out: Writer, media: list[Media]) -> None:
        """Control tokens that the template wrote become tokens; those of the conversation become text again."""
        waiting, start = list(media), 0
        for found in self._spelling.finditer(text):
            out.text(text[start : found.start()].translate(_SHOW))
            token_id, start = self._ids[found[0]], found.end()
            if token_id in self._media and waiting:
                out.media(waiting.pop(0))
            else:
                out.control(token_id)
        out.text(text[start:].translate(_SHOW))
        if waiting:
            raise RequestError(f"The chat template leaves out {len(waiting)} of the {len(media)} media parts.")

    def _state(self, ids: list[int]) -> ParserState:
        """Read off the prompt's end."""
        tokenizer = self.tokenizer
        heading = [tokenizer.channel_open, *tokenizer.encode("thought\n")]
        if ids[-len(heading) :] == heading:
            return "thought"
        closed = (tokenizer.channel_close, tokenizer.tool_response_close, tokenizer.tool_response_open)
        return "content" if ids and ids[-1] in closed else "start"


def _hidden(value: Any) -> Any:
    """The value with every string in it, keys too, disguised."""
    if isinstance(value, str):
        return value.translate(_HIDE)
    if isinstance(value, Mapping):
        return {_hidden(key): _hidden(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(inner) for inner in value]
    return value


def _as_template_dict(message: Message) -> dict[str, Any]:
    """Like `Message.as_dict`, but with arguments as mappings and both names for thinking, as templates expect."""
    raw = message.as_dict()
    for call, read in zip(raw.get("tool_calls", ()), message.tool_calls, strict=True):
        call["function"]["arguments"] = read.arguments
    if message.thinking is not None:
        raw["reasoning_content"] = message.thinking
    return raw


def _as_declaration(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    if tool.response is not None:
        function["response"] = tool.response
    return {"type": "function", "function": function}


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML, which no model has been trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)
