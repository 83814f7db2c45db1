"""The KV layout: what it says is what is allocated, and what its shortcuts cost in precision."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cabochon import ops
from cabochon.config import ModelConfig, read_config
from cabochon.engine.options import EngineOptions, context_that_fits, plan_cache
from cabochon.kv.layout import KVPlan, bytes_read, kv_groups, plan_pages, request_pages, row_geometry, token_bytes
from cabochon.kv.pool import PageStore
from cabochon.llm import LLM
from cabochon.llm.loading import Loaded
from cabochon.model import fused
from cabochon.model.gemma4 import Gemma4
from cabochon.variants import find
from support import coded_attention
from support.reference import oracle_logits
from support.toys import SIZES, WINDOW, calm_, random_ids, toy_config, toy_model

GIB = 2**30
META = torch.device("meta")
CONTEXTS = (4096, 32_768, 131_072, 262_144)


def text(size):
    return read_config(find(size).config()).text


def one_user(size, tokens, value_bytes=None, page_size=32):
    groups = kv_groups(text(size).layers)
    value_bytes = value_bytes or dict.fromkeys(groups, 2)
    return plan_pages(groups, value_bytes, page_size=page_size, max_tokens=tokens, requests=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("formats", [("auto", "auto"), ("auto", "int8"), ("fp8", "fp8")])
def test_the_pool_allocates_what_the_layout_says(size, formats):
    chosen = dict(zip(("sliding", "global"), formats, strict=True))
    value_bytes = {kind: 2 if kind_format == "auto" else 1 for kind, kind_format in chosen.items()}
    for tokens in CONTEXTS:
        plan = one_user(size, tokens, value_bytes)
        assert PageStore(plan, torch.bfloat16, META, chosen).bytes() == plan.bytes()


def test_the_documented_bytes_are_those_that_a_pool_allocates():
    page = (Path(__file__).parents[1] / "docs" / "sizing.md").read_text()
    table = page.split("## Pages of one conversation, in bytes\n\n")[1].split("\n\n")[0]
    cells = 0
    for line in table.splitlines()[2:]:
        size, kept, *took = (cell.strip() for cell in line.strip("|").split("|"))
        options = EngineOptions(max_num_seqs=1, max_snapshots=0, kv_cache_dtype=kept, kv_cache_memory_bytes=2**40)
        for tokens, documented in zip(CONTEXTS, took, strict=True):
            if documented == "-":
                assert tokens > text(size).max_position_embeddings
                continue
            plan, _ = plan_cache(text(size), options, tokens, META, torch.bfloat16)
            store = PageStore(plan, torch.bfloat16, META, options.formats())
            held = sum(part.untyped_storage().nbytes() for part in (*store.codes.values(), *store.scales.values()))
            assert documented.split(" = ")[0] == f"{held:,}", (size, kept, tokens)
            cells += 1
    assert cells == 2 * (5 * 4 - 2)


def test_published_bytes_per_token():
    """Figures of the fact sheet: two tensors for E2B and E4B, 1.25 head widths instead of 2 for the others."""
    two_tensors = {"E2B": 6_144, "E4B": 16_384, "12B": 16_384, "26B-A4B": 20_480, "31B": 81_920}
    windows = {"E2B": 12_288, "E4B": 40_960, "12B": 327_680, "26B-A4B": 204_800, "31B": 819_200}
    for size in SIZES:
        groups = kv_groups(text(size).layers)
        share = 1 if size in ("E2B", "E4B") else 1.25 / 2
        assert token_bytes(groups["global"], 2) == two_tensors[size] * share
        assert token_bytes(groups["sliding"], 2) == windows[size]


def test_31b_with_its_whole_context_takes_13_5_gib():
    options = EngineOptions(max_num_seqs=1, max_num_batched_tokens=8192, max_snapshots=0, kv_cache_memory_bytes=2**40)
    plan, _ = plan_cache(text("31B"), options, 262_144, META, torch.bfloat16)
    print(f"31B, 262,144 tokens, one user, bf16: {plan.bytes() / GIB:.2f} GiB")
    assert plan.bytes() <= 13.5 * GIB
    assert PageStore(plan, torch.bfloat16, META, options.formats()).bytes() == plan.bytes()


def test_a_window_needs_no_second_set_of_pages():
    group = kv_groups(text("31B").layers)["sliding"]
    assert request_pages(group, 262_144, 32) == 1024 // 32 + 1
    assert request_pages(group, 100, 32) == 4
    assert request_pages(group, 262_144, 1) == 1024 + 1


def test_memory_that_is_short_is_shared_and_too_little_refused():
    groups = kv_groups(text("E2B").layers)
    two = dict.fromkeys(groups, 2)
    args = {"page_size": 32, "max_tokens": 4096, "snapshots": 4}
    plenty = plan_pages(groups, two, requests=8, **args)
    tight = plan_pages(groups, two, requests=8, budget=plenty.bytes() // 2, **args)
    one = plan_pages(groups, two, requests=1, page_size=32, max_tokens=4096)
    assert one.bytes() < tight.bytes() <= plenty.bytes() // 2
    assert all(one.pages[kind] <= tight.pages[kind] < plenty.pages[kind] for kind in groups)
    with pytest.raises(Exception, match=f"takes {one.bytes() / 2**20:.1f} MiB, but only 8.0 MiB are free"):
        plan_pages(groups, two, requests=8, budget=2**23, **args)


def test_a_context_that_nobody_named_is_as_long_as_fits():
    def context(memory):
        options = EngineOptions(max_num_seqs=1, max_snapshots=0, kv_cache_memory_bytes=memory)
        tokens = context_that_fits(text("31B"), options, META, torch.bfloat16)
        assert plan_cache(text("31B"), options, tokens, META, torch.bfloat16)[0].bytes() <= memory
        return tokens

    assert context(14 * GIB) == 262_144
    assert context(7 * GIB) == (7 * GIB - 33 * 32 * 819_200) // (32 * 51_200) * 32


def test_bytes_read_follow_the_definition():
    layers = text("E2B").layers
    short, long = (bytes_read(layers, context, {"sliding": 2, "global": 2}) for context in (100, 10_000))
    assert short == sum(spec.kv_heads * row_geometry(spec)[0] * 2 * 100 for spec in layers)
    assert long == sum(spec.kv_heads * row_geometry(spec)[0] * 2 * (511 if spec.window else 10_000) for spec in layers)


# Precision ------------------------------------------------------------------------------------------------------------


def two_tensors(size, dtype):
    """The toy with keys and values stored apart: the same function of the same weights."""
    config = toy_config(size)
    layers = tuple(replace(spec, k_eq_v=False) for spec in config.text.layers)
    model = Gemma4(ModelConfig(replace(config.text, layers=layers)))
    calm_(model)
    with torch.no_grad():
        for layer, spec in zip(model.language_model.layers, config.text.layers, strict=True):
            if spec.k_eq_v:
                layer.self_attn.v_proj.weight.copy_(layer.self_attn.k_proj.weight)
    return model.to(dtype).eval()


def logits(model, ids, **options):
    options = {"block_size": 8, "num_blocks": (64, 64), "max_num_batched_tokens": 7, **options}
    return LLM.of(Loaded("toy", model), max_model_len=256, **options).logits(ids).double()


@pytest.mark.parametrize("size", ["12B", "26B-A4B", "31B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_narrow_cache_is_as_exact_as_two_tensors(size, dtype):
    narrow, wide = toy_model(size, dtype=dtype), two_tensors(size, dtype)
    errors = {"narrow": 0.0, "wide": 0.0}
    for seed in range(6):
        ids = random_ids(4 * WINDOW, seed=seed)
        exact = oracle_logits(size, ids)
        errors["narrow"] += float((logits(narrow, ids) - exact).square().mean())
        errors["wide"] += float((logits(wide, ids) - exact).square().mean())
    ratio = (errors["narrow"] / errors["wide"]) ** 0.5
    print(f"{size} {dtype}: error of the 1.25-width cache is {ratio:.3f} of the two-tensor cache's")
    assert ratio <= 1.1


@pytest.mark.parametrize("size", SIZES)
def test_eight_bit_caches_cost_little(size):
    model = toy_model(size)
    kl = {"fp8": 0.0, "int8": 0.0}
    for seed in range(3):
        ids = random_ids(4 * WINDOW, seed=seed)
        exact = oracle_logits(size, ids).log_softmax(-1)
        for kind in kl:
            rounded = logits(model, ids, kv_cache_dtype=kind).log_softmax(-1)
            kl[kind] += float((exact.exp() * (exact - rounded)).sum(-1).mean()) / 3
    print(f"{size}: mean KL of the fp8 cache {kl['fp8']:.1e}, of the int8 cache {kl['int8']:.1e}")
    assert 1e-12 < kl["int8"] < 1e-4
    assert 1e-12 < kl["fp8"] < 5e-4


@pytest.mark.parametrize("size", SIZES)
def test_queries_and_weights_in_8_bits_cost_as_much_as_the_cache_at_most(size, monkeypatch):
    """What the CPU kernels round beside the cache, at the real width of heads; everything else is in float32."""

    def coded(q, *where, **how):
        return coded_attention.attend(q, *where, **how).to(q.dtype)

    monkeypatch.setattr(fused, "fused", lambda layers, x, last_reader: None)
    model = toy_model(size, global_head_dim=512)
    options = {"num_blocks": (64, 64), "max_num_batched_tokens": 64, "block_size": 8}
    kl = {"cache": 0.0, "all": 0.0}
    for seed in range(2):
        ids = random_ids(250, seed=seed)
        exact = logits(model, ids, **options).log_softmax(-1)
        for kind, attend in {"cache": ops.attend, "all": coded}.items():
            with monkeypatch.context() as patch:
                patch.setattr(ops, "attend", attend)
                rounded = logits(model, ids, kv_cache_dtype="int8", **options).log_softmax(-1)
            kl[kind] += float((exact.exp() * (exact - rounded)).sum(-1).mean()) / 2
    print(f"{size}: mean KL of the int8 cache {kl['cache']:.1e}, with queries and weights rounded {kl['all']:.1e}")
    assert kl["cache"] < kl["all"] < 2 * kl["cache"]


def test_plans_print():
    plan = one_user("E2B", 4096)
    assert isinstance(plan, KVPlan)
    assert plan.pages == {"sliding": 17, "global": 128}
