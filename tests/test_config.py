"""config.json is read strictly: every published file, every spelling, and nothing in silence."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.config import READS_TARGET, read_config, read_generation_config, to_json
from cabochon.errors import CheckpointError, ConfigError
from cabochon.variants import VARIANTS, find
from support.published import FACTS, needs_facts
from support.published import path as published
from support.toys import SIZES, toy_drafter_json, toy_json

CONFIGS = sorted(published("configs").glob("gemma-4-*.config.json")) if FACTS else []


@needs_facts
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name.partition(".")[0])
def test_published_configs_equal_the_literals_of_the_family(path):
    found = read_config(path)
    assert found == read_config(find(path.name.removesuffix(".config.json")).config())
    assert to_json(found) == json.loads(path.read_text())


@needs_facts
def test_the_diffusion_model_is_refused_with_a_way_on():
    with pytest.raises(ConfigError, match=r"block diffusion.*26B-A4B-it"):
        read_config(published("configs") / "diffusiongemma-26B-A4B-it.config.RECONSTRUCTED.json")


def test_layers_of_e2b():
    text = read_config(find("E2B").config()).text
    kinds = ["global" if i % 5 == 4 else "sliding" for i in range(35)]
    assert [spec.kind for spec in text.layers] == kinds
    assert [spec.reads_kv_of for spec in text.layers[:15]] == list(range(15))
    assert {spec.reads_kv_of for spec in text.layers[15:] if spec.kind == "sliding"} == {13}
    assert {spec.reads_kv_of for spec in text.layers[15:] if spec.kind == "global"} == {14}
    assert [spec.ffn_width for spec in text.layers] == [6144] * 15 + [12288] * 20
    assert {(spec.head_dim, spec.window, spec.rope.rotated) for spec in text.layers} == {
        (256, 512, 256),
        (512, None, 128),
    }


def test_layers_of_31b():
    layers = read_config(find("31B").config()).text.layers
    assert {(s.kind, s.kv_heads, s.k_eq_v) for s in layers} == {("sliding", 16, False), ("global", 4, True)}
    assert all(spec.owns_kv and spec.ple_width == 0 for spec in layers)


def test_a_drafter_reads_the_target():
    config = read_config(find("E4B-assistant").config())
    assert [spec.reads_kv_of for spec in config.text.layers] == [READS_TARGET] * 4
    assert config.drafter is not None and config.drafter.use_ordered_embeddings
    assert config.text.final_logit_softcapping is None


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.role != "assistant"], ids=lambda variant: variant.name)
def test_what_transformers_writes_today_is_read_the_same(variant):
    """It spells the global layers' heads as `per_layer_config` and renames the vision tower's rotary embedding."""
    from transformers import AutoConfig

    raw = variant.config()
    written = json.loads(AutoConfig.for_model(**raw).to_json_string(use_diff=False))
    assert "per_layer_config" in written["text_config"]
    assert read_config(written) == read_config(raw)


@pytest.mark.parametrize("size", SIZES)
def test_a_text_only_checkpoint_is_its_text_config(size):
    raw = toy_json(size)
    flat = read_config({**raw["text_config"], "architectures": ["Gemma4ForCausalLM"]})
    assert flat.text == read_config(raw).text
    assert flat.model_type == "gemma4_text" and flat.vision is None


def test_drafter_toys_are_read():
    assert all(read_config(toy_drafter_json(size)).drafter for size in SIZES)


def broken(**changes):
    """A toy's config with keys set (`text_config__head_dim=3`) or, with `...`, removed."""
    raw = toy_json("26B-A4B", media=True)
    for path, value in changes.items():
        *way, key = path.split("__")
        part = raw
        for step in way:
            part = part[step]
        if value is ...:
            del part[key]
        else:
            part[key] = value
    return raw


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not of this family; known are gemma4, "),
        ({"text_config__hiden_size": 3}, r"unknown key text_config.hiden_size; did you mean 'hidden_size'\? .*ignore="),
        ({"text_config__future": None}, "unknown key text_config.future"),
        ({"vision_config__deepstack": [1]}, "unknown key vision_config.deepstack"),
        ({"text_config__hidden_size": ...}, "text_config.hidden_size is missing"),
        ({"text_config": ...}, "text_config is missing"),
        ({"text_config": 3}, "text_config is 3; it must be an object"),
        ({"text_config__hidden_size": "64"}, "text_config.hidden_size is '64'; it must be a whole number"),
        ({"text_config__hidden_size": True}, "text_config.hidden_size is True; it must be a whole number"),
        ({"text_config__rms_norm_eps": "x"}, "rms_norm_eps is 'x'; it must be a number"),
        ({"text_config__attention_k_eq_v": 1}, "attention_k_eq_v is 1; it must be true or false"),
        ({"text_config__hidden_activation": "silu"}, 'is "silu"; this network is built for "gelu_pytorch_tanh" only'),
        ({"text_config__attention_bias": True}, "attention_bias is true; this network is built for false only"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false; this network is built for true only"),
        ({"text_config__use_bidirectional_attention": "all"}, "is 'all'; a text generator has 'vision' or null"),
        ({"text_config__layer_types": ["full_attention"]}, "layer_types must list num_hidden_layers = 6 entries"),
        ({"text_config__layer_types": ["full_attention"] * 5 + ["sliding_attention"]}, "ends with a sliding layer"),
        ({"text_config__layer_types": ["linear_attention"] * 6}, "holds 'linear_attention'; known are"),
        ({"text_config__layer_types": [[], {}, 1, None, "", "full_attention"]}, "holds ..; known are"),
        ({"text_config__per_layer_config": {"5": 3}}, "per_layer_config.5 is 3; it must be an object"),
        ({"text_config__num_kv_shared_layers": 1}, "no global layer is left to share from"),
        ({"text_config__top_k_experts": 9}, "the experts are 8 of width 24, 9 per token"),
        ({"text_config__num_attention_heads": 6}, "is 6, not a multiple of the key-value heads"),
        (
            {"text_config__per_layer_config": {"7": {"head_dim": 32}}},
            "per_layer_config.7 is not a layer number below 6",
        ),
        ({"text_config__per_layer_config": {"0": {"head_dim": 32}}}, "gives sliding layers different heads"),
        ({"text_config__per_layer_config": {"5": {"sliding_window": 3}}}, "per_layer_config.5.sliding_window"),
        ({"text_config__rope_parameters__full_attention__rope_type": "yarn"}, "must be 'proportional'"),
        ({"text_config__rope_parameters__full_attention__factor": 8.0}, "factor is 8.0; this network is built for 1.0"),
        (
            {"text_config__hidden_size_per_layer_input": 8, "text_config__vocab_size_per_layer_input": 0},
            "is 0 but hidden",
        ),
        ({"eoa_token_id": 3}, "eoa_token_id is 3 but eoa_token_index is 312"),
        ({"eos_token_id": "1"}, "eos_token_id is '1'; it must be a token id or a list"),
        ({"vision_config__num_key_value_heads": 1}, "num_key_value_heads is 1; this network is built for 2 only"),
        ({"vision_soft_tokens_per_image": 70}, "default_output_length is 280 but vision_soft_tokens_per_image is 70"),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(broken(**changes))
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 40) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "5", "head_dim", "²"]), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), size=st.sampled_from(SIZES))
def test_any_value_anywhere_is_read_or_refused(data, size):
    raw = toy_json(size, media=True)
    part = data.draw(st.sampled_from([raw, *(value for value in raw.values() if isinstance(value, dict))]))
    part[data.draw(st.sampled_from([*part, "per_layer_config", "quantization_config"]))] = data.draw(JSON)
    try:
        read_config(raw)
    except ConfigError as error:
        assert "\n" not in str(error)


def test_unknown_keys_pass_on_the_callers_word():
    raw = broken(text_config__future=3)
    assert read_config(raw, ignore=["text_config.future"]).text == read_config(broken()).text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "holds a JSON list, not an object"),
        (None, "does not exist"),
    ],
)
def test_broken_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


@needs_facts
def test_published_generation_configs():
    folder = published("configs")
    four = read_generation_config(folder / "generation_config.E2B-E4B-26B-31B-it.json")
    assert (four.temperature, four.top_p, four.top_k, four.eos) == (1.0, 0.95, 64, (1, 106, 50))
    assert four.suppress == () and four.unread == ()
    assert read_generation_config(folder / "generation_config.12B-it.json").suppress == (258883, 258882)


def test_generation_defaults(tmp_path):
    assert read_generation_config(tmp_path) == read_generation_config(None)
    greedy = read_generation_config({"do_sample": False, "eos_token_id": 7, "num_beams": 4, "top_k": None})
    assert (greedy.temperature, greedy.eos, greedy.unread, greedy.top_k) == (0.0, (7,), ("num_beams",), 64)


def test_no_torch_is_imported():
    code = "import sys, cabochon.config, cabochon.variants, cabochon.weights.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
