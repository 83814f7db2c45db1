"""The Triton attention against `reference.attend` on fresh random input: rows, windows, pages, spans, types."""

import pytest
import torch

from cabochon.ops import reference
from cabochon.ops.views import Past, Rows, ScaledPages, View
from support.triton_twins import DEVICE, TOLERANCE, distance, twin

attend = twin("triton_attention").attend

S = 4
"""Slots per page: small, so that a few keys cross many pages."""


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def geometry(head: int, layout: str) -> tuple[int, int, int]:
    """(row width, key offset, value offset), see kv.layout."""
    return (2 * head, 0, head) if layout == "two tensors" else (head + head // 4, head // 4, 0)


def stored(contexts: list[int], window: int | None, rows: torch.Tensor, generator: torch.Generator):
    """Pages in random order that hold `rows` [n, K, W] cut from the window of each context, and where they lie."""
    first = [0 if window is None else max(0, c - window + 1) // S * S for c in contexts]
    counts = [-(-(c - f) // S) for c, f in zip(contexts, first, strict=True)]
    numbers = torch.randperm(sum(counts), generator=generator).int() + 1
    table = torch.zeros(len(contexts), max(*counts, 1), dtype=torch.int32)
    for r, numbers_of_r in enumerate(numbers.split(counts)):
        table[r, : counts[r]] = numbers_of_r
    longest = max(c - f for c, f in zip(contexts, first, strict=True))
    return table, torch.tensor(first, dtype=torch.int32), longest, sum(counts) + 1


def eight_bits(pages: torch.Tensor, codes: torch.dtype, head: int) -> ScaledPages:
    empty = torch.zeros(pages.shape, dtype=torch.uint8).view(codes)
    scaled = ScaledPages(empty, torch.zeros(*pages.shape[:3], 2), head)
    scaled.write(pages.flatten(0, 1), torch.arange(pages.shape[0] * S))
    return scaled


def check(
    lengths: list[int],
    contexts: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head: int = 16,
    layout: str = "two tensors",
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    codes: torch.dtype | None = None,
    tail: int | None = None,
    span: tuple[int, int] | None = None,
) -> None:
    g = torch.Generator().manual_seed(sum(lengths) + sum(contexts))
    width, key, value = geometry(head, layout)
    start, tokens = starts(lengths), sum(lengths)
    position = torch.cat([torch.arange(c, c + n) for c, n in zip(contexts, lengths, strict=True)]).int()
    until = position.clone()
    if span is not None:
        until[span[0] : span[1]] = position[span[1] - 1]
    rows = Rows(None, start, position, until, max(lengths))
    if tail is not None:
        asked = [min(tail, n) for n in lengths]
        index = torch.cat([torch.arange(int(e) - a, int(e)) for a, e in zip(asked, start[1:], strict=True)])
        rows = Rows(index, starts(asked), position[index], until[index], max(asked))
    table, first, longest, pages_needed = stored(contexts, window, position, g)
    pages = torch.randn(pages_needed, S, kv_heads, width, generator=g).to(dtype)
    step = torch.randn(tokens, kv_heads, width, generator=g).to(dtype)
    q = (torch.randn(len(rows.position), heads, head, generator=g) * head**-0.5).to(dtype)
    past = Past(table, first, torch.full((tokens,), -1), longest)
    kept = pages if codes is None else eight_bits(pages, codes, head)
    where = {"key_offset": key, "value_offset": value, "window": window}
    view = View(rows, start, torch.tensor(contexts, dtype=torch.int32), kept, past)
    wanted = reference.attend(q, step, view, **where)
    got = attend(*(to_device(x) for x in (q, step, view)), **where)
    assert distance(got.cpu(), wanted) < TOLERANCE[dtype]


def to_device(value):
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, int) or value is None:
        return value
    return type(value)(*(to_device(getattr(value, name)) for name in type(value).__slots__))


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("layout", ["two tensors", "value is key"])
def test_decode_of_unequal_contexts(layout, window):
    check([1, 1, 1, 1], [0, 5, 40, 600], layout=layout, window=window)


@pytest.mark.parametrize("window", [None, 24])
def test_verification_of_drafts_and_a_prefill_in_one_step(window):
    check([3, 1, 5], [7, 40, 600], window=window)
    check([40, 1, 5], [0, 40, 30], window=window)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_groups_whose_size_is_no_power_of_two(kv_heads):
    check([1, 20], [9, 3], heads=6, kv_heads=kv_heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types(dtype):
    check([1, 18], [70, 3], dtype=dtype, layout="value is key", head=32)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["two tensors", "value is key"])
def test_pages_in_eight_bits(codes, layout):
    check([1, 20], [70, 13], codes=codes, layout=layout, window=32)


def test_only_the_last_rows_of_a_long_step_ask():
    check([600, 3], [0, 40], tail=1, kv_heads=1)
    check([90, 3], [30, 40], tail=2, window=24)


def test_a_span_whose_tokens_see_each_other():
    check([50], [10], window=16, span=(5, 35))


def test_training_has_no_past():
    q, step = torch.randn(9, 2, 16), torch.randn(9, 1, 32)
    start, context = starts([4, 5]), torch.zeros(2, dtype=torch.int32)
    position = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4], dtype=torch.int32)
    rows = Rows(None, start, position, position, 5)
    where = {"key_offset": 0, "value_offset": 16, "window": None}
    view = View(rows, start, context)
    wanted = reference.attend(q, step, view, **where)
    got = attend(*(to_device(x) for x in (q, step, view)), **where)
    assert distance(got.cpu(), wanted) < 2e-6


def test_a_row_does_not_depend_on_the_batch_around_it():
    """Chunks of keys are cut at absolute positions, so the sums of a decode row are the same alone and in company."""
    g = torch.Generator().manual_seed(0)
    pages, step = torch.randn(300, S, 1, 32, generator=g), torch.randn(2, 1, 32, generator=g)
    q = torch.randn(2, 4, 16, generator=g)
    table = torch.randperm(299, generator=g).int()[None].repeat(2, 1)
    where = {"key_offset": 0, "value_offset": 16, "window": None}

    def decode(contexts: list[int]) -> torch.Tensor:
        count = len(contexts)
        position = torch.tensor(contexts, dtype=torch.int32)
        start = starts([1] * count)
        rows = Rows(None, start, position, position, 1)
        first = torch.zeros(count, dtype=torch.int32)
        past = Past(table[:count], first, torch.full((count,), -1), max(contexts))
        args = (q[:count], step[:count], View(rows, start, position, pages, past))
        return attend(*(to_device(x) for x in args), **where)

    assert torch.equal(decode([600])[0], decode([600, 1100])[0])
