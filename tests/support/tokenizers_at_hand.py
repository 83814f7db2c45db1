"""The tokenizers that tests of text run with: the bundled one always, the published one where it is."""

from functools import cache

import pytest

from cabochon.chat.tokenizer import Tokenizer
from cabochon.hub import BUNDLED
from support.published import needs_facts, path

both = pytest.mark.parametrize("name", ["bundled", pytest.param("published", marks=needs_facts)])


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_file(BUNDLED if name == "bundled" else path("tokenizer.json"))
