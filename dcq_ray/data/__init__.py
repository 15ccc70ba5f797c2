"""From a job's `data` to images in a fixed, indexed order: the train, held-out and test parts, and their batches.

    choice       which images, from labels and counts alone
    pixels       images as arrays: decode, resize, grey
    source       what any data set offers;  builtin, npz, imagefolder, custom: the kinds there are
    preprocess   stored pixels to the network's input, a batch at a time
    splits       the three parts
    standin      noise in the place of images that are not here
    batches      in order, or shuffled and augmented

Owns all that happens between a data set's files and the teacher's input. Knows nothing of networks, shards or Ray.
"""

from dcq_ray.data.batches import augmented_batches, epoch_order, ordered_batches, view_images
from dcq_ray.data.splits import Part, Splits, load_splits
from dcq_ray.data.standin import stand_in_splits

__all__ = [
    "Part",
    "Splits",
    "augmented_batches",
    "epoch_order",
    "load_splits",
    "ordered_batches",
    "stand_in_splits",
    "view_images",
]
