"""Digits from a human voice: `python scripts/pebble/human.py [FOLDER]` scores a checkpoint on recordings.

Training knows formant synthesisers only; these are Allison Smith's recordings for the Asterisk telephone exchange
(CC-BY-SA-3.0: fetched when asked for, scored with, never trained on and never shipped). Every digit was recorded once,
as a word of its own, so a string of digits is joined from them, with pauses as a machine would make. One voice and ten
recordings say little about voices in general.

The figure goes to standard output and, as `human`, into the notes from which the bundled checkpoint's card is written.
"""

from __future__ import annotations

import argparse
import functools
import random
from pathlib import Path
from typing import Any

import av
import numpy as np
import sounds
from case import Case, look, says
from numpy.typing import NDArray
from score import note
from shown import Shown
from sources import package

from cabochon.evaluate import Exercise, evaluate
from cabochon.hub import BUNDLED
from cabochon.llm import AsyncLLM
from cabochon.media.audio import RATE

VOICE = "usr/share/asterisk/sounds/en_US_f_Allison/digits"
COUNT = 200


@functools.cache
def recording(digit: str) -> NDArray[np.float32]:
    """[N] at 16 kHz, without the silence around it."""
    file = package("asterisk-core-sounds-en-g722") / VOICE / f"{digit}.g722"
    with av.open(file, format="g722") as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return sounds.trimmed(samples.astype(np.float32) / np.float32(32768))


def hear(rng: random.Random) -> Case:
    """One to five digits."""
    text = "".join(rng.choices("0123456789", k=rng.randint(1, 5)))
    parts: list[NDArray[np.float32]] = []
    for digit in text:
        parts += [np.zeros(int(rng.uniform(0.08, 0.25) * RATE), np.float32), recording(digit)]
    shown = Shown("audio", np.concatenate([*parts, parts[0]]))
    return Case("digits, a human voice", text, [look(shown, rng.choice(sounds.ASK_DIGITS))], says(text),
                score="characters", shown=[shown])  # fmt: skip


def exercises() -> list[Exercise]:
    rng = random.Random("human")
    records: list[dict[str, Any]] = [hear(rng).record() for _ in range(COUNT)]
    return [Exercise(**record) for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=BUNDLED)
    llm = AsyncLLM(parser.parse_args().folder)
    try:
        (line,) = evaluate(llm, exercises())
    finally:
        llm.close()
    text = f"{line.score:.1%} ({line.n} strings; {line.withheld:.1%} without the sound)"
    print(text)
    note(human=text)


if __name__ == "__main__":
    main()
