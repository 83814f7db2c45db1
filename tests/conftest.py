"""Settings that every test shares.

Random input differs from test to test and is the same from run to run, so that a failure comes back when asked for;
CABOCHON_TEST_SEED=1 (2, 3, ...) draws other input, for the hypothesis tests too.
"""

import os
import random
import zlib

import numpy
import pytest
import torch
from hypothesis import settings

# Toy models are fastest on one thread, and the suite itself runs on every core (pytest -n).
os.environ.setdefault("OMP_NUM_THREADS", "1")

if not torch.cuda.is_available():
    # Triton reads it once, when the first library that brings kernels of its own imports it.
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["support.kernels"]

SEED = os.environ.get("CABOCHON_TEST_SEED", "0")
settings.register_profile("repeatable", derandomize=SEED == "0", database=None)
settings.load_profile("repeatable")


def pytest_report_header() -> str:
    return f"CABOCHON_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(f"{SEED} {request.node.nodeid}".encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
