"""Which mask belongs to which image, by their file names alone: equal names, else equal but for words all names share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

# an observer's mark with its number, a number, or a word; of a name in lower case
_WORD = re.compile(
    r"(?<=[\W_])(?:manual|observer|expert|annotator|ho|gt)[1-9](?!\d)|(?:1st|2nd|3rd)[a-z]*|\d+|[^\W\d_]+"
)
_OF_MASKS = re.compile(r"mask|gt|truth|label|annot|manual|vessel|seg|observer|expert|binary|target|ah$|[123](st|nd|rd)")
_KEPT = re.compile(r"\d+|l|r|od|os|ou|left|right")  # a number, or which eye it is: never ignored
_MOST = 4  # words that are ignored at one end


def match_names(images: Sequence[str], masks: Sequence[str]) -> dict[str, str]:
    """Name of an image -> name of its mask; names without endings. What is left over, or would match twice, is not in it.

    Where any two are equal, only equal ones match. Else words at the start or end that all names of one list share are
    ignored, as few as give the most matches: 21_training and 21_manual1, Image_01L and Image_01L_1stHO, img1 and mask1.
    Numbers and sides (L, OD, left) never are; words of both lists only where those of the masks alone mean a mask.
    """
    if equal := set(images) & set(masks):
        return {name: name for name in images if name in equal}
    best: dict[str, str] = {}
    words = [{name: tuple(_WORD.findall(name.lower())) for name in names} for names in (images, masks)]
    for cuts in sorted(product(*map(_cuts, words)), key=lambda cuts: sum(map(sum, cuts))):
        lost, keys = [], []
        for names, (start, end) in zip(words, cuts, strict=True):
            key: dict[tuple[str, ...], list[str]] = {}
            for name, all_words in names.items():
                key.setdefault(all_words[start : len(all_words) - end], []).append(name)
            keys.append(key)
            lost.append({*all_words[:start], *all_words[len(all_words) - end :]} if names else set())
        if all(lost) and not all(map(_OF_MASKS.match, lost[1] - lost[0])):
            continue
        ours, theirs = keys
        found = {ours[k][0]: theirs[k][0] for k in ours if k and len(ours[k]) == len(theirs.get(k, "")) == 1}
        best = max(best, found, key=len)
    return best


def _cuts(names: dict[str, tuple[str, ...]]) -> list[tuple[int, int]]:
    """How many words may be ignored at the start and at the end of all `names`: every choice."""
    ends = []
    for words in (names.values(), [words[::-1] for words in names.values()]):
        shared = [len({*column}) == 1 and not _KEPT.fullmatch(column[0]) for column in zip(*words, strict=False)]
        ends.append(range([*shared[:_MOST], False].index(False) + 1))
    return list(product(ends[0], ends[1]))
