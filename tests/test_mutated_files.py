"""Files with one thing wrong cost one sentence each, in a process that gets half a gigabyte and no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.mutations import KINDS


def mutations(kind, count):
    seed = os.environ.get("CABOCHON_TEST_SEED", "0")
    command = [sys.executable, "-m", "support.mutations", kind, str(count), seed]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert not found["faults"], "\n".join(found["faults"])
    assert found["refused"] > found["loaded"], "what the mutations spoil is hardly noticed"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_mutated_checkpoints(kind):
    mutations(kind, 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_mutated_checkpoints(kind):
    found = mutations(kind, 500)
    print(f"{kind}: {found['refused']} refused, {found['loaded']} loaded all the same, 0 faults")
