"""A small tokenizer of Gemma 4's kind, made in memory: its control tokens at their ids, bytes, characters, pairs."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer as Backend

from cabochon.chat.tokenizer import Tokenizer

CONTROL = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
    49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>",
    100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
_PAIRS = ["th", "he", "in", "er", "an", "re", "on", "at", "ca", "ll", "l:", "{▁", '":', '",', "[[", "}}", "12", "00"]
_CHARACTERS = "".join(chr(code) for code in range(33, 127)) + "▁\néüß€日本😀"


@cache
def small_tokenizer() -> Tokenizer:
    """About 500 tokens."""
    vocab = {CONTROL.get(i, f"<unused{i}>"): i for i in range(107)}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + list(_CHARACTERS):
        vocab.setdefault(piece, len(vocab))
    merges = []
    for pair in _PAIRS:
        vocab.setdefault(pair, len(vocab))
        merges.append([pair[0], pair[1]])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    backend = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None, "pre_tokenizer": None,
        "added_tokens": [{"id": i, "content": content, **flags} for i, content in CONTROL.items()],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocab, "merges": merges},
    }  # fmt: skip
    return Tokenizer(Backend.from_str(json.dumps(backend)))
