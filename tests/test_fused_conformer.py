"""The audio tower with a call per layer, against the same layers op by op: the same bits on every instruction set."""

import pytest
import torch

from cabochon.config import AudioConfig
from cabochon.model import fused_conformer
from cabochon.model.audio import AudioTower
from cabochon.ops import cpu, towers

pytestmark = pytest.mark.skipif(not cpu.supported(), reason="installed without the compiled kernels")


@pytest.fixture(params=cpu.supported() or ["none"], autouse=True)
def isa(request, monkeypatch):
    before, threads = cpu.active(), torch.get_num_threads()
    cpu.use(request.param)
    monkeypatch.setattr(towers._cpu, "matrix_tiles", lambda: False)  # ours, also where torch's product would be taken
    with torch.inference_mode():
        yield request.param
    torch.set_num_threads(threads)
    cpu.use(before)


def tower(width=96, heads=4, clipped=True):
    """Ranges differ from matrix to matrix, also those that cut queries', keys' and values' inputs, and do cut."""
    config = AudioConfig(width, 2, heads, 12, 13, 0, 50.0, -1e9, (128, 32), 5, 0.5, 1e10, clipped, 1e-6, 80)
    built = AudioTower(config)
    with torch.no_grad():
        for name, tensor in built.state_dict().items():
            if name.endswith(("_min", "_max")):
                tensor.copy_((1 + torch.rand(())) * (-1 if name.endswith("_min") else 1))
            else:
                tensor.normal_(0.5 * (tensor.dim() == 1), tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.2)
    return built.bfloat16().eval()


def op_by_op(built, mel):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(towers, "takes_conformer", lambda x, distance: False)
        return built(mel)


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize(("width", "heads", "frames"), [(96, 4, 333), (64, 1, 5), (136, 2, 50)])
def test_the_same_bits_as_op_by_op(width, heads, frames, clipped, monkeypatch):
    built, mel = tower(width, heads, clipped), torch.randn(frames, 128).bfloat16()
    expected = op_by_op(built, mel)
    assert expected.isfinite().all()
    monkeypatch.setattr("cabochon.model.conformer.Layer.forward", None)  # nothing is done op by op
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(built(mel), expected)


def test_queries_keys_and_values_that_share_a_range():
    built, mel = tower(), torch.randn(40, 128).bfloat16()
    for layer in built.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.input_min, projection.input_max = layer.self_attn.q_proj.input_min, torch.tensor(0.5).bfloat16()
        layer.self_attn.v_proj.input_max = layer.self_attn.q_proj.input_max
    assert torch.equal(built(mel), op_by_op(built, mel))


def test_weights_and_ranges_that_change_are_seen():
    built, mel = tower(), torch.randn(40, 128).bfloat16()
    before = built(mel)
    built.layers[1].self_attn.q_proj.input_max.fill_(0.125)
    assert not torch.equal(changed := built(mel), before)
    built.layers[0].norm_out.weight = torch.nn.Parameter(torch.ones(96).bfloat16())
    assert not torch.equal(built(mel), changed)
    assert torch.equal(built(mel), op_by_op(built, mel))


def test_layers_that_the_kernel_does_not_know_go_op_by_op():
    built, mel = tower(), torch.randn(40, 128).bfloat16()
    x, distance = torch.randn(10, 96).bfloat16(), torch.randn(12, 96).bfloat16()
    assert all(fused_conformer.fused(layer, x, distance) for layer in built.layers)
    assert fused_conformer.fused(built.layers[0], x.float(), distance.float()) is None
    expected = built(mel)
    layer = built.layers[1]
    layer.norm_out = type("Norm", (type(layer.norm_out),), {})(96, 1e-6).bfloat16()
    layer.norm_out.weight = torch.nn.Parameter(torch.ones(96).bfloat16())
    assert fused_conformer.fused(layer, x, distance) is None
    got = built(mel)
    assert got.shape == expected.shape and not torch.equal(got, expected)
    assert torch.equal(got, op_by_op(built, mel))
