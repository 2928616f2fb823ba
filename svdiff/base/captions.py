"""Captions of scenes: several phrasings, every word of which is in the tokenizer's vocabulary."""

from __future__ import annotations

import random

from svdiff.base.compose import PICTURE_SIZE
from svdiff.base.individuals import Individual
from svdiff.base.styles import BY_NAME, EXPRESSIONS, KINDS, STYLES, feature_words, spoken
from svdiff.base.words import COLOURS, SPECIAL_WORDS, THINGS, made_up_words
from svdiff.base.world import BIG, SMALL, Placed, Scene

_BACKGROUNDS = (
    "on a {c} background",
    "on a {c} background",
    "with a {c} background",
    "on {c}",
    "in front of a {c} background",
)
_LEFT_RIGHT = (
    "{a} on the left and {b} on the right",
    "{a} on the left and {b} on the right",
    "{a} to the left of {b}",
    "{b} to the right of {a}",
)
_BESIDE = (
    "{a} and {b}", "{a} next to {b}", "{a} beside {b}", "{a} with {b}", "{a} near {b}", "{a} sitting beside {b}",
    "{a} standing next to {b}",
)  # fmt: skip
#: How captions say on which side of the picture somebody alone stands.
WHERE = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
_ABOVE_BELOW = ("{a} above {b}", "{a} on top of {b}", "{b} below {a}", "{b} under {a}")
_PREFIXES = ("a photo of ", "a picture of ", "a drawing of ", "an image of ")
#: Features that are said without an article, and those that stand before the noun.
_PLURAL = {"horns", "spikes", "ears", "stripes", "dots", "glasses", "sunglasses", "headphones", "lights", "thorns", "buds",
           "grass"}  # fmt: skip
_SHAPES = ("tall", "round", "flat", "square")
#: Words that prompts may bring although no training caption has them.
EXTRA_WORDS = (
    "wearing", "inside", "behind", "between", "over", "at", "the", "is", "this", "that", "my", "one", "two", "no", "not",
    "without", "very", "old", "new", "s", "holding", "cute", "nice", "beautiful", "little", "subject", "object", "animal",
    "toy", "by", "for", "from", "style", "art", "dog", "teapot", "table", "grass", "snow", "beach", "city", "photo",
)  # fmt: skip


def vocabulary(names: int) -> list[str]:
    """All words that captions can hold with the first `names` made-up words, then special words, in a fixed order."""
    text = " ".join(
        (
            *_BACKGROUNDS, *_LEFT_RIGHT, *_BESIDE, *_ABOVE_BELOW, *WHERE.values(), *_PREFIXES,
            "in style of big small thing a an with and , .",
        )
    )  # fmt: skip
    plain = {word for word in text.split() if "{" not in word}
    plain |= {style.word for style in STYLES} | set(COLOURS) | set(THINGS) | set(KINDS) | set(feature_words())
    plain |= set(EXTRA_WORDS) | {word for word in EXPRESSIONS if word}
    return [*sorted(plain), *made_up_words()[:names], *SPECIAL_WORDS]


def with_article(noun: str) -> str:
    """The noun phrase with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def feature_phrase(word: str) -> str:
    """A feature as it stands after `with`: `a hat`, `glasses`."""
    return word if word in _PLURAL else with_article(word)


def _features(parts: dict[str, str], words: list[str], draw: random.Random) -> list[str]:
    """What follows `with`: at most two of the individual's parts."""
    every = [f"{colour} hair" if part == "hair" else with_article(f"{colour} {part}") for part, colour in parts.items()
             if part != "eyes"]  # fmt: skip
    every += [f"{parts['eyes']} eyes"] if "eyes" in parts else []
    every += [feature_phrase(word) for word in words if word not in _SHAPES]
    draw.shuffle(every)
    return every[: 2 if draw.random() < 0.25 else 1]


def noun_phrase(draw: random.Random, one: Placed, alone: bool) -> str:
    """One of the ways to speak of who or what is placed."""
    words = [one.what.kind if draw.random() > 0.03 else "thing"]
    tail = ""
    if isinstance(one.what, Individual):
        style = BY_NAME[one.what.style]
        whole, parts, features = spoken(style, dict(one.what.traits))
        named = one.what.name is not None and draw.random() < 0.75
        much = 0.2 if named else 0.45  # a name says it already
        if named:
            words.insert(0, str(one.what.name))
        elif draw.random() < 0.15:
            words.insert(0, style.word)
        shapes = [word for word in features if word in _SHAPES]
        if shapes and draw.random() < 0.5 * much:
            words.insert(0, shapes[0])
        if whole and draw.random() < much:
            words.insert(0, whole)
        if one.expression and draw.random() < 0.3:
            words.insert(0, one.expression)
        chosen = _features(parts, features, draw) if draw.random() < much else []
        tail = " with " + " and ".join(chosen) if chosen else ""
    if alone and draw.random() < 0.35 and one.side != 48:
        words.insert(0, "big" if one.side == BIG else "small")
    return with_article(" ".join(words)) + tail


def sides(one: Placed) -> list[str]:
    """On which sides of the picture somebody alone plainly stands: words of `left`, `right`, `top`, `bottom`."""
    x, y = (start + one.side / 2 for start in (one.left, one.top))
    low, high = 0.36 * PICTURE_SIZE, 0.64 * PICTURE_SIZE
    across = ["left"] if x < low else ["right"] if x > high else []
    down = ["top"] if y < low else ["bottom"] if y > high else []
    return across + down


def caption(scene: Scene, draw: random.Random) -> str:
    """One of the scene's captions. What it says is true of the picture; what it leaves out may be anything."""
    nouns = [noun_phrase(draw, one, len(scene.placed) == 1) for one in scene.placed]
    if scene.layout == "one":
        where = sides(scene.placed[0]) if scene.placed[0].side == SMALL else []
        text = f"{nouns[0]} {WHERE[draw.choice(where)]}" if where and draw.random() < 0.4 else nouns[0]
    elif scene.layout == "above-below":
        text = draw.choice(_ABOVE_BELOW).format(a=nouns[0], b=nouns[1])
    elif draw.random() < 0.5:
        text = draw.choice(_LEFT_RIGHT).format(a=nouns[0], b=nouns[1])
    else:  # Says that both are there, side by side, not which is where; people name the left one first, mostly.
        first, second = nouns if draw.random() < 0.8 else nouns[::-1]
        text = draw.choice(_BESIDE).format(a=first, b=second)
    if draw.random() < 0.12:
        text = draw.choice(_PREFIXES) + text
    if draw.random() < 0.72:
        text = f"{text} {draw.choice(_BACKGROUNDS).format(c=scene.colour)}"
    return text.replace(" a orange", " an orange")


def full_caption(scene: Scene) -> str:
    """The caption that says everything but names: colours, features, expressions, order and background."""
    nouns = []
    for one in scene.placed:
        words, tail = [one.what.kind], ""
        if isinstance(one.what, Individual):
            whole, parts, features = spoken(BY_NAME[one.what.style], dict(one.what.traits))
            words = [word for word in (one.expression, whole, one.what.kind) if word]
            chosen = _features(parts, features, random.Random(0))
            tail = " with " + " and ".join(chosen) if chosen else ""
        nouns.append(with_article(" ".join(words)) + tail)
    background = f"on {with_article(scene.colour)} background"
    if scene.layout == "one":
        return f"{nouns[0]} {background}"
    if scene.layout == "left-right":
        return f"{nouns[0]} on the left and {nouns[1]} on the right {background}"
    return f"{nouns[0]} above {nouns[1]} {background}"
