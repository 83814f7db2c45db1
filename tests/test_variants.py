"""The family's literals, and the names that people use for it."""

import pytest

from cabochon.config import read_config
from cabochon.errors import UnknownModelError
from cabochon.variants import SIZES, VARIANTS, find, lookup, suggest
from cabochon.weights.params import parameters


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("E2B", "google/gemma-4-E2B-it"),
        ("gemma4:e4b", "google/gemma-4-E4B-it"),
        ("gemma4:26b", "google/gemma-4-26B-A4B-it"),
        ("12b-base", "google/gemma-4-12B"),
        ("gemma-4-31B", "google/gemma-4-31B"),
        ("google/gemma-4-E2B-it-assistant", "google/gemma-4-E2B-it-assistant"),
        ("26B-A4B-assistant", "google/gemma-4-26B-A4B-it-assistant"),
    ],
)
def test_names(name, repo):
    assert find(name).repo == repo


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("google/gemma-4-26b-it", "google/gemma-4-26B-A4B-it"),
        ("google/gemma-4-27b-it", "google/gemma-4-26B-A4B-it"),
        ("gemma-4-4b-it", "google/gemma-4-E4B-it"),
        ("google/gemma4-e2b-instruct", "google/gemma-4-E2B-it"),
        ("gemma-4-12b-pt", "google/gemma-4-12B"),
        ("gemma4:e2x", "google/gemma-4-E2B-it"),
        ("E4", "google/gemma-4-E4B-it"),
    ],
)
def test_near_misses_get_a_suggestion(name, meant):
    assert lookup(name) is None and suggest(name) == meant
    with pytest.raises(UnknownModelError, match=rf"no model '{name}'; did you mean {meant}\?"):
        find(name)


@pytest.mark.parametrize("name", ["llama-3-8b", "mistral", "", "google/paligemma"])
def test_strangers_get_the_list(name):
    assert suggest(name) is None
    with pytest.raises(UnknownModelError, match="known sizes are E2B, E4B, 12B, 26B-A4B, 31B"):
        find(name)


def test_every_name_means_one_checkpoint():
    names = [name.lower() for variant in VARIANTS for name in {*variant.aliases, variant.repo}]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_parameter_counts_are_those_of_the_table(variant):
    config = read_config(variant.config())
    stored = [p for p in parameters(config, unused=True) if p.part != "head"]
    assert sum(param.count for param in stored) == variant.parameters
    assert config.text.max_position_embeddings == variant.context
    assert ("audio" in variant.modalities) == (config.audio is not None)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_active_parameters_are_the_cards_to_five_percent(size):
    """What a text token meets, without the tables it only looks up (the tied embedding counts as the head)."""
    rows = parameters(read_config(find(size.name).config()))
    dense = sum(p.count for p in rows if p.part in ("text", "embedding"))
    experts = read_config(find(size.name).config()).text.layers[0].experts
    routed = sum(p.count for p in rows if p.part == "experts")
    active = dense + (routed * experts.per_token // experts.count if experts else 0)
    assert active == pytest.approx(size.active, rel=0.05)
