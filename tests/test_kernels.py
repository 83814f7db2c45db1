"""The CPU kernels against their slow twins, for every instruction set that this CPU has, odd sizes included."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from cabochon import ops
from cabochon.ops import cpu, reference
from cabochon.ops.views import Past, Rows, ScaledPages, View
from cabochon.quant import QuantTensor, dequantize, pack, quantize, round_activations
from support import coded_attention
from support.kernels import needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("isa")]

FORMATS = ["dense", "int8", "int4"]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}
FUSED = [isa for isa in cpu.supported() if isa != "plain"]
"""Those that multiply and add with one rounding."""


def weight_of(shape, format, dtype, random):
    dense = torch.randn(shape, generator=random) * shape[-1] ** -0.5
    return dense.to(dtype) if format == "dense" else pack(quantize(dense, format))


def exact_linear(x, weight):
    """float64, with the rounding of activations that integer kernels do."""
    if isinstance(weight, QuantTensor):
        return round_activations(x) @ dequantize(weight).double().mT
    return x.double() @ weight.double().mT


def assert_close(got, expected, dtype, factor=1.0):
    assert not got.isnan().any()
    error = (got.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-9)
    assert error < TOLERANCE[dtype] * factor, f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 1), (1, 130, 70), (5, 66, 2113), (13, 17, 33)])
def test_linear(rows, outputs, inputs, format, dtype, random):
    x = torch.randn(rows, inputs, generator=random).to(dtype)
    weight = weight_of((outputs, inputs), format, dtype, random)
    assert_close(cpu.linear(x, weight), exact_linear(x, weight), dtype)
    wide = cpu.linear(x, weight, wide=True)
    assert wide.dtype == torch.float32 and torch.equal(wide.to(dtype), cpu.linear(x, weight))
    assert_close(wide, exact_linear(x, weight), torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("inputs", [1100, 2100])
def test_rows_do_not_depend_on_company_or_threads(inputs, format, dtype, random):
    weight = weight_of((200, inputs), format, dtype, random)
    x = torch.randn(61, inputs, generator=random).to(dtype)
    together = ops.linear(x, weight)
    torch.set_num_threads(3)
    for rows in (1, 2, 3, 7, 8, 13, 29):
        assert torch.equal(ops.linear(x[:rows], weight), together[:rows])
    assert torch.equal(ops.linear(x, weight), together)


@pytest.mark.parametrize("isa", FUSED, indirect=True)
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(3, 33, 70), (17, 20, 1600), (270, 81, 320)])
def test_integer_products_are_the_same_bits_wherever_additions_are_fused(isa, rows, outputs, inputs, format, random):
    """Whatever the shape of an instruction set's tiles, and with the largest sums that a group can have."""
    x = torch.randn(rows, inputs, generator=random)
    x[1], x[2, ::2] = 3.0, -3.0
    dense = torch.randn(outputs, inputs, generator=random)
    dense[0], dense[1] = -1.0, 1.0
    weight = pack(quantize(dense, format))
    got = ops.linear(x, weight)
    for other in set(FUSED) - {isa}:
        cpu.use(other)
        assert torch.equal(ops.linear(x, weight), got), other


@pytest.mark.parametrize("format", FORMATS)
def test_strided_rows_and_leading_axes(format, random):
    weight = weight_of((48, 64), format, torch.float32, random)
    wide = torch.randn(4, 3, 128, generator=random)
    x = wide[..., 64:]
    assert ops.linear(x, weight).shape == (4, 3, 48)
    assert torch.equal(ops.linear(x, weight), ops.linear(x.contiguous(), weight))


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_a_number_stays_visible(format, random):
    weight = weight_of((40, 96), format, torch.float32, random)
    x = torch.randn(3, 96, generator=random)
    x[1, 50] = torch.nan
    y = ops.linear(x, weight)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_head(softcap, dtype, random):
    weight = weight_of((999, 64), "dense", dtype, random) * 20
    x = torch.randn(2, 64, generator=random).to(dtype)
    logits = cpu.head(x, weight, softcap)
    expected = reference.head(x.double(), weight.double(), softcap)
    assert logits.dtype == torch.float32
    assert_close(logits, expected, torch.float32)  # not rounded to bfloat16 on the way


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("width", "some"), [(64, 1), (70, 130), (2113, 7)])
def test_head_at_some_rows(width, some, dtype, random):
    """The bits of the whole head, wherever the rows lie and whatever stands beside them."""
    weight = weight_of((300, width), "dense", dtype, random)
    x = torch.randn(3, 2 * width, generator=random).to(dtype)[:, width:]
    ids = torch.randint(300, (3, some), generator=random)
    got = cpu.head_at(x, weight, ids)
    assert torch.equal(got, cpu.head(x, weight, None).gather(1, ids))
    assert_close(got, reference.head_at(x.double(), weight.double(), ids), torch.float32)
    torch.set_num_threads(3)
    assert torch.equal(cpu.head_at(x[1:], weight, ids[1:]), got[1:])
    with pytest.raises(IndexError):
        cpu.head_at(x, weight, ids + 300)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_head_at_rows_of_a_quantized_table(format, random):
    weight = weight_of((300, 64), format, torch.float32, random)
    x, ids = torch.randn(3, 64, generator=random), torch.randint(300, (3, 20), generator=random)
    expected = reference.head(x, weight, None).gather(1, ids)
    assert_close(cpu.head_at(x, weight, ids), expected, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "width", "inner"), [(1, 64, 128), (4, 70, 90), (9, 33, 321)])
def test_gated_mlp(rows, width, inner, format, dtype, random):
    x = torch.randn(rows, width, generator=random).to(dtype)
    gate, up = (weight_of((inner, width), format, dtype, random) for _ in range(2))
    down = weight_of((width, inner), format, dtype, random)
    hidden = torch.nn.functional.gelu(exact_linear(x, gate), approximate="tanh") * exact_linear(x, up)
    expected = exact_linear(hidden.to(dtype) if format == "dense" else hidden.float(), down)
    got = cpu.gated_mlp(x, gate, up, down)
    # A hidden number at a rounding edge may fall to the other side: one step of 1/127 in one of `inner` terms.
    assert_close(got, expected, dtype, 1 if format == "dense" or dtype == torch.bfloat16 else 2000)
    assert torch.equal(got[:1], cpu.gated_mlp(x[:1], gate, up, down))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("format", FORMATS)
def test_experts(format, dtype, random):
    tokens, per_token, count, width, inner = 11, 3, 7, 64, 48
    x = torch.randn(tokens, width, generator=random).to(dtype)
    chosen = torch.stack([torch.randperm(count - 1, generator=random)[:per_token] for _ in range(tokens)])
    weights = torch.rand(tokens, per_token, generator=random).to(dtype)
    gate_up = weight_of((count, 2 * inner, width), format, dtype, random)
    down = weight_of((count, width, inner), format, dtype, random)
    expected = torch.zeros(tokens, width, dtype=torch.float64)
    for token in range(tokens):
        for slot in range(per_token):
            expert = int(chosen[token, slot])
            gate, up = exact_linear(x[token : token + 1], gate_up[expert]).chunk(2, -1)
            hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
            y = exact_linear(hidden.to(dtype) if format == "dense" else hidden.float(), down[expert])
            expected[token] += y[0] * weights[token, slot].double()
    got = ops.experts(x, chosen, weights, gate_up, down)
    assert_close(got, expected, dtype, 1 if format == "dense" or dtype == torch.bfloat16 else 2000)
    alone = [ops.experts(x[t : t + 1], chosen[t : t + 1], weights[t : t + 1], gate_up, down) for t in range(tokens)]
    assert torch.equal(got, torch.cat(alone))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 16, 70, 1536])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(weighted, width, dtype, random):
    x = torch.randn(3, 5, width, generator=random).to(dtype)
    weight = torch.randn(width, generator=random).to(dtype) if weighted else None
    expected = reference.rms_norm(x.double(), None if weight is None else weight.double(), 1e-6)
    assert_close(ops.rms_norm(x, weight, 1e-6), expected, dtype)


@pytest.mark.parametrize("width", [1, 70, 1536])
def test_rms_norm_of_a_wider_stream_has_the_type_of_the_weight(width, random):
    x, weight = torch.randn(3, 5, width, generator=random), torch.randn(width, generator=random).bfloat16()
    got = ops.rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    assert_close(got, reference.rms_norm(x.double(), weight.double(), 1e-6), torch.bfloat16)


@pytest.mark.parametrize(("kind", "dtype"), [*zip(TOLERANCE, TOLERANCE, strict=True), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("width", [1, 72, 1152])
@pytest.mark.parametrize("onto", [False, True])
def test_settle(onto, width, kind, dtype, random):
    weight = torch.randn(width, generator=random).to(dtype)
    x = (torch.randn(3, 5, width, generator=random) * 2).to(kind)
    residual = torch.randn(3, 5, width, generator=random).to(kind) if onto else None
    wide = None if residual is None else residual.double()
    for options in ({}, {"bound": 0.5, "share": 0.5}):
        got = ops.settle(x, weight, 1e-6, onto=residual, **options)
        assert got.dtype == kind
        assert_close(got, reference.settle(x.double(), weight.double(), 1e-6, onto=wide, **options), kind)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [16, 70])
def test_per_layer_inputs(width, dtype, random):
    x, token, weight = (torch.randn(shape, generator=random) for shape in ((9, 5, width), (9, 5, width), width))
    token, weight = token.to(dtype), weight.to(dtype)
    expected = reference.per_layer_inputs(x.double(), token.double(), weight.double(), 1e-6, 64**-0.5)
    for given in (x, x.to(dtype)):
        got = ops.per_layer_inputs(given, token, weight, 1e-6, 64**-0.5)
        assert got.dtype == dtype
        assert_close(got, expected, dtype, 1 if given.dtype == torch.float32 else 2)


def test_cos_and_sin(random):
    position = torch.randint(0, 262144, (400,), generator=random, dtype=torch.int32)
    frequency = torch.cat([torch.ones(1), torch.rand(6, generator=random)])
    angle = (position.float()[:, None] * frequency).double()
    for got, exact in zip(ops.cos_sin(position, frequency), (angle.cos(), angle.sin()), strict=True):
        assert (got.double() - exact).abs().max() < 2**-23  # two steps of float32 between a half and one


def test_torch_has_no_team_where_ours_works():
    torch.set_num_threads(2)
    with ThreadPoolExecutor(1) as other, pytest.raises(ZeroDivisionError), cpu.alone(torch.ones(1)):
        assert torch.get_num_threads() == 1 and cpu.on() and cpu._cpu.threads() == 2
        assert other.submit(torch.get_num_threads).result() == 2
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2
    with cpu.alone(torch.ones(1, dtype=torch.float64)):
        assert torch.get_num_threads() == 2
    with torch.inference_mode(False), torch.enable_grad(), cpu.alone(torch.ones(1)):
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head", "rotated"), [(256, 256), (512, 128), (8, 4), (20, 20)])
def test_rope(head, rotated, dtype, random):
    x, angle = torch.randn(7, 3, head, generator=random), torch.randn(7, rotated // 2, generator=random)
    cos, sin = angle.cos(), angle.sin()
    expected = reference.rope(x.double(), cos.double(), sin.double())
    got = ops.rope(x, cos, sin, dtype)
    assert got.dtype == dtype and ops.rope(x, cos, sin).dtype == torch.float32
    assert_close(got, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["rows", "panels"])
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 1), (50, 70), (33, 256)])
def test_embed_gives_the_bits_of_its_definition(shape, format, layout, dtype, random):
    rows = quantize(torch.randn(shape, generator=random).to(dtype), format)
    table = pack(rows) if layout == "panels" else rows
    ids = torch.randint(shape[0], (2, 9), generator=random)
    for kind in (None, torch.float32):
        expected = reference.embed(ids.flatten(), rows, 7.3, kind).unflatten(0, (2, 9))
        assert torch.equal(ops.embed(ids, table, 7.3, kind), expected)
    with pytest.raises(IndexError, match="no such row"):
        ops.embed(ids + shape[0], table, 1.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "count"), [((1, 1), 3), ((50, 70), 18), ((9, 8960), 8), ((70, 1536), 300)])
def test_embed_of_a_dense_table_gives_the_bits_of_its_definition(shape, count, dtype, random):
    table = torch.randn(shape, generator=random).to(dtype)
    ids = torch.randint(shape[0], (count,), generator=random)
    for kind in (None, torch.float32):
        assert torch.equal(ops.embed(ids, table, 7.3, kind), reference.embed(ids, table, 7.3, kind))
    for wrong in (shape[0], -1):
        with pytest.raises(IndexError, match="no such row"):
            ops.embed(torch.tensor([0, wrong]), table, 1.0)


def test_store(random):
    pages, rows = torch.zeros(3, 4, 2, 10), torch.randn(5, 2, 10, generator=random)
    slots = torch.tensor([3, -1, 4, 11, 0])
    twin = pages.clone()
    reference.store(twin, rows, slots)
    ops.store(pages, rows, slots)
    assert torch.equal(pages, twin)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_store_in_8_bits_gives_the_bits_of_its_definition(dtype, random):
    """Rows of ordinary, of tiny and of no size, and one with something in it that is no number."""
    size = torch.tensor([1.0, 30.0, 1e-25, 0.0, 1.0])[:, None, None]
    rows = (torch.randn(5, 3, 70, generator=random) * size).to(dtype)
    rows[4, 1, 69] = torch.nan
    slots = torch.tensor([3, 11, 4, 0, 7])
    pages, twin = (
        ScaledPages(torch.zeros(3, 4, 3, 70, dtype=torch.int8), torch.zeros(3, 4, 3, 2), 40) for _ in range(2)
    )
    for into, store in ((pages, cpu.store), (twin, reference.store)):
        store(into, rows, slots)
        store(into, rows, torch.full((5,), -1))
    assert pages.scales[1, 3, 1, 1].isnan() and twin.scales[1, 3, 1, 1].isnan()
    for part in (pages, twin):
        part.scales[1, 3, 1, 1], part.codes[1, 3, 1, 40:] = 0, 0
    assert torch.equal(pages.codes, twin.codes) and torch.equal(pages.scales, twin.scales)


def attention_case(lengths, contexts, heads, kv_heads, head, width, window, dtype, random, slots=16):
    """Requests with `contexts` tokens in shuffled pages and `lengths` tokens in this step."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    position = torch.cat([torch.arange(c, c + n) for c, n in zip(contexts, lengths, strict=True)]).int()
    firsts = [0 if window is None else max(0, c - window + 1) // slots * slots for c in contexts]
    counts = [-(-(c - f) // slots) for c, f in zip(contexts, firsts, strict=True)]
    order = torch.randperm(sum(counts) + 1, generator=random).int()
    table = torch.zeros(len(lengths), max([*counts, 1]), dtype=torch.int32)
    at = 0
    for r, count in enumerate(counts):
        table[r, :count] = order[at : at + count]
        at += count
    pages = torch.randn(len(order), slots, kv_heads, width, generator=random).to(dtype)
    q = torch.randn(len(position), heads, head, generator=random).to(dtype) * head**-0.5
    step = torch.randn(len(position), kv_heads, width, generator=random).to(dtype)
    rows = Rows(None, starts, position, position.clone(), max(lengths))
    past = Past(table, torch.tensor(firsts).int(), torch.full((len(position),), -1), max(contexts))
    return q, step, View(rows, starts, torch.tensor(contexts).int(), pages, past)


def exact_attention(q, step, view, **where):
    """float64, with the roundings of kernels that multiply bytes."""
    if not isinstance(view.pages, ScaledPages):
        return reference.attend(q.double(), step.double(), replace(view, pages=view.pages.double()), **where)
    widened_to = q.dtype if "bf16" in cpu.active() or "amx" in cpu.active() else torch.float32
    cut = min(max(view.pages.split - where["key_offset"], 0), q.shape[-1])
    if cpu.active() not in ("plain", "avx2") and q.dtype == torch.bfloat16 and q.shape[-1] % 64 == cut % 64 == 0:
        return coded_attention.attend(q, step, view, widened_to=widened_to, **where)
    pages = view.pages.read(torch.arange(len(view.pages.codes)), widened_to)
    return reference.attend(q.double(), step.double(), replace(view, pages=pages.double()), **where)


CASES = {
    "decode": ([1, 1, 1], [0, 700, 37], 8, 1, 256, 512, None),
    "sliding": ([70, 1, 5], [300, 600, 0], 4, 2, 64, 128, 100),
    "shared vector": ([9, 20], [530, 3], 4, 2, 32, 40, None),
    "odd": ([3, 2], [18, 65], 6, 3, 12, 24, 20),
    "wide": ([60], [280], 8, 2, 512, 640, None),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_attend(case, dtype, random):
    lengths, contexts, heads, kv_heads, head, width, window = CASES[case]
    inputs = attention_case(lengths, contexts, heads, kv_heads, head, width, window, dtype, random)
    offsets = {"key_offset": width - head, "value_offset": 0, "window": window}
    got = cpu.attend(*inputs, **offsets)
    q, step, view = inputs
    wide = replace(view, pages=view.pages.double())
    expected = reference.attend(q.double(), step.double(), wide, **offsets)
    assert_close(got, expected, dtype)
    torch.set_num_threads(4)
    assert torch.equal(cpu.attend(*inputs, **offsets), got)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head", "window"), [(64, None), (40, None), (64, 100)])
def test_attention_of_a_row_does_not_depend_on_the_cut_of_the_prompt(head, window, dtype, random):
    """A prompt of 600 tokens in one step, and its end after any number of stored tokens: the same bits."""
    where = {"key_offset": 0, "value_offset": head, "window": window}
    whole = attention_case([600], [0], 4, 1, head, 2 * head, window, dtype, random)
    q, step, _ = whole
    full = cpu.attend(*whole, **where)
    for cut, slots in [(1, 16), (130, 32), (255, 1), (256, 16), (261, 7), (599, 32)]:
        _, _, view = attention_case([600 - cut], [cut], 4, 1, head, 2 * head, window, dtype, random, slots)
        place = torch.arange(int(view.past.first[0]), cut)
        page = view.past.table[0, (place - view.past.first[0]) // slots].long()
        ops.store(view.pages, step[place], page * slots + place % slots)
        part = cpu.attend(q[cut:], step[cut:], view, **where)
        assert torch.equal(part, full[cut:]), f"cut after {cut}"


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_over_blocks_of_several_chunks(dtype, codes, random):
    """The end of 2,900 tokens: the same bits alone or with rows before it, however threads share the blocks."""
    where = {"key_offset": 0, "value_offset": 64, "window": None}
    q, step, view = attention_case([301], [2599], 4, 1, 64, 128, None, dtype, random, 32)
    if codes:
        shape, stored = view.pages.shape, view.pages.flatten(0, 1)
        view.pages = ScaledPages(torch.zeros(shape, dtype=torch.int8), torch.zeros(*shape[:3], 2), 64)
        view.pages.write(stored, torch.arange(shape[0] * shape[1]))
    expected = exact_attention(q, step, view, **where)
    whole = cpu.attend(q, step, view, **where)
    assert_close(whole, expected, dtype)
    last = torch.tensor([300])
    rows = Rows(last, torch.tensor([0, 1]).int(), view.rows.position[last], view.rows.see_until[last], 1)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(ops.attend(q, step, view, **where), whole)
        assert torch.equal(ops.attend(q[last], step, replace(view, rows=rows), **where), whole[last])


def test_attend_over_two_way_spans_and_chosen_rows(random):
    q, step, view = attention_case([40, 30], [50, 0], 4, 2, 64, 128, 32, torch.float32, random)
    rows = view.rows
    rows.see_until = rows.position.clone()
    rows.see_until[10:20] = rows.position[19]
    index = torch.tensor([5, 12, 39, 40, 69])
    few = replace(view, rows=Rows(index, torch.tensor([0, 3, 5]).int(), rows.position[index], rows.see_until[index], 3))
    offsets = {"key_offset": 0, "value_offset": 64, "window": 32}
    expected = reference.attend(q[index], step, few, **offsets)
    assert_close(cpu.attend(q[index], step, few, **offsets), expected, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head", "width", "window"),
    [
        (4, 2, 64, 128, None),
        (4, 2, 32, 40, 100),
        (6, 2, 12, 24, None),
        (8, 1, 256, 512, 500),
        (8, 1, 512, 1024, None),
        (16, 2, 256, 320, None),
        (5, 1, 512, 640, None),
    ],
)
def test_attend_over_pages_in_8_bits(heads, kv_heads, head, width, window, dtype, random):
    q, step, view = attention_case([3, 1, 1], [150, 37, 600], heads, kv_heads, head, width, window, dtype, random)
    shape = view.pages.shape
    kept = ScaledPages(torch.zeros(shape, dtype=torch.int8), torch.zeros(*shape[:3], 2), head)
    kept.write(view.pages.flatten(0, 1), torch.arange(shape[0] * shape[1]))
    offsets = {"key_offset": width - head, "value_offset": 0, "window": window}
    view = replace(view, pages=kept)
    expected = exact_attention(q, step, view, **offsets)
    got = cpu.attend(q, step, view, **offsets)
    assert_close(got, expected, dtype)
    torch.set_num_threads(3)
    assert torch.equal(cpu.attend(q, step, view, **offsets), got)
    rows, past, ends = view.rows, view.past, torch.tensor([0, 1]).int()
    one = Rows(None, ends, rows.position[4:], rows.see_until[4:], 1)
    table = Past(past.table[2:], past.first[2:], past.slots[4:], past.longest)
    alone = cpu.attend(q[4:], step[4:], View(one, ends, view.context[2:], kept, table), **offsets)
    assert torch.equal(alone, got[4:])
    table = Past(past.table[:1], past.first[:1], past.slots[:1], past.longest)
    first = Rows(None, ends, rows.position[:1], rows.see_until[:1], 1)
    alone = cpu.attend(q[:1], step[:1], View(first, ends, view.context[:1], kept, table), **offsets)
    assert torch.equal(alone, got[:1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_not_a_number_stays_visible_over_pages_in_8_bits(dtype, random):
    q, step, view = attention_case([1, 1], [150, 90], 4, 1, 64, 128, None, dtype, random)
    shape = view.pages.shape
    view.pages = ScaledPages(torch.zeros(shape, dtype=torch.int8), torch.ones(*shape[:3], 2), 64)
    q[0, 2, 50] = torch.nan
    got = cpu.attend(q, step, view, key_offset=0, value_offset=64, window=None)
    assert got[0, 2].isnan().all() and not got[0, [0, 1, 3]].isnan().any() and not got[1].isnan().any()


def test_attend_without_past(random):
    q, step, view = attention_case([33, 7], [0, 0], 4, 2, 64, 128, 16, torch.float32, random)
    view = replace(view, pages=None, past=None)
    offsets = {"key_offset": 0, "value_offset": 64, "window": 16}
    assert_close(cpu.attend(q, step, view, **offsets), reference.attend(q, step, view, **offsets), torch.float32)


def test_gradients_take_the_reference(random):
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(3, 8, generator=random, requires_grad=True)
        ops.linear(x, torch.randn(4, 8)).sum().backward()
        assert x.grad is not None
