"""Peers of `cabochon bench cpu`: what is no peer is told, and those that are here run a toy."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cabochon.cli import app
from cabochon.cli.peers import LlamaCpp, Transformers, known_peers
from cabochon.errors import InputError
from support.toys import toy_config

LARGE = {
    "hidden_size": 64,
    "head_dim": 64,
    "global_head_dim": 64,
    "vocab_size": 1 << 14,
    "vocab_size_per_layer_input": 1 << 14,
}
"""Room for the bundled vocabulary, and rows that 8-bit blocks fit in."""
BUILD = os.environ.get("CABOCHON_LLAMA_CPP_BUILD")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--versus vllm", "--versus is 'vllm', but must be llama.cpp=PATH"),
        ("--versus llama.cpp", "--versus is 'llama.cpp', but must be"),
        ("--versus llama.cpp=/nowhere/llama-bench", "there is no program"),
        ("--formats int8,int3", "--formats has 'int3', but the formats are bfloat16, int8, int4"),
        ("--kv-cache-dtype fp8", "--kv-cache-dtype is 'fp8', but must be auto or int8"),
    ],
)
def test_what_can_not_be_is_told_before_anything_is_made(words, said):
    done = CliRunner().invoke(app, ["bench", "cpu", *words.split()])
    assert isinstance(done.exception, InputError) and said in str(done.exception)


def test_peers_may_be_several(tmp_path):
    program = tmp_path / "llama-bench"
    program.touch(mode=0o755)
    assert known_peers([f"llama.cpp={program}", "transformers"]) == {"llama.cpp": program, "transformers": None}


@pytest.mark.parametrize("cpu_time", [False, True])
def test_transformers_takes_prompts_and_steps(cpu_time):
    peer = Transformers(toy_config("E2B"), cpu_time)
    assert peer.prefill(20) > 0 and peer.decode(3, 9) > 0
    first = peer.past[3, 9].get_seq_length()
    assert peer.decode(3, 9) > 0 and peer.past[3, 9].get_seq_length() == first + 1


def test_a_program_that_fails_is_told(tmp_path):
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(InputError, match="ended with 3; it said: no such model"):
        LlamaCpp(program, toy_config("E2B", **LARGE), "bfloat16", tmp_path, False).prefill(8)


@pytest.mark.skipif(BUILD is None, reason="CABOCHON_LLAMA_CPP_BUILD names no build of llama.cpp")
@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_llama_cpp_takes_a_file_of_ours(format, tmp_path):
    large = LARGE | {"hidden_size": 256, "intermediate_size": 512, "hidden_size_per_layer_input": 256}
    peer = LlamaCpp(Path(BUILD, "bin", "llama-bench"), toy_config("E2B", **large), format, tmp_path, False)
    assert peer.prefill(16) > 0 and peer.decode(1, 8) > 0
    assert peer.decode(2, 8) is None
