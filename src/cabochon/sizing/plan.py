"""The plan: does it fit, how far could it go, how fast could it be, and what would help most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import variants
from ..config import ModelConfig, read_config
from ..formats import QUANTIZED
from . import memory, speed
from .hardware import Hardware
from .memory import Memory, Workload
from .speed import Speed
from .units import gib, kilo

MARGIN = 0.02
"""Share of the device that stays free: allocators don't fill the last gap."""
READABLE = 10.0
"""Tokens per second and user under which a reply is slower than reading."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A workload on a device, sized. Bytes are per rank."""

    model: str
    work: Workload
    hardware: Hardware
    available: int
    """Bytes that may be used."""
    memory: Memory
    longest_context: int
    """For one user; 0 when not even the weights fit."""
    most_users: int
    """At this context."""
    speeds: tuple[Speed, ...]
    advice: str
    """The one change that would help most."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available

    @property
    def pool_tokens(self) -> int:
        """Tokens whose keys and values fit beside the weights, in conversations of this context."""
        return self.most_users * self.work.context

    @property
    def verdict(self) -> str:
        need, have = gib(self.memory.total), gib(self.available)
        load = f"{self.work.users} x {kilo(self.work.context)}"
        if self.fits:
            return f"fits: {load} takes {need} of {have}"
        if self.most_users:
            return f"too much: {load} takes {need}, there are {have}; {self.most_users} at once would fit"
        if self.longest_context:
            return f"too much: {load} takes {need}, there are {have}; {self.longest_context:,} tokens would fit"
        return f"does not fit: weights and a step alone take {gib(_without_kv(self.memory))} of {have}"

    def summary(self) -> str:
        """Five lines for the start of a program."""
        first = self.speeds[0]
        weights = gib(self.memory.on_device) + (
            f" (+ {gib(self.memory.on_host)} in host memory)" if self.memory.on_host else ""
        )
        at_most = f"at most {first.decode:,.0f} tokens/s for one user, {first.prefill:,.0f} tokens/s of prompt"
        return "\n".join(
            (
                f"model    {self.model}, {self.work.precision}: {weights} of weights",
                f"cache    {self.pool_tokens:,} tokens: {self.most_users:,} users at {kilo(self.work.context)}",
                f"memory   {self.verdict}",
                f"speed    {at_most} ({self.hardware.name})",
                f"advice   {self.advice}",
            )
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        sizes = {key: getattr(self.memory, key) for key in ("on_device", "on_host", "total")}
        facts = {key: getattr(self, key) for key in ("fits", "verdict", "pool_tokens")}
        work = {**asdict(self.work), "kept": sorted(self.work.kept)}
        return {**asdict(self), **facts, "work": work, "memory": {**asdict(self.memory), **sizes}}


def plan(
    model: str | ModelConfig,
    hardware: Hardware,
    work: Workload | None = None,
    *,
    available: int | None = None,
    name: str | None = None,
    drafter: ModelConfig | None = None,
) -> MemoryPlan:
    """Size `model` (a name of the family or a config) for `work` on `hardware`.

    `drafter` is the one of a config; names have their own. `available` are the bytes that may be used, without it all
    of the device's. Raises `UnknownModelError` for a strange name and `InputError` for a workload that the model can't
    have on any device.
    """
    work = work or Workload()
    config, own, draft_tokens = resolve(model)
    sized = Sizer(config, drafter or own, draft_tokens, hardware, int((available or hardware.memory) * (1 - MARGIN)))
    took = sized.memory(work)
    return MemoryPlan(
        model=name or (model if isinstance(model, str) else "model"),
        work=work,
        hardware=hardware,
        available=sized.available,
        memory=took,
        longest_context=sized.longest_context(work),
        most_users=sized.most_users(work),
        speeds=tuple(sized.speed(work, batch) for batch in speed.BATCHES),
        advice=sized.advice(work, took),
    )


def resolve(model: str | ModelConfig) -> tuple[ModelConfig, ModelConfig | None, int]:
    """Config, its drafter's config where the family has one, and how many tokens to draft."""
    if isinstance(model, ModelConfig):
        return model, None, 0
    variant = variants.find(model)
    config = read_config(variant.config())
    if variant.role == "assistant":
        return config, None, 0
    return config, read_config(variants.Variant(variant.size, "assistant").config()), variant.size.draft_tokens


def ranking(hardware: Hardware, work: Workload, *, available: int | None = None) -> list[MemoryPlan]:
    """Every size in every format that fits, the best first.

    Best: a larger size before a smaller one and a finer format before a coarser, but what is slower than reading
    (READABLE tokens per second and user) comes after what isn't.
    """
    plans = []
    for size in reversed(variants.SIZES):
        for format in (None, *QUANTIZED):
            asked = replace(work, quantization=format, context=min(work.context, size.context))
            made = plan(size.name, hardware, asked, available=available)
            if made.fits:
                plans.append(made)
    return sorted(plans, key=lambda made: made.speeds[0].decode < READABLE)


@dataclass(frozen=True, slots=True)
class Sizer:
    """One model on one device, asked about several workloads."""

    config: ModelConfig
    drafter: ModelConfig | None
    draft_tokens: int
    hardware: Hardware
    available: int

    def memory(self, work: Workload) -> Memory:
        return memory.measure(self.config, work, self.hardware, self.drafter)

    def fits(self, work: Workload) -> bool:
        return self.memory(work).total <= self.available

    def speed(self, work: Workload, batch: int) -> Speed:
        drafter = self.drafter if work.drafter else None
        return speed.speed(self.config, work, self.hardware, batch, drafter, self.draft_tokens)

    def longest_context(self, work: Workload) -> int:
        """In whole pages, for one user."""
        least = memory.image_tokens(self.config, work.images) + 1
        most = self.config.text.max_position_embeddings
        found = _largest(least, most, lambda n: self.fits(replace(work, users=1, context=n)))
        return found if found == most else found // memory.PAGE * memory.PAGE

    def most_users(self, work: Workload) -> int:
        return _largest(1, 100_000, lambda n: self.fits(replace(work, users=n)))

    def advice(self, work: Workload, took: Memory) -> str:
        return self._to_fit(work, took) if took.total > self.available else self._to_be_faster(work)

    def _to_fit(self, work: Workload, took: Memory) -> str:
        """The mildest single change after which the workload fits, else what it would fit on."""
        for change, words in self._changes(work):
            if self.fits(change):
                return f"{words}: then it takes {gib(self.memory(change).total)}"
        small = replace(work, quantization="int4", kv_cache_dtype="int8")
        if users := self.most_users(small):
            return f"--quantization int4 --kv-cache-dtype int8 and {users} users at most"
        if context := self.longest_context(small):
            return f"--quantization int4 --kv-cache-dtype int8 and --context {context} at most"
        for size in reversed(variants.SIZES):
            config = read_config(variants.Variant(size, "it").config())
            other = replace(small, context=min(work.context, size.context), drafter=False)
            if memory.measure(config, other, self.hardware).total <= self.available:
                return f"a smaller model: {size.name} in int4 fits this workload"
        missing = self.memory(small).total - self.available
        return f"a larger device: even in int4 with an 8-bit cache {gib(missing)} are missing"

    def _to_be_faster(self, work: Workload) -> str:
        now = self.speed(work, 1).decode
        best, words = max(((self._decode(change), words) for change, words in self._changes(work)), default=(now, ""))
        if best < 1.1 * now:
            return "nothing: the device's memory is read as little as it can be"
        return f"{words}: one user could get {best:,.0f} instead of {now:,.0f} tokens/s"

    def _decode(self, work: Workload) -> float:
        if not self.fits(work):
            return 0.0
        found = self.speed(work, 1)
        return found.decode_with_drafter or found.decode

    def _changes(self, work: Workload) -> Iterator[tuple[Workload, str]]:
        """Single changes, the mildest first."""
        if work.kv_cache_dtype == "auto":
            yield replace(work, kv_cache_dtype="int8"), "--kv-cache-dtype int8"
        if not work.drafter and self.drafter is not None:
            yield replace(work, drafter=True), "--drafter"
        formats = QUANTIZED[QUANTIZED.index(work.quantization) + 1 :] if work.quantization else QUANTIZED
        for format in formats:
            yield replace(work, quantization=format), f"--quantization {format}"


def _without_kv(took: Memory) -> int:
    return took.total - took.pool - took.snapshots


def _largest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number for which `fits` holds, when it holds for all smaller ones; 0 when for none."""
    if not fits(least):
        return 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
