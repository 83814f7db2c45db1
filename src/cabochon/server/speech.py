"""Speech to text with OpenAI's words: the prompts that Google publishes for it, and what is made of the answers.

The prompts are those of the family's audio guide (google-gemma/cookbook, docs/capabilities/audio.ipynb), the text
before the sound as there. Pure functions.
"""

from __future__ import annotations

from typing import Any

from ..chat.events import Usage
from ..chat.messages import Media, Message, Text
from ..engine.request import SamplingParams
from ..errors import RequestError
from ..media import audio
from ..media.source import Policy
from .ask import Ask

ITS_OWN = "its original language"
RULES = (
    " Follow these specific instructions for formatting the answer:\n"
    "* Only output the transcription, with no newlines.\n"
    "* When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, "
    "and write 3 instead of three."
)
LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech",
    "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "fa": "Persian", "fi": "Finnish", "fr": "French", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "kn": "Kannada",
    "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "ml": "Malayalam", "mr": "Marathi", "ms": "Malay",
    "nl": "Dutch", "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili",
    "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu",
    "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
"""ISO 639-1 codes; a language may also be given by its English name."""
FORMATS = ("json", "text", "verbose_json")


def language_name(code: str | None) -> str:
    """The language as the prompt calls it."""
    if not code:
        return ITS_OWN
    plain = code.strip().lower().split("-")[0]
    known = {name.lower(): name for name in LANGUAGES.values()}
    name = LANGUAGES.get(plain) or known.get(code.strip().lower())
    if name is None:
        raise RequestError(
            f"language is {code!r}, but must be an ISO 639-1 code like en or de, or be left out.", "language"
        )
    return name


def transcription_prompt(language: str | None) -> str:
    name = language_name(language)
    into = "" if name == ITS_OWN else f" into {name} text"
    return f"Transcribe the following speech segment in {name}{into}.{RULES}"


def translation_prompt(target: str = "English") -> str:
    return (
        f"Transcribe the following speech segment in {ITS_OWN}, then translate it into {target}. When formatting the "
        f"answer, first output the transcription in {ITS_OWN}, then one newline, then output the string '{target}: ', "
        f"then the translation in {target}."
    )


def translated(text: str, target: str = "English") -> str:
    """The translation out of an answer to `translation_prompt`; all of it where the model kept no form."""
    _, mark, translation = text.rpartition(f"{target}: ")
    return (translation if mark else text).strip()


def pieces(data: bytes, policy: Policy) -> tuple[list[bytes], float]:
    """The sound in files that the model can take one at a time, and how many seconds it is long."""
    samples = audio.read_audio(data, policy.max_audio_seconds)
    seconds = len(samples) / audio.RATE
    if seconds <= audio.CLIP_SECONDS:
        return [data], seconds
    return [audio.to_wav(piece) for piece in audio.at_pauses(samples)], seconds


def ask(prompt: str, sound: bytes, hint: str | None, temperature: float | None) -> Ask:
    """The question about one piece. `hint` is the caller's own text about style or names."""
    text = f"{prompt}\n{hint.strip()}" if hint and hint.strip() else prompt
    message = Message("user", (Text(text), Media("audio", sound)))
    return Ask((message,), SamplingParams(temperature=temperature or 0.0), thinking=False)


def check_format(response_format: str) -> None:
    if response_format not in FORMATS:
        raise RequestError(
            f"response_format is {response_format!r}, but the model gives no times, so it must be one of "
            f"{', '.join(FORMATS)}.",
            "response_format",
        )


def answer(text: str, response_format: str, task: str, language: str, seconds: float, usage: Usage) -> dict[str, Any]:
    """The JSON of a finished transcription or translation."""
    out: dict[str, Any] = {"text": text}
    if response_format == "verbose_json":
        out |= {"task": task, "language": language, "duration": round(seconds, 3)}
    return out | {"usage": usage_object(usage)}


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "type": "tokens",
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
