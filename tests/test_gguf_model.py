"""Models in GGUF files: written, read back, and the same model; blocks that our kernels know enter as they are."""

import json
from dataclasses import replace

import pytest
import torch

from cabochon.chat.tokenizer import Tokenizer
from cabochon.config import read_config
from cabochon.errors import CheckpointError, InputError
from cabochon.hub import BUNDLED
from cabochon.llm.loading import build
from cabochon.model.batch import whole_sequences
from cabochon.model.drafter import Drafter
from cabochon.quant import QuantTensor, dequantize
from cabochon.weights.checkpoint import open_checkpoint
from cabochon.weights.gguf import read_gguf, write_gguf
from cabochon.weights.gguf_blocks import BY_NAME
from cabochon.weights.gguf_model import config_of, tokenizer_of
from cabochon.weights.gguf_write import save_gguf, save_towers
from cabochon.weights.load import fill
from cabochon.weights.params import parameters
from support.toys import calm_, random_ids, toy_drafter_json, toy_model
from support.words import small_tokenizer

SHAPES = ["E2B", "E4B", "12B", "26B-A4B", "31B"]


def write(path, size, format, **text):
    model = toy_model(size, **text)
    weights = model.state_dict()
    save_gguf(path, model.config, weights.__getitem__, format, tokenizer_json=None)
    return model


def logits(model):
    with torch.no_grad():
        return model(whole_sequences([torch.tensor(random_ids(40))]))


@pytest.mark.parametrize("size", SHAPES)
def test_a_written_file_is_the_same_model(tmp_path, size):
    model = write(tmp_path / "toy.gguf", size, "bf16")
    opened = open_checkpoint(tmp_path / "toy.gguf")
    text = opened.config.text
    assert text == model.config.text
    rounded = {p.name for p in parameters(model.config) if p.quantize}
    again = build(opened.config, opened.source, torch.device("cpu"), torch.float32)
    for name, tensor in again.state_dict().items():
        whole = model.state_dict()[name]
        assert torch.equal(tensor, whole.bfloat16().float() if name in rounded else whole), name
    assert (logits(again) - logits(model)).abs().max() < 0.2


def test_q4_0_blocks_enter_as_they_are(tmp_path):
    write(tmp_path / "toy.gguf", "31B", "q4_0")
    opened = open_checkpoint(tmp_path / "toy.gguf")
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    taken = opened.source.read(name)
    assert isinstance(taken, QuantTensor)
    assert taken.format == "int4"
    stored = read_gguf(tmp_path / "toy.gguf").tensors["blk.0.ffn_gate.weight"]
    assert stored.kind.name == "Q4_0"
    assert torch.equal(dequantize(taken), stored.dequantize())
    model = build(opened.config, opened.source, torch.device("cpu"), torch.float32)
    assert logits(model).isfinite().all()


def test_rows_that_fit_no_block_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"down_proj\.weight has rows of 72"):
        write(tmp_path / "toy.gguf", "26B-A4B", "q8_0")


def test_the_vocabulary_survives(tmp_path):
    words = small_tokenizer()
    source = words.backend.to_str()
    model = toy_model("E2B", vocab_size=len(words), vocab_size_per_layer_input=len(words))
    save_gguf(
        tmp_path / "t.gguf",
        model.config,
        model.state_dict().__getitem__,
        "f16",
        tokenizer_json=source,
        template="{{ 1 }}",
    )
    file = read_gguf(tmp_path / "t.gguf")
    assert file.metadata["tokenizer.chat_template"] == "{{ 1 }}"
    before, after = json.loads(source), json.loads(tokenizer_of(file.metadata))
    assert after["model"]["vocab"] == before["model"]["vocab"] | {t["content"]: t["id"] for t in before["added_tokens"]}
    assert after["model"]["merges"] == before["model"]["merges"]
    assert {t["id"] for t in after["added_tokens"]} == {t["id"] for t in before["added_tokens"]}
    assert read_config(config_of(file)).text == model.config.text


def test_other_architectures_are_named(tmp_path):
    model = toy_model("31B")
    save_gguf(tmp_path / "t.gguf", model.config, model.state_dict().__getitem__, "f16")
    data = (tmp_path / "t.gguf").read_bytes().replace(b"gemma4", b"llama4")
    (tmp_path / "t.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="'llama4' model"):
        open_checkpoint(tmp_path / "t.gguf")
    row = [("a", (2,), BY_NAME["F32"], lambda: torch.zeros(2))]
    write_gguf(tmp_path / "t.gguf", {"general.architecture": "clip"}, row)
    with pytest.raises(CheckpointError, match="eyes and ears only"):
        open_checkpoint(tmp_path / "t.gguf")


THEIR_DRAFTER = {
    "block_count": 4,
    "context_length": 4096,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": [4, 4, 4, 2],
    "rope.freq_base": 1000000.0,
    "rope.freq_base_swa": 10000.0,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.sliding_window": 16,
    "attention.shared_kv_layers": 4,
    "embedding_length_per_layer_input": 0,
    "attention.sliding_window_pattern": [True, True, True, False],
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
    "embedding_length_out": 64,
    "nextn_predict_layers": 4,
}
"""What llama.cpp's converter said of a toy 26B-A4B drafter."""
THEIR_LAYER = (
    *("attn_norm", "attn_q", "attn_q_norm", "attn_output", "post_attention_norm"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm", "layer_output_scale"),
)
THEIR_TENSORS = {
    *(f"blk.{layer}.{name}.weight" for layer in range(4) for name in THEIR_LAYER),
    *(f"{name}.weight" for name in ("rope_freqs", "token_embd", "output_norm")),
    *(f"nextn.{name}_projection.weight" for name in ("pre", "post")),
}


CLUSTERS = {"num_centroids": 2048, "centroid_intermediate_top_k": 32}
"""What a config says that doesn't speak of them."""


def toy_drafter(size):
    config = read_config(toy_drafter_json(size))
    return calm_(Drafter(config))


def test_a_drafter_is_written_as_llama_cpp_writes_it(tmp_path):
    drafter = toy_drafter("26B-A4B")
    save_gguf(tmp_path / "t.gguf", drafter.config, drafter.state_dict().__getitem__, "f16")
    file = read_gguf(tmp_path / "t.gguf")
    assert set(file.tensors) == THEIR_TENSORS
    assert file.tensors["nextn.pre_projection.weight"].shape == (32, 128)
    assert file.metadata["general.architecture"] == "gemma4-assistant"
    for key, value in THEIR_DRAFTER.items():
        ours = file.metadata[f"gemma4-assistant.{key}"]
        alike = value if isinstance(value, list) or not isinstance(ours, list) else [value] * 4
        assert ours == pytest.approx(alike), key


@pytest.mark.parametrize("size", SHAPES)
def test_a_drafter_comes_back_without_its_clusters(tmp_path, size):
    drafter = toy_drafter(size)
    save_gguf(tmp_path / "t.gguf", drafter.config, drafter.state_dict().__getitem__, "f16")
    opened = open_checkpoint(tmp_path / "t.gguf")
    # The 12B's says that pictures see themselves; a drafter reads none.
    assert opened.config.text == replace(drafter.config.text, two_way_spans=False)
    assert opened.config.drafter == replace(drafter.config.drafter, use_ordered_embeddings=False, **CLUSTERS)
    with torch.device("meta"):
        again = Drafter(opened.config)
    fill(again, opened.source, opened.config, dtype=torch.float32)
    kept = {name: w for name, w in drafter.state_dict().items() if not name.startswith("masked_embedding.")}
    assert again.state_dict().keys() == kept.keys()
    matrices = {param.name for param in parameters(opened.config) if param.quantize}
    assert "embed_tokens.weight" in matrices
    for name, weight in kept.items():
        assert torch.equal(again.state_dict()[name], weight.half().float() if name in matrices else weight), name


def test_a_folder_with_two_models_asks_which(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", ["E2B", "12B", "31B"])
def test_eyes_and_ears_lie_beside(tmp_path, size):
    words = Tokenizer.from_file(BUNDLED)
    text = {"vocab_size": len(words)} | ({"vocab_size_per_layer_input": len(words)} if size == "E2B" else {})
    model = toy_model(size, media=True, **text)
    assert model.config.vision is not None
    model.config = replace(model.config, vision=replace(model.config.vision, soft_tokens=16))
    weights = model.state_dict()
    spelling = (BUNDLED / "tokenizer.json").read_text()
    save_gguf(tmp_path / "toy.gguf", model.config, weights.__getitem__, "bf16", tokenizer_json=spelling)
    assert open_checkpoint(tmp_path).config.vision is None
    save_towers(tmp_path / "mmproj-toy.gguf", model.config, weights.__getitem__)
    opened = open_checkpoint(tmp_path)
    assert (opened.config.vision, opened.config.audio) == (model.config.vision, model.config.audio)
    assert opened.config.tokens.image == words.image
    again = build(opened.config, opened.source, torch.device("cpu"), torch.float32).state_dict()
    assert again.keys() == weights.keys()
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, weights[name], rtol=2**-8, atol=1e-6, msg=name)


def test_other_towers_are_named_and_those_of_other_models_left_alone(tmp_path):
    f32 = BY_NAME["F32"]
    write(tmp_path / "toy.gguf", "31B", "bf16")
    towers = {"general.architecture": "clip", "clip.vision.projector_type": "gemma3", "clip.vision.projection_dim": 9}
    row = [("mm.input_projection.weight", (2, 2), f32, lambda: torch.zeros(2, 2))]
    write_gguf(tmp_path / "mmproj-a.gguf", towers, row)
    assert open_checkpoint(tmp_path).config.vision is None
    write_gguf(tmp_path / "mmproj-b.gguf", towers | {"clip.vision.projection_dim": 64}, row)
    with pytest.raises(CheckpointError, match="holds a 'gemma3' tower"):
        open_checkpoint(tmp_path)
