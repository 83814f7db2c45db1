"""What the eye is trained on: several questions about one picture, in one conversation.

A pass through the tower costs more than a question, and questions about one thing that differ make the network keep
what it sees apart. Scoring asks one question a picture (pictures.py, writing.py), of the same kinds among others.

Two things keep colour and shape from being learned as one, without any picture of an unseen pair. Some things have a
colour out of the whole cube, far from that of the pair that is kept unseen, and only their shape is asked for. And some
answers begin with a wrong colour that is given, not learned, so that the shape after it has to come from the picture.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable

import pictures
from case import Case, discuss, says
from pictures import COLOURS, PAIRS, RGB, UNSEEN, Thing
from writing import bars, highest

TINTED = 0.6
"""Of the things whose shape alone is asked for."""
MISLED = 0.3
"""Of the lone things: the answer begins with another colour."""
APART = 60
"""Least distance of a tint, in the cube of 0 to 255, from the colour that its shape never has."""
GRID = 20
"""Thousandths of a side to which the boxes in training are rounded; finer digits would be noise to this eye."""
ONES = 0.1
"""Of the questions for a number whose answer is one: it is the commonest by far, and would be learned as such."""
MOST = 4
"""Questions about one picture."""
Exchange = tuple[str, str]


def colour_of(tone: RGB) -> str:
    """The name that comes nearest."""
    return min(COLOURS, key=lambda colour: math.dist(tone, COLOURS[colour]))


def tint(rng: random.Random, shape: str) -> RGB:
    """Any colour that stands out from dark and pale paper and is not like the one that `shape` is never seen in."""
    (never,) = (colour for colour, unseen in UNSEEN if unseen == shape)
    while True:
        r, g, b = (rng.randint(0, 255) for _ in range(3))
        visible = max(r, g, b) > 110 and min(r, g, b) < 150
        if visible and colour_of((r, g, b)) != never and math.dist((r, g, b), COLOURS[never]) > APART:
            return r, g, b


def tinted(rng: random.Random, thing: Thing) -> Thing:
    return Thing(thing.colour, thing.shape, thing.x, thing.y, thing.r, tint(rng, thing.shape))


def _box(thing: Thing, label: str) -> Exchange:
    coarse = [GRID * round(v / GRID) for v in thing.box]
    answer = json.dumps([{"box_2d": coarse, "label": label}], separators=(",", ":"))
    return f"Give the box of the {label}.", answer


def _case(rng: random.Random, task: str, things: list[Thing], exchanges: list[Exchange]) -> Case:
    shown, spots = pictures.show(rng, rng.sample(things, len(things)))
    messages, reply = discuss(shown, exchanges)
    return Case(task, repr(things), messages, reply, shown=[shown], spots=spots)


def lone(rng: random.Random) -> Case:
    """What one thing is and where."""
    thing = pictures.place(rng, *rng.choice(PAIRS))
    asked = {kind: rng.choice(ways) for kind, ways in pictures.ASKED.items()}
    if rng.random() < MISLED:
        return _misled(rng, thing, asked["both"])
    if rng.random() < TINTED:
        thing = tinted(rng, thing)
        exchanges = [(asked["shape"], pictures.named(thing, "shape")), _box(thing, thing.shape)]
    else:
        exchanges = [(question, pictures.named(thing, kind)) for kind, question in asked.items()]
        exchanges.append(_box(thing, f"{thing.colour} {thing.shape}"))
    rng.shuffle(exchanges)
    return _case(rng, "lone", [thing], exchanges[: rng.randint(1, MOST)])


def _misled(rng: random.Random, thing: Thing, question: str) -> Case:
    """The reply begins with a colour that the thing doesn't have, and goes on with its shape."""
    wrong = rng.choice([colour for colour in COLOURS if colour != thing.colour])
    start = pictures.article(wrong).capitalize()
    shown, spots = pictures.show(rng, [thing])
    messages, _ = discuss(shown, [(question, "")])
    reply = says(f"{start} {thing.shape}.")
    return Case("lone", repr(thing), messages, reply, shown=[shown], spots=spots, given=start)


def several(rng: random.Random) -> Case:
    """Numbers, boxes, colours, shapes and directions among up to nine things."""
    number = 0
    if rng.random() < 0.4:
        things = pictures.two(rng)
    else:
        number, shape, things = pictures.crowd(rng)
    pairs = Counter((thing.colour, thing.shape) for thing in things)
    exchanges = [*_numbers(rng, things, ("shape", "colour")), *_lookups(things)]
    clear = [thing for thing in things if pairs[thing.colour, thing.shape] == 1]
    boxes = [_box(thing, f"{thing.colour} {thing.shape}") for thing in clear]
    exchanges += rng.sample(boxes, min(2, len(boxes)))
    if len(clear) > 1:
        exchanges += _direction(*rng.sample(clear, 2))
    rng.shuffle(exchanges)
    exchanges = exchanges[: rng.randint(2, MOST)]
    if number:  # what scoring asks, from one to six alike
        asked = pictures.ask_number(rng, shape), f"{number}."
        exchanges = [asked, *(other for other in exchanges[1:] if other != asked)]
        rng.shuffle(exchanges)
    return _case(rng, "several", things, exchanges)


def _numbers(rng: random.Random, things: list[Thing], kinds: tuple[str, ...]) -> list[Exchange]:
    """How many there are of a shape or a colour."""
    counted = []
    for kind in kinds:
        for name, number in Counter(getattr(thing, kind) for thing in things).items():
            question = pictures.ask_number(rng, name) if kind == "shape" else f"How many are {name}?"
            if number > 1 or rng.random() < ONES:
                counted.append((question, f"{number}."))
    return counted


def _lookups(things: list[Thing]) -> list[Exchange]:
    """The colour of a shape that occurs once, and the other way round."""
    found: list[Exchange] = []
    for thing in things:
        if sum(other.shape == thing.shape for other in things) == 1:
            found.append((f"What colour is the {thing.shape}?", pictures.named(thing, "colour")))
        if sum(other.colour == thing.colour for other in things) == 1:
            found.append((f"What shape is {thing.colour}?", pictures.named(thing, "shape")))
    return found


def _direction(start: Thing, goal: Thing) -> list[Exchange]:
    """One of the four ways, if it is clear which."""
    dx, dy = goal.x - start.x, goal.y - start.y
    if max(abs(dx), abs(dy)) < 2 * min(abs(dx), abs(dy)):
        return []
    wanted = (round(dx / abs(dx)), 0) if abs(dx) > abs(dy) else (0, round(dy / abs(dy)))
    way = next(way for way, step in pictures.WAYS.items() if step == wanted)
    names = [f"{thing.colour} {thing.shape}" for thing in (start, goal)]
    return [(f"Which way is it from the {names[0]} to the {names[1]}?", f"{way.capitalize()}.")]


def moving(rng: random.Random) -> Case:
    """Which way a thing goes, in two to four frames, and what it is."""
    way, steps, shown = pictures.moving(rng, rng.randint(2, 4))
    thing = steps[0]
    exchanges = [(rng.choice(pictures.ASKED[kind]), pictures.named(thing, kind)) for kind in pictures.ASKED]
    exchanges = rng.sample(exchanges, rng.randrange(2))
    exchanges.insert(rng.randint(0, len(exchanges)), (pictures.ask_way(rng, thing), f"{way.capitalize()}."))
    messages, reply = discuss(shown, exchanges)
    return Case("moving", repr(steps), messages, reply, shown=[shown])


def chart(rng: random.Random) -> Case:
    """The heights of bars, and the highest."""
    heights, shown, spots = bars(rng)
    exchanges = [(f"How high is the {colour} bar?", f"{height}.") for colour, height in heights.items()]
    top = highest(heights)
    if top is not None:
        exchanges.append(("Which bar is the highest?", f"{top.capitalize()}."))
    rng.shuffle(exchanges)
    messages, reply = discuss(shown, exchanges[:MOST])
    return Case("chart", repr((list(heights.values()), list(heights))), messages, reply, shown=[shown], spots=spots)


def patchwork(rng: random.Random) -> Case:
    """Two to seven things, many in any colour: how many there are of a shape, and where those are that are alone."""
    things = pictures.apart(rng, [rng.choice(PAIRS) for _ in range(rng.randint(2, 7))], 17, 36)
    things = [tinted(rng, thing) if rng.random() < TINTED else thing for thing in things]
    shapes = Counter(thing.shape for thing in things)
    exchanges = _numbers(rng, things, ("shape",))
    exchanges += [_box(thing, thing.shape) for thing in things if shapes[thing.shape] == 1][:2]
    rng.shuffle(exchanges)
    return _case(rng, "patchwork", things, exchanges[: rng.randint(1, MOST)])


SCENES: tuple[Callable[[random.Random], Case], ...] = (lone, several, patchwork, moving, chart)
