"""The GPU benchmark's steps on a toy, with the CPU's clock; and what it says where there is no GPU."""

import time

import pytest
import torch

from cabochon.cli import bench_gpu
from cabochon.errors import InputError
from support.toys import toy_config


def clock(run):
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@pytest.mark.parametrize("format", ["bfloat16", "int4"])
@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_every_step_is_timed_and_counted(size, format):
    config = toy_config(size)
    found = list(bench_gpu.steps(config, format, [20], [1, 3], [9, 40], clock, torch.device("cpu")))
    assert [step.what for step in found] == [
        "prefill 20", "decode 1 at 9", "decode 3 at 9", "decode 1 at 40", "decode 3 at 40"
    ]  # fmt: skip
    assert all(step.seconds > 0 for step in found) and found[0].moved is None
    assert found[2].moved > found[1].moved  # three pasts are read, the weights once
    assert found[1].floor(found[1].moved / found[1].seconds) == pytest.approx(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(InputError, match="needs a GPU"):
        bench_gpu.gpu()
