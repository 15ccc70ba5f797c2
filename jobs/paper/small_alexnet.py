"""AlexNet for images of 48x48 pixels: a user's own network, which its job names as `small_alexnet:alexnet_bn_48`."""

from __future__ import annotations

from torch import nn

from dcq_ray.networks import alexnet_bn


def alexnet_bn_48(num_classes: int = 10) -> nn.Sequential:
    """AlexNet with BatchNorm for [B, 3, 48, 48] -> [B, num_classes].

    Its convolutions and poolings are `dcq_ray:alexnet_bn`'s. 48 pixels are the fewest that reach the last pooling; what is
    left there is one position instead of 6x6, so the first fully connected layer has 256 inputs.
    """
    network = alexnet_bn(num_classes)
    network.fc0 = nn.Linear(256, 4096)
    return network
