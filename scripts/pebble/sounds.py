"""Exercises about speech: digits and household commands, spoken by eSpeak NG's formant voices.

The voices of training and of scoring differ (`UNSEEN_VOICES`), and a second synthesiser, flite, which joins recordings
of real speakers, is never trained on at all.
"""

from __future__ import annotations

import ctypes
import functools
import random
import subprocess
import tempfile
import wave

import numpy as np
from case import Case, draw, look, says
from numpy.typing import NDArray
from shown import Shown
from sources import CACHE, package

from cabochon.media.audio import RATE, log_mel

ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
VARIANTS = (
    "", "f1", "f2", "f3", "f5", "m1", "m2", "m3", "m4", "m6", "m7", "Alex", "Andrea", "Andy", "Annie", "Diogo",
    "Gene", "Jacky", "Lee", "Mario", "Michael", "Mike", "anika", "boris", "edward", "iven", "john", "linda",
    "max", "michel", "norbert", "paul", "quincy", "rob", "robert", "steph", "victor",
)  # fmt: skip
UNSEEN_VARIANTS = ("f4", "m5", "m8", "Denis", "Marco", "Storm", "belinda", "ed", "kaukovalta", "shelby", "zac")
UNSEEN_SPEAKERS = ("rms", "slt", "awb")
"""Voices of flite."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ASK_DIGITS = ("Which digits do you hear?", "Write down the digits.")
ASK_WORDS = ("What is said?", "Write down what you hear.")


POOL = 12_000
"""Sounds made once for training: a formant synthesiser takes 25 ms a clip, as long as learning from it."""


class Speaker:
    """eSpeak NG through its C interface; one of a kind in a process."""

    def __init__(self) -> None:
        folder = package("espeakng-loader") / "espeakng_loader"
        self.speaker = ctypes.CDLL(str(folder / "libespeak-ng.so"))
        self.rate = self.speaker.espeak_Initialize(1, 0, str(folder).encode(), 0)  # 1: hand samples over, play nothing
        self.parts: list[NDArray[np.int16]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._take)
        self.speaker.espeak_SetSynthCallback(self.callback)

    def _take(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        if count:
            self.parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> NDArray[np.float32]:
        """[N] at 16 kHz; `speed` in words a minute, `pitch` 0 to 100."""
        self.parts = []
        if self.speaker.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        self.speaker.espeak_SetParameter(1, speed, 0)
        self.speaker.espeak_SetParameter(3, pitch, 0)
        raw = text.encode() + b"\0"
        self.speaker.espeak_Synth(raw, len(raw), 0, 0, 0, 1, None, None)
        self.speaker.espeak_Synchronize()
        return resampled(np.concatenate(self.parts).astype(np.float32) / 32768, self.rate)


@functools.cache
def speaker() -> Speaker:
    return Speaker()


def resampled(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """At 16 kHz, from a multiple of 50 Hz: the spectrum cut off or filled up with nothing, over a quick length."""
    unit = 16 * rate // 50
    samples = np.pad(samples, (0, -len(samples) % unit))
    count = len(samples) * RATE // rate
    spectrum = np.fft.rfft(samples)
    wanted = np.zeros(count // 2 + 1, complex)
    common = min(len(wanted), len(spectrum))
    wanted[:common] = spectrum[:common]
    return (np.fft.irfft(wanted, count) * count / len(samples)).astype(np.float32)


def flite(text: str, voice: str) -> NDArray[np.float32]:
    """[N] at 16 kHz from the held-out synthesiser."""
    binary = package("flite") / "usr/bin/flite"
    libraries = package("libflite1") / "usr/lib/x86_64-linux-gnu"
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(
            [str(binary), "-voice", voice, "-t", text, "-o", file.name],
            check=True, env={"LD_LIBRARY_PATH": str(libraries)},
        )  # fmt: skip
        with wave.open(file.name) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768
            return resampled(samples, sound.getframerate())


def _room(rng: random.Random, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Silence around it, a level of its own and a little noise."""
    noise = np.random.default_rng(rng.getrandbits(32))
    before, after = (np.zeros(int(rng.uniform(0.02, 0.15) * RATE), np.float32) for _ in range(2))
    samples = np.concatenate([before, samples, after])
    level = rng.uniform(0.3, 0.95) / max(1e-3, float(np.abs(samples).max()))
    return (samples * level + noise.standard_normal(len(samples)) * 10 ** rng.uniform(-4, -2.2)).astype(np.float32)


def trimmed(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Without the silence that synthesisers put around speech."""
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


def _spoken(rng: random.Random, text: str, unseen: bool) -> NDArray[np.float32]:
    variant = rng.choice(UNSEEN_VARIANTS if unseen else VARIANTS)
    voice = rng.choice(ACCENTS) + (f"+{variant}" if variant else "")
    return _room(rng, trimmed(speaker().say(text, voice, rng.randint(130, 230), rng.randint(25, 75))))


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=rng.randint(1, 5)))


def command(rng: random.Random) -> str:
    """One of 210 sentences, of which a tenth is held out."""
    room = rng.choice(("kitchen", "bedroom", "hall", "garage", "office", "garden"))
    thing = rng.choice(("light", "fan", "heater", "lamp", "radio"))
    what = rng.choice(("music", "song", "story", "news"))
    minutes = rng.choice(("two", "five", "ten", "fifteen", "twenty", "thirty", "forty"))
    return rng.choice(
        (
            f"turn {rng.choice(('on', 'off'))} the {room} {thing}",
            f"{rng.choice(('open', 'close', 'lock'))} the {room} {rng.choice(('door', 'window'))}",
            f"set {rng.choice(('a timer', 'an alarm'))} for {minutes} {rng.choice(('minutes', 'seconds', 'hours'))}",
            f"{rng.choice(('play', 'stop', 'skip'))} the {what} in the {room}",
        )
    )


@functools.cache
def pool(count: int = POOL) -> list[tuple[str, str, NDArray[np.float16]]]:
    """(task, text, log-mel frames) of training sounds, kept on disk once made."""
    path = CACHE / f"sounds-{count}.npz"
    if not path.exists():
        rng = random.Random("sounds")
        cases = [draw(hear_digits if i % 3 else hear_command, rng, test=False) for i in range(count)]
        mels = [log_mel(case.shown[0].data).astype(np.float16) for case in cases]
        lengths = np.array([len(mel) for mel in mels])
        names = np.array([[case.task, case.reply["content"]] for case in cases])
        with path.with_suffix(".part").open("wb") as file:
            np.savez(file, names=names, lengths=lengths, mels=np.concatenate(mels))
        path.with_suffix(".part").rename(path)
    with np.load(path) as kept:
        ends = kept["lengths"].cumsum()[:-1]
        return [(*map(str, name), mel) for name, mel in zip(kept["names"], np.split(kept["mels"], ends), strict=True)]


def hear(rng: random.Random) -> Case:
    """One of the pool: louder or softer, with other noise, a few frames cut off the beginning. For training only."""
    task, text, mel = rng.choice(pool())
    noise = np.random.default_rng(rng.getrandbits(32))
    frames = np.exp(mel[rng.randrange(3) :].astype(np.float32)) * rng.uniform(0.5, 1.5)
    frames += noise.exponential(10 ** rng.uniform(-3.5, -1.5), frames.shape).astype(np.float32)
    shown = Shown("audio", np.log(frames))
    question = rng.choice(ASK_DIGITS if task == "spoken digits" else ASK_WORDS)
    return Case(task, f"hear {text}", [look(shown, question)], says(text), score="characters", shown=[shown])


def _heard(rng: random.Random, digits: bool, sound: NDArray[np.float32], text: str) -> Case:
    shown = Shown("audio", sound)
    question = rng.choice(ASK_DIGITS if digits else ASK_WORDS)
    task = "spoken digits" if digits else "commands"
    return Case(task, f"hear {text}", [look(shown, question)], says(text), score="characters", shown=[shown])


def hear_digits(rng: random.Random, unseen: bool = False) -> Case:
    """One to five digits."""
    text = _digits(rng)
    return _heard(rng, True, _spoken(rng, ", ".join(WORDS[int(d)] for d in text), unseen), text)


def hear_command(rng: random.Random, unseen: bool = False) -> Case:
    text = command(rng)
    return _heard(rng, False, _spoken(rng, text, unseen), text)


def hear_unseen_digits(rng: random.Random) -> Case:
    return hear_digits(rng, True)


def hear_unseen_command(rng: random.Random) -> Case:
    return hear_command(rng, True)


def hear_flite(rng: random.Random) -> Case:
    """Digits from the synthesiser that training never uses."""
    text = _digits(rng)
    spoken = flite(", ".join(WORDS[int(d)] for d in text), rng.choice(UNSEEN_SPEAKERS))
    return _heard(rng, True, _room(rng, trimmed(spoken)), text)
