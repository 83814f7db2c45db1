"""The engine: requests in, one step at a time, new tokens out. Token ids only; not for several threads at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ..errors import ContextError, InputError, RequestError
from ..kv.cache import KVCache
from ..model.drafter import Drafter
from ..model.gemma4 import Gemma4
from . import sampler
from .batching import build, spans_of
from .encoder import Encoder, Features
from .guessers import Drafting, Lookup
from .options import EngineOptions, context_that_fits, plan_cache
from .reply import extend
from .request import EngineFinish, Request, StepOutput, TokenLogprob
from .runner import Runner
from .sampler import Drawn
from .scheduler import Item, Plan, Scheduler
from .speculative import Speculator
from .stats import Gauges, Stats
from .track import Track

log = logging.getLogger(__name__)
LONGEST_SPAN = 1120
"""Soft tokens of the largest image: an atomic span may exceed the step's budget by this."""


@dataclass(slots=True)
class Turn:
    """One reply's part of a step's drawing. More than one token comes of it where guesses came true."""

    track: Track
    row: int
    """Of the logits that the first token is drawn from."""
    offered: int
    """Guesses whose logits follow that row."""
    before: int
    """Tokens of the track before the drawing."""
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def next_row(self) -> int:
        """Of the logits after the track's newest token."""
        return self.row + self.track.length - self.before

    @property
    def goes_on(self) -> bool:
        """Are there such logits: has all that came been guessed?"""
        return self.track.finish is None and self.track.length == self.before + self.track.matched


class Engine:
    """Runs `Request`s on a model. `step()` until it is not `busy`; `abort` at any time between steps."""

    def __init__(
        self,
        model: Gemma4,
        options: EngineOptions | None = None,
        *,
        max_model_len: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        suppress: tuple[int, ...] = (),
        drafter: Drafter | Lookup | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        options = options or EngineOptions()
        some = model.language_model.norm.weight
        device, dtype = device or some.device, dtype or some.dtype
        text = model.config.text
        self.options, self.device, self.clock = options, device, clock
        self.vocab_size = text.vocab_size
        longest = text.max_position_embeddings
        if max_model_len is not None and not 1 <= max_model_len <= longest:
            raise InputError(f"max_model_len is {max_model_len}, but must be between 1 and the model's {longest}.")
        self.max_model_len = max_model_len or context_that_fits(text, options, device, dtype)
        if max_model_len is None and self.max_model_len < longest:
            log.warning("the context is %d of %d tokens: memory for pages is short", self.max_model_len, longest)
        self.runner = Runner(model, device, record=options.cuda_graphs)
        self.encoder = Encoder(model, options.encoder_cache_tokens)
        self.stats = Stats()
        plan, snapshot_pages = plan_cache(text, options, self.max_model_len, device, dtype)
        self.cache = KVCache(
            plan,
            dtype,
            device,
            options.formats(),
            rows=options.max_num_seqs,
            max_tokens=self.max_model_len,
            step_tokens=options.max_num_batched_tokens + LONGEST_SPAN,
            snapshot_pages=snapshot_pages,
            share=options.enable_prefix_caching,
        )
        self.scheduler = Scheduler(
            self.cache,
            seats=options.max_num_seqs,
            budget=options.max_num_batched_tokens,
            logit_rows=max(1, 2**26 // text.vocab_size),
        )
        self.speculator: Speculator | None = None
        if drafter is not None:
            text_network, most = model.language_model, options.num_speculative_tokens
            guesser = drafter if isinstance(drafter, Lookup) else Drafting(drafter, text_network, self.cache)
            self.speculator = Speculator(guesser, most, self.stats, clock)
        self._suppress = torch.tensor(suppress, device=device) if suppress else None
        self._tracks: dict[str, list[Track]] = {}
        self._arrivals = 0
        self._ended: list[Track] = []
        """Tracks whose end nobody has been told yet."""

    # Requests ---------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Is there anything left to do or to tell?"""
        return bool(self._tracks or self._ended)

    def room(self, prompt: int) -> int:
        """How long a reply to a prompt of `prompt` tokens can get: what the context and the pages leave."""
        pages = self.cache.plan.pages["global"] * self.cache.page_size
        return min(self.max_model_len, pages) - prompt

    def add(self, request: Request) -> None:
        """Accept a request, or say at once why it can never be served (`RequestError`, `ContextError`)."""
        if request.id in self._tracks:
            raise RequestError(f"A request with id {request.id!r} is running already.", "id")
        self.validate(request)
        track = Track(request, self._arrivals, self.clock())
        self._arrivals += 1
        self._tracks[request.id] = [track]
        self.scheduler.add(track)
        self.stats.requests += 1
        self.stats.tokens_in += track.prompt_length

    def validate(self, request: Request) -> None:
        """Raise what `add` would raise for its tokens and its length. Safe from any thread."""
        self._check_ids(request)
        self._check_room(request)

    def _check_ids(self, request: Request) -> None:
        ids = np.asarray(request.token_ids, dtype=np.int64)
        if ids.size == 0:
            raise RequestError("The prompt is empty; give at least one token.", "prompt")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            wrong = int(ids[(ids < 0) | (ids >= self.vocab_size)][0])
            raise RequestError(f"Token id {wrong} is not in the vocabulary of {self.vocab_size} tokens.", "prompt")
        for token in request.params.logit_bias:
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"logit_bias names token {token}, but there are {self.vocab_size}.", "logit_bias")

    def _check_room(self, request: Request) -> None:
        prompt, reply = len(request.token_ids), request.params.max_tokens or 1
        if prompt + reply > self.max_model_len:
            raise ContextError(
                f"The prompt has {prompt} tokens and the reply may take {reply}, together {prompt + reply}, but the "
                f"context is {self.max_model_len}; shorten the prompt or lower max_tokens.",
                "max_tokens" if prompt < self.max_model_len else "prompt",
            )
        for kind, pages in self.cache.needs(prompt + reply).items():
            there = self.cache.plan.pages[kind]
            if pages > there:
                raise ContextError(
                    f"Prompt and reply of up to {prompt + reply} tokens need {pages} {kind} pages of "
                    f"{self.cache.page_size} tokens, but the cache has {there}; lower max_tokens or give it memory.",
                    "max_tokens",
                )

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request (or one of its replies) now; its pages are free at once. An unknown id is no error."""
        for track in list(self._tracks.get(request_id, ())):
            if index is None or track.index == index:
                self._end(track, "abort")

    # Steps ------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Run one step and return what it brought."""
        begin = self.clock()
        outputs = self._farewells()
        plan = self.scheduler.plan()
        self.stats.preemptions += len(plan.preempted)
        if not plan.items:
            return outputs
        features = self._encode(plan)
        if not plan.items:
            return outputs + self._farewells()
        batch = build(plan.items, self.cache, self.device, skip=self.options.skip_unwanted, features=features)
        planned = self.clock()
        try:
            logits, hidden = self.runner.run(batch)
        except Exception as error:
            log.exception("a step failed")
            for item in plan.items:
                self._fail(item.track, f"The model failed on this step: {error}")
            return outputs + self._farewells()
        ran = self.clock()
        turns = self._harvest(plan, logits)
        done = self.clock()
        if self.speculator is not None:
            if all(item.count == item.guesses + 1 for item in plan.items):
                self.speculator.steps.add(batch.tokens, done - planned)
            self._guess(turns, hidden)
            self.stats.draft_seconds += self.clock() - done
        outputs += self._told(turns)
        stats = self.stats
        stats.steps += 1
        stats.tokens_computed += batch.tokens
        stats.host_seconds += planned - begin
        stats.model_seconds += ran - planned
        stats.sampler_seconds += done - ran
        stats.step_time.add(done - begin)
        return outputs

    def _encode(self, plan: Plan) -> Features:
        """The features that the step needs. Requests whose media can't be encoded end and leave the plan."""
        touched = [(item, span) for item in plan.items for span in spans_of(item)]
        if not touched:
            return {}
        features, faults = self.encoder.encode([span for _, span in touched])
        for item, span in touched:
            if span.key in faults and item in plan.items:
                plan.items.remove(item)
                self._fail(item.track, faults[span.key])
        return features

    def _harvest(self, plan: Plan, logits: Tensor) -> list[Turn]:
        """After the model: name pages, keep windows, hand out prompt logits, draw tokens, part the replies."""
        turns: list[Turn] = []
        at = 0
        for item in plan.items:
            track = item.track
            track.guesses, track.matched = item.guesses, 0
            self._advance(track, item.context + item.count - item.guesses)
            if item.wanted and track.scored < track.prompt_length:
                self._score(item, logits[at : at + item.wanted])
            at += item.wanted
            if track.remaining == 0:
                siblings = [track, *self._part(track)]
                turns += [Turn(each, at - 1 - item.guesses, item.guesses, each.length) for each in siblings]
        self._draw(turns, logits)
        for turn in turns:
            if turn.track.finish is None and turn.track.holding is None:
                self._seat(turn.track)
        return turns

    def _draw(self, turns: list[Turn], logits: Tensor) -> None:
        """A token for each reply, and one more for as long as a reply's tokens are those that were guessed."""
        going = turns
        while going:
            rows = [turn.next_row for turn in going]
            whole = rows == list(range(logits.shape[0]))
            drawn = sampler.draw(logits if whole else logits[rows], [turn.track for turn in going], self._suppress)
            for turn, result in zip(going, drawn, strict=True):
                self._take(turn, result)
            going = [turn for turn in going if turn.goes_on]
        for turn in turns:
            track = turn.track
            if track.matched:
                # The last token counts as not computed even where it was guessed: so ends of replies look alike.
                self._advance(track, min(turn.before + track.matched, track.length - 1))

    def _guess(self, turns: list[Turn], hidden: Tensor) -> None:
        """Have guesses made for the replies that go on with one token to compute."""
        assert self.speculator is not None
        for turn in turns:
            self.speculator.learn(turn.track, turn.offered)
        ready = [turn for turn in turns if turn.track.finish is None and turn.track.holding is not None]
        ready = [turn for turn in ready if turn.track.remaining == 1]
        if ready:
            rows = [turn.next_row - 1 for turn in ready]
            try:
                self.speculator.guess([turn.track for turn in ready], hidden[rows])
            except Exception:  # no reply needs it
                log.exception("guessing failed; replies go on without guesses")
                self.speculator = None

    def _told(self, turns: list[Turn]) -> list[StepOutput]:
        """What the turns brought, and the ends of those that it ended."""
        outputs = []
        for turn in turns:
            track, tokens = turn.track, tuple(turn.track.ids[turn.before :].tolist())
            first = turn.before == track.prompt_length and track.index == 0
            scores = tuple(track.prompt_scores) if first and track.prompt_scores else None
            outputs.append(self._output(track, tokens, tuple(turn.logprobs), scores))
            self.stats.tokens_out += len(tokens)
            if track.finish is not None:
                self._close(track)
        return [*self._farewells(), *outputs]

    def _advance(self, track: Track, computed: int) -> None:
        assert track.holding is not None
        if track.computed == track.cached and track.generated == 0:
            self._count_hit(track)
        track.computed = computed
        self.cache.commit(track.holding, track.content, track.computed)
        while track.boundaries and track.boundaries[0] <= track.computed:
            if track.boundaries.pop(0) == track.computed:
                self.cache.snapshot(track.holding, track.content, track.computed)

    def _count_hit(self, track: Track) -> None:
        self.stats.prefix_hits += track.cached > 0
        self.stats.prefix_misses += track.cached == 0
        self.stats.tokens_saved += track.cached

    def _score(self, item: Item, logits: Tensor) -> None:
        """Logits of the prompt's tokens from where they were last handed out."""
        track, request = item.track, item.track.request
        first = item.context + item.count - item.wanted
        if request.sink is not None:
            request.sink(first, logits)
        most = request.params.prompt_logprobs
        if most is not None:
            following = track.ids[first + 1 : track.prompt_length][: item.wanted].tolist()
            if first == 0:
                track.prompt_scores.append(None)
            track.prompt_scores += sampler.score(logits[: len(following)], following, [most] * len(following))
        track.scored = item.context + item.count

    def _part(self, track: Track) -> list[Track]:
        """The other replies of a request whose prompt has just been computed."""
        request = track.request
        if track.index or track.generated or request.params.n == 1:
            return []
        twins = [track.twin(index) for index in range(1, request.params.n)]
        self._tracks[request.id] += twins
        return twins

    def _seat(self, twin: Track) -> None:
        """A reply that has just parted runs on from copies of its sibling's last pages, or waits for room."""
        first = next((t for t in self._tracks[twin.request.id] if t.index == 0 and t.holding is not None), None)
        seats = len(self.scheduler.running) < self.scheduler.seats
        holding = self.cache.fork(first.holding, twin.prompt_length) if first and first.holding and seats else None
        if holding is None:
            self.scheduler.add(twin)
        else:
            twin.holding, twin.computed = holding, twin.prompt_length
            self.scheduler.running.append(twin)

    # Tokens -----------------------------------------------------------------------------------------------------------

    def _take(self, turn: Turn, drawn: Drawn) -> None:
        """Let a reply go on by what was drawn for it."""
        track = turn.track
        if drawn.error is not None:
            track.end("error", error=drawn.error)
            return
        self._clock_token(track)
        extend(track, drawn.token)
        if drawn.logprob is not None:
            turn.logprobs.append(drawn.logprob)
            # Forced tokens were not drawn: they are certain.
            certain = track.ids[turn.before + len(turn.logprobs) :].tolist()
            turn.logprobs += [TokenLogprob(token, 0.0) for token in certain]

    def _clock_token(self, track: Track) -> None:
        now = self.clock()
        if track.last_token_at is None:
            self.stats.first_token.add(now - track.started_at)
        else:
            self.stats.inter_token.add(now - track.last_token_at)
        track.last_token_at = now

    # Ends -------------------------------------------------------------------------------------------------------------

    def _close(self, track: Track) -> None:
        """Free a finished track; keep its window if the next turn may go on from there."""
        broken = track.finish == "error"
        if track.holding is not None and track.request.keep_end and track.finish in ("stop", "length"):
            self.cache.snapshot(track.holding, track.content, track.computed)
        self.scheduler.remove(track, broken=broken)
        siblings = self._tracks[track.request.id]
        siblings.remove(track)
        if not siblings:
            del self._tracks[track.request.id]
        reason = track.finish or "abort"
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1

    def _end(self, track: Track, reason: EngineFinish, error: str | None = None) -> None:
        """End a track outside the drawing of tokens; the next outputs tell it."""
        track.end(reason, error=error)
        self._close(track)
        self._ended.append(track)

    def _fail(self, track: Track, error: str) -> None:
        self._end(track, "error", error)

    def _farewells(self) -> list[StepOutput]:
        outputs = [self._output(track, (), (), None) for track in self._ended]
        self._ended.clear()
        return outputs

    def _output(
        self,
        track: Track,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        scores: tuple[TokenLogprob | None, ...] | None,
    ) -> StepOutput:
        return StepOutput(
            track.request.id,
            track.index,
            tokens,
            logprobs,
            scores,
            track.finish,
            track.stop_reason,
            track.cached,
            track.error,
        )

    # Looking in -------------------------------------------------------------------------------------------------------

    def gauges(self) -> Gauges:
        """What the engine holds at the moment."""
        cache = self.cache
        return Gauges(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages={"sliding": cache.sliding.used, "global": cache.full.used},
            pages_total={"sliding": cache.sliding.count, "global": cache.full.count},
            pages_idle=len(cache.full.idle),
            snapshots=len(cache.snapshots),
            snapshot_pages=cache.snapshots.pages,
            snapshot_bytes=cache.snapshots.pages * cache.plan.page_bytes("sliding"),
        )

    def check(self) -> None:
        """Assert that books and requests agree."""
        tracks = [track for siblings in self._tracks.values() for track in siblings]
        held = [track for track in tracks if track.holding is not None]
        assert set(map(id, held)) == set(map(id, self.scheduler.running)), "a track holds pages without running"
        assert len(tracks) == len(self.scheduler.running) + len(self.scheduler.waiting), "a track is lost"
        self.cache.check(track.holding for track in held if track.holding is not None)
