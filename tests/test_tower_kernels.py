"""The towers' kernels against their slow twins in float64, for every instruction set that this CPU has."""

import pytest
import torch

from cabochon import ops
from cabochon.ops import cpu, towers
from cabochon.ops import reference_towers as reference
from support.kernels import needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("isa")]

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-8}
"""Of the largest value: float32 sums of some hundred terms; bfloat16's one rounding, and that of what lies between."""


@pytest.fixture
def our_product(monkeypatch):
    """Ours, also on a CPU where torch's would be taken."""
    monkeypatch.setattr(towers._cpu, "matrix_tiles", lambda: False)


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return type(value)(*map(double, value)) if isinstance(value, tuple) else value


def agree(op, dtype, *inputs, roundings=1, **options):
    """The op's result, compared with its twin's in float64; so many `roundings` may add up."""
    got = getattr(ops, op)(*inputs, **options)
    twin = getattr(reference, op)
    expected = twin(*map(double, inputs), **{name: double(value) for name, value in options.items()})
    assert got.dtype == dtype and got.shape == expected.shape and not got.isnan().any()
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < roundings * TOLERANCE[dtype], f"relative error {error:.1e}"
    return got


def scalars(*values):
    return ops.Clip(*(torch.tensor(value, dtype=torch.bfloat16) for value in values))


CLIPS = {"none": None, "narrow": scalars(-0.75, 0.5, -1.5, 1.0)}
SIZES = [(1, 8, 5), (13, 70, 33), (25, 1290, 64), (100, 33, 17), (1601, 16, 40)]
"""Rows, inputs, outputs: around tiles of 12, strips of 16 and 32, the 1,536 rows that are copied together."""


@pytest.mark.usefixtures("our_product")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_clipped_linear(rows, inputs, outputs, clip, silu):
    x, weight = torch.randn(rows, inputs).bfloat16(), (torch.randn(outputs, inputs) * inputs**-0.5).bfloat16()
    got = agree("clipped_linear", torch.bfloat16, x, weight, CLIPS[clip], silu=silu)
    torch.set_num_threads(3)
    assert torch.equal(ops.clipped_linear(x, weight, CLIPS[clip], silu=silu), got), "whoever does which part"
    assert torch.equal(ops.clipped_linear(x[:1], weight, CLIPS[clip], silu=silu), got[:1]), "whatever stands beside"
    more = torch.randn(rows, outputs).bfloat16()
    for onto in (more, more[0].expand(rows, -1)):
        agree("clipped_linear", torch.bfloat16, x, weight, CLIPS[clip], silu=silu, onto=onto)


@pytest.mark.usefixtures("our_product")
@pytest.mark.parametrize("gate", ["gelu", "sigmoid"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_clipped_gate(rows, inputs, outputs, clip, gate):
    x = torch.randn(2, rows, inputs).bfloat16()[:, ::2]  # rows that don't lie together
    first, second = (torch.randn(2 * outputs, inputs) * inputs**-0.5).bfloat16().chunk(2)
    clips = CLIPS[clip], CLIPS[clip] and CLIPS[clip]._replace(output_max=torch.tensor(0.25).bfloat16())
    got = ops.clipped_gate(x, first, second, clips, gate)
    doubled = tuple(map(double, clips))
    expected = reference.clipped_gate(x.double(), first.double(), second.double(), doubled, gate)
    assert (got.double() - expected).abs().max() < TOLERANCE[torch.bfloat16] * expected.abs().max()


@pytest.mark.usefixtures("our_product")
def test_gates_of_different_ranges_of_the_input_take_the_long_way():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    clips = CLIPS["narrow"], CLIPS["narrow"]._replace(input_max=torch.tensor(9.0))
    got = ops.clipped_gate(x, weight, weight, clips, "gelu")
    assert torch.equal(got, reference.clipped_gate(x, weight, weight, clips, "gelu"))


@pytest.mark.usefixtures("our_product")
def test_what_is_not_a_number_passes_the_ranges():
    x, weight = torch.ones(3, 8).bfloat16(), torch.ones(4, 8).bfloat16()
    x[1, 5] = torch.nan
    y = ops.clipped_linear(x, weight, CLIPS["narrow"])
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def test_spin_tells_what_it_multiplied():
    cpu._cpu.set_threads(1)
    once = cpu._cpu.spin(10)
    assert once > 0 and cpu._cpu.spin(30) == 3 * once
    cpu._cpu.set_threads(2)
    assert cpu._cpu.spin(10) == 2 * once


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "head"), [(2, 72), (3, 64), (1, 8)])
def test_turn(heads, head, dtype):
    x, weight = torch.randn(2, 7, heads, head).to(dtype), torch.randn(head).to(dtype)
    angle = torch.randn(7, 1, 2, head // 4)
    agree("turn", dtype, x, weight, 1e-6, angle.cos().to(dtype), angle.sin().to(dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 37, 3, 24), (1, 130, 2, 72), (1, 397, 2, 64), (1, 384, 1, 8)])
def test_attend_all(shape, dtype):
    """Counts around the blocks of 384 keys, tiles of 12 and 32 queries, widths that fill no register or tile."""
    q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
    got = agree("attend_all", dtype, q, k, v)
    torch.set_num_threads(3)
    assert torch.equal(ops.attend_all(q[:1], k[:1], v[:1]), got[:1]), "a picture does not depend on the one beside it"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("keys", ["rising", "falling"])
def test_attend_all_when_scores_grow_beyond_what_was_taken_off(keys, dtype):
    """Scores from 0 to 300 for one query, all near 0 for the other: each has its own moments of being weighed anew."""
    q = torch.tensor([1.0, 2**-10]).repeat(250).reshape(1, 500, 1, 1).expand(1, 500, 1, 8).to(dtype)
    size = torch.linspace(0, 37.5, 500)
    k = (size if keys == "rising" else size.flip(0)).reshape(1, 500, 1, 1).expand(1, 500, 1, 8).to(dtype)
    agree("attend_all", dtype, q, k, torch.randn(1, 500, 1, 8).to(dtype))


def test_attend_all_does_not_hide_what_is_not_a_number():
    q = torch.randn(1, 70, 1, 16).bfloat16()
    k, v = q.clone(), q.clone()
    q[0, 40] = torch.nan
    out = ops.attend_all(q, k, v)
    assert out[0, 40].isnan().all() and not out[0, :40].isnan().any() and not out[0, 41:].isnan().any()
    k[0, 69] = torch.inf
    assert not ops.attend_all(q, k, v).isfinite().any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "heads", "head", "reach"), [(1, 1, 16, 12), (29, 3, 40, 12), (40, 8, 128, 16)])
def test_attend_recent(tokens, heads, head, reach, dtype):
    q, k, v = (torch.randn(tokens, heads, head).to(dtype) for _ in range(3))
    relative, scale = torch.randn(reach, heads, head).to(dtype), torch.rand(head) * head**-0.5
    got = agree("attend_recent", dtype, q, k, v, relative, scale, 1.9, 5.0)
    assert torch.equal(ops.attend_recent(q[:9], k[:9], v[:9], relative, scale, 1.9, 5.0), got[:9]), "nothing from ahead"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (3, 70), (40, 1024)])
def test_blend(tokens, width, dtype):
    x, taps, weight = (torch.randn(n, width).to(dtype) for n in (tokens, 5, 1))
    agree("blend", dtype, x, taps, weight[0], 1e-6, torch.inf)
    agree("blend", dtype, x, taps, weight[0], 1e-6, 0.5)


@pytest.mark.parametrize(("frames", "bands"), [(1, 1), (7, 10), (33, 16), (70, 128)])
@pytest.mark.parametrize(("channels", "outputs"), [(16, 16), (48, 80), (128, 32)])
def test_subsample(frames, bands, channels, outputs):
    """Sizes that are odd at either halving, and more rows than are made at once.

    The first convolution's results and the second one's sums are rounded, too.
    """
    halvings = [
        ops.Halving((torch.randn(count, inputs, 3, 3) * inputs**-0.5).bfloat16(), torch.randn(count).bfloat16())
        for inputs, count in ((1, channels), (channels, outputs))
    ]
    mel = torch.randn(frames, bands).bfloat16()
    got = agree("subsample", torch.bfloat16, mel, *halvings, 1e-6, roundings=3)
    torch.set_num_threads(3)
    assert torch.equal(ops.subsample(mel, *halvings, 1e-6), got)
