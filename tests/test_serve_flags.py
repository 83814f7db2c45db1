"""`cabochon serve`'s flags: the argument lists that the published recipes print after `vllm serve` or `vllm-openai`."""

from __future__ import annotations

import asyncio
import atexit
import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import httpx
import pytest
import torch

from cabochon.chat.messages import Message, Text
from cabochon.cli.serve import build
from cabochon.cli.serve_flags import ServeSettings, read_settings
from cabochon.cli.vllm_flags import REFUSED as REFUSED_FLAGS
from cabochon.config import read_config
from cabochon.engine.guessers import Lookup
from cabochon.engine.request import SamplingParams
from cabochon.errors import InputError
from cabochon.llm import AsyncLLM
from cabochon.llm.prepare import prepare
from cabochon.model.drafter import Drafter
from cabochon.server import door
from cabochon.server.app import create_app
from cabochon.server.ask import Ask
from cabochon.server.options import ServerOptions
from cabochon.server.service import Service
from cabochon.weights.load import save
from support.serving import Process, serving
from support.speaking import save_seeing
from support.toys import SIZES, calm_, toy_drafter_json

RECIPES = {
    "quick start": "google/gemma-4-E4B-it --max-model-len 131072",
    "26B on one GPU": "google/gemma-4-26B-A4B-it --max-model-len 32768 --gpu-memory-utilization 0.90 "
    "--max-num-batched-tokens 4096",
    "docker": "--model google/gemma-4-26B-A4B-it --max-model-len 32768 --gpu-memory-utilization 0.90 "
    "--max-num-batched-tokens 4096 --host 0.0.0.0 --port 8000",
    "docker on AMD": "--model google/gemma-4-E2B-it --host 0.0.0.0 --port 8000",
    "docker on Xeon": "google/gemma-4-26B-A4B-it --tensor-parallel-size 1 --enable-auto-tool-choice "
    "--tool-call-parser gemma4 --chat-template examples/tool_chat_template_gemma4.jinja --reasoning-parser gemma4",
    "TPU": "--model google/gemma-4-E2B-it --max-model-len 16384 --disable_chunked_mm_input --host 0.0.0.0 --port 8000",
    "full-featured E2B": "google/gemma-4-E2B-it --max-model-len 16384 --gpu-memory-utilization 0.90 "
    "--enable-auto-tool-choice --reasoning-parser gemma4 --tool-call-parser gemma4 "
    "--chat-template examples/tool_chat_template_gemma4.jinja "
    """--limit-mm-per-prompt '{"image": 4, "audio": 1}' --async-scheduling --host 0.0.0.0 --port 8000""",
    "full-featured 26B": "google/gemma-4-26B-A4B-it --max-model-len 16384 --gpu-memory-utilization 0.90 "
    "--max-num-batched-tokens 4096 --enable-auto-tool-choice --reasoning-parser gemma4 --tool-call-parser gemma4 "
    "--chat-template examples/tool_chat_template_gemma4.jinja --limit-mm-per-prompt.image 4 --async-scheduling "
    "--host 0.0.0.0 --port 8000",
    "thinking": "google/gemma-4-E2B-it --max-model-len 16384 --reasoning-parser gemma4 --tool-call-parser gemma4 "
    "--enable-auto-tool-choice --chat-template examples/tool_chat_template_gemma4.jinja",
    "thinking by default": "google/gemma-4-E2B-it --max-model-len 16384 --reasoning-parser gemma4 "
    "--chat-template examples/tool_chat_template_gemma4.jinja "
    """--default-chat-template-kwargs '{"enable_thinking": true}'""",
    "video": """google/gemma-4-E2B-it --max-model-len 8192 --limit-mm-per-prompt '{"image": 4, "video": 1}'""",
    "sound that the size does not hear": "google/gemma-4-31B-it --max-model-len 8192 "
    """--limit-mm-per-prompt '{"image": 4, "audio": 1}'""",
    "for benchmarks": "google/gemma-4-31B-it --max-model-len 32768 --no-enable-prefix-caching "
    """--limit-mm-per-prompt '{"image": 0, "audio": 0}' --async-scheduling""",
    "drafter": "google/gemma-4-E2B-it --speculative-config "
    """'{"model":"google/gemma-4-E2B-it-assistant","num_speculative_tokens":2}'""",
    "images only": "google/gemma-4-E2B-it --limit-mm-per-prompt.audio 0",
    "text only": """google/gemma-4-E2B-it --limit-mm-per-prompt '{"image": 0, "audio": 0}'""",
    "language model only": "google/gemma-4-26B-A4B-it --language-model-only",
    "vision budget": """google/gemma-4-31B-it --mm-processor-kwargs '{"max_soft_tokens": 560}'""",
    "fp8 cache": "RedHatAI/gemma-4-26B-A4B-it-FP8-dynamic --kv-cache-dtype fp8 --gpu-memory-utilization 0.92 "
    "--max-model-len 131072 --max-num-seqs 1",
    "Blackwell desktop": "nvidia/Gemma-4-26B-A4B-NVFP4 --gpu-memory-utilization 0.92 --max-model-len 262144 "
    "--max-num-seqs 64 --max-num-batched-tokens 8192 --enable-chunked-prefill --enable-prefix-caching "
    "--load-format fastsafetensors",
    "small Blackwell": "nvidia/Gemma-4-26B-A4B-NVFP4 --kv-cache-dtype fp8 --gpu-memory-utilization 0.9 "
    "--max-num-batched-tokens 4096 --enable-prefix-caching --enable-chunked-prefill --async-scheduling "
    "--max-num-seqs 4",
    "eager with a backend": "google/gemma-4-E4B --host=0.0.0.0 --port=8000 --max-model-len=131072 "
    "--gpu-memory-utilization=0.90 --kv-cache-dtype=fp8 --dtype=bfloat16 --enforce-eager --max-num-seqs=8 "
    "--attention-backend=TRITON_ATTN --async-scheduling",
    "own names and keys": "google/gemma-4-31B-it --served-model-name gemma4 best --api-key one --trust-remote-code "
    "--dtype bfloat16",
    "experts": "google/gemma-4-26B-A4B-it --enable-expert-parallel --quantization compressed-tensors",
    "quantised while loading": "google/gemma-4-E4B-it --quantization int4",
}
"""What the recipes print (github.com/vllm-project/recipes, Google/Gemma4.md, and model cards). All of these start."""

REFUSED = {
    "31B on two GPUs": (
        "google/gemma-4-31B-it --tensor-parallel-size 2 --max-model-len 32768 --gpu-memory-utilization 0.90",
        "--tensor-parallel-size 2: splitting a model over several devices is not available yet; start with 1.",
    ),
    "short form": ("google/gemma-4-31B-it -tp 4", "splitting a model over several devices"),
    "guesses by other means": (
        'google/gemma-4-E2B-it --speculative-config \'{"method":"eagle3","num_speculative_tokens":2}\'',
        "asks for the method 'eagle3'; known are mtp .the model's own drafter. and ngram",
    ),
    "guesses of an unknown kind": (
        "google/gemma-4-E2B-it --speculative-config '{\"prompt_lookup_max\":2}'",
        "--speculative-config holds 'prompt_lookup_max'; known are method, num_speculative_tokens, model ",
    ),
    "guesses from tails of no length": (
        'google/gemma-4-E2B-it --speculative-config \'{"method":"ngram","prompt_lookup_max":"4"}\'',
        "prompt_lookup_min and prompt_lookup_max must be numbers of tokens, 1 to 9999",
    ),
    "guesses from tails of nothing": (
        'google/gemma-4-E2B-it --speculative-config \'{"method":"ngram","prompt_lookup_max":0}\'',
        "must be numbers of tokens, 1 to 9999",
    ),
    "guesses by nobody": ("google/gemma-4-E2B-it --num-speculative-tokens 2", "name one with --drafter"),
    "guesses, said twice": (
        'google/gemma-4-E2B-it --drafter auto --speculative-config \'{"method":"mtp"}\'',
        "give one or the other",
    ),
    "copies": ("google/gemma-4-26B-A4B-it --data-parallel-size 2", "start one server per copy"),
    "online quantisation": ("google/gemma-4-E2B-it --quantization fp8", "load a checkpoint that is quantised already"),
    "another parser": ("google/gemma-4-E2B-it --tool-call-parser hermes", "the parser is gemma4"),
    "another cache": ("google/gemma-4-E2B-it --kv-cache-dtype nvfp4", "must be auto, fp8 \\(e4m3\\) or int8"),
    "no such flag": ("google/gemma-4-E2B-it --turbo", "--turbo"),
    "no such template": ("google/gemma-4-E2B-it --chat-template nowhere.jinja", "which is no file"),
    "two models": ("google/gemma-4-E2B-it --model google/gemma-4-E4B-it", "one is served at a time"),
    "a bad limit": ("google/gemma-4-E2B-it --limit-mm-per-prompt smell=1", "image, video or audio"),
    "a bad option": ("""m --mm-processor-kwargs '{"size": 224}'""", "holds 'size', but known are"),
    "a bad budget": ("""m --mm-processor-kwargs '{"max_soft_tokens": 300}'""", "must be 70, 140, 280, 560 or 1120"),
    "a budget above the cap": (
        """m --mm-processor-kwargs '{"max_soft_tokens": 560}' --max-image-tokens 280""",
        "asks for 560 tokens, but --max-image-tokens is 280",
    ),
    "a bad default": ("""m --default-chat-template-kwargs '{"think": true}'""", "holds 'think', but known are"),
    "a bad length": ("m --max-model-len long", "must be a number of tokens"),
}


def read(line: str, **environment: str) -> ServeSettings:
    return read_settings(shlex.split(line), environment)


@cache
def toy(size: str) -> str:
    """A checkpoint of random weights in the shape of `size`, for the rest of the run."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return str(save_seeing(Path(folder.name) / size, size))


@cache
def toy_drafter(size: str) -> str:
    folder = Path(toy(size)) / "drafter"
    vocab_size = read_config(Path(toy(size))).text.vocab_size
    drafter = calm_(Drafter(read_config(toy_drafter_json(size, vocab_size=vocab_size))))
    save(folder, drafter, drafter.config)
    return str(folder)


def with_a_toy(line: str) -> list[str]:
    """The arguments, with toys of the same size in place of the model and its drafter."""
    arguments = shlex.split(line)
    place = next(index for index, argument in enumerate(arguments) if "/gemma-4-" in argument.lower())
    size = next(size for size in SIZES if f"gemma-4-{size}".lower() in arguments[place].lower())
    rest = [each.replace(f"google/gemma-4-{size}-it-assistant", toy_drafter(size)) for each in arguments[place + 1 :]]
    return [*arguments[:place], toy(size), *rest]


ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}


def with_key(keys: tuple[str, ...]) -> dict[str, str]:
    return {"authorization": f"Bearer {keys[0]}"} if keys else {}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_start(name: str) -> None:
    """The engine and the server that the list asks for, and one reply from them."""
    llm, options = build(read_settings(with_a_toy(RECIPES[name]), {}))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(llm, options))
        async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
            asked = {**ASK, "model": options.names[0]}
            return await client.post("/v1/chat/completions", json=asked, headers=with_key(options.api_keys))

    try:
        answer = asyncio.run(ask())
    finally:
        llm.close()
    assert answer.status_code == 200, answer.text


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_start_as_processes(name: str) -> None:
    arguments = with_a_toy(RECIPES[name])
    with serving(*arguments) as process:
        headers = with_key(read_settings(arguments, {}).server["api_keys"])
        answer = httpx.post(process.base + "/v1/chat/completions", json=ASK, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        process.terminate()
        assert process.code() == 0, process.log
    for notice in read_settings(arguments, {}).notices:
        assert notice in process.log


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_processes(name: str) -> None:
    line, sentence = REFUSED[name]
    process = Process(*shlex.split(line))
    assert process.code() == 2
    assert process.log.startswith("cabochon: ") and process.log.count("\n") == 1
    assert re.search(sentence, process.log)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_is_refused_with_the_reason(name: str) -> None:
    line, sentence = REFUSED[name]
    with pytest.raises(InputError, match=sentence):
        read(line)


def test_flags_reach_their_place() -> None:
    settings = read(RECIPES["full-featured 26B"])
    assert settings.max_model_len == 16384
    assert settings.engine == {"max_num_batched_tokens": 4096, "gpu_memory_utilization": 0.9}
    assert settings.server["media_limits"] == {"image": 4}
    assert (settings.server["host"], settings.server["port"]) == ("0.0.0.0", 8000)
    assert settings.chat_template is None
    assert sorted(notice.split()[0].rstrip(":") for notice in settings.notices) == [
        "--async-scheduling",
        "--chat-template",
        "--enable-auto-tool-choice",
        "--reasoning-parser",
        "--tool-call-parser",
    ]
    assert read(RECIPES["own names and keys"]).names == ("gemma4", "best")
    assert read(RECIPES["language model only"]).server["media_limits"] == {"image": 0, "video": 0, "audio": 0}
    assert read(RECIPES["thinking by default"]).server["thinking"] is True
    assert read(RECIPES["vision budget"]).media_options == {"max_soft_tokens": 560}
    assert read("m --limit-mm-per-prompt image=2,video=1").server["media_limits"] == {"image": 2, "video": 1}


@pytest.mark.parametrize(("text", "tokens"), [("32768", 32768), ("32k", 32000), ("32K", 32768), ("auto", None)])
def test_lengths(text: str, tokens: int | None) -> None:
    assert read(f"m --max-model-len {text}").max_model_len == tokens


def test_file_environment_and_line_in_rising_order(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: from-file\nport: 1\nmax-num-seqs: 4\nserved-model-name: [a, b]\nenable_prefix_caching: false\n"
        "enable-auto-tool-choice: true\nlimit-mm-per-prompt: {image: 3}\n"
    )
    settings = read(f"--config {file} --port 3", CABOCHON_PORT="2", CABOCHON_MAX_NUM_SEQS="8", CABOCHON_HOME="/x")
    assert settings.model == "from-file"
    assert settings.server["port"] == 3
    assert settings.engine == {"max_num_seqs": 8, "enable_prefix_caching": False}
    assert settings.names == ("a", "b")
    assert settings.server["media_limits"] == {"image": 3}
    assert read("", CABOCHON_API_KEY="k", CABOCHON_LANGUAGE_MODEL_ONLY="1").server["api_keys"] == ("k",)
    file.write_text("prot: 1\n")
    with pytest.raises(InputError, match="'prot', which is no flag"):
        read(f"--config {file}")
    file.write_text("- a\n")
    with pytest.raises(InputError, match="must hold flags"):
        read(f"--config {file}")
    with pytest.raises(InputError, match="can't be read"):
        read("--config nowhere.yaml")


@pytest.mark.parametrize("flag", REFUSED_FLAGS)
def test_every_flag_that_is_refused_says_what_to_do(flag: str) -> None:
    with pytest.raises(InputError, match=rf"^{flag}: .+\.$"):
        read(f"m {flag} 1")


def test_flags_that_change_nothing_say_so() -> None:
    settings = read("m --enable-server-load-tracking --max-logprobs 5 --mm-processor-cache-gb 4")
    assert [notice.split()[0].rstrip(":") for notice in settings.notices] == [
        *("--max-logprobs", "--mm-processor-cache-gb", "--enable-server-load-tracking"),
    ]
    with pytest.raises(InputError, match="--max-logprobs 50: 20 alternatives per token are the most"):
        read("m --max-logprobs 50")


@pytest.mark.parametrize("given", ["https://a https://b", """'["https://a", "https://b"]'"""])
def test_origins_as_words_and_as_vllms_list(given: str) -> None:
    assert read(f"m --allowed-origins {given}").server["allowed_origins"] == ("https://a", "https://b")
    with pytest.raises(InputError, match="--allowed-origins is not JSON"):
        read("m --allowed-origins [https://a")


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\ntwo\n")
    assert read(f"m --api-key-file {file} --api-key three").server["api_keys"] == ("three", "one", "two")
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no key"):
        read(f"m --api-key-file {file}")


# What the flags do ---------------------------------------------------------------------------------------------------


def built(line: str) -> tuple[AsyncLLM, ServerOptions]:
    return build(read_settings([toy("E2B"), *shlex.split(line)], {}))


def test_the_drafter_guesses() -> None:
    drafter = toy_drafter("E2B")
    for line, most in ((f"--drafter {drafter}", 4), ("--drafter auto --num-speculative-tokens 2", 2)):
        llm, _ = built(line)
        try:
            speculator = llm.front.engine.speculator
            assert speculator is not None and speculator.most == most
        finally:
            llm.close()
    told = read("m --speculative-config " + shlex.quote('{"method": "mtp", "num_speculative_tokens": 3}'))
    assert (told.drafter, told.engine["num_speculative_tokens"]) == ("auto", 3)


@pytest.mark.parametrize(
    ("told", "drafter", "lookup"),
    [
        ({}, "ngram", Lookup()),
        ({"prompt_lookup_max": 4}, "ngram:4-4", Lookup(4, 4)),
        ({"prompt_lookup_min": 2, "prompt_lookup_max": 7}, "ngram:2-7", Lookup(7, 2)),
    ],
)
def test_the_conversation_guesses(told: dict[str, int], drafter: str, lookup: Lookup) -> None:
    line = "--speculative-config " + shlex.quote(json.dumps({"method": "ngram", "num_speculative_tokens": 6, **told}))
    assert read(f"m {line}").drafter == drafter
    llm, _ = built(line)
    try:
        speculator = llm.front.engine.speculator
        assert speculator is not None and (speculator.guesser, speculator.most) == (lookup, 6)
    finally:
        llm.close()


def test_flags_reach_the_engine() -> None:
    line = "--max-model-len 4k --max-num-seqs 3 --max-num-batched-tokens 128 --kv-cache-dtype fp8 --block-size 16"
    llm, _ = built(f"{line} --no-enable-prefix-caching --dtype bfloat16 --quantization int8 --loop-guard 64")
    try:
        engine = llm.front.engine
        assert (llm.max_model_len, llm.front.loop_guard, engine.scheduler.seats) == (4000, 64, 3)
        chosen = {name: getattr(engine.options, name) for name in ("max_num_batched_tokens", "block_size")}
        assert chosen == {"max_num_batched_tokens": 128, "block_size": 16}
        assert (engine.options.kv_cache_dtype, engine.options.enable_prefix_caching) == ("fp8", False)
        assert engine.runner.model.language_model.norm.weight.dtype == torch.bfloat16
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("flags", "towers"),
    [
        ("", ["vision_tower", "audio_tower"]),
        ("--language-model-only", []),
        ("--limit-mm-per-prompt image=0,video=0,audio=0", []),
        ("--limit-mm-per-prompt image=0,audio=0", ["vision_tower"]),
    ],
)
def test_towers_that_the_limits_leave_no_use_for_stay_away(flags: str, towers: list[str]) -> None:
    llm, _ = built(flags)
    try:
        parts = [name for name, _ in llm.front.engine.runner.model.named_children()]
        assert [name for name in parts if name.endswith("_tower")] == towers
    finally:
        llm.close()


def test_a_share_of_the_memory_is_all_that_is_planned_with() -> None:
    model = toy("E2B")
    small, large = (prepare(model, engine={"gpu_memory_utilization": share}).plan.available for share in (0.05, 0.1))
    assert 1.8 < large / small < 2.2
    with pytest.raises(InputError, match="must be above 0 and at most 1"):
        prepare(model, engine={"gpu_memory_utilization": 90.0})


def test_thinking_by_default_until_a_request_says_otherwise() -> None:
    llm, options = built("""--default-chat-template-kwargs '{"enable_thinking": true}'""")
    service = Service(llm, options)

    def tokens(thinking: bool | None) -> tuple[int, ...]:
        ask = Ask((Message("user", (Text("Hello"),)),), SamplingParams(), thinking=thinking)
        return asyncio.run(service.render(ask)).token_ids

    try:
        assert tokens(None) == tokens(True) != tokens(False)
    finally:
        llm.close()


# The address ----------------------------------------------------------------------------------------------------------


def serve_alone(*arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """`cabochon serve` up to where it would load a model, which it may not."""
    script = (
        f"import sys; sys.argv[1:] = ['serve', *sys.argv[1:]]; {first}\n"
        "import cabochon.llm.loading as loading; loading.load = None\n"
        "from cabochon.cli import main; main()"
    )
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "70000"], "The port is 70000, but must be between 1 and 65535"),
        (["--host", "203.0.113.7"], "203.0.113.7 is no address of this machine; take 127.0.0.1"),
        (["--host", "no such host"], "The host 'no such host' is no address of this machine"),
        (["--request-timeout", "0"], "request_timeout is 0, but must be above 0 seconds."),
        (["--drain", "-1"], "drain is -1, but must be 0 or more."),
        (["--allowed-media-dir", "/no/such"], "--allowed-media-dir names '/no/such', which is no folder."),
    ],
)
def test_what_cannot_be_served_is_told_before_a_model_is_loaded(arguments: list[str], sentence: str) -> None:
    told = serve_alone("--port", "0", *arguments)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
    assert told.stderr.startswith(f"cabochon: {sentence}")


def test_a_port_in_use_is_told_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        told = serve_alone("--port", str(port))
    assert told.returncode == 2
    assert told.stderr == (
        f"cabochon: Port {port} of 127.0.0.1 is in use; stop what uses it, or take another with --port.\n"
    )


def test_a_port_that_is_free_is_found_and_told() -> None:
    doors = door.take("localhost", 0)
    assert all(each.getsockname()[1] for each in doors)
    for each in doors:
        each.close()


def test_without_the_servers_packages_the_remedy_is_told() -> None:
    told = serve_alone(
        first="sys.modules['uvicorn'] = None; import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name: None if name == 'uvicorn' else find(name)"
    )
    assert told.returncode == 2
    assert told.stderr == "cabochon: serve needs uvicorn, not installed here: pip install 'cabochon[server]'\n"
