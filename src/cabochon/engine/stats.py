"""What the engine counts. Cheap to update, read by `/metrics`, the bench and the tests."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclass(slots=True)
class Histogram:
    """Counts of seconds: `counts[i]` are those above `BOUNDS[i - 1]` and up to `BOUNDS[i]`."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(slots=True)
class Stats:
    """Counters since the engine began, and what it holds at the moment."""

    steps: int = 0
    tokens_in: int = 0
    """Prompt tokens of accepted requests."""
    tokens_out: int = 0
    tokens_computed: int = 0
    tokens_saved: int = 0
    """Prompt tokens that prefix hits made unnecessary to compute."""
    requests: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """By reason."""
    prefix_hits: int = 0
    prefix_misses: int = 0
    preemptions: int = 0
    step_time: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    host_seconds: float = 0.0
    """Time in scheduling and batching."""
    model_seconds: float = 0.0
    sampler_seconds: float = 0.0
    draft_seconds: float = 0.0
    drafted: int = 0
    """Guesses that were put to the test."""
    accepted: int = 0
    """Those that came true: so many tokens needed no step of their own."""


@dataclass(frozen=True, slots=True)
class Gauges:
    """What an engine holds at the moment."""

    running: int
    waiting: int
    pages: dict[str, int]
    """Pages per group that requests or snapshots hold."""
    pages_total: dict[str, int]
    pages_idle: int
    """Global pages kept for later requests only."""
    snapshots: int
    snapshot_pages: int
    snapshot_bytes: int
