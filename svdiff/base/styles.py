"""The artists' styles of the picture world: what decides who somebody is, what is expression, and the words for both.

An individual is a choice for each of its style's traits. Its expression is not part of it: pictures of one individual
differ in expression, place, size, mirroring and background.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass, field

Traits = Mapping[str, str]

#: Words that captions use for features; a trait's variant without a word is drawn and not spoken of.
_TOPS = {
    "horns": "horns", "hornsIn": "horns", "hornsSmall": "horns", "spike": "spikes", "spikes": "spikes",
    "antenna": "antenna", "antennae": "antenna", "bobble": "antenna", "earsRound": "ears", "earsPointy": "ears",
    "earsDroop": "ears", "fin": "fin", "crown": "crown", "sprout": "leaf",
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """One artist's way to draw one kind.

    `traits` are the options that decide an individual, each with the variants in use (None: all that the artist drew)
    and `chances` the probability that an optional part is there. `expressions` names what the face does. `features`
    gives the words for variants of a trait, `colours` the traits whose value is a colour with the word that it colours
    ("" for the whole).
    """

    name: str
    kind: str
    word: str
    package: str
    author: str
    licence: str
    url: str
    traits: Mapping[str, tuple[str, ...] | None]
    expressions: Mapping[str, Mapping[str, str]]
    colours: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    chances: Mapping[str, int] = field(default_factory=dict)
    held_out: bool = False


_DICEBEAR = "dicebear-styles"
_CC0 = "CC0-1.0"
_CC_BY = "CC-BY-4.0"
_FREE = "free for personal and commercial use"

STYLES: tuple[Style, ...] = (
    Style(
        "revoy", "cat", "painted", "robohash", "David Revoy", _CC_BY, "https://www.davidrevoy.com",
        traits={
            "body": tuple(str(i) for i in range(15)),
            "fur": ("0", "1", "2", "3", "4", "5", "8", "9"),
            "accessory": ("0", "2", "3", "4", "5", "6", "7", "11", "12", "13", "14", "15"),
        },
        expressions={
            "smiling": {"eyes": "0", "mouth": "0"},
            "happy": {"eyes": "6", "mouth": "1"},
            "surprised": {"eyes": "7", "mouth": "2"},
            "angry": {"eyes": "1", "mouth": "8"},
            "": {"eyes": "5", "mouth": "6"},
        },
        colours={"body": ""},
        features={
            "fur": {"0": "stripes", "1": "stripes", "3": "stripes", "4": "patch", "5": "patch", "9": "dots"},
            "accessory": {
                "0": "scarf", "7": "scarf", "3": "headband", "11": "headband", "4": "bow", "12": "bow", "5": "hat",
                "13": "hat", "6": "headphones", "14": "headphones", "2": "collar",
            },
        },
    ),
    Style(
        "critters", "critter", "paper", _DICEBEAR, "DiceBear", _CC0, "https://www.dicebear.com",
        traits={"bodyVariant": None, "bodyColor": None, "topVariant": tuple(_TOPS), "accentColor": None},
        chances={"top": 85, "pattern": 0, "cheeks": 0},
        expressions={
            "smiling": {"eyesVariant": "round", "mouthVariant": "smile"},
            "sad": {"eyesVariant": "dots", "mouthVariant": "sad"},
            "winking": {"eyesVariant": "wink", "mouthVariant": "smirk"},
            "angry": {"eyesVariant": "angry", "mouthVariant": "zigzag"},
            "surprised": {"eyesVariant": "wide", "mouthVariant": "ooh"},
        },
        colours={"bodyColor": ""},
        features={
            "topVariant": _TOPS,
            "bodyVariant": {"tower": "tall", "chimney": "tall", "round": "round", "blob": "round", "squat": "flat",
                            "block": "square"},
        },
    ),
    Style(
        "clay", "critter", "clay", _DICEBEAR, "DiceBear", _CC0, "https://www.dicebear.com",
        traits={"bodyVariant": None, "bodyColor": None, "topVariant": None, "accentColor": None},
        chances={"top": 80, "pattern": 0},
        expressions={
            "smiling": {"eyesVariant": "even", "mouthVariant": "smile"},
            "sad": {"eyesVariant": "dots", "mouthVariant": "frown"},
            "winking": {"eyesVariant": "wink", "mouthVariant": "smirk"},
            "surprised": {"eyesVariant": "big", "mouthVariant": "o"},
        },
        colours={"bodyColor": ""},
        held_out=True,
    ),
    Style(
        "bottts", "robot", "metal", _DICEBEAR, "Pablo Stanley", _FREE, "https://bottts.com/",
        traits={"headVariant": None, "baseColor": None, "topVariant": None, "sidesVariant": None,
                "eyesVariant": ("bulging", "eva", "frame1", "frame2", "glow", "robocop", "round", "roundFrame01",
                                "sensor", "shade01"),
                "textureVariant": ("camo01", "circuits", "dots")},
        chances={"texture": 40},
        expressions={
            "smiling": {"mouthVariant": "smile01"},
            "angry": {"mouthVariant": "bite"},
            "": {"mouthVariant": "grill02"},
        },
        colours={"baseColor": ""},
        features={
            "headVariant": {"round01": "round", "round02": "round", "square01": "square", "square02": "square",
                            "square03": "square", "square04": "square"},
            "topVariant": {"antenna": "antenna", "antennaCrooked": "antenna", "bulb01": "lamp", "glowingBulb01": "lamp",
                           "glowingBulb02": "lamp", "horns": "horns", "lights": "lights", "pyramid": "hat",
                           "radar": "dish"},
        },
    ),
    Style(
        "voxel-bot", "robot", "voxel", _DICEBEAR, "DiceBear", _CC0, "https://www.dicebear.com",
        traits={"bodyColor": None, "accentColor": ("#343a40", "#7a4a2d", "#5f6b7a"), "topVariant": None,
                "chestVariant": None, "glowColor": None},
        expressions={
            "smiling": {"eyesVariant": "happy", "mouthVariant": "smile"},
            "angry": {"eyesVariant": "visor", "mouthVariant": "zigzag"},
            "surprised": {"eyesVariant": "round", "mouthVariant": "speaker"},
            "": {"eyesVariant": "square", "mouthVariant": "line"},
        },
        colours={"bodyColor": "", "glowColor": "eyes"},
        features={
            "topVariant": {"antenna": "antenna", "twin": "antenna", "dish": "dish", "fin": "fin", "lightbar": "lights",
                           "siren": "lamp"},
            "chestVariant": {"heart": "heart"},
        },
    ),
    Style(
        "sprouts", "plant", "potted", _DICEBEAR, "DiceBear", _CC0, "https://www.dicebear.com",
        traits={"plantVariant": None, "plantColor": ("#4ade80", "#2dd4bf", "#a3e635", "#10b981"), "bloomColor": None,
                "potVariant": None, "potColor": None},
        chances={"pattern": 0, "cheeks": 0},
        expressions={
            "smiling": {"eyesVariant": "round", "mouthVariant": "smile"},
            "sad": {"eyesVariant": "dots", "mouthVariant": "frown"},
            "winking": {"eyesVariant": "wink", "mouthVariant": "grin"},
            "angry": {"eyesVariant": "angry", "mouthVariant": "wavy"},
            "surprised": {"eyesVariant": "wide", "mouthVariant": "ooh"},
        },
        colours={"potColor": "pot"},
        features={
            "plantVariant": {"cactus": "thorns", "flower": "flower", "tulip": "tulip", "palm": "palm", "grass": "grass",
                             "bush": "bush", "ball": "bush", "buds": "buds", "sprout": "leaf", "seedling": "leaf"},
        },
    ),
    Style(
        "toon-head", "person", "cartoon", _DICEBEAR, "Johan Melin", _CC_BY,
        "https://www.figma.com/community/file/1589627891082866389",
        traits={"skinColor": None, "hairVariant": None, "hairColor": None, "rearHairVariant": None, "beardVariant": None,
                "clothesVariant": None, "clothesColor": None},
        chances={"beard": 35, "rearHair": 45},
        expressions={
            "smiling": {"eyesVariant": "happy", "mouthVariant": "smile", "eyebrowsVariant": "happy"},
            "sad": {"eyesVariant": "humble", "mouthVariant": "sad", "eyebrowsVariant": "sad"},
            "angry": {"eyesVariant": "wide", "mouthVariant": "angry", "eyebrowsVariant": "angry"},
            "surprised": {"eyesVariant": "wide", "mouthVariant": "agape", "eyebrowsVariant": "raised"},
            "winking": {"eyesVariant": "wink", "mouthVariant": "smile", "eyebrowsVariant": "neutral"},
        },
        colours={"hairColor": "hair", "clothesColor": "shirt"},
        features={"beardVariant": dict.fromkeys(("chin", "chinMoustache", "fullBeard", "longBeard", "moustacheTwirl"), "beard")},
    ),
    Style(
        "avataaars", "person", "flat", _DICEBEAR, "Pablo Stanley", _FREE, "https://avataaars.com/",
        traits={"skinColor": None,
                "topVariant": ("bigHair", "bob", "bun", "curly", "dreads", "fro", "hat", "hijab", "longButNotTooLong",
                               "shortFlat", "shortCurly", "shavedSides", "straight01", "turban", "winterHat02",
                               "winterHat1"),
                "hairColor": None, "hatColor": ("#65c9ff", "#5199e4", "#929598", "#a7ffc4", "#ff488e", "#ff5c5c"),
                "clothesVariant": ("blazerAndShirt", "collarAndSweater", "hoodie", "overall", "shirtCrewNeck"),
                "clothesColor": ("#262e33", "#65c9ff", "#5199e4", "#929598", "#a7ffc4", "#ffffb1", "#ff488e", "#ff5c5c"),
                "accessoriesVariant": ("prescription01", "round", "sunglasses"), "accessoriesColor": ("#262e33",),
                "facialHairVariant": ("beardMajestic", "beardMedium", "moustacheMagnum"), "facialHairColor": None},
        chances={"accessories": 30, "facialHair": 25},
        expressions={
            "smiling": {"eyesVariant": "default", "mouthVariant": "smile", "eyebrowsVariant": "default"},
            "sad": {"eyesVariant": "default", "mouthVariant": "sad", "eyebrowsVariant": "sadConcerned"},
            "winking": {"eyesVariant": "wink", "mouthVariant": "twinkle", "eyebrowsVariant": "default"},
            "surprised": {"eyesVariant": "surprised", "mouthVariant": "disbelief", "eyebrowsVariant": "raisedExcited"},
            "happy": {"eyesVariant": "happy", "mouthVariant": "smile", "eyebrowsVariant": "raisedExcited"},
        },
        colours={"clothesColor": "shirt"},
        features={
            "topVariant": {"hat": "hat", "winterHat02": "hat", "winterHat1": "hat", "hijab": "scarf",
                           "turban": "turban"},
            "accessoriesVariant": {"prescription01": "glasses", "round": "glasses", "sunglasses": "sunglasses"},
            "facialHairVariant": {"beardMajestic": "beard", "beardMedium": "beard", "moustacheMagnum": "moustache"},
        },
    ),
    Style(
        "personas", "person", "soft", _DICEBEAR, "Draftbit", _CC_BY, "https://personas.draftbit.com/",
        traits={"skinColor": None, "hairVariant": None, "hairColor": None, "noseVariant": None, "clothesVariant": None,
                "clothingColor": None, "facialHairVariant": None, "facialHairColor": None},
        chances={"facialHair": 15},
        expressions={
            "smiling": {"eyesVariant": "open", "mouthVariant": "smile"},
            "sad": {"eyesVariant": "open", "mouthVariant": "frown"},
            "winking": {"eyesVariant": "wink", "mouthVariant": "smirk"},
            "happy": {"eyesVariant": "happy", "mouthVariant": "bigSmile"},
        },
        colours={"hairColor": "hair", "clothingColor": "shirt"},
        held_out=True,
    ),
)  # fmt: skip

BY_NAME = {style.name: style for style in STYLES}
KINDS = tuple(dict.fromkeys(style.kind for style in STYLES))
EXPRESSIONS = tuple(dict.fromkeys(e for style in STYLES for e in style.expressions))

#: Coats of the painted cats: their colour as a word.
_COATS = ("brown", "green", "black", "gray", "red", "yellow", "pink", "brown", "blue", "yellow", "orange", "gray",
          "brown", "white", "orange")  # fmt: skip


def colour_word(value: str) -> str:
    """The word for a colour given as #rrggbb."""
    r, g, b = (int(value[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, saturation, light = colorsys.rgb_to_hsv(r, g, b)
    if light < 0.3:
        return "black"
    if saturation < 0.16:
        return "white" if light > 0.85 else "gray"
    degrees = hue * 360
    if degrees < 18 or degrees >= 335:
        return "brown" if light < 0.65 else "pink" if saturation < 0.5 else "red"
    if degrees < 45:
        return "brown" if light < 0.75 else "orange"
    for limit, word in ((68, "yellow"), (165, "green"), (250, "blue"), (290, "purple")):
        if degrees < limit:
            return word
    return "pink"


def spoken(style: Style, traits: Traits) -> tuple[str | None, dict[str, str], list[str]]:
    """What captions can say of an individual: the colour of the whole, colours of parts by part, and feature words."""
    whole, parts = None, {}
    for trait, part in style.colours.items():
        if trait not in traits:
            continue
        word = _COATS[int(traits[trait])] if style.name == "revoy" else colour_word(traits[trait])
        if part:
            parts[part] = word
        else:
            whole = word
    words = [table[traits[trait]] for trait, table in style.features.items() if traits.get(trait) in table]
    return whole, parts, words


def feature_words() -> list[str]:
    """All words that `spoken` can give beside colours."""
    words = {word for style in STYLES for table in style.features.values() for word in table.values()}
    return sorted(words | {part for style in STYLES for part in style.colours.values() if part})
