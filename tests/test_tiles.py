"""Products of many rows on AMX tiles: the bits of AVX-512. The tiles are emulated, so any such machine can tell."""

import os
import subprocess
import sys

import pytest
import torch

from cabochon import ops
from cabochon.cli import checks
from cabochon.ops import cpu
from cabochon.quant import pack, quantize

TILES, TWIN = "amx_emulated", "avx512_bf16"
pytestmark = pytest.mark.skipif(
    TILES not in cpu.supported(), reason="no emulated tiles: no AVX-512, or no editable install"
)


def on_both(run):
    before, threads = cpu.active(), torch.get_num_threads()
    try:
        with torch.inference_mode():
            cpu.use(TWIN)
            expected = run()
            cpu.use(TILES)
            got = run()
            torch.set_num_threads(3)
            assert torch.equal(run(), got)
    finally:
        torch.set_num_threads(threads)
        cpu.use(before)
    assert not expected.isnan().any()
    return got, expected


def weight_of(format, *shape):
    return pack(quantize(torch.randn(shape) * shape[-1] ** -0.5, format))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [
        (11, 17, 40),
        (12, 1, 1),
        (13, 16, 33),
        (23, 130, 768),
        (24, 33, 769),
        (264, 64, 96),
        (265, 81, 64),
        (600, 40, 2000),
    ],
)
def test_linear(rows, outputs, inputs, format, dtype):
    """Rows in whole twelves and not, a last panel of one row, one group and more than are unpacked at a time."""
    x, weight = torch.randn(rows, inputs).to(dtype), weight_of(format, outputs, inputs)
    got, expected = on_both(lambda: ops.linear(x, weight))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_gated_mlp(format):
    x = torch.randn(37, 70)
    gate, up, down = weight_of(format, 321, 70), weight_of(format, 321, 70), weight_of(format, 70, 321)
    got, expected = on_both(lambda: ops.gated_mlp(x, gate, up, down))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_experts(format):
    """Some experts have a few tokens, some have more than twelve."""
    tokens, count, width, inner = 90, 7, 70, 48
    x, weights = torch.randn(tokens, width), torch.rand(tokens, 2)
    chosen = torch.stack([torch.randint(count - 2, (tokens,)), (torch.rand(tokens) < 0.1) + count - 2], -1)
    gate_up, down = weight_of(format, count, 2 * inner, width), weight_of(format, count, width, inner)
    got, expected = on_both(lambda: ops.experts(x, chosen, weights, gate_up, down))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_extreme_codes_and_what_is_not_a_number(format):
    """Largest sums of a group, zeros of an empty row, infinite scales: the same bits, and no row touches another."""
    x = torch.full((25, 96), 3.0)
    x[3], x[7, ::2], x[20, 5], x[21, 70] = 0, -3.0, torch.inf, torch.nan
    weight = pack(quantize(torch.full((20, 96), -1.0), format))
    before = cpu.active()
    try:
        with torch.inference_mode():
            cpu.use(TWIN)
            expected = ops.linear(x, weight)
            cpu.use(TILES)
            got = ops.linear(x, weight)
    finally:
        cpu.use(before)
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))
    assert got[20:22].isnan().all() and not got[[*range(20), *range(22, 25)]].isnan().any()


def test_tiles_are_taken_only_if_their_bits_are_right(monkeypatch):
    assert cpu._cpu.same_products(TILES, TWIN)
    assert not cpu._cpu.same_products("plain", TWIN)  # which rounds once more
    assert cpu._cpu.admit_tiles() == cpu.tiles_refused
    assert ("amx" in cpu.supported()) == (cpu._cpu.matrix_tiles() and not cpu.tiles_refused)
    monkeypatch.setattr(cpu, "tiles_refused", "their products differ from AVX-512's")
    (finding,) = checks.kernels()
    assert finding.text.endswith("AMX tiles are left alone: their products differ from AVX-512's")


@pytest.mark.parametrize("isa", [TILES, TWIN])
def test_the_environment_decides(isa):
    """Where it asks for something else, tiles are not even tried."""
    script = "from cabochon.ops import cpu; print(cpu.active(), 'amx' in cpu.supported())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "CABOCHON_ISA": isa}, capture_output=True, text=True
    )
    assert done.stdout.split() == [isa, "False"], done.stderr
