"""Which images: fixed, seeded, class-balanced choices, as arrays of indices.

Owns the rule by which images are chosen and ordered. Speaks of labels and counts alone: knows no images and no job.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def balanced_choice(
    labels: Indices | None, num_images: int, total: int, generator: np.random.Generator, *, leave_half: bool = False
) -> Indices:
    """`total` of the `num_images` indices, as evenly over the classes as there are images.

    Counts of classes that have images left differ by at most 1, and every prefix of the order has nearly the
    proportions of the whole. A smaller total, drawn by a generator in the same state, chooses a subset. With
    `leave_half`, at least half of each class is left where the total allows, so that a rare class does not go to one
    part alone. `labels` [N] None: any images, in any order. `total` must not exceed `num_images`.
    """
    shuffled = generator.permutation(num_images)
    if labels is None:
        return shuffled[:total]
    _, classes = np.unique(labels, return_inverse=True)
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    available = np.bincount(classes)
    favourites = generator.permutation(len(available))
    at_most = available // 2 if leave_half and (available // 2).sum() >= total else available
    counts = balanced_counts(at_most, total, favourites)

    first_of_class = np.cumsum(available) - available
    rank_in_class = np.arange(num_images) - first_of_class[classes[by_class]]
    is_chosen = rank_in_class < counts[classes[by_class]]
    chosen, rank = by_class[is_chosen], rank_in_class[is_chosen]
    # The k-th of a class's n images goes somewhere in the k-th n-th of the order: classes are interleaved.
    place = (rank + generator.random(total)) / counts[classes[chosen]]
    return chosen[np.argsort(place, kind="stable")]


def balanced_counts(at_most: Indices, total: int, favourites: Indices) -> Indices:
    """How many of each class make `total`, as evenly as `at_most` [K] allows.

    What does not divide evenly goes to the classes that come first in `favourites`, a permutation of the K classes.
    `total` must not exceed the sum of `at_most`.
    """
    counts = np.zeros_like(at_most)
    while (missing := total - int(counts.sum())) > 0:
        open_classes = favourites[counts[favourites] < at_most[favourites]]
        share, remainder = divmod(missing, len(open_classes))
        if share == 0:
            counts[open_classes[:remainder]] += 1
        else:
            counts[open_classes] = np.minimum(counts[open_classes] + share, at_most[open_classes])
    return counts


def generator_of(*key: int) -> np.random.Generator:
    """The generator that belongs to some non-negative numbers, such as a seed and the purpose of the choice."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
