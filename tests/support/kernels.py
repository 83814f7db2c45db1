"""Fixtures of the tests that run kernels."""

from collections.abc import Iterator

import pytest
import torch

from cabochon.ops import cpu

needs_kernels = pytest.mark.skipif(not cpu.supported(), reason="installed without the compiled kernels")


@pytest.fixture(params=cpu.supported() or ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU has, in turn."""
    before, threads = cpu.active(), torch.get_num_threads()
    cpu.use(request.param)
    with torch.inference_mode():
        yield request.param
    torch.set_num_threads(threads)
    cpu.use(before)


@pytest.fixture
def random() -> torch.Generator:
    """Seeded as the test is, whatever threads draw."""
    return torch.Generator().manual_seed(torch.initial_seed() % 2**31)
