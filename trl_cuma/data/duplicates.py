# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Groups of texts that are nearly the same, so that a split never puts one of a group in training and another in test.

Two texts are alike where the Jaccard similarity of their sets of character 5-grams, shared / (shared + unshared), is
at least a threshold. A group is everything that a chain of alike texts connects (single linkage), so no text outside a
group is alike to one inside it. All pairs count, none is sampled: a pair can only be alike where it shares one of its
rarest 5-grams (prefix filtering, Bayardo et al. 2007, with the shorter index prefix of Xiao et al. 2008).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

THRESHOLD = 0.5
"""
Chosen on real surveys. Questions of one battery ("how much do you trust people in this group: your family?", "...:
your neighborhood?") share their wording and differ in an item, and are alike above it. Questions that share only their
scale ("On a scale of 1 to 10, ...") are not.
"""

GRAM = 5


def near_duplicate_groups(texts: Sequence[str], ids: Sequence[str], threshold: float = THRESHOLD) -> list[str]:
    """
    The group of each text: the smallest id, in text order, of all texts of its group.

    Case, punctuation, white space and Unicode's compatibility forms make no difference. A text shorter than 5
    characters is alike only to the same text. The groups don't depend on the texts' order.

    Survey questions go in whole, with the words of their scale: without them, questions that differ only in the scale
    become one group, and short batteries ("how justifiable is divorce?") fall apart.

    Args:
        texts (`Sequence[str]`):
            Texts.
        ids (`Sequence[str]`):
            An id of each text, all different.
        threshold (`float`, *optional*, defaults to `0.5`):
            Smallest similarity of texts that are alike, above 0 and at most 1.

    Returns:
        `list[str]`: A group id per text.

    Raises:
        `ValueError`: If `threshold` is out of range, the lengths differ, an id comes twice, or a text isn't a `str`.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` is a similarity above 0 and at most 1, got {threshold!r}.")
    if len(texts) != len(ids):
        raise ValueError(f"`texts` and `ids` must be as long as each other, got {len(texts)} and {len(ids)}.")
    if len(set(ids)) != len(ids):
        raise ValueError(f"`ids` must be all different, got {len(ids) - len(set(ids))} that came before.")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{position}] must be a `str`, got {type(text).__name__}: drop it before.")

    plain = _plain(texts)
    number = {text: n for n, text in enumerate(dict.fromkeys(plain))}  # the same text is compared once
    group = _link(list(number), threshold)
    of_text = [int(group[number[text]]) for text in plain]
    smallest: dict[int, str] = {}
    for key, text_id in zip(of_text, ids, strict=True):
        smallest[key] = min(smallest.get(key, text_id), text_id)
    return [smallest[key] for key in of_text]


def _plain(texts: Sequence[str]) -> list[str]:
    """The texts casefolded, in NFKC, every run of punctuation, white space and control characters one space."""
    folded = [unicodedata.normalize("NFKC", text).casefold() for text in texts]
    # By category, not by a regular expression's \w, which takes the vowel signs of Hindi for punctuation.
    space = {ord(c): " " for c in set().union(*folded) if unicodedata.category(c)[0] in "PZC"}
    return [" ".join(text.translate(space).split()) for text in folded]


def _link(texts: list[str], threshold: float) -> np.ndarray:
    """A group number per text, `(len(texts),)`; the texts are all different."""
    group = np.arange(len(texts))
    owner, gram = _grams(texts)
    if not len(owner):
        return group

    # Texts from the one with the fewest 5-grams on; in each, the rarest 5-gram first.
    size = np.bincount(owner, minlength=len(texts))
    texts_by_size = np.argsort(size, kind="stable")
    size = size[texts_by_size]
    count = np.bincount(gram)
    place, rarity = np.empty(len(texts), dtype=np.int64), np.empty(len(count), dtype=np.int64)
    place[texts_by_size] = np.arange(len(texts))
    rarity[np.argsort(count, kind="stable")] = np.arange(len(count))
    owner, gram = np.divmod(np.sort(place[owner] * len(count) + rarity[gram]), len(count))
    start = np.cumsum(size) - size

    # x is alike to y, no smaller, only if they share at least t |y| and 2 t / (1 + t) |x| 5-grams. They can't if none
    # of the |y| - t |y| + 1 rarest of y is among the |x| - 2 t / (1 + t) |x| + 1 rarest of x. The tiny number: in
    # floats 0.7 * 10 is above 7, and would lose pairs exactly at the threshold.
    looked_up = size - np.ceil(threshold * size - 1e-9).astype(np.int64) + 1
    listed = size - np.ceil(2 * threshold / (1 + threshold) * size - 1e-9).astype(np.int64) + 1
    smallest_alike = np.searchsorted(size, threshold * size - 1e-9)

    in_list = np.arange(len(gram)) - start[owner] < listed[owner]
    by_gram = np.argsort(gram[in_list], kind="stable")
    holders = owner[in_list][by_gram]  # the texts that list a 5-gram, 5-gram by 5-gram, smaller texts first
    held = np.bincount(gram[in_list], minlength=len(count))
    first = np.cumsum(held) - held
    so_far = np.zeros(len(count), dtype=np.int64)  # how many of a 5-gram's holders come before the text at hand

    present = np.zeros(len(count), dtype=bool)
    for text in range(np.searchsorted(size, 1), len(texts)):
        mine = gram[start[text] : start[text] + size[text]]
        rare = mine[: looked_up[text]]
        others = holders[_ranges(first[rare], so_far[rare])]
        others = np.unique(others[(others >= smallest_alike[text]) & (group[others] != group[text])])
        if len(others):
            present[mine] = True
            theirs = present[gram[_ranges(start[others], size[others])]]
            present[mine] = False
            shared = np.add.reduceat(theirs, np.cumsum(size[others]) - size[others], dtype=np.int64)
            alike = others[shared / (size[others] + size[text] - shared) >= threshold]
            for old in np.unique(group[alike]):
                group[group == old] = group[text]
        so_far[mine[: listed[text]]] += 1
    return group[place]


def _grams(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """
    The set of 5-grams of each text of at least 5 characters, as pairs (number of the text, number of the 5-gram), one
    array each.
    """
    length = np.array([len(text) for text in texts], dtype=np.int64)
    # surrogatepass: JSON can hold half a surrogate pair, which UTF-32 refuses otherwise
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)
    owner = np.repeat(np.arange(len(texts)), length)
    if len(points) < GRAM:
        return owner[:0], points[:0]
    # Numbers for pairs of characters, then for pairs of pairs, then for these and one more: exact, without hashing.
    two = _number(points[:-1], points[1:])
    four = _number(two[:-2], two[2:])
    five = _number(four[:-1], points[4:])
    inside = owner[: 1 - GRAM] == owner[GRAM - 1 :]  # 5-grams that don't reach into the next text
    owner, five = owner[: 1 - GRAM][inside], five[inside]
    if not len(five):
        return owner, five
    num_grams = five.max() + 1
    return np.divmod(np.unique(owner * num_grams + five), num_grams)


def _number(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A number for each pair of entries, the same for the same pair."""
    return np.unique(left * (right.max() + 1) + right, return_inverse=True)[1]


def _ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`start[i], start[i] + 1, ...`, `length[i]` of them, one `i` after the other."""
    return np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())
