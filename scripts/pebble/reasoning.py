"""Sorting, letters, weekdays and where-is-it stories."""

from __future__ import annotations

import random
from collections import Counter

from case import Case, says, user
from words import ANIMALS, COLOURS, DAYS, FOODS, NAMES, OBJECTS, PLACES, invented


def sort_numbers(rng: random.Random) -> Case:
    numbers = rng.sample(range(1, 100), rng.randrange(3, 7))
    given = ", ".join(map(str, numbers))
    ask = rng.choice(
        (
            "Sort these numbers: {}",
            "Put in order: {}",
            "Sort {} from small to large.",
            "Sort: {}",
            "Arrange from smallest to largest: {}",
        )
    )
    lines, left = [], list(numbers)
    while len(left) > 1:
        lines.append(" ".join(map(str, left)) + f": {min(left)}")
        left.remove(min(left))
    ordered = ", ".join(map(str, sorted(numbers)))
    return Case("sort", given, [user(ask.format(given))], says(ordered, "\n".join(lines)), thinking=True)


def letters(rng: random.Random) -> Case:
    known = ANIMALS + COLOURS + FOODS + OBJECTS + PLACES + [name.lower() for name in NAMES]
    word = rng.choice(known) if rng.random() < 0.3 else invented(rng, rng.randrange(1, 4))
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("aeinorst")
    ask = rng.choice(
        ("How many times does the letter {} appear in {}?", "How many {} are in {}?", "Count the letter {} in {}.")
    )
    seen, spelt = 0, []
    for c in word:
        seen += c == letter
        spelt.append(f"{c} {seen}" if c == letter else c)
    return Case(
        "letters",
        f"{letter} {word}",
        [user(ask.format(letter, word))],
        says(str(seen), "\n".join(spelt)),
        thinking=True,
        choices=5,
    )


def weekday(rng: random.Random) -> Case:
    start, days, back = rng.randrange(7), rng.randrange(1, 400), rng.random() < 0.3
    ask = rng.choice(("Today is {}. What day {} {} days {}?", "It is {} today. Which day of the week {} {} days {}?"))
    when = ("was it", "ago") if back else ("is it in", "from now")
    rest, lines = 0, []
    for digit in str(days):
        lines.append(f"{rest if rest else ''}{digit} mod 7 = {(rest * 10 + int(digit)) % 7}")
        rest = (rest * 10 + int(digit)) % 7
    step = -1 if back else 1
    lines += [f"{i} {DAYS[(start + step * i) % 7]}" for i in range(rest + 1)]
    answer = DAYS[(start + step * rest) % 7]
    text = ask.format(DAYS[start], when[0], days, when[1])
    return Case(
        "weekday", f"{start} {step * days}", [user(text)], says(answer, "\n".join(lines)), thinking=True, choices=7
    )


def where_is(rng: random.Random) -> Case:
    things, people = rng.sample(OBJECTS, 2), rng.sample(NAMES, 3)
    places = rng.sample(PLACES, 4)
    at: dict[str, str] = {}
    lines = []
    for _ in range(rng.randrange(2, 6)):
        thing = rng.choice(things)
        place = rng.choice([p for p in places if p != at.get(thing)])
        verb = rng.choice(("moved", "took", "carried")) if thing in at else rng.choice(("put", "left"))
        lines.append(f"{rng.choice(people)} {verb} the {thing} {'to' if thing in at else 'in'} the {place}.")
        at[thing] = place
        if rng.random() < 0.2:
            lines.append(f"{rng.choice(people)} went to the {rng.choice(places)}.")
    asked = rng.choice(sorted(at))
    story = " ".join(lines)
    ask = rng.choice(("Where is the {} now?", "Where is the {}?", "In which place is the {}?"))
    named = Counter(place for place in places if place in story)
    return Case(
        "where is it", story, [user(f"{story} {ask.format(asked)}")], says(f"In the {at[asked]}."), choices=len(named)
    )
