"""/metrics: the engine's counters and the door's, read when Prometheus asks, so that nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ..engine.stats import BOUNDS, Gauges, Histogram, Stats
from .guard import Traffic

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(stats: Stats, gauges: Gauges, traffic: Traffic) -> bytes:
    """The page in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(stats, gauges, traffic))
    return generate_latest(registry)


class _Snapshot:
    def __init__(self, stats: Stats, gauges: Gauges, traffic: Traffic) -> None:
        self._stats, self._gauges, self._traffic = stats, gauges, traffic

    def collect(self) -> Iterator[Metric]:
        stats, gauges = self._stats, self._gauges
        yield _gauge("requests_running", "Replies in progress.", gauges.running)
        yield _gauge("requests_waiting", "Requests that wait for a place.", gauges.waiting)
        yield _gauge("snapshots", "Windows kept for later requests.", gauges.snapshots)
        yield _gauge("snapshot_bytes", "Their bytes.", gauges.snapshot_bytes)
        yield _gauge("pages_idle", "Global pages kept for later requests only.", gauges.pages_idle)
        yield _by("pages_used", "Pages held, by KV group.", "group", gauges.pages.items())
        yield _by("pages", "Pages there are, by KV group.", "group", gauges.pages_total.items())
        yield _counter("requests", "Requests accepted.", stats.requests)
        yield _counter("prompt_tokens", "Prompt tokens of accepted requests.", stats.tokens_in)
        yield _counter("generation_tokens", "Tokens generated.", stats.tokens_out)
        yield _counter("computed_tokens", "Tokens that went through the network.", stats.tokens_computed)
        yield _counter("prefix_saved_tokens", "Prompt tokens that the prefix cache had.", stats.tokens_saved)
        yield _counter("prefix_hits", "Requests that began with cached tokens.", stats.prefix_hits)
        yield _counter("prefix_misses", "Requests that did not.", stats.prefix_misses)
        yield _counter("preemptions", "Replies that gave up their pages for a while.", stats.preemptions)
        yield _counter("spec_decode_num_draft_tokens", "Guesses of the drafter that were computed.", stats.drafted)
        yield _counter("spec_decode_num_accepted_tokens", "Guesses that came true.", stats.accepted)
        yield _counter("steps", "Steps of the engine.", stats.steps)
        finished = CounterMetricFamily("cabochon_finished", "Replies ended, by reason.", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
        yield _histogram("step_seconds", "Time of a step.", stats.step_time)
        yield _histogram("first_token_seconds", "Time to the first token.", stats.first_token)
        yield _histogram("inter_token_seconds", "Time between tokens of one reply.", stats.inter_token)
        answered = CounterMetricFamily(
            "cabochon_http_requests", "Answers, by route and status.", labels=["route", "status"]
        )
        for (route, status), count in self._traffic.answered.items():
            answered.add_metric([route, str(status)], count)
        yield answered


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"cabochon_{name}", what, value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"cabochon_{name}", what, value=value)


def _by(name: str, what: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    family = GaugeMetricFamily(f"cabochon_{name}", what, labels=[label])
    for key, value in values:
        family.add_metric([key], value)
    return family


def _histogram(name: str, what: str, histogram: Histogram) -> Metric:
    buckets, total = [], 0
    for bound, count in zip((*BOUNDS, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return HistogramMetricFamily(f"cabochon_{name}", what, buckets=buckets, sum_value=histogram.total)
