"""Modelfiles: read strictly, kept under a name, and the name is a model for library, commands and server."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cabochon import LLM, AsyncLLM, SamplingParams
from cabochon.errors import InputError, UnknownModelError
from cabochon.hub import BUNDLED, locate
from cabochon.media.source import Policy
from cabochon.modelfile import Recipe, keep, made, names, read_modelfile
from support.stand import post, running

SYSTEM = "You add numbers.\nYou say nothing else."
WHOLE = f'''# a comment
from {BUNDLED}

SYSTEM """
{SYSTEM}
"""
PARAMETER temperature 0
PARAMETER top_k 7
PARAMETER min_p 0.1
PARAMETER repeat_penalty 1.2
PARAMETER num_predict 5
PARAMETER num_ctx 300
PARAMETER stop "END"
MESSAGE user What is 1 + 1?
MESSAGE assistant """2"""
LICENSE """Apache
License 2.0"""
'''
HELLO = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


def cabochon(*words, **options):
    command = [sys.executable, "-m", "cabochon", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, **options)


def test_everything_in_a_file_is_read(tmp_path):
    recipe = read_modelfile(WHOLE, tmp_path)
    assert recipe == Recipe(
        base=str(BUNDLED),
        system=SYSTEM,
        parameters={
            "temperature": 0,
            "top_k": 7,
            "min_p": 0.1,
            "repeat_penalty": 1.2,
            "num_predict": 5,
            "num_ctx": 300,
        },
        stop=("END",),
        messages=(("user", "What is 1 + 1?"), ("assistant", "2")),
        licenses=("Apache\nLicense 2.0",),
    )


def test_a_relative_path_starts_beside_the_file(tmp_path):
    (tmp_path / "weights").mkdir()
    assert read_modelfile("FROM weights", tmp_path).base == str(tmp_path / "weights")
    assert read_modelfile("FROM ./nothing.gguf", tmp_path).base == str(tmp_path / "nothing.gguf")
    assert read_modelfile("FROM E2B", tmp_path).base == "E2B"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no FROM"),
        ("SYSTEM hello", "has no FROM"),
        ("FROM a\nFROM b", "line 2: a second FROM"),
        ('FROM a\nTEMPLATE """{{ .Prompt }}"""', "line 2: conversations are rendered in code"),
        ("FROM a\nADAPTER ./lora", "line 2: adapters can't be loaded yet"),
        ("FROM a\nSING loudly", "line 2: there is no instruction SING"),
        ("FROM a\nPARAMETER mirostat 1", "there is no PARAMETER mirostat; there are temperature"),
        ("FROM a\nPARAMETER temperature hot", "temperature is 'hot', but must be a number from 0 to 100"),
        ("FROM a\nPARAMETER top_k 1.5", "top_k is '1.5'"),
        ("FROM a\nPARAMETER top_p nan", "top_p is 'nan'"),
        ("FROM a\nMESSAGE system hello", "MESSAGE takes user or assistant"),
        ('FROM a\n\nSYSTEM """never', 'line 3: SYSTEM opens """ and never closes it'),
        ('FROM a\nSYSTEM """x""" y', 'behind the closing """'),
        ("FROM", "FROM says nothing"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, sentence):
    with pytest.raises(InputError) as caught:
        read_modelfile(text, tmp_path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_is_a_model():
    keep("adder:v1", read_modelfile(WHOLE, Path()))
    assert names() == ["adder:v1"]
    assert locate("adder:v1") == BUNDLED
    plain, llm = LLM(), LLM("adder:v1")
    assert llm.name == "adder:v1"
    assert llm.max_model_len == 300
    opened = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What is 1 + 1?"}]
    opened += [{"role": "assistant", "content": "2"}, *HELLO]
    assert llm.render(HELLO).token_ids == plain.render(opened).token_ids
    own = [{"role": "system", "content": "Be kind."}, *HELLO]
    assert llm.render(own).token_ids == plain.render([own[0], *opened[1:]]).token_ids
    settled = llm.front.chat(HELLO).request.params
    assert (settled.temperature, settled.top_k, settled.max_tokens, settled.stop) == (0, 7, 5, ("END",))
    asked = llm.front.chat(HELLO, params=SamplingParams(temperature=0.5, max_tokens=3, stop=["."])).request.params
    assert (asked.temperature, asked.top_k, asked.max_tokens, asked.stop) == (0.5, 7, 3, ["."])
    assert (asked.min_p, asked.repetition_penalty) == (0.1, 1.2)
    off = llm.front.chat(HELLO, params=SamplingParams(min_p=0, repetition_penalty=1)).request.params
    assert (off.min_p, off.repetition_penalty) == (0, 1)


def test_a_name_is_served():
    keep("adder", Recipe(str(BUNDLED), system=SYSTEM, parameters={"num_predict": 4}))
    counted = {}
    for name in ("adder", None):
        llm = AsyncLLM(name, policy=Policy(remote=False))
        with running(llm) as base:
            answered = post(base, "/v1/chat/completions", {"model": llm.name, "messages": HELLO}).json()
            counted[name] = answered["usage"]
        llm.close()
    assert counted["adder"]["completion_tokens"] <= 4
    assert counted["adder"]["prompt_tokens"] > counted[None]["prompt_tokens"] + 5


def test_a_damaged_file_and_bad_names_are_told(home):
    keep("adder", Recipe(str(BUNDLED)))
    next((home / "data").rglob("adder.json")).write_text("{")
    with pytest.raises(InputError, match="make adder anew"):
        made("adder")
    for name in ("../up", "a b", "", "x/y"):
        with pytest.raises(InputError, match="can't be a model's name"):
            keep(name, Recipe("E2B"))
    with pytest.raises(UnknownModelError):
        locate("subtractor")


def test_the_commands(home):
    (home / "Modelfile").write_text(WHOLE)
    created = cabochon("create", "adder", "-f", home / "Modelfile")
    assert (created.returncode, created.stdout.split(";")[0]) == (0, f"adder is made from {BUNDLED}")
    assert "adder" in cabochon("list").stdout
    shown = cabochon("show", "adder").stdout
    assert "You add numbers." in shown and "temperature" in shown and "Apache" in shown
    answered = cabochon("run", "adder", "What is 2 + 3?", "--json")
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)["usage"]["completion_tokens"] <= 5

    (home / "Modelfile").write_text("FROM adder\nPARAMETER temperature 0.5\n")
    assert cabochon("create", "warmer", cwd=home).returncode == 0
    below = made("adder")
    assert made("warmer") == replace(below, parameters={**below.parameters, "temperature": 0.5})
    assert cabochon("rm", "adder", "--yes").returncode == 0
    assert names() == ["warmer"]
    assert locate("warmer") == BUNDLED
    refused = cabochon("create", "E2B", "-f", home / "Modelfile")
    assert (refused.returncode, "name of another model" in refused.stderr) == (2, True)
    (home / "Modelfile").write_text("FROM nobody/nothing\n")
    refused = cabochon("create", "other", "-f", home / "Modelfile")
    assert (refused.returncode, names()) == (2, ["warmer"])
