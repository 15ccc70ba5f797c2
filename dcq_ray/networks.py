"""The networks of the DCQ and DoReFa-Net papers that torchvision lacks.

Owns their architectures and their parameters' names, which are those of published weights. Every activation and pooling
is a module with a name of its own, to cut at; all networks are traceable by torch.fx. Knows nothing of weights files,
images or quantizers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

# -- plain networks: convolutions, then fully connected layers ---------------------------------------------------------


def lenet(in_channels: int = 1, num_classes: int = 10, image_size: int = 28, final_relu: bool = True) -> nn.Sequential:
    """LeNet as the DCQ authors trained it: [B, in_channels, image_size, image_size] -> [B, num_classes].

    A ReLU follows every layer, even the last; trained from scratch that one loses classes whose outputs die, so
    `final_relu=False` leaves it out. Raises ValueError: a count below 1, `image_size` below 16.
    """
    _check_counts(in_channels=in_channels, num_classes=num_classes)
    _check_counts(at_least=16, image_size=image_size)
    final_size = ((image_size - 4) // 2 - 4) // 2
    return _chain(
        ("conv1", nn.Conv2d(in_channels, 20, 5)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(20, 50, 5)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(50 * final_size**2, 500)),
        ("relu3", nn.ReLU()),
        ("fc2", nn.Linear(500, num_classes)),
        *([("relu4", nn.ReLU())] if final_relu else []),
    )


def simplenet(num_classes: int = 10) -> nn.Sequential:
    """LeNet-5 for colour images, as the DCQ authors trained it: [B, 3, 32, 32] -> [B, num_classes].

    Raises ValueError: `num_classes` below 1.
    """
    _check_counts(num_classes=num_classes)
    return _chain(
        ("conv1", nn.Conv2d(3, 6, 5)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(6, 16, 5)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(16 * 5 * 5, 120)),
        ("relu3", nn.ReLU()),
        ("fc2", nn.Linear(120, 84)),
        ("relu4", nn.ReLU()),
        ("fc3", nn.Linear(84, num_classes)),
    )


def svhn(num_classes: int = 10, image_size: int = 40) -> nn.Sequential:
    """The house-number network of DoReFa-Net: [B, 3, image_size, image_size] -> [B, num_classes].

    Seven convolutions and one fully connected layer (Zhou et al. 2016, arXiv 1606.06160, section 3.1, for 40x40 images;
    layers as in its authors' code, with ReLU for their activation clipped to [0, 1]). The last convolution covers all
    that is left of the image, 5x5 of 40x40, so other sizes work too. Raises ValueError: `num_classes` below 1,
    `image_size` below 21.
    """
    _check_counts(num_classes=num_classes)
    _check_counts(at_least=21, image_size=image_size)
    pooled_size = -(-(image_size - 4) // 4)
    return _initialized(
        _chain(
            ("conv0", nn.Conv2d(3, 48, 5)),
            ("pool0", nn.MaxPool2d(2, ceil_mode=True)),
            ("relu0", nn.ReLU()),
            *_conv_bn_relu(1, 48, 64, kernel_size=3, padding=1),
            *_conv_bn_relu(2, 64, 64, kernel_size=3, padding=1, pool=nn.MaxPool2d(2, ceil_mode=True)),
            *_conv_bn_relu(3, 64, 128, kernel_size=3),
            *_conv_bn_relu(4, 128, 128, kernel_size=3, padding=1),
            *_conv_bn_relu(5, 128, 128, kernel_size=3),
            ("dropout", nn.Dropout(0.5)),
            *_conv_bn_relu(6, 128, 512, kernel_size=pooled_size - 4),
            ("flatten", nn.Flatten()),
            ("fc", nn.Linear(512, num_classes)),
        )
    )


def alexnet_bn(num_classes: int = 1000) -> nn.Sequential:
    """AlexNet with BatchNorm, as DoReFa-Net quantizes it: [B, 3, 224, 224] -> [B, num_classes].

    Layers as in the code of Zhou et al. 2016 (arXiv 1606.06160), with ReLU for their activation clipped to [0, 1].
    Raises ValueError: `num_classes` below 1.
    """
    _check_counts(num_classes=num_classes)
    return _initialized(
        _chain(
            ("conv0", nn.Conv2d(3, 96, 12, stride=4)),
            ("relu0", nn.ReLU()),
            *_conv_bn_relu(1, 96, 256, kernel_size=5, padding=2, groups=2, pool=nn.MaxPool2d(3, 2, ceil_mode=True)),
            *_conv_bn_relu(2, 256, 384, kernel_size=3, padding=1, pool=nn.MaxPool2d(3, 2, padding=1)),
            *_conv_bn_relu(3, 384, 384, kernel_size=3, padding=1, groups=2),
            *_conv_bn_relu(4, 384, 256, kernel_size=3, padding=1, groups=2, pool=nn.MaxPool2d(3, 2)),
            ("flatten", nn.Flatten()),
            ("fc0", nn.Linear(256 * 6 * 6, 4096)),
            ("bnfc0", nn.BatchNorm1d(4096, eps=1e-4)),
            ("relufc0", nn.ReLU()),
            ("fc1", nn.Linear(4096, 4096, bias=False)),
            ("bnfc1", nn.BatchNorm1d(4096, eps=1e-4)),
            ("relufc1", nn.ReLU()),
            ("fct", nn.Linear(4096, num_classes)),
        )
    )


def vgg11_cifar(num_classes: int = 10) -> nn.Sequential:
    """VGG-11 with BatchNorm and one fully connected layer: [B, 3, 32, 32] -> [B, num_classes].

    Configuration A of Simonyan and Zisserman 2014 (arXiv 1409.1556, table 1). Raises ValueError: `num_classes` below 1.
    """
    _check_counts(num_classes=num_classes)
    widths = (64, 128, 256, 256, 512, 512, 512, 512)
    pooled_after = {1, 2, 4, 6, 8}
    layers: list[tuple[str, nn.Module]] = []
    for index, (in_width, width) in enumerate(zip((3, *widths[:-1]), widths, strict=True), start=1):
        layers += [
            (f"conv{index}", nn.Conv2d(in_width, width, 3, padding=1, bias=False)),
            (f"bn{index}", nn.BatchNorm2d(width)),
            (f"relu{index}", nn.ReLU()),
        ]
        if index in pooled_after:
            layers.append((f"pool{index}", nn.MaxPool2d(2)))
    return _initialized(_chain(*layers, ("flatten", nn.Flatten()), ("fc", nn.Linear(512, num_classes))))


# -- residual networks -------------------------------------------------------------------------------------------------


class PaddedShortcut(nn.Module):
    """The shortcut without parameters (He et al. 2015, arXiv 1512.03385, option A): [B, C, H, W] -> [B, D, H/2, W/2].

    Every second row and column, with as many channels of zeros before the C as after them.
    """

    def __init__(self, num_added_channels: int) -> None:
        super().__init__()
        self.num_added_channels = num_added_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.num_added_channels // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.num_added_channels - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut round them: [B, C, H, W] -> [B, width, H/stride, W/stride].

    The shortcut is the identity where `downsample` is None.
    """

    def __init__(self, in_width: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu2(residual + shortcut)
        return result


def resnet20(num_classes: int = 10) -> nn.Sequential:
    """ResNet-20 (He et al. 2015, section 4.2) with parameter-free shortcuts: [B, 3, 32, 32] -> [B, num_classes].

    Raises ValueError: `num_classes` below 1.
    """
    return _cifar_resnet(3, num_classes)


def resnet32(num_classes: int = 10) -> nn.Sequential:
    """ResNet-32 (He et al. 2015, section 4.2) with parameter-free shortcuts: [B, 3, 32, 32] -> [B, num_classes].

    Raises ValueError: `num_classes` below 1.
    """
    return _cifar_resnet(5, num_classes)


def resnet44(num_classes: int = 10) -> nn.Sequential:
    """ResNet-44 (He et al. 2015, section 4.2) with parameter-free shortcuts: [B, 3, 32, 32] -> [B, num_classes].

    Raises ValueError: `num_classes` below 1.
    """
    return _cifar_resnet(7, num_classes)


def resnet20_dcq(num_classes: int = 10) -> nn.Sequential:
    """ResNet-20 as the DCQ authors trained it, with 1x1 convolutions as shortcuts: [B, 3, 32, 32] -> [B, num_classes].

    Raises ValueError: `num_classes` below 1.
    """
    _check_counts(num_classes=num_classes)
    return _resnet((16, 32, 64), 3, _projection, head="fc", num_classes=num_classes)


def resnet18_cifar(num_classes: int = 10) -> nn.Sequential:
    """ResNet-18 for small images, a 3x3 stem and no first pooling: [B, 3, 32, 32] -> [B, num_classes].

    Parameter names and shapes are those of torchvision's resnet18, save the stem's and the head's shape. Raises
    ValueError: `num_classes` below 1.
    """
    _check_counts(num_classes=num_classes)
    return _resnet((64, 128, 256, 512), 2, _projection, head="fc", num_classes=num_classes)


def _cifar_resnet(blocks_per_layer: int, num_classes: int) -> nn.Sequential:
    _check_counts(num_classes=num_classes)
    return _resnet((16, 32, 64), blocks_per_layer, _padding, head="linear", num_classes=num_classes)


def _padding(in_width: int, width: int) -> nn.Module:
    return PaddedShortcut(width - in_width)


def _projection(in_width: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_width, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))


def _resnet(
    widths: Sequence[int],
    blocks_per_layer: int,
    shortcut: Callable[[int, int], nn.Module],
    *,
    head: str,
    num_classes: int,
) -> nn.Sequential:
    """A residual network whose layers after the first halve the image; `shortcut` makes the shortcut where one does."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, widths[0], 3, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(widths[0])),
        ("relu", nn.ReLU()),
    ]
    in_width = widths[0]
    for index, width in enumerate(widths, start=1):
        blocks = []
        for _ in range(blocks_per_layer):
            halves = in_width != width
            downsample = shortcut(in_width, width) if halves else None
            blocks.append(BasicBlock(in_width, width, 2 if halves else 1, downsample))
            in_width = width
        layers.append((f"layer{index}", nn.Sequential(*blocks)))
    layers += [
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        (head, nn.Linear(in_width, num_classes)),
    ]
    return _initialized(_chain(*layers))


# -- what they share ---------------------------------------------------------------------------------------------------


def _chain(*layers: tuple[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _conv_bn_relu(
    index: int,
    in_width: int,
    width: int,
    *,
    kernel_size: int,
    padding: int = 0,
    groups: int = 1,
    pool: nn.Module | None = None,
) -> list[tuple[str, nn.Module]]:
    """A layer of DoReFa-Net's: convolution, BatchNorm, pooling where there is one, activation."""
    conv = nn.Conv2d(in_width, width, kernel_size, padding=padding, groups=groups, bias=False)
    layers: list[tuple[str, nn.Module]] = [(f"conv{index}", conv), (f"bn{index}", nn.BatchNorm2d(width, eps=1e-4))]
    if pool is not None:
        layers.append((f"pool{index}", pool))
    return [*layers, (f"relu{index}", nn.ReLU())]


def _initialized(network: nn.Sequential) -> nn.Sequential:
    """He initialization of the convolutions (He et al. 2015, arXiv 1502.01852), for networks trained from scratch."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _check_counts(*, at_least: int = 1, **counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {at_least}")


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    network.__name__: network
    for network in (
        lenet,
        simplenet,
        svhn,
        alexnet_bn,
        vgg11_cifar,
        resnet20,
        resnet32,
        resnet44,
        resnet20_dcq,
        resnet18_cifar,
    )
}
"""Every network of this module, by its name."""
