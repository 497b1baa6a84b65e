"""Which mask belongs to which image, by their file names alone: equal names, else equal but for words all names share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

# an observer's mark with its number, a number, or a word; of a name in lower case
_WORD = re.compile(
    r"(?<=[\W_])(?:manual|observer|expert|annotator|ho|gt)[1-9](?!\d)|(?:1st|2nd|3rd)[a-z]*|\d+|[^\W\d_]+"
)
_OF_MASKS = re.compile(r"mask|gt|truth|label|annot|manual|vessel|seg|observer|expert|binary|target|ah|[123](st|nd|rd)")
_SIDES = {"l", "r", "od", "os", "ou", "left", "right"}  # which eye it is: never ignored, as numbers are not
_MOST = 4  # words that are ignored at one end


def match_names(images: Sequence[str], masks: Sequence[str]) -> dict[str, str]:
    """Name of an image -> name of its mask; without endings, each list without repetitions.

    Where any two are equal, only equal ones match. Else words at the start or end that all names of one list share are
    ignored, as few as give the most matches: 21_training and 21_manual1, Image_01L and Image_01L_1stHO, img1 and mask1.
    Numbers and sides (L, OD, left) are never ignored. Both lists lose words only where those of the masks say that these
    are masks. What is left over, or would match twice, is missing in the result.
    """
    if equal := set(images) & set(masks):
        return {name: name for name in images if name in equal}
    best: dict[str, str] = {}
    sides = [{name: tuple(_WORD.findall(name.lower())) for name in names} for names in (images, masks)]
    cuts = sorted(product(*map(_cuts, sides)), key=lambda pair: sum(map(sum, pair)))
    for ours, theirs in cuts:
        if any(ours) and any(theirs):
            words = next(iter(sides[1].values()))
            if not all(map(_OF_MASKS.match, (*words[: theirs[0]], *words[len(words) - theirs[1] :]))):
                continue
        keys, others = (_by_key(names, cut) for names, cut in zip(sides, (ours, theirs), strict=True))
        found = {keys[key][0]: others[key][0] for key in keys if len(keys[key]) == len(others.get(key, "")) == 1}
        if len(found) > len(best):
            best = found
    return best


def _cuts(names: dict[str, tuple[str, ...]]) -> list[tuple[int, int]]:
    """How many words may be ignored at the start and at the end of all `names`: every choice."""
    ends = []
    for lists in (names.values(), [words[::-1] for words in names.values()]):
        columns = [set(column) for column in zip(*lists, strict=False)][:_MOST]
        may = [len(words) == 1 and not any(w.isdecimal() or w in _SIDES for w in words) for words in columns]
        ends.append(range((may + [False]).index(False) + 1))
    return list(product(*ends))


def _by_key(names: dict[str, tuple[str, ...]], cut: tuple[int, int]) -> dict[tuple[str, ...], list[str]]:
    """Words that are left -> names; what has none left is left out."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, words in names.items():
        if key := words[cut[0] : len(words) - cut[1]]:
            found.setdefault(key, []).append(name)
    return found
