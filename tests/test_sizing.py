"""The planner's numbers against the files, the page pool and its own arithmetic."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cabochon import LLM, SamplingParams
from cabochon.cli import app
from cabochon.cli.bench_shapes import past_bytes, random_codes, weight_bytes
from cabochon.cli.measure import Meter
from cabochon.config import read_config
from cabochon.errors import CabochonError, InputError
from cabochon.kv.layout import kv_groups, plan_pages
from cabochon.kv.pool import PageStore
from cabochon.llm.loading import build
from cabochon.llm.prepare import prepare
from cabochon.ops import cpu
from cabochon.quant import QuantTensor
from cabochon.sizing import Workload, hardware, plan, ranking, start, units
from cabochon.sizing.memory import PAGE, measure, value_bytes, weights
from cabochon.sizing.report import tables
from cabochon.sizing.speed import active_parameters, expected_tokens, speed, step_seconds
from cabochon.variants import SIZES, find
from cabochon.weights.checkpoint import open_checkpoint
from cabochon.weights.compressed import save_compressed
from cabochon.weights.gguf_write import save_gguf
from cabochon.weights.params import parameters
from support.toys import SIZES as TOYS
from support.toys import toy_config, toy_model

ROOT = Path(__file__).parents[1]
CPU = replace(hardware.find("Raspberry Pi 5"), memory=64 << 30)
GPU = hardware.find("h100")
PUBLISHED = {"E2B": 2.3e9, "12B": 11.9e9, "26B-A4B": 3.8e9, "31B": 30.7e9}


def config_of(size):
    return read_config(find(size).config())


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_weights_in_bfloat16_are_the_files_bytes_without_what_is_stored_for_nothing(size):
    config = config_of(size.name)
    unused = sum(p.count for p in parameters(config, unused=True) if not p.used and p.part != "head")
    made = plan(size.name, CPU, Workload(context=1024))
    assert made.memory.on_device + 2 * unused == 2 * size.stored
    assert sum(part.parameters for part in made.memory.weights) == size.stored - unused


@pytest.mark.parametrize("size", PUBLISHED)
def test_active_parameters_are_the_published_ones(size):
    assert active_parameters(config_of(size)) == pytest.approx(PUBLISHED[size], rel=0.011)


def test_a_head_in_four_bits_leaves_its_table_of_rows_on_the_host_of_a_gpu():
    found = {}
    for format in ("int8", "int4"):
        parts = weights(config_of("E2B"), Workload(quantization=format), GPU)
        found[format] = {part.part: (part.format, part.place) for part in parts}
    assert found["int8"]["embedding"] == ("int8", "device") and "head" not in found["int8"]
    assert (found["int4"]["embedding"], found["int4"]["head"]) == (("int8", "host"), ("int4", "device"))


def test_per_layer_embeddings_live_in_host_memory_on_a_gpu_only():
    on_gpu, on_cpu = plan("E2B", GPU).memory, plan("E2B", CPU).memory
    assert on_gpu.on_host == 2 * 262_144 * 35 * 256 and on_cpu.on_host == 0
    assert on_gpu.on_device + on_gpu.on_host == on_cpu.on_device


@pytest.mark.parametrize("size", ["12B", "26B-A4B", "31B"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_what_divides(size, ranks):
    config = config_of(size)
    one, each = (measure(config, Workload(ranks=n), GPU) for n in (1, ranks))
    replicated = sum(part.replicated for part in each.weights)
    assert ranks * (each.on_device - replicated) + replicated == pytest.approx(one.on_device, abs=ranks * 1000)
    kv_heads = {part.kind: spec.kv_heads for part in one.kv for spec in config.text.layers if spec.kind == part.kind}
    for whole, part in zip(one.kv, each.kv, strict=True):
        assert part.token_bytes == whole.token_bytes // (1 if kv_heads[part.kind] % ranks else ranks)


def test_a_drafter_is_a_part_of_its_own():
    with_it = plan("E4B", GPU, Workload(drafter=True)).memory
    assert {part.part: part.parameters for part in with_it.weights}["drafter"] == find("E4B").size.drafter


# Keys and values ----------------------------------------------------------------------------------------------------

TOKEN_BYTES = {  # global and sliding, bfloat16; the fact sheet's for two tensors, times 1.25 / 2 where value = key
    "E2B": (6144, 12288),
    "E4B": (16384, 40960),
    "12B": (16384 * 5 // 8, 327680),
    "26B-A4B": (20480 * 5 // 8, 204800),
    "31B": (81920 * 5 // 8, 819200),
}


@pytest.mark.parametrize("size", TOKEN_BYTES)
def test_bytes_per_token(size):
    took = {part.kind: part for part in plan(size, GPU).memory.kv}
    assert (took["global"].token_bytes, took["sliding"].token_bytes) == TOKEN_BYTES[size]
    assert took["global"].saved_by_k_eq_v == (0 if size.startswith("E") else took["global"].token_bytes * 3 // 5)


@pytest.mark.parametrize("size", TOYS)
@pytest.mark.parametrize("cache", ["auto", "int8", "fp8"])
@pytest.mark.parametrize(("context", "users"), [(100, 1), (1000, 3), (33, 7)])
def test_predicted_pages_are_what_the_pool_allocates(size, cache, context, users):
    config = toy_config(size)
    work = Workload(context=context, users=users, kv_cache_dtype=cache)
    took = measure(config, work)
    pages = plan_pages(
        *(kv_groups(config.text.layers), value_bytes(work)),
        page_size=PAGE,
        max_tokens=context,
        requests=users,
        snapshots=users,
    )
    store = PageStore(pages, torch.bfloat16, torch.device("cpu"), {"sliding": "auto", "global": cache})
    allocated = sum(t.nbytes for t in (*store.codes.values(), *store.scales.values()))
    assert took.pool + took.snapshots == allocated


# What fits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "gib"), [("E2B", 12), ("12B", 26), ("31B", 70)])
def test_the_longest_context_is_the_last_page_that_fits(size, gib):
    made = plan(size, CPU, Workload(), available=gib << 30)
    config, longest = config_of(size), made.longest_context
    assert longest > 0
    assert measure(config, Workload(context=longest), CPU).total <= made.available
    if longest < config.text.max_position_embeddings:
        assert measure(config, Workload(context=longest + PAGE), CPU).total > made.available


def test_most_users_is_the_last_that_fits():
    made = plan("E4B", GPU, Workload(context=32768))
    config = config_of("E4B")
    sizes = [measure(config, Workload(context=32768, users=made.most_users + n), GPU).total for n in (0, 1)]
    assert sizes[0] <= made.available < sizes[1]


@pytest.mark.parametrize(
    ("size", "gib", "work", "advice"),
    [
        ("31B", 24, Workload(), "--quantization int4"),
        ("E4B", 8, Workload(context=1024), "--quantization int8"),
        ("26B-A4B", 3, Workload(), "a smaller model: E2B"),
        ("E2B", 1, Workload(), "a larger device"),
        ("12B", 12, Workload(context=8192, users=500), "users at most"),
    ],
)
def test_advice_when_it_does_not_fit(size, gib, work, advice):
    made = plan(size, GPU, work, available=gib << 30)
    assert not made.fits and advice in made.advice


def test_advice_when_it_fits_names_a_faster_way():
    made = plan("12B", GPU)
    assert made.fits and "--quantization int4" in made.advice


def test_the_ranking_holds_only_what_fits_and_starts_with_the_largest():
    made = ranking(hardware.find("4090"), Workload(context=32768))
    assert all(each.fits for each in made) and made[0].model == "31B"
    slow = ranking(replace(CPU, memory=32 << 30), Workload())
    assert slow[0].speeds[0].decode >= 10 > slow[-1].speeds[0].decode


def test_the_summary_has_five_lines_and_json_is_complete():
    made = plan("26B-A4B", GPU, Workload(context=32768, users=8, images=2, drafter=True, kv_cache_dtype="fp8"))
    assert len(made.summary().splitlines()) == 5
    told = json.loads(json.dumps(made.to_json()))
    assert told["memory"]["total"] == made.memory.total and told["fits"] is True
    assert all(len(row) == len(table.headings) for table in tables(made) for row in table.rows)


@pytest.mark.parametrize(
    ("model", "work", "message"),
    [
        ("E2B", Workload(context=200_000), "200,000 tokens is more than the model's 131,072"),
        ("E2B", Workload(context=500, images=2), "2 images take 564 tokens, but the context is 500"),
        ("E2B", Workload(ranks=3), "3 ranks can't share 8 attention heads"),
    ],
)
def test_workloads_that_no_device_can_have(model, work, message):
    with pytest.raises(InputError, match=message):
        plan(model, GPU, work)


# What to start with -------------------------------------------------------------------------------------------------


def test_a_start_takes_the_finest_format_that_leaves_room():
    card = hardware.find("4090")
    picked = {size: start(config_of(size), card, name=size) for size in ("E2B", "12B", "31B")}
    assert {size: each.quantization for size, each in picked.items()} == {"E2B": None, "12B": "int8", "31B": "int4"}
    assert picked["E2B"].context == 131_072 and picked["E2B"].users == 64
    assert 8192 < picked["31B"].context < 262_144


@pytest.mark.parametrize("size", ["E2B", "12B", "31B"])
@pytest.mark.parametrize("gib", [12, 20, 24, 40])
def test_what_a_start_promises_the_page_pool_can_hold(size, gib):
    config = config_of(size)
    try:
        made = start(config, CPU, name=size, available=gib << 30)
    except InputError:
        assert gib < {"E2B": 5, "12B": 9, "31B": 22}[size]
        return
    work = replace(made.plan.work, context=made.context)
    pages = plan_pages(
        *(kv_groups(config.text.layers), value_bytes(work)),
        page_size=PAGE,
        max_tokens=made.context,
        requests=made.users,
        snapshots=made.users,
        budget=made.cache_bytes,
    )
    assert pages.bytes() <= made.cache_bytes
    assert len(made.summary().splitlines()) == 5


@pytest.mark.parametrize(
    ("size", "wishes", "message"),
    [
        ("31B", {}, "31B can't be loaded here: does not fit.*; what would help: a smaller model: 12B"),
        ("12B", {"formats": ("int8",)}, "what would help: --quantization int4"),
        ("E4B", {"context": 100_000, "formats": ("int8",), "users": 900}, "what would help"),
    ],
)
def test_what_cannot_start_says_what_to_change(size, wishes, message):
    with pytest.raises(InputError, match=message):
        start(config_of(size), CPU, name=size, available=12 << 30 if size != "E4B" else 9 << 30, **wishes)


# Speed --------------------------------------------------------------------------------------------------------------


def test_the_floor_of_e2b_is_the_known_one():
    """2,279 M parameters are read per token; at 30 GB/s that is 6.6 tokens/s in bfloat16 and about 23 in int4."""
    device = replace(CPU, bandwidth=30e9, bf16=1e13, int8=1e13)
    rates = {
        f: speed(config_of("E2B"), Workload(context=512, quantization=f), device, 1).decode for f in (None, "int4")
    }
    assert rates[None] == pytest.approx(6.5, abs=0.15) and rates["int4"] == pytest.approx(22.5, abs=1)


@pytest.mark.parametrize("size", ["E2B", "12B", "31B"])
@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_the_floor_is_what_the_network_really_reads(size, format):
    """Bytes of a decode step by the planner, and counted on a network in memory (small vectors put aside)."""
    config = toy_config(size)
    network = random_codes(config, format)
    work = Workload(context=9, quantization=None if format == "bfloat16" else format)
    bytes_per_second = replace(CPU, bandwidth=1.0, bf16=1e30, int8=1e30)
    vectors = sum(p.nbytes("bfloat16") for p in parameters(network.config) if len(p.shape) == 1 and p.part == "text")
    padding = sum(weight.nbytes - told for weight, told in quantised(network, format))
    counted = weight_bytes(network) - vectors - padding + past_bytes(network, 1, 9)
    assert step_seconds(config, work, bytes_per_second, 1, 1) == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("format", ["gguf:q4_0", "gguf:q8_0", "ct:w4a16"])
def test_a_file_is_planned_as_it_is_loaded(tmp_path, format):
    """Predicted weights against the tensors in memory; blocks of q4_0 stay int4, everything else is expanded."""
    network = toy_model("31B")
    if format == "ct:w4a16":
        path = tmp_path
        save_compressed(path, network.config, pairs(network), format.removeprefix("ct:"))
    else:
        path = tmp_path / "toy.gguf"
        weights = network.state_dict()
        save_gguf(path, network.config, weights.__getitem__, format.removeprefix("gguf:"))
    opened = open_checkpoint(path)
    assert bool(opened.kept) == (format == "gguf:q4_0")
    loaded = build(opened.config, opened.source, torch.device("cpu"), torch.bfloat16)
    held = 0
    for param in parameters(opened.config):
        owner, _, leaf = param.name.rpartition(".")
        held += getattr(loaded.get_submodule(owner), leaf).nbytes
    planned = measure(opened.config, Workload(context=64, kept=opened.kept), CPU)
    assert planned.on_device == held
    assert prepare(path, "cpu", quantization="none").plan.memory.on_device == held
    shown = CliRunner().invoke(app, ["plan", str(path), "--context", "64", "--json"])
    assert json.loads(shown.output)["memory"]["on_device"] == held


@pytest.mark.parametrize(
    ("media", "towers"),
    [
        (None, {"vision_tower", "audio_tower"}),
        ((), set()),
        (("video",), {"vision_tower"}),
        (("audio",), {"audio_tower"}),
    ],
)
def test_towers_that_nobody_asks_for_are_neither_loaded_nor_planned(media, towers):
    llm = LLM(device="cpu", media=media)
    network = llm.front.engine.runner.model
    assert {name for name, _ in network.named_children() if name.endswith("_tower")} == towers
    held = sum(parameter.nbytes for parameter in (*network.parameters(), *network.buffers()))
    planned = prepare(None, "cpu", quantization="none", media=media).plan.memory
    assert planned.on_device == held
    kinds = {"vision_tower": {"image", "video"}, "audio_tower": {"audio"}}
    assert llm.front.senses.kinds == set().union(*(kinds[tower] for tower in towers))
    question = [{"role": "user", "content": "12 + 30"}]
    greedy = SamplingParams(temperature=0, max_tokens=12)
    assert llm.chat(question, params=greedy) == LLM(device="cpu").chat(question, params=greedy)


def test_a_kind_of_media_that_there_is_not():
    with pytest.raises(InputError, match=r"'smell'.*image, video, audio"):
        LLM(media=["smell"])


def pairs(network):
    return ((param, network.state_dict()[param.name]) for param in parameters(network.config))


def quantised(network, format):
    """(weight, its bytes by the table) of every quantised matrix that a step reads; panels fill rows up to 16."""
    for param in parameters(network.config):
        owner, _, leaf = param.name.rpartition(".")
        value = getattr(network.get_submodule(owner), leaf)
        if isinstance(value, QuantTensor) and not param.looked_up:
            yield value, param.nbytes("bfloat16", format)


def test_prefill_skips_the_layers_that_share():
    """0.61 TFLOP for 512 tokens of E2B, 1.97 if all layers ran for all of them."""
    device = replace(CPU, bandwidth=1e15, bf16=1e12)
    seconds = 512 / speed(config_of("E2B"), Workload(), device, 1).prefill
    assert seconds == pytest.approx(0.59, abs=0.03)


def test_experts_are_read_by_need():
    device = replace(CPU, bf16=1e18)
    rates = [speed(config_of("26B-A4B"), Workload(context=64), device, batch).decode for batch in (1, 8, 64)]
    assert 2 * rates[0] < rates[1] < 8 * rates[0]  # eight users share some experts, but not all
    assert rates[1] < rates[2]


def test_a_drafter_pays_by_its_acceptance():
    assert expected_tokens(0.0, 4) == 1 and expected_tokens(1.0, 4) == 5
    slow, fast = (plan("31B", GPU, Workload(drafter=True, acceptance=a)).speeds[0] for a in (0.0, 0.9))
    assert slow.decode_with_drafter < slow.decode < fast.decode_with_drafter


# Units and devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 << 30), ("24 GB", 24 * 10**9), ("24g", 24 << 30), ("8,192 MiB", 8 << 30), ("1.5t", 3 << 39)],
)
def test_sizes(text, size):
    assert units.parse_bytes(text) == size


@pytest.mark.parametrize(("text", "count"), [("32k", 32768), ("32,768", 32768), ("1M", 1 << 20), ("8192", 8192)])
def test_token_counts(text, count):
    assert units.parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "x", "-3G", "0GB", "24", "1e9GB", "9" * 400 + "G", "1..5G", "GiB", "٣GB"])
def test_no_sizes(text):
    with pytest.raises(InputError, match="is no size of memory"):
        units.parse_bytes(text)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("h200", "H200"),
        ("4090", "RTX 4090"),
        ("a100-80", "A100 80GB"),
        ("M4 max", "Apple M4 Max"),
        ("spark", "DGX Spark"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX 4070 Ti"),
        ("rtx 3060", "RTX 3060 12GB"),
        ("mi300x", "MI300X"),
    ],
)
def test_devices_by_the_names_people_use(name, found):
    assert hardware.find(name).name == found


@pytest.mark.parametrize("name", ["gtx1080", "", "h900x"])
def test_strange_devices(name):
    with pytest.raises(InputError, match="There is no data for the device"):
        hardware.find(name)


def test_a_measurement_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hardware.recall() is None and "guess" in hardware.this_machine().source
    hardware.remember(hardware.Measured(bandwidth=3e10, bf16=1e12, int8=2e12, int4=3e12, cores=2))
    machine = hardware.this_machine()
    assert machine.bandwidth == 3e10 and "measured" in machine.source
    assert [machine.rate(format) for format in (None, "int8", "int4")] == [1e12, 2e12, 3e12]
    hardware.measurement_file().write_text("{broken")
    assert hardware.recall() is None


@pytest.mark.parametrize("isa", [*cpu.supported(), "reference"])
def test_this_machine_can_be_measured(isa):
    before = cpu.active()
    try:
        cpu.use(isa)
        found = Meter(read_bytes=1 << 22, shape=(32, 256, 512), seconds=0.01).now()
    finally:
        cpu.use(before)
    assert min(found.bandwidth, found.bf16, found.int8, found.int4) > 1e7


def test_an_interruption_lowers_no_limit():
    """By a clock on which every second run takes ten times as long."""
    ticks = cycle((1e-3, 1e-2))
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += next(ticks)
        return now

    meter = Meter(read_bytes=1 << 20, shape=(32, 256, 512), seconds=1.0, clock=clock)
    assert meter.now().bandwidth == pytest.approx((1 << 20) / 1e-3, rel=1e-6)


# The commands -------------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.text(max_size=12),
    st.from_regex(r"[0-9,._-]{0,9}( ?[kKmMgGtT]?i?[bB]?)?", fullmatch=True),
    st.sampled_from(
        ["E2B", "31B", "h200", "24GiB", "32k", "1e99", "nan", "inf", "-1", "0", "int4", "∞GiB", "google/x"]
    ),
)
FLAGS = ("--memory", "--gpu", "--context", "--users", "--images", "--ranks", "--acceptance", "--quantization")


@settings(max_examples=300, deadline=None)
@given(model=WORDS, flags=st.lists(st.tuples(st.sampled_from(FLAGS), WORDS), max_size=3))
def test_nonsense_is_answered_in_a_sentence(model, flags):
    words = ["plan", *(word for flag in flags for word in flag), "--", model]
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, CabochonError), words
        assert "\n" not in str(result.exception)


def test_plan_draws_and_writes_a_page(tmp_path):
    words = ["plan", "E4B", "--gpu", "4090", "--plot", str(tmp_path / "a.png"), "--html", str(tmp_path / "a.html")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "a.html").read_text()
    assert "fits: 1 x 8k" in page and "http" not in page.replace("data:image", "")


def test_plan_compares_formats_and_ranks_sizes():
    compared = CliRunner().invoke(app, ["plan", "E2B", "--compare", "--gpu", "l4"]).output
    assert all(format in compared for format in ("bfloat16", "int8", "int4"))
    ranked = CliRunner().invoke(app, ["plan", "--memory", "24GiB", "--gpu", "4090"]).output
    assert "pick: 31B in int4, the largest that fits and writes at 10 tokens/s or more" in ranked
    nothing = CliRunner().invoke(app, ["plan", "--memory", "1GiB", "--gpu", "4090"]).output
    assert "Nothing fits 1 x 8k into 1.00 GiB" in nothing
    told = json.loads(CliRunner().invoke(app, ["plan", "--memory", "24GiB", "--gpu", "4090", "--json"]).output)
    assert [each["fits"] for each in told] == [True] * len(told)


def test_doctor_finds_nothing_wrong_with_what_ships():
    result = CliRunner().invoke(app, ["doctor", "pebble", "--offline", "--json"])
    found = {finding["topic"]: finding for finding in json.loads(result.output)}
    assert result.exit_code == 0
    assert {"python", "torch", "kernels", "memory", "disk", "licence", "config", "weights", "fit"} <= found.keys()
    assert found["weights"]["status"] == found["fit"]["status"] == "ok"


def test_doctor_says_what_is_broken(tmp_path):
    assert CliRunner().invoke(app, ["doctor", str(tmp_path / "none"), "--offline"]).exit_code == 1
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    result = CliRunner().invoke(app, ["doctor", str(tmp_path), "--offline"])
    assert result.exit_code == 1
    assert "is not JSON" in result.output and "is cut off" in result.output


def test_the_page_on_sizes_is_fresh():
    spec = importlib.util.spec_from_file_location("sizing_doc", ROOT / "scripts" / "sizing_doc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.document(), "run: python scripts/sizing_doc.py"


def test_no_torch_is_imported():
    code = "import sys, cabochon.sizing; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONWARNINGS": "error"}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == 0
