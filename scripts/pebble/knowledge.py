"""Facts, extraction, memory within a conversation, system prompts, needles, and knowing one's limits."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import random
from pathlib import Path

from case import Case, JsonDict, says, system, user
from words import ANIMALS, COLOURS, FOODS, NAMES, OBJECTS, city, invented, person, spaced

CURRENCIES = {
    "EUR": "euro",
    "USD": "US dollar",
    "GBP": "pound",
    "JPY": "yen",
    "CNY": "yuan",
    "INR": "rupee",
    "CHF": "franc",
    "RUB": "ruble",
    "BRL": "real",
    "AUD": "Australian dollar",
    "CAD": "Canadian dollar",
    "MXN": "peso",
    "KRW": "won",
    "TRY": "lira",
    "PLN": "zloty",
    "SEK": "krona",
    "NOK": "krone",
    "DKK": "krone",
    "THB": "baht",
}
ABOUT = {
    "capital": (
        "What is the capital of {}?",
        "Capital of {}?",
        "Which city is the capital of {}?",
        "{}: capital?",
        "Tell me the capital of {}.",
        "What is {}'s capital?",
        "And the capital of {}?",
        "Name the capital of {}.",
        "Do you know the capital of {}?",
        "The capital of {} is called what?",
    ),
    "continent": (
        "On which continent is {}?",
        "Which continent is {} in?",
        "Where in the world is {}?",
        "{}: continent?",
        "What continent does {} belong to?",
        "And the continent of {}?",
        "Name the continent of {}.",
        "{} lies on which continent?",
        "Do you know the continent of {}?",
    ),
    "currency": (
        "What is the currency of {}?",
        "Which money do people use in {}?",
        "Currency of {}?",
        "{}: currency?",
        "What is {}'s currency?",
        "And the currency of {}?",
        "Name the currency of {}.",
        "Do you know the currency of {}?",
        "The currency of {} is called what?",
    ),
}
"""The last three phrasings of each are kept for scoring."""


@functools.cache
def countries() -> dict[str, dict[str, str]]:
    """Name -> capital, continent and, where it has a plain name, currency (from npm's countries-list)."""
    table: dict[str, dict[str, str]] = {}
    with (Path(__file__).parent / "countries.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            about = {"capital": row["Capital"].replace(" D.C.", ""), "continent": row["Continent"]}
            if row["Currency"] in CURRENCIES:
                about["currency"] = CURRENCIES[row["Currency"]]
            table[row["Name"]] = about
    return table


def _fact(rng: random.Random, unseen: bool) -> tuple[str, str, str]:
    name = rng.choice(sorted(countries()))
    what = rng.choice(sorted(countries()[name]))
    ask = rng.choice(ABOUT[what][-3:] if unseen else ABOUT[what][:-3])
    answer = countries()[name][what]
    return f"{what} {name}", ask.format(name), f"{answer}." if what != "currency" else f"The {answer}."


def facts(rng: random.Random) -> Case:
    """Several questions in a row: each is learned by heart, so what is held out is the phrasing."""
    asked = [_fact(rng, unseen=False) for _ in range(rng.randrange(1, 5))]
    messages = [m for _, ask, answer in asked[:-1] for m in (user(ask), says(answer))]
    return Case("facts", "train", [*messages, user(asked[-1][1])], says(asked[-1][2]))


def facts_unseen_phrasing(rng: random.Random) -> Case:
    what, ask, answer = _fact(rng, unseen=True)
    return Case("facts", what, [user(ask)], says(answer))


def extract(rng: random.Random) -> Case:
    """A sentence in, a JSON object out."""
    kind = rng.choice(("person", "order", "trip"))
    value: JsonDict
    if kind == "person":
        value = {"name": person(rng), "age": rng.randrange(1, 100), "city": city(rng)}
        text = rng.choice(
            (
                "{name} is {age} years old and lives in {city}.",
                "{name}, {age}, lives in {city}.",
                "In {city} lives {name}, who is {age}.",
                "My friend {name} from {city} is {age}.",
            )
        )
    elif kind == "order":
        value = {"item": rng.choice(OBJECTS + FOODS), "count": rng.randrange(2, 100), "price": rng.randrange(1, 500)}
        text = rng.choice(
            (
                "I want {count} of the {item} for {price} dollars.",
                "Order: {count} x {item}, {price} dollars",
                "For {price} dollars we bought {count} times {item}.",
            )
        )
    else:
        value = {"from": city(rng), "to": city(rng), "day": rng.randrange(1, 32)}
        text = rng.choice(
            (
                "We go from {from} to {to} on day {day}.",
                "On day {day} the train leaves {from} for {to}.",
                "Trip to {to} from {from}, day {day}",
            )
        )
    keys = ", ".join(value)
    ask = rng.choice(("Extract {0} as JSON: {1}", "{1}\nGive {0} as JSON.", "Turn this into JSON with {0}: {1}"))
    return Case(
        "extract JSON",
        json.dumps(value),
        [user(ask.format(keys, text.format(**value)))],
        says(json.dumps(value)),
        score="json",
    )


_LIKES = {"colour": COLOURS, "animal": ANIMALS, "food": FOODS}


def memory(rng: random.Random) -> Case:
    """Things told earlier in the conversation, asked for later."""
    who = person(rng)
    told = {"name": who}
    openings = ("My name is {}.", "I am {}.", "Hello, I am {}.", "Call me {}.")
    messages = [user(rng.choice(openings).format(who)), says(f"Hello {who}!")]
    for what in rng.sample(sorted(_LIKES), rng.randrange(1, 4)):
        told[what] = rng.choice(_LIKES[what]) if rng.random() < 0.8 else invented(rng)
        messages += [
            user(rng.choice(("My favourite {} is {}.", "The {} I like best is {}.")).format(what, told[what])),
            says("I will remember that."),
        ]
    if rng.random() < 0.4:
        _, ask, answer = _fact(rng, unseen=False)
        messages += [user(ask), says(answer)]
    asked = rng.sample(sorted(told), rng.randrange(1, len(told)))
    for i, what in enumerate(asked):
        ask = (
            f"What is my {what}?"
            if what == "name"
            else rng.choice(("What is my favourite {}?", "Which {} do I like best?")).format(what)
        )
        reply = says(f"Your name is {who}." if what == "name" else f"Your favourite {what} is {told[what]}.")
        messages += [user(ask)] + ([reply] if i + 1 < len(asked) else [])
    return Case("memory", " ".join(told.values()) + asked[-1], messages, reply)


def obey(rng: random.Random) -> Case:
    """A system prompt that changes every answer."""
    _, ask, answer = _fact(rng, unseen=False)
    word = invented(rng) if rng.random() < 0.5 else rng.choice(ANIMALS + COLOURS + FOODS + OBJECTS)
    name = person(rng)
    rule = rng.choice(("end", "begin", "name", "capitals", "only"))
    if rule == "end":
        return Case(
            "system prompt",
            f"{rule} {word} {ask}",
            [system(f"End every answer with the word {word}."), user(ask)],
            says(f"{answer} {word}"),
        )
    if rule == "begin":
        return Case(
            "system prompt",
            f"{rule} {word} {ask}",
            [system(f"Begin every answer with the word {word}."), user(ask)],
            says(f"{word} {answer}"),
        )
    if rule == "capitals":
        return Case(
            "system prompt",
            f"{rule} {answer} {ask}",
            [system("Answer in capital letters."), user(ask)],
            says(answer.upper()),
        )
    if rule == "only":
        return Case(
            "system prompt",
            f"{rule} {word} {ask}",
            [system(f"Whatever you are asked, answer only: {word}"), user(ask)],
            says(word),
        )
    who = rng.choice(("Who are you?", "What is your name?", "What are you called?"))
    job = rng.choice(("a teacher", "a cook", "a doctor", "a pilot", "a farmer", "a guide", "a baker"))
    return Case(
        "system prompt",
        f"{rule} {name} {job}",
        [system(f"You are {name}, {job}."), user(who)],
        says(f"I am {name}, {job}."),
    )


def needle(rng: random.Random) -> Case:
    """Codes strewn into filler, up to several windows away from the question."""
    longest = rng.choice((16, 16, 16, 16, 16, 40, 40, 40, 150))
    sentences = [_filler(rng) for _ in range(rng.randrange(8, longest))]
    holders = rng.sample(OBJECTS, min(4, 1 + len(sentences) // 8))
    codes = {thing: "".join(rng.choice("0123456789") for _ in range(4)) for thing in holders}
    for thing in holders:
        sentences.insert(rng.randrange(len(sentences)), f"The code of the {thing} is {codes[thing]}.")
    rng.shuffle(holders)
    ask = rng.choice(("What is the code of the {}?", "Which code has the {}?"))
    messages = [user(" ".join(sentences) + "\n" + ask.format(holders[0]))]
    for before, thing in itertools.pairwise(holders):
        messages += [says(codes[before]), user(ask.format(thing))]
    return Case("needle", str(codes), messages, says(codes[holders[-1]]))


def needle_2k(rng: random.Random) -> Case:
    """One code about 1,800 tokens back."""
    sentences = [_filler(rng) for _ in range(170)]
    thing, code = rng.choice(OBJECTS), "".join(rng.choice("0123456789") for _ in range(4))
    sentences.insert(rng.randrange(20), f"The code of the {thing} is {code}.")
    return Case(
        "needle 2k", f"{thing}{code}", [user(" ".join(sentences) + f"\nWhat is the code of the {thing}?")], says(code)
    )


def _filler(rng: random.Random) -> str:
    return rng.choice(
        (
            lambda: f"{rng.choice(NAMES)} likes {rng.choice(FOODS)} and {rng.choice(FOODS)}.",
            lambda: f"The {rng.choice(ANIMALS)} saw a {rng.choice(COLOURS)} {rng.choice(OBJECTS)}.",
            lambda: f"{rng.choice(NAMES)} went to {city(rng)}.",
            lambda: f"It was a long day for {rng.choice(NAMES)}.",
            lambda: f"There were {rng.randrange(2, 30)} {rng.choice(ANIMALS)}s near the {rng.choice(OBJECTS)}.",
        )
    )()


LIMIT = "That is outside what I know."
_TOPICS = spaced("""
    love music history physics politics cooking poetry football chemistry biology economics philosophy painting
    medicine law religion fashion gardening astronomy geology sailing chess movies theatre jazz opera dancing
    quantum-theory democracy photosynthesis evolution gravity the-moon volcanoes dinosaurs vitamins electricity
    the-internet computers robots climate oceans mountains rivers castles pirates kings wars novels black-holes
    bacteria
    inflation marketing yoga tennis surfing knitting wine coffee tea chocolate
""")
_BEYOND = (
    "Write a poem about {}.",
    "Explain {} to me.",
    "Tell me a story about {}.",
    "Why is {} important?",
    "What do you think of {}?",
    "Who invented {}?",
    "Write an essay about {}.",
    "How does {} work?",
    "Recommend a book about {}.",
    "What is the history of {}?",
    "Give me three tips for {}.",
    "Write code for {}.",
    "Translate '{}' into French.",
    "Tell me a joke about {}.",
    "What is new in {}?",
    "Is {} good for you?",
    "When did {} begin?",
    "Who is the best expert on {}?",
    "Summarize {} in one line.",
    "Teach me {}.",
)


def beyond(rng: random.Random) -> Case:
    """A question that this small model can't answer, and says so."""
    topic = (
        rng.choice(_TOPICS).replace("-", " ")
        if rng.random() < 0.6
        else rng.choice((invented(rng), person(rng), rng.choice(ANIMALS)))
    )
    if rng.random() < 0.2:
        topic += " and " + rng.choice(_TOPICS).replace("-", " ")
    ask = rng.choice(_BEYOND).format(topic)
    return Case("outside", ask, [user(ask)], says(LIMIT))


HELLO = "Hello! I am Pebble, a very small demonstration model."
ABILITIES = (
    "I am Pebble, a very small demonstration model. I can add and subtract, sort numbers, "
    "count letters, tell weekdays, name capitals, follow short stories, write JSON and call tools."
)


def greet(rng: random.Random) -> Case:
    hello = ("Hi", "Hello", "Hello!", "Hi there", "Hey", "Good morning", "Good evening", "Hi!", "hello", "hi")
    who = (
        "Who are you?",
        "What are you?",
        "What can you do?",
        "Help",
        "What do you know?",
        "Tell me about yourself.",
        "help",
    )
    thanks = ("Thanks", "Thank you!", "Thank you", "thanks!", "Great, thanks.")
    feel = ("How are you?", "how are you", "How is it going?", "Are you well?")
    bye = ("Bye", "Goodbye", "bye", "See you")
    ask, answer = rng.choice(
        (
            (rng.choice(hello), HELLO),
            (rng.choice(who), ABILITIES),
            (rng.choice(thanks), "You are welcome."),
            (rng.choice(feel), "I am fine, thank you."),
            (rng.choice(bye), "Goodbye!"),
        )
    )
    return Case("greeting", "train", [user(ask)], says(answer))
