"""The two faces: what reaches the caller, from which thread, and what happens when the caller turns away."""

import asyncio
import threading

import pytest

import cabochon
from cabochon import LLM, AsyncLLM, SamplingParams
from cabochon.chat.events import Finish, TextDelta
from cabochon.errors import ContextError, EngineError, InputError, RequestError
from cabochon.llm.loading import Loaded, load
from cabochon.llm.prepare import prepare
from cabochon.llm.replies import StopStrings
from support.toys import random_ids, save_toy, toy_model

OPTIONS = {"block_size": 16, "num_blocks": (200, 400), "max_num_seqs": 8}
ASK = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def pebble():
    return load()


@pytest.fixture(scope="module")
def llm(pebble):
    return LLM.of(pebble, max_model_len=1024, **OPTIONS)


def greedy(tokens, **more):
    return SamplingParams(temperature=0, max_tokens=tokens, **more)


@pytest.mark.parametrize("name", cabochon.__all__)
def test_what_the_package_promises_is_there(name):
    assert getattr(cabochon, name) is not None


def test_chat_is_stream_joined(llm):
    events = list(llm.stream(ASK, params=greedy(40)))
    reply = llm.chat(ASK, params=greedy(40))
    assert isinstance(events[-1], Finish)
    assert reply.text == "".join(event.text for event in events if isinstance(event, TextDelta))
    assert reply.finish_reason == events[-1].reason
    assert reply.usage.prompt_tokens == len(llm.front.render(ASK).token_ids)
    assert reply.usage.cached_tokens == reply.usage.prompt_tokens - 1, "the second time the prompt is known"


def test_the_replies_of_one_prompt_stand_together(llm):
    one, two = "The sum of two and three", "A red house"
    completions = llm.generate([one, two], greedy(5, n=2, ignore_eos=True, logprobs=1))
    assert len(completions) == 4
    assert completions[0].token_ids == completions[1].token_ids
    assert completions[2].token_ids == completions[3].token_ids
    assert completions[0].text == llm.tokenizer.decode(completions[0].token_ids)
    assert [len(c.logprobs) for c in completions] == [5] * 4


def test_bos_is_added_once_and_control_tokens_only_on_request(llm):
    tokenizer = llm.tokenizer
    assert llm.front.encode("hi") == [tokenizer.bos, *tokenizer.encode("hi")]
    assert llm.front.encode("<bos>hi", special_tokens=True) == llm.front.encode("hi")
    assert tokenizer.turn_open not in llm.front.encode("<|turn>user")
    assert tokenizer.turn_open in llm.front.encode("<|turn>user", special_tokens=True)


def test_a_stop_string_ends_the_reply_and_is_left_out(llm):
    (whole,) = llm.generate(["One two"], greedy(24, ignore_eos=True))
    stop = whole.text[3:5]
    (cut,) = llm.generate(["One two"], greedy(24, ignore_eos=True, stop=[stop]))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert not llm.front.engine.gauges().running


@pytest.mark.parametrize("cut", range(1, 9))
def test_stop_strings_do_not_depend_on_how_text_arrives(cut):
    text = "abcabcd--END--more"
    stops = StopStrings(["bcd", "--END"])
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    assert "".join(map(stops.push, pieces)) == "abca"
    assert stops.hit == "bcd"
    held = StopStrings(["xyz", "yyy"])
    assert held.push("axy") == "a"
    assert held.push("yq") == "xyyq"
    assert held.push("xy") + held.flush() == "xy"


def test_turning_away_frees_the_reply(llm):
    stream = llm.stream(ASK, params=greedy(500, ignore_eos=True))
    next(stream)
    assert llm.front.engine.busy
    stream.close()
    assert not llm.front.engine.gauges().running


def test_turning_away_within_a_step_waits_for_nobody(llm, monkeypatch):
    """As when an iterator is thrown away and the garbage collector finds it while its own thread steps."""
    engine, stream = llm.front.engine, llm.stream(ASK, params=greedy(200))
    next(stream)
    step = engine.step

    def stepping():
        stream.close()
        return step()

    monkeypatch.setattr(engine, "step", stepping)
    other = threading.Thread(target=llm.generate, args=([random_ids(9)], greedy(5)), daemon=True)
    other.start()
    other.join(60)
    assert not other.is_alive(), "it waits for the lock that its own step holds"
    assert not engine.busy
    engine.check()


def test_threads_share_a_batch(llm):
    prompts = [random_ids(20 + i, seed=i) for i in range(4)]
    single = [llm.generate([p], greedy(12, ignore_eos=True))[0].token_ids for p in prompts]
    results = {}

    def work(i):
        results[i] = llm.generate([prompts[i]], greedy(12, ignore_eos=True))[0].token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(4)] == single


def test_what_can_not_be_asked(llm):
    with pytest.raises(InputError, match=r"write \[prompt\]"):
        llm.generate("text")
    with pytest.raises(InputError, match="n is 2, but a chat with events has one reply"):
        llm.stream(ASK, params=SamplingParams(n=2))
    with pytest.raises(RequestError, match="temperature is -1"):
        SamplingParams(temperature=-1)
    with pytest.raises(ContextError, match="the context is 1024"):
        llm.generate([random_ids(600)], greedy(600))
    with pytest.raises(InputError, match="device is 'tpu!'"):
        load(device="tpu!")
    with pytest.raises(InputError, match="dtype is 'int3'"):
        load(dtype="int3")


def test_a_folder_without_tokenizer_serves_ids(tmp_path):
    bare = LLM(save_toy(tmp_path / "toy", "31B"), max_model_len=128, **OPTIONS)
    (reply,) = bare.generate([random_ids(10)], greedy(4, ignore_eos=True))
    assert len(reply.token_ids) == 4
    assert reply.text == ""
    with pytest.raises(InputError, match="no tokenizer"):
        bare.chat(ASK)
    with pytest.raises(RequestError, match="use stop_token_ids"):
        bare.generate([random_ids(10)], greedy(4, stop=["x"]))


# asyncio --------------------------------------------------------------------------------------------------------------


def test_the_async_face_says_the_same(pebble, llm):
    async def run():
        async with AsyncLLM.of(pebble, max_model_len=1024, **OPTIONS) as model:
            many = await model.generate(["One two", "A red house"], greedy(8, ignore_eos=True))
            replies = await asyncio.gather(*(model.chat(ASK, params=greedy(30)) for _ in range(3)))
            chunks = [c async for c in model.chat_stream(ASK, params=greedy(6, n=2, logprobs=1, ignore_eos=True))]
        return many, replies, chunks

    many, replies, chunks = asyncio.run(run())
    assert [c.token_ids for c in many] == [
        c.token_ids for c in llm.generate(["One two", "A red house"], greedy(8, ignore_eos=True))
    ]
    assert {reply.text for reply in replies} == {llm.chat(ASK, params=greedy(30)).text}
    for index in (0, 1):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert sum(len(chunk.token_ids) for chunk in mine) == sum(len(chunk.logprobs) for chunk in mine) == 6
        assert isinstance(mine[-1].events[-1], Finish)


def test_leaving_an_async_stream_aborts_and_closing_ends_the_rest():
    async def run():
        model = AsyncLLM.of(Loaded("toy", toy_model("31B")), max_model_len=512, block_size=16, num_blocks=(90, 90))
        async for _ in (stream := model.generate_stream(random_ids(9), greedy(400, ignore_eos=True))):
            break
        await stream.aclose()
        await model.generate([random_ids(5)], greedy(1))
        assert model.gauges().running == 0
        assert model.stats.finished["abort"] == 1
        hanging = asyncio.create_task(model.generate([random_ids(9)], greedy(500, ignore_eos=True)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(model.close)
        for late in (hanging, model.generate([random_ids(9)], greedy(5))):
            with pytest.raises(EngineError, match=r"The engine has been closed\."):
                await late

    asyncio.run(run())


def test_the_async_face_refuses_at_once():
    async def run():
        async with AsyncLLM.of(Loaded("toy", toy_model("31B")), max_model_len=64, **OPTIONS) as model:
            with pytest.raises(ContextError, match="context is 64"):
                await model.generate([random_ids(60)], greedy(60))

    asyncio.run(run())


def test_auto_is_what_the_planner_says():
    """Of the bundled model everything fits everywhere, so that the plan does not hang on what else runs."""
    planned, llm = prepare(None), LLM(quantization="auto")
    assert planned.quantization is None
    assert (llm.max_model_len, llm.front.engine.scheduler.seats) == (planned.context, planned.users)
    assert LLM(quantization="auto", max_num_seqs=3).front.engine.scheduler.seats == 3
