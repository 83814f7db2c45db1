"""Word lists that several generators draw from, and made-up words."""

from __future__ import annotations

import random


def spaced(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


NAMES = spaced("""
    Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor Wendy
    Adam Bella Carl Diana Eric Fiona George Hanna Ivan Julia Kevin Laura Mark Nina Oscar Peter Ruth Simon Tom Alice
    Bruno Cora Dan Ella Frank Gina Hugo Ines Jonas Lena Max Nora Otto Pia Ralf Sara Theo Uma Vera
""")
CITIES = spaced("""
    Paris London Berlin Madrid Rome Vienna Oslo Lima Cairo Tokyo Delhi Boston Chicago Dublin Lisbon Prague Warsaw
    Athens Helsinki Moscow Beijing Seoul Sydney Toronto Denver Geneva Milan Naples Porto Seville Hamburg Munich
    Zurich Bergen Kyoto Osaka Mumbai Lagos Nairobi Havana Bogota Quito Santiago Montreal Vancouver Seattle Dallas
    Houston Phoenix Manila Jakarta Hanoi Bangkok Kabul Tunis Algiers Dakar Accra Sofia Riga Vilnius
""")
COLOURS = spaced("red blue green yellow black white brown orange purple pink grey gold")
ANIMALS = spaced("cat dog horse cow sheep goat rabbit mouse duck goose lion tiger bear wolf fox owl frog snake")
FOODS = spaced("bread cheese rice soup pizza salad cake apples pasta fish eggs beans plums pears nuts honey")
OBJECTS = spaced("ball book key cup hat coin lamp pen ring shoe letter spoon clock map bag bottle knife stone")
PLACES = spaced("garden kitchen box drawer basket cellar bedroom attic car office shed hall cupboard bathroom")
DAYS = spaced("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SKIES = spaced("sunny cloudy rainy windy snowy foggy stormy clear")

VERBS = spaced("""
    set start stop open close find book order send show play create delete update move lock check add remove get
    print scan clean paint turn measure mix sort pack plan read write save load call charge rent
""")
NOUNS = spaced("""
    lamp door room table song ticket event note task file light heater camera oven robot train taxi meal report
    invoice window garden pump engine clock parcel account photo video printer shelf fence boat tank drone bike bed
    roof pool gate valve
""")
TEXT_KEYS = spaced("name colour title place label owner kind shape style mode topic group level target city tag")
NUMBER_KEYS = [
    "count",
    "size",
    "speed",
    "minutes",
    "amount",
    "width",
    "height",
    "weight",
    "year",
    "number",
    "price",
    "hours",
    "limit",
    "power",
    "age",
    "depth",
]
FLAG_KEYS = spaced("urgent quiet loop visible strict dry fast public")

_ONSETS = spaced("b c d f g h j k l m n p r s t v w z br dr gr kl pr st tr pl")
_VOWELS = spaced("a e i o u ai ee oo")
_CODAS = ["", "", "", "n", "r", "s", "l", "m", "t", "k", "nd", "x"]


def invented(rng: random.Random, syllables: int = 2) -> str:
    """A pronounceable word that no dictionary has."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)]
    return "".join(parts) + rng.choice(_CODAS)


def person(rng: random.Random) -> str:
    """A first name, now and then a made-up one."""
    return rng.choice(NAMES) if rng.random() < 0.8 else invented(rng).capitalize()


def city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.8 else invented(rng).capitalize()
