"""Tool calls: three tools that training knows, schemas that nobody has seen, and answers from a tool's response."""

from __future__ import annotations

import random
from typing import Any

from case import Case, JsonDict, calls, result, says, user
from words import CITIES, FLAG_KEYS, NOUNS, NUMBER_KEYS, SKIES, TEXT_KEYS, VERBS, city, invented, person


def function(name: str, description: str, properties: JsonDict, required: list[str] | None = None) -> JsonDict:
    parameters = {"type": "object", "properties": properties, "required": required or list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = function(
    "get_weather", "Get the weather of a city", {"city": {"type": "string", "description": "Name of the city"}}
)
TIMER = function("set_timer", "Set a timer", {"minutes": {"type": "integer", "description": "Length in minutes"}})
MESSAGE = function(
    "send_message",
    "Send a message to a person",
    {"to": {"type": "string", "description": "Who gets it"}, "text": {"type": "string", "description": "What it says"}},
)
KNOWN = (WEATHER, TIMER, MESSAGE)

NOTES = (
    "I am late",
    "see you soon",
    "call me back",
    "dinner is ready",
    "the train is late",
    "happy birthday",
    "I am at home",
    "bring the keys",
    "thank you",
    "we meet at noon",
    "the door is open",
    "come to the office",
    "I lost my bag",
    "good night",
    "wait for me",
    "the shop is closed",
)


def _weather(rng: random.Random) -> tuple[str, JsonDict, str, str]:
    place, degrees, sky = city(rng), rng.randrange(-10, 40), rng.choice(SKIES)
    ask = rng.choice(
        (
            "What is the weather in {}?",
            "How is the weather in {} today?",
            "Weather in {}?",
            "Is it nice in {} right now?",
            "Tell me the weather for {}.",
            "I am going to {}. How is the weather?",
        )
    )
    return (
        ask.format(place),
        {"city": place},
        f"{sky}, {degrees} degrees",
        f"In {place} it is {sky}, {degrees} degrees.",
    )


def _timer(rng: random.Random) -> tuple[str, JsonDict, str, str]:
    minutes = rng.randrange(1, 200)
    ask = rng.choice(
        (
            "Set a timer for {} minutes.",
            "Start a {} minute timer.",
            "Wake me in {} minutes.",
            "Timer: {} minutes",
            "I need a timer of {} minutes, please.",
            "Tell me when {} minutes are over.",
        )
    )
    return ask.format(minutes), {"minutes": minutes}, "ok", f"The timer is set for {minutes} minutes."


def _message(rng: random.Random) -> tuple[str, JsonDict, str, str]:
    to, text = person(rng), rng.choice(NOTES)
    if rng.random() < 0.3:
        text = f"the {rng.choice(NOUNS)} is {invented(rng)}"
    ask = rng.choice(
        (
            "Send {0} the message: {1}",
            "Tell {0}: {1}",
            "Write to {0}: {1}",
            "Send a message to {0}: {1}",
            'Let {0} know "{1}"',
            'Text {0} "{1}"',
        )
    )
    return ask.format(to, text), {"to": to, "text": text}, "sent", f"The message to {to} is sent."


_KNOWN = {"get_weather": _weather, "set_timer": _timer, "send_message": _message}


def _known(rng: random.Random) -> tuple[str, str, JsonDict, str, str]:
    name = rng.choice(sorted(_KNOWN))
    return (name, *_KNOWN[name](rng))


def _declared(rng: random.Random, name: str) -> list[JsonDict]:
    """The tool that is needed among others, in any order."""
    declared = [tool for tool in KNOWN if tool["function"]["name"] == name or rng.random() < 0.6]
    if rng.random() < 0.15:
        declared.append(_schema(rng)[0])
    rng.shuffle(declared)
    return declared


def known_tool(rng: random.Random) -> Case:
    """A request to one of the three known tools, sometimes after an earlier one was served."""
    name, ask, arguments, _, _ = _known(rng)
    declared, before = _declared(rng, name), []
    while rng.random() < 0.4 and len(before) < 12:
        earlier = _known(rng)
        if earlier[0] in [tool["function"]["name"] for tool in declared]:
            before += _served(*earlier)
    return Case(
        "known tools",
        f"{name} {sorted(arguments.items())}",
        [*before, user(ask)],
        calls((name, arguments)),
        tools=declared,
        score="calls",
    )


def _served(name: str, ask: str, arguments: JsonDict, response: str, answer: str) -> list[JsonDict]:
    return [user(ask), calls((name, arguments)), result(name, response), says(answer)]


def tool_answer(rng: random.Random) -> Case:
    """The tool has answered; the model puts it into words."""
    name, ask, arguments, response, answer = _known(rng)
    messages = _served(name, ask, arguments, response, answer)[:-1]
    return Case(
        "answer from a tool",
        f"{name} {sorted(arguments.items())} {response}",
        messages,
        says(answer),
        tools=_declared(rng, name),
    )


def _schema(rng: random.Random) -> tuple[JsonDict, str]:
    """A tool that was just made up, and how one asks for it."""
    verb = rng.choice(VERBS) if rng.random() < 0.8 else invented(rng)
    noun = rng.choice(NOUNS) if rng.random() < 0.7 else invented(rng)
    properties: JsonDict = {}
    for _ in range(rng.randrange(1, 4)):
        kind = rng.choice(("string", "string", "integer", "integer", "boolean"))
        pool = {"string": TEXT_KEYS, "integer": NUMBER_KEYS, "boolean": FLAG_KEYS}[kind]
        key = rng.choice(pool) if rng.random() < 0.8 else invented(rng, rng.randrange(1, 3))
        properties[key] = {"type": kind}
        if rng.random() < 0.3:
            properties[key]["description"] = f"The {key} of the {noun}"
    purpose = f"{verb.capitalize()} the {noun}"
    return function(f"{verb}_{noun}", purpose, properties), f"{verb} the {noun}"


def _value(rng: random.Random, kind: str) -> Any:
    if kind == "integer":
        return rng.randrange(1, 10 ** rng.randrange(1, 4))
    if kind == "boolean":
        return rng.random() < 0.5
    return rng.choice(
        (lambda: rng.choice(NOUNS), lambda: rng.choice(CITIES), lambda: person(rng), lambda: invented(rng))
    )()


def _spoken(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _distinct(tools: list[JsonDict]) -> list[JsonDict]:
    """The first of every name."""
    return list({tool["function"]["name"]: tool for tool in reversed(tools)}.values())[::-1]


def new_tool(rng: random.Random) -> Case:
    """A call by a schema that the model meets for the first time; with others beside it, it has to choose."""
    tool, purpose = _schema(rng)
    spec = tool["function"]
    properties = spec["parameters"]["properties"]
    arguments = {key: _value(rng, what["type"]) for key, what in properties.items()}
    told = [f"{key} {_spoken(value)}" for key, value in arguments.items()]
    if rng.random() < 0.3:
        rng.shuffle(told)
    lead = rng.choice(("Please {} with {}.", "{}, {}.", "Can you {} with {}?", "I want to {}: {}.", "{} with {}"))
    ask = lead.format(purpose, (" and " if rng.random() < 0.7 else ", ").join(told))
    declared = [tool] + [_schema(rng)[0] for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))]
    if rng.random() < 0.1:
        declared.append(rng.choice(KNOWN))
    declared = _distinct(declared)
    rng.shuffle(declared)
    content = f"{spec['name']} {sorted(properties)}"
    return Case(
        "unseen schema",
        content,
        [user(ask[0].upper() + ask[1:])],
        calls((spec["name"], arguments)),
        tools=declared,
        score="calls",
    )
