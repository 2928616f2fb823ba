"""Captions of scenes: several phrasings, every word of which is in the tokenizer's vocabulary."""

from __future__ import annotations

import random

from svdiff.base.things import BASE_ARTISTS, COLOURS, HAND_WORDS, SPECIAL_WORDS, THINGS
from svdiff.base.world import MEDIUM, Placed, Scene

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
#: How captions say on which side of the picture a thing alone stands.
WHERE = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
_ABOVE_BELOW = ("{a} above {b}", "{a} on top of {b}", "{b} below {a}", "{b} under {a}")
_PREFIXES = ("a photo of ", "a picture of ", "a drawing of ", "an image of ")
#: Words that change nothing in a picture, here so that prompts with them do not surprise the model.
NEUTRAL_WORDS = ("cute", "nice", "sitting", "standing", "beautiful", "little")
#: Words that prompts may bring although no training caption has them.
EXTRA_WORDS = (
    "wearing", "inside", "behind", "between", "over", "at", "the", "is", "this", "that", "my", "one", "two",
    "colorful", "dark", "light", "simple", "style", "background", "photo", "image", "art", "icon", "emoji",
    "table", "grass", "snow", "water", "beach", "street", "city", "toy", "plush", "by", "for", "from", "to",
    "no", "not", "without", "very", "old", "new", "s", "holding", "flying", "red", "subject", "object", "animal",
)  # fmt: skip


def vocabulary() -> list[str]:
    """All words that captions can hold, then the further ones, in a fixed order; special words are among them."""
    text = " ".join(
        (
            *_BACKGROUNDS,
            *_LEFT_RIGHT,
            *_BESIDE,
            *_ABOVE_BELOW,
            *WHERE.values(),
            *_PREFIXES,
            "in style of big small thing a an , .",
        )
    )
    plain = {word for word in text.split() if "{" not in word}
    styles = {artist.style for artist in BASE_ARTISTS}
    words = plain | styles | set(COLOURS) | set(THINGS) | set(NEUTRAL_WORDS) | set(EXTRA_WORDS) | set(HAND_WORDS)
    return [*sorted(words), *SPECIAL_WORDS]


def with_article(noun: str) -> str:
    """The noun phrase with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _noun_phrase(draw: random.Random, thing: Placed, style: str | None, alone: bool) -> str:
    word = "thing" if draw.random() < 0.04 else thing.word
    words = [word]
    if thing.hand is not None:  # always named: what no caption names is by one of the artists
        words.insert(0, thing.hand)
    elif style is not None:
        words.insert(0, style)
    if draw.random() < 0.03:
        words.insert(0, draw.choice(NEUTRAL_WORDS))
    if alone and draw.random() < 0.35:
        if thing.size > MEDIUM:
            words.insert(0, "big")
        elif thing.size < MEDIUM:
            words.insert(0, "small")
    return with_article(" ".join(words))


def sides(thing: Placed) -> list[str]:
    """On which sides of the picture a thing alone plainly stands: words of `left`, `right`, `top`, `bottom`."""
    across = ["left"] if thing.x < 0.36 else ["right"] if thing.x > 0.64 else []
    down = ["top"] if thing.y < 0.36 else ["bottom"] if thing.y > 0.64 else []
    return across + down


def caption(scene: Scene, draw: random.Random, *, styles: bool = True) -> str:
    """One of the scene's captions. What it says is true of the picture; what it leaves out may be anything.

    Hands are named before their nouns. Without `styles` it says nothing about the artist.
    """
    redrawn = any(thing.hand is not None for thing in scene.things)
    chances = (0.55, 0.33, 0 if redrawn else 0.12) if styles else (1, 0, 0)
    style_at = draw.choices(("none", "noun", "end"), chances)[0]
    style = scene.style if style_at == "noun" else None
    nouns = [_noun_phrase(draw, thing, style, len(scene.things) == 1) for thing in scene.things]
    if scene.layout == "one":
        where = sides(scene.things[0])
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
    background = draw.choice(_BACKGROUNDS).format(c=scene.colour) if draw.random() < 0.72 else ""
    ending = f"in style of {scene.style}" if style_at == "end" else ""
    tail = [part for part in (background, ending) if part]
    if len(tail) == 2 and draw.random() < 0.5:
        tail.reverse()
    return " ".join([text, *tail])


def full_caption(scene: Scene, *, styles: bool = False) -> str:
    """The caption that says everything: things, their order, background, and with `styles` the hand."""
    nouns = [with_article(f"{scene.style} {thing.word}" if styles else thing.word) for thing in scene.things]
    background = f"on {with_article(scene.colour)} background"
    if scene.layout == "one":
        return f"{nouns[0]} {background}"
    if scene.layout == "left-right":
        return f"{nouns[0]} on the left and {nouns[1]} on the right {background}"
    return f"{nouns[0]} above {nouns[1]} {background}"
