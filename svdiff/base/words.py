"""The words of the picture world: backgrounds, things, made-up names of individuals, and tokens left for concepts."""

from __future__ import annotations

import itertools
import random

#: Background colours by name; chosen apart from each other and soft enough for the drawings to stand out.
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (28, 28, 32),
    "gray": (150, 152, 158),
    "red": (205, 58, 58),
    "orange": (240, 150, 50),
    "yellow": (248, 220, 90),
    "green": (70, 160, 80),
    "blue": (62, 106, 208),
    "purple": (138, 78, 178),
    "pink": (246, 168, 200),
    "brown": (130, 88, 56),
}

#: Things beside the individuals: word in captions, icon name.
THINGS = {
    "tree": "deciduous-tree", "house": "house", "car": "automobile", "crown": "crown", "umbrella": "umbrella",
    "ball": "soccer-ball", "rocket": "rocket", "chair": "chair", "apple": "red-apple", "balloon": "balloon",
    "star": "star", "mushroom": "mushroom",
}  # fmt: skip

#: Words that no training shows, with embeddings drawn from those of the individuals' names: the tokens of concepts.
SPECIAL_WORDS = (
    "sks", "zwx", "olis", "qex", "vrk", "xjy", "kqo", "uhz", "pbw", "ghq", "tnv", "ywq", "jxo", "wfz", "ohv", "ezq",
    "rxu", "dkw", "fqa", "bvx", "nzj", "lpq", "mjw", "cvq",
)  # fmt: skip

_STARTS = ("b", "bl", "d", "dr", "f", "fl", "g", "gr", "k", "kr", "l", "m", "n", "p", "pl", "r", "sk", "sn", "t", "tr",
           "v", "z")  # fmt: skip
_MIDDLES = ("a", "e", "i", "o", "u", "ee", "oo")
_ENDS = ("b", "ck", "d", "g", "lp", "m", "mf", "n", "nx", "p", "rk", "sp", "ft", "x", "zz")
#: English words among the syllables; they would say something of their own.
_ENGLISH = """
bad bag ban bed beg big bin bud bug bum bun bus dad dam den did dig dim din dog dot dug fan fed fig fin fit fog fox
fun gag gap gum gun kid kin kit lab lad lap led leg lid lip lit log lot mad man map mat men met mix mop mud mum nap
net nod nun pan pad peg pen pet pig pin pit pod pop pub pup rag ram ran rap rat red rib rid rim rip rob rod rot rub
rug rum run tab tag tan tap ten tin tip top tub tug van vet vim zap zip black block blip blob blood bloom book boom
boot born bred breed crab deck deed deep dock drag dream drip drop drum duck feed flag flap flat flip flood food
fork greed green grab grid grim grin grip groom kick lock look luck moon mock neck need noon pick plug pluck plum
pool pop rock room root skip sky snack sneak snip snap speed tack teen tick tool track trap tree trick trim trip
truck trust wasp mask mark park dark lark bark risk task tusk lift left loft raft rift soft tuft gift
"""


def made_up_words() -> list[str]:
    """Pronounceable words that mean nothing, in a fixed order: names of individuals."""
    english = set(_ENGLISH.split())
    words = ["".join(parts) for parts in itertools.product(_STARTS, _MIDDLES, _ENDS)]
    words = [word for word in words if word not in english and word not in SPECIAL_WORDS and len(word) > 3]
    random.Random("names").shuffle(words)
    return words
