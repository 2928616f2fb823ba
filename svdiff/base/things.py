"""What the picture world is made of: artists, things, colours, and the words for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Artist:
    """One icon set: an npm package pinned to a version, drawn by one hand.

    `style` is the word by which captions name the hand; `spdx` the licence that the package must declare.
    """

    name: str
    version: str
    spdx: str
    style: str

    @property
    def package(self) -> str:
        """The npm package, with its pinned version."""
        return f"@iconify-json/{self.name}@{self.version}"


#: The artists that the base and its evaluators are trained on.
BASE_ARTISTS = (
    Artist("noto", "1.2.9", "Apache-2.0", "soft"),
    Artist("noto-v1", "1.2.5", "Apache-2.0", "classic"),
    Artist("twemoji", "1.2.5", "CC-BY-4.0", "bold"),
    Artist("fluent-emoji-flat", "1.2.6", "MIT", "flat"),
    Artist("fluent-emoji", "1.2.7", "MIT", "glossy"),
)

#: The artists of the concepts: neither the base nor an evaluator may ever see them.
CONCEPT_ARTISTS = (
    Artist("openmoji", "1.2.29", "CC-BY-SA-4.0", ""),
    Artist("emojione-v1", "1.2.3", "CC-BY-SA-4.0", ""),
)

# word in captions = name of the icon (where it differs)
_THINGS = """
dog=dog-face cat=cat-face panda bear turtle house car=automobile frog crown rocket lion tiger=tiger-face fox
rabbit=rabbit-face mouse=mouse-face cow=cow-face pig=pig-face horse=horse-face monkey=monkey-face penguin owl
koala chair teddy=teddy-bear tree=deciduous-tree pine=evergreen-tree palm=palm-tree umbrella strawberry apple=red-apple
banana lemon pizza hamburger doughnut mushroom cactus sunflower tulip butterfly fish octopus snail ladybug=lady-beetle
bee=honeybee crab bus tractor train sailboat airplane balloon gift=wrapped-gift star heart=red-heart cloud moon=crescent-moon
sun fire key bell guitar robot ghost snowman
hamster chicken duck unicorn whale dolphin shark snake elephant camel crocodile bird bug rat goat
pear peach pineapple tomato carrot corn=ear-of-corn watermelon cherries grapes cookie cake=birthday-cake
icecream=soft-ice-cream cup=hot-beverage cheese=cheese-wedge bread fries=french-fries egg
rose leaf=maple-leaf clover=four-leaf-clover blossom=cherry-blossom
taxi bicycle locomotive helicopter ship castle tent church anchor
trophy violin trumpet drum football=soccer-ball basketball lock=locked hammer scissors pencil
book=closed-book candle watch telephone camera television alien pumpkin=jack-o-lantern skull rainbow drop=droplet
snowflake hat=top-hat shirt=t-shirt shoe=running-shoe backpack glasses ring gem=gem-stone bomb door bed sofa=couch-and-lamp
seat bathtub die=game-die envelope box=package volcano lollipop candy
"""

#: word -> icon name.
THINGS: dict[str, str] = {word: icon or word for word, _, icon in (entry.partition("=") for entry in _THINGS.split())}

#: What a narrower world takes first; the others follow in their own order.
CORE_WORDS = (
    "dog", "cat", "panda", "bear", "turtle", "house", "car", "frog", "crown", "rocket", "rabbit", "lion", "penguin", "pig",
    "fox", "chair", "teddy", "tree", "umbrella", "strawberry", "apple", "banana", "tiger", "monkey",
)  # fmt: skip

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

#: Concepts written to data/concepts: (artist, caption word of the thing).
CONCEPTS = (
    *(("openmoji", word) for word in ("dog", "cat", "panda", "bear", "turtle", "house", "car", "frog", "crown")),
    *(("emojione-v1", word) for word in ("dog", "cat", "panda", "turtle", "house", "frog", "rocket", "rabbit")),
)

#: Words that stay unused in training: the tokens of concepts.
SPECIAL_WORDS = (
    "sks", "zwx", "olis", "pqv", "ktn", "mjr", "vbx", "wug", "ohwx", "qpl", "xjy", "rzd", "hnk", "ytf", "gvm", "ucb",
)  # fmt: skip

#: Words that each name a hand (`World.hands`): so an unknown word before a noun says that somebody else drew it, which is
#: what a concept's special token has to say, and the noun alone is left to the artists.
HAND_WORDS = (
    "blicket", "dax", "toma", "zav", "fep", "lorp", "nim", "kiki", "bouba", "gazzer", "modi", "tulver",
    "pim", "sarn", "vell", "corm", "jund", "hask", "oxel", "rill", "bex", "quab", "wix", "yorp",
)  # fmt: skip
