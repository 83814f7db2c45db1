"""The CPU kernels that rank, sum and draw logits against their definitions, for every instruction set of this CPU."""

import pytest
import torch

from cabochon import ops
from cabochon.ops import cpu, reference, reference_drawing
from support.kernels import needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("isa")]


def numbers(rows, width, random):
    """Rows in random order, one rising, one of few values, one nearly all forbidden, one with what is not a number."""
    x = torch.randn(rows, width, generator=random)
    x[0] = x[0].sort().values
    x[1] = x[1].round()  # zeros of both signs among them
    x[2, torch.rand(width, generator=random) < 0.99] = -torch.inf
    x[3, torch.rand(width, generator=random) < 3 / width] = torch.nan
    x[4] = -torch.inf
    x[4, width // 2] = torch.inf
    return x


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 130, 1000, 4096, 70_001, 262_144])
@pytest.mark.parametrize("k", [1, 5, 64, 1024])
def test_largest(width, k, random):
    x = numbers(6, width, random)
    values, places = x.sort(dim=-1, descending=True, stable=True)
    for op in (cpu, reference):
        got = op.largest(x, k)
        assert torch.equal(got[1], places[:, :k])
        assert torch.equal(got[0].nan_to_num(7.0), values[:, :k].nan_to_num(7.0))
    wide = torch.cat([x, x], 1)[:, width:]
    assert torch.equal(ops.largest(wide, k)[1], places[:, :k])


def test_largest_of_nothing_and_in_other_types(random):
    x = numbers(5, 700, random)
    assert ops.largest(x[:0], 3)[0].shape == (0, 3)
    for dtype in (torch.float64, torch.bfloat16):
        values, places = ops.largest(x.to(dtype), 3)
        assert values.dtype == dtype
        assert torch.equal(x.to(dtype).gather(1, places).nan_to_num(7.0), values.nan_to_num(7.0))


@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("width", [1, 700, 5_003])
def test_draw(width, temperature, spread, random):
    """Few and many candidates, ties, forbidden tokens, both ends of the uniform number."""
    rows = 40
    x = torch.randn(rows, width, generator=random) * spread
    x[::2] = (x[::2] * 8).round() / 8
    x[::3, 1::2] = -torch.inf
    settings = torch.empty(5, rows, dtype=torch.float64)
    settings[0] = torch.rand(rows, generator=random, dtype=torch.float64)
    settings[0, :2] = torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64)
    settings[1] = temperature
    for row, allowed in enumerate([(1, 5, 64, 1024, 1025, 3000, width), (0.3, 0.95, 1.0), (0.0, 0.05, 1.0)], 2):
        settings[row] = torch.tensor(allowed)[torch.randint(len(allowed), (rows,), generator=random)]
    tokens, best = cpu.draw(x, settings)
    expected = reference_drawing.draw(x, settings)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(best, expected[1])


def test_draw_says_what_it_can_not_draw_from(random):
    x = torch.randn(3, 3000, generator=random)
    x[0], x[1, 7], x[2, 8] = -torch.inf, torch.nan, torch.inf
    for top_k in (1, 64, 3000):
        settings = torch.tensor([[0.5, 1.0, top_k, 1.0, 0.0]] * 3, dtype=torch.float64).T
        best = cpu.draw(x, settings)[1]
        assert best.tolist()[::2] == [-torch.inf, torch.inf] and best[1].isnan()


@pytest.mark.parametrize("width", [1, 15, 1024, 70_001])
def test_log_sum(width, random):
    x = numbers(6, width, random)
    x[1] = torch.randn(width, generator=random) * 30
    got, expected = cpu.log_sum(x), x.double().logsumexp(-1)
    assert torch.allclose(got.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
