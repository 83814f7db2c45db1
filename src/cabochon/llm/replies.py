"""A reply's tokens as they come, made into text or events, and ended early where the text says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..chat.events import Event, Finish, FinishReason, TextDelta
from ..chat.messages import ParserState
from ..chat.parser import Parser
from ..chat.tokenizer import Tokenizer
from ..engine.request import Completion, EngineFinish, StepOutput, TokenLogprob
from ..errors import CabochonError, EngineError, RequestError


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step of the engine added to one reply."""

    index: int
    """Which of the n replies."""
    text: str = ""
    """Of a raw reply: the text that became certain."""
    events: tuple[Event, ...] = ()
    """Of a chat reply: the events that became certain."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    spoken: tuple[TokenLogprob, ...] = ()
    """Of a chat reply: those of `logprobs` whose tokens the answer's text shows."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: EngineFinish | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0


def failure(output: StepOutput) -> CabochonError:
    """What to raise for an output that ended in an error."""
    error = output.error
    return error if isinstance(error, RequestError) else EngineError(error or "The request failed.")


class StopStrings:
    """Cuts text at the first stop string; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit: str | None = None

    def portions(self, ids: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """A step's tokens as they are to be read: one by one where a stop string may end the reply between them."""
        if not self._stops:
            yield ids
            return
        for token in ids:
            if self.hit is None:
                yield (token,)

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string; nothing comes after a hit."""
        if self.hit is not None or not self._stops:
            return "" if self.hit is not None else text
        text = self._held + text
        found = min(((at, stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self._held, self.hit = "", found[1]
            return text[: found[0]]
        keep = max(map(len, self._stops)) - 1
        start = next(
            (at for at in range(max(0, len(text) - keep), len(text)) if self._begins(text[at:])),
            len(text),
        )
        self._held = text[start:]
        return text[:start]

    def _begins(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)

    def flush(self) -> str:
        """What was held back after all."""
        held, self._held = self._held, ""
        return held


class RawReply:
    """A reply to a raw prompt: plain text without control tokens. Without a tokenizer there is no text."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self._stream = tokenizer.stream() if tokenizer else None
        self._stops = StopStrings(stops)
        self._chunks: list[Chunk] = []
        self.over = False

    def push(self, output: StepOutput) -> Chunk:
        """One step's tokens; a chunk with a `finish_reason` is the last."""
        text, taken = "", 0
        for ids in self._stops.portions(output.token_ids):
            text += self._stops.push(self._stream.push(ids)) if self._stream else ""
            taken += len(ids)
        reason, stop = output.finish_reason, output.stop_reason
        if reason is not None and self._stream:
            text += self._stops.push(self._stream.flush()) + self._stops.flush()
        if self._stops.hit is not None:
            reason, stop = "stop", self._stops.hit
        self.over = reason is not None
        chunk = Chunk(
            output.index,
            text,
            (),
            output.token_ids[:taken],
            output.logprobs[:taken],
            (),
            output.prompt_logprobs,
            reason,
            stop,
            output.cached_tokens,
        )
        self._chunks.append(chunk)
        return chunk

    def completion(self) -> Completion:
        """The whole reply."""
        chunks, last = self._chunks, self._chunks[-1]
        logprobs = tuple(entry for chunk in chunks for entry in chunk.logprobs)
        assert last.finish_reason is not None
        return Completion(
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            text="".join(chunk.text for chunk in chunks),
            finish_reason=last.finish_reason,
            logprobs=logprobs or None,
            prompt_logprobs=next((c.prompt_logprobs for c in chunks if c.prompt_logprobs is not None), None),
            stop_reason=last.stop_reason,
            cached_tokens=last.cached_tokens,
        )


class ChatReply:
    """A reply to a conversation: events. Stop strings count in the answer, not in thinking or calls."""

    def __init__(self, tokenizer: Tokenizer, state: ParserState, stops: Sequence[str], prompt_tokens: int) -> None:
        self._parser = Parser(tokenizer, state)
        self._stops = StopStrings(stops)
        self._prompt_tokens = prompt_tokens
        self.over = False

    def push(self, output: StepOutput) -> Chunk:
        """One step's tokens; a chunk with a `finish_reason` is the last and holds the `Finish` event."""
        events: list[Event] = []
        spoken: list[TokenLogprob] = []
        taken = 0
        for ids in self._stops.portions(output.token_ids):
            events += self._cut(self._parser.push(ids))
            spoken += [output.logprobs[taken + place] for place in self._parser.spoken] if output.logprobs else []
            taken += len(ids)
        reason, stop = output.finish_reason, output.stop_reason
        if self._stops.hit is not None:
            reason, stop = "stop", self._stops.hit
        if reason is not None:
            events += self._finish(reason, output.cached_tokens)
        self.over = reason is not None
        return Chunk(
            output.index,
            "",
            tuple(events),
            output.token_ids[:taken],
            output.logprobs[:taken],
            tuple(spoken),
            output.prompt_logprobs,
            reason,
            stop,
            output.cached_tokens,
        )

    def _finish(self, reason: FinishReason, cached: int) -> list[Event]:
        *rest, finish = self._parser.finish(reason, prompt_tokens=self._prompt_tokens, cached_tokens=cached)
        assert isinstance(finish, Finish)
        events = self._cut(rest)
        held = self._stops.flush()
        if held:
            events.append(TextDelta(held))
        return [*events, replace(finish, stop=self._stops.hit)]

    def _cut(self, events: list[Event]) -> list[Event]:
        """Answer text up to a stop string, and nothing after it."""
        kept: list[Event] = []
        for event in events:
            if self._stops.hit is not None:
                break
            if isinstance(event, TextDelta):
                event = replace(event, text=self._stops.push(event.text))
                if not event.text:
                    continue
            kept.append(event)
        return kept
