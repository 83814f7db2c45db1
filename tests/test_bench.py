"""`cabochon bench`: every command runs on the bundled model and ends in one JSON line that adds up."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from cabochon.cli import app, bench_cpu
from cabochon.cli.bench import _percentile
from cabochon.cli.bench import _print as bench_shown
from cabochon.engine.runner import Runner
from cabochon.errors import EngineError

SMALL = ["--input-len", "24", "--output-len", "6"]


def bench(*words):
    done = CliRunner().invoke(app, ["bench", *words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_latency():
    result = bench("latency", *SMALL, "--repeats", "1", "--batch", "2")
    assert 0 < result["prefill_s"] < result["total_s"]
    assert result["per_token_s"] * 5 == pytest.approx(result["total_s"] - result["prefill_s"])
    assert result["model_ms_per_step"] > 0


def test_the_run_that_touches_everything_does_not_count(monkeypatch):
    seconds = iter((9.0, 1.0, 3.0, 2.0))
    monkeypatch.setattr("cabochon.cli.bench._timed", lambda *_: {"first": 0.5, "total": next(seconds)})
    assert bench("latency", *SMALL, "--repeats", "3")["total_s"] == 2.0


def test_throughput_beside_transformers():
    result = bench("throughput", *SMALL, "--num-prompts", "4", "--baseline", "transformers")
    assert result["output_tokens_per_s"] * result["total_s"] == pytest.approx(24)
    assert result["times_baseline"] == pytest.approx(result["baseline_total_s"] / result["total_s"])


def test_serve_sim():
    result = bench("serve-sim", *SMALL, "--num-prompts", "5", "--rate", "50", "--max-num-seqs", "2")
    assert 0 < result["first_token_p50_s"] <= result["first_token_p99_s"] <= result["total_s"]
    assert result["between_tokens_p50_s"] > 0


def test_serve_sim_beside_transformers():
    result = bench("serve-sim", *SMALL, "--num-prompts", "3", "--rate", "50", "--baseline", "transformers")
    assert 0 < result["baseline_first_token_p50_s"] < result["baseline_total_s"]
    assert result["times_baseline"] == pytest.approx(result["baseline_total_s"] / result["total_s"])


def test_an_unknown_baseline_is_refused():
    with pytest.raises(Exception, match="--baseline is 'llama', but the only one is transformers"):
        bench("latency", *SMALL, "--baseline", "llama")


def test_a_request_that_fails_is_no_figure(monkeypatch):
    nothing = torch.full((1, 2048), torch.nan)
    monkeypatch.setattr(Runner, "run", lambda self, batch: (nothing, nothing))
    with pytest.raises(EngineError, match="not numbers"):
        bench("latency", *SMALL, "--repeats", "1")


def test_percentiles():
    assert [_percentile([3.0, 1.0, 2.0, 4.0], q) for q in (0, 50, 99)] == [1.0, 3.0, 4.0]
    assert _percentile([], 50) == 0.0


@pytest.mark.parametrize("clock", [[], ["--cpu-time"]])
def test_the_cpu_beside_its_prediction(clock):
    words = ["--model", "random:E2B?layers=5&media=no", "--formats", "int8", "--prefill", "16", "--batches", "1"]
    result = bench("cpu", *clock, *words, "--contexts", "40", "--repeats", "1")
    assert [row["what"] for row in result["rows"]] == ["prefill 16", "decode 1 at 40"]
    for row in result["rows"]:
        assert row["reached"] == pytest.approx(row["tokens_per_second"] / row["predicted"])
        # By the clock on the wall other programs may hold up the limits' measurement, and not the step's.
        assert 0 < row["reached"] < (2 if clock else math.inf)
    assert result["cpu_time"] is bool(clock)


def test_a_narrow_terminal_cuts_no_figure(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    peers = {"llama.cpp": 123456.7, "times_llama.cpp": 10.01, "transformers": 98765.4, "times_transformers": 12.51}
    row = {"format": "bfloat16", "what": "decode 100 at 131071", "tokens_per_second": 1234567.8, "predicted": 7654321.9}
    bench_cpu._show("CPU", [row | {"reached": 0.4567} | peers])
    bench_shown({"some_figure_with_a_long_name": 0.123456, "model": "random:E2B?media=no&layers=5" * 3})
    shown = capsys.readouterr()
    for figure in ("decode 100 at 131071", "1234567.8", "7654321.9", "46%", "123456.7 (10.01x)", "98765.4 (12.51x)"):
        assert figure in shown.out
    assert "0.1235" in shown.err and "random:E2B?media=no&layers=5" * 3 in shown.err


def test_the_server_beside_the_bare_engine():
    words = ["--streams", "1,2", "--input-len", "8", "--output-len", "6", "--fresh", "40", "--cached", "40"]
    result = bench("serve", *words, "--repeats", "1")
    ways = ["engine steps", "LLM.generate", "server, whole", "server, streamed"]
    whats = ["1 at once", "2 at once", "first token, 40 new", "first token, 40 known"]
    assert [(row["what"], row["way"]) for row in result["rows"]] == [(what, way) for what in whats for way in ways]
    for row in result["rows"]:
        tokens = {"1": 6, "2": 12}.get(row["what"][0], 1)
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(tokens)
        assert (row["loop_ms_per_step"] is None) == (row["way"] in ways[:2])
    assert all(row["of_engine"] == 1 for row in result["rows"] if row["way"] == ways[0])


def test_a_server_that_fails_is_no_figure(monkeypatch):
    nothing = torch.full((1, 2048), torch.nan)
    monkeypatch.setattr(Runner, "run", lambda self, batch: (nothing, nothing))
    with pytest.raises(EngineError, match="not numbers"):
        bench("serve", "--repeats", "1")
