"""/metrics: the engine's counters and the door's, read when Prometheus asks, so that nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ..engine.stats import BOUNDS, Gauges, Histogram, Stats
from .guard import Traffic

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(stats: Stats, gauges: Gauges, traffic: Traffic, model: str) -> bytes:
    """The page in Prometheus' text format: our counters, then what vLLM's dashboards and autoscalers look for."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page([*_ours(stats, gauges, traffic), *_as_vllm(stats, gauges, model)]))
    return generate_latest(registry)


@dataclass(frozen=True, eq=False)
class _Page:
    """What the registry asks for its metrics."""

    metrics: list[Metric]

    def collect(self) -> list[Metric]:
        return self.metrics


def _ours(stats: Stats, gauges: Gauges, traffic: Traffic) -> Iterator[Metric]:
    yield _gauge("cabochon_requests_running", "Replies in progress.", gauges.running)
    yield _gauge("cabochon_requests_waiting", "Requests that wait for a place.", gauges.waiting)
    yield _gauge("cabochon_snapshots", "Windows kept for later requests.", gauges.snapshots)
    yield _gauge("cabochon_snapshot_bytes", "Their bytes.", gauges.snapshot_bytes)
    yield _gauge("cabochon_pages_idle", "Global pages kept for later requests only.", gauges.pages_idle)
    for of, what, pages in (("_used", "held", gauges.pages), ("", "there are", gauges.pages_total)):
        counts = (((group,), count) for group, count in pages.items())
        yield _by(GaugeMetricFamily, f"cabochon_pages{of}", f"Pages {what}, by KV group.", ["group"], counts)
    yield _counter("cabochon_requests", "Requests accepted.", stats.requests)
    yield _counter("cabochon_prompt_tokens", "Prompt tokens of accepted requests.", stats.tokens_in)
    yield _counter("cabochon_generation_tokens", "Tokens generated.", stats.tokens_out)
    yield _counter("cabochon_computed_tokens", "Tokens that went through the network.", stats.tokens_computed)
    yield _counter("cabochon_prefix_saved_tokens", "Prompt tokens that the prefix cache had.", stats.tokens_saved)
    yield _counter("cabochon_prefix_hits", "Requests that began with cached tokens.", stats.prefix_hits)
    yield _counter("cabochon_prefix_misses", "Requests that did not.", stats.prefix_misses)
    yield _counter("cabochon_preemptions", "Replies that gave up their pages for a while.", stats.preemptions)
    yield _counter("cabochon_spec_decode_num_draft_tokens", "Guesses of the drafter that were computed.", stats.drafted)
    yield _counter("cabochon_spec_decode_num_accepted_tokens", "Guesses that came true.", stats.accepted)
    yield _counter("cabochon_steps", "Steps of the engine.", stats.steps)
    finished = (((reason,), count) for reason, count in stats.finished.items())
    yield _by(CounterMetricFamily, "cabochon_finished", "Replies ended, by reason.", ["reason"], finished)
    yield _histogram("cabochon_step_seconds", "Time of a step.", stats.step_time)
    yield _histogram("cabochon_first_token_seconds", "Time to the first token.", stats.first_token)
    yield _histogram("cabochon_inter_token_seconds", "Time between tokens of one reply.", stats.inter_token)
    answered = (((route, str(status)), count) for (route, status), count in traffic.answered.items())
    labels = ["route", "status"]
    yield _by(CounterMetricFamily, "cabochon_http_requests", "Answers, by route and status.", labels, answered)


def _as_vllm(stats: Stats, gauges: Gauges, model: str) -> Iterator[Metric]:
    """The same numbers under vLLM's names, where they mean the same."""
    held = gauges.pages["global"] / max(1, gauges.pages_total["global"])
    yield _gauge("vllm:num_requests_running", "Replies in progress.", gauges.running, model)
    yield _gauge("vllm:num_requests_waiting", "Requests that wait for a place.", gauges.waiting, model)
    yield _gauge("vllm:kv_cache_usage_perc", "Share of the global pages that is held.", held, model)
    yield _counter("vllm:prompt_tokens", "Prompt tokens of accepted requests.", stats.tokens_in, model)
    yield _counter("vllm:generation_tokens", "Tokens generated.", stats.tokens_out, model)
    yield _counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.tokens_in, model)
    yield _counter("vllm:prefix_cache_hits", "Prompt tokens that the prefix cache had.", stats.tokens_saved, model)
    yield _counter("vllm:num_preemptions", "Replies that gave up their pages for a while.", stats.preemptions, model)
    yield _counter("vllm:spec_decode_num_draft_tokens", "Guesses that were computed.", stats.drafted, model)
    yield _counter("vllm:spec_decode_num_accepted_tokens", "Guesses that came true.", stats.accepted, model)
    finished = (((model, reason), count) for reason, count in stats.finished.items())
    labels = ["model_name", "finished_reason"]
    yield _by(CounterMetricFamily, "vllm:request_success", "Replies ended, by reason.", labels, finished)
    yield _histogram("vllm:time_to_first_token_seconds", "Time to the first token.", stats.first_token, model)
    yield _histogram("vllm:inter_token_latency_seconds", "Time between tokens.", stats.inter_token, model)


def _gauge(name: str, what: str, value: float, model: str | None = None) -> Metric:
    return _by(GaugeMetricFamily, name, what, *_of(model, value))


def _counter(name: str, what: str, value: float, model: str | None = None) -> Metric:
    return _by(CounterMetricFamily, name, what, *_of(model, value))


def _of(model: str | None, value: float) -> tuple[list[str], list[tuple[tuple[str, ...], float]]]:
    return ([], [((), value)]) if model is None else (["model_name"], [((model,), value)])


def _by(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    what: str,
    labels: list[str],
    values: Iterable[tuple[tuple[str, ...], float]],
) -> Metric:
    family = kind(name, what, labels=labels)
    for names, value in values:
        family.add_metric(names, value)
    return family


def _histogram(name: str, what: str, histogram: Histogram, model: str | None = None) -> Metric:
    buckets, total = [], 0
    for bound, count in zip((*BOUNDS, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    family = HistogramMetricFamily(name, what, labels=[] if model is None else ["model_name"])
    family.add_metric([] if model is None else [model], buckets, histogram.total)
    return family
