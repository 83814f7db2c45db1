"""Steps of fixed size: padded to a shape of the list they compute what the step itself computes."""

import pytest
import torch

from cabochon.engine.engine import Engine
from cabochon.engine.graphs import Frame, Shape, takes
from cabochon.engine.options import EngineOptions
from cabochon.engine.request import Request, SamplingParams
from cabochon.engine.runner import Runner
from cabochon.model.batch import whole_sequences
from support.toys import SIZES, random_ids, toy_model


class Padded(Runner):
    """Runs every step that could be recorded in a frame of its shape, without recording it."""

    def __init__(self, model, device):
        super().__init__(model, device)
        self.frames: dict[Shape, Frame] = {}
        self.steps = 0

    @torch.inference_mode()
    def run(self, batch):
        if not takes(batch):
            return super().run(batch)
        self.steps += 1
        frame = self.frames.setdefault(Shape.of(batch), Frame(Shape.of(batch), batch))
        frame.fill(batch)
        logits, hidden = self.model.step(frame.batch)
        return logits[: batch.tokens], hidden[: batch.tokens]


def replies(size: str, runner: type[Runner], device: str = "cpu", **options) -> tuple[dict[str, list[int]], Runner]:
    model = toy_model(size).to(device)
    engine = Engine(model, EngineOptions(block_size=4, num_blocks=(80, 80), **options), max_model_len=120)
    if runner is not Runner:
        engine.runner = runner(model, engine.device)
    for number, (prompt, reply) in enumerate([(30, 24), (5, 9), (17, 3), (40, 30), (3, 6)]):
        params = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, max_tokens=reply, ignore_eos=True)
        engine.add(Request(str(number), random_ids(prompt, number), params))
    out: dict[str, list[int]] = {}
    while engine.busy:
        for output in engine.step():
            assert output.error is None
            out.setdefault(output.request_id, []).extend(output.token_ids)
    engine.cache.check([])
    return out, engine.runner


@pytest.mark.parametrize("size", SIZES)
def test_padding_changes_nothing(size):
    """Requests come and go, windows slide, pages are shared; the frames of 1, 2, 4 and 8 requests are used again."""
    wanted, _ = replies(size, Runner)
    got, runner = replies(size, Padded)
    assert got == wanted
    assert runner.steps > 20 and {shape.requests for shape in runner.frames} == {1, 2, 4, 8}


def test_shapes_are_few():
    def requests(count: int) -> int:
        return Shape.of(whole_sequences([torch.tensor([7])] * count)).requests

    assert [requests(n) for n in (1, 2, 3, 5, 9, 17, 33, 100)] == [1, 2, 4, 8, 16, 32, 48, 112]


def test_only_steps_of_one_token_each_are_taken():
    assert not takes(whole_sequences([torch.tensor([7])]))  # training: nothing is stored
    assert not takes(whole_sequences([torch.tensor([7, 8])]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("size", SIZES)
def test_recorded_steps_reply_the_same(size):
    wanted, _ = replies(size, Runner, "cuda")
    got, runner = replies(size, Runner, "cuda", cuda_graphs=True)
    assert got == wanted and runner.recorder.recorded
