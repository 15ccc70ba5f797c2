"""The rivals: what a user would do instead, from the same teacher, data, quantizer and budget.

    dorefa       the whole network on labels (DoReFa-Net, Zhou et al. 2016, arXiv 1606.06160)
    distill      the whole network on labels and the teacher's logits (Hinton et al. 2015, arXiv 1503.02531)
    hints        its first half on the teacher's activations, then distillation of the whole (FitNets, arXiv 1412.6550)
    sequential   section by section, each on what the trained ones before it give; nothing in parallel

Each gets the best of three learning rates, and of its epochs, by held-out images; the test part is touched once.
"""

from dcq_ray.baseline.methods import METHODS
from dcq_ray.baseline.rivals import RATE_FACTORS, train_rival

__all__ = ["METHODS", "RATE_FACTORS", "train_rival"]
