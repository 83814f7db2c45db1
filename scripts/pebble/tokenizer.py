"""Train the byte-fallback BPE. Ids 0-106 are Gemma 4's, so one chat template and one set of control tokens serve both.

0..106    control and unused tokens, spelling for spelling
107..     runs of newlines, runs of spaces, 256 bytes, letters, merged pieces
V-7..V-1  media placeholders, at the very top
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

CONTROL = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
    49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>", 100: "<|channel>",
    101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
MEDIA = ("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>")
LONGEST_RUN = 8
WORDS = r"▁?\p{L}+|\p{N}|▁?[^\p{L}\p{N}▁\n]+|▁+|\n+"
"""Merges stay inside these while training: words with their space, single digits, punctuation."""


def _first_107() -> list[str]:
    names, unused = [], 0
    for i in range(107):
        if i in CONTROL:
            names.append(CONTROL[i])
        elif i == 5:
            names.append("[multimodal]")
        else:
            names.append(f"<unused{unused}>")
            unused += 1
    return names


def _runs(piece: str, shortest: int) -> tuple[list[str], list[list[str]]]:
    """Runs of one character up to LONGEST_RUN, and every way to put them together, longest results first."""
    pieces = [piece * n for n in range(shortest, LONGEST_RUN + 1)]
    merges = [[piece * a, piece * (n - a)] for n in range(LONGEST_RUN, 1, -1) for a in range(n - 1, 0, -1)]
    return pieces, merges


def train(texts: list[str], size: int) -> dict[str, Any]:
    """A tokenizer.json of `size` tokens."""
    alphabet = [*sorted(set(string.printable) - set(string.whitespace)), "▁"]
    lines, line_merges = _runs("\n", 1)
    spaces, space_merges = _runs("▁", 2)
    vocabulary = _first_107() + lines + spaces + [f"<0x{b:02X}>" for b in range(256)] + alphabet
    wanted = size - len(vocabulary) - len(MEDIA)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=8, limit_alphabet=200, show_progress=False)
    learner.train_from_iterator((text.replace(" ", "▁") for text in texts), trainer)
    merges = []
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        known = set(alphabet) | {a + b for a, b in merges}
        if len(merges) < wanted and left in known and right in known and not (left + right).isdigit():
            merges.append([left, right])
    assert len(merges) == wanted, f"only {len(merges)} of {wanted} merges learned"
    vocabulary += [left + right for left, right in merges] + list(MEDIA)
    assert len(vocabulary) == len(set(vocabulary)) == size
    return _file(vocabulary, line_merges + space_merges + merges)


def _file(vocabulary: list[str], merges: list[list[str]]) -> dict[str, Any]:
    added = [*CONTROL.values(), *MEDIA]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[content], "content": content, **flags} for content in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": ids, "merges": merges,
        },
    }  # fmt: skip


def main(folder: Path, size: int = 2048, seed: int = 0) -> None:
    """Write `folder`/tokenizer.json, trained on tasks and prose half and half."""
    from mixture import TASKS, plain_text
    from prose import passage

    rng = random.Random(seed)
    texts = [plain_text(rng, rng.choice(TASKS).generator) for _ in range(12_000)]
    texts += [passage(rng, 1000) for _ in range(sum(map(len, texts)) // 1000)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(train(texts, size), ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(__file__).parents[2] / "src" / "cabochon" / "pebble")
