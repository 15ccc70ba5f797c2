"""The networks: shapes, names of parameters, sizes computed by hand, and the accuracy of published weights."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dcq_ray.data import load_splits, ordered_batches
from dcq_ray.networks import NETWORKS, PaddedShortcut, alexnet_bn, lenet, resnet18_cifar, resnet20, svhn
from dcq_ray.spec import DataSpec, NormalizeSpec

INPUT_SHAPES = {"lenet": (1, 28, 28), "svhn": (3, 40, 40), "alexnet_bn": (3, 224, 224)}
NUM_PARAMETERS = {
    "lenet": 20 * 25 + 20 + 50 * 20 * 25 + 50 + 800 * 500 + 500 + 500 * 10 + 10,
    "simplenet": 6 * 75 + 6 + 16 * 150 + 16 + 400 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10,
    "svhn": 3648 + 27648 + 36864 + 73728 + 2 * 147456 + 1638400 + 2048 + 5130,
    "alexnet_bn": 41568 + 307200 + 884736 + 663552 + 442368 + 2560 + 37752832 + 16384 + 16777216 + 4097000,
    "vgg11_cifar": 9 * 1024192 + 2 * 2752 + 5130,
    "resnet20": 269722,  # the numbers that their authors publish
    "resnet32": 464154,
    "resnet44": 658586,
    "resnet20_dcq": 269722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64,
    "resnet18_cifar": 11173962,
}
HALF = NormalizeSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
IMAGENET = NormalizeSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TEACHERS = {
    "lenet_mnist_dcq": "lenet",
    "simplenet_cifar10_dcq": "simplenet",
    "resnet20_cifar10_dcq": "resnet20_dcq",
    "resnet20_cifar10_jpeg": "resnet20",
    "resnet20_cifar10_akamaster": "resnet20",
    "resnet32_cifar10_akamaster": "resnet32",
    "resnet44_cifar10_akamaster": "resnet44",
}


def _example(name: str) -> torch.Tensor:
    return torch.randn(2, *INPUT_SHAPES.get(name, (3, 32, 32)), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_its_papers_size_and_is_traced_to_the_same_function(name: str) -> None:
    network = NETWORKS[name]().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == NUM_PARAMETERS[name]
    traced = torch.fx.symbolic_trace(network)
    with torch.no_grad():
        output = network(_example(name))
        assert torch.equal(traced(_example(name)), output)
    assert output.shape == (2, 1000 if name == "alexnet_bn" else 10)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_module_is_called_once_so_that_its_name_is_a_place(name: str) -> None:
    network = NETWORKS[name](num_classes=3)
    called = [node.target for node in torch.fx.symbolic_trace(network).graph.nodes if node.op == "call_module"]
    leaves = [name for name, module in network.named_modules() if not list(module.children())]
    assert len(called) == len(set(called))
    assert set(called) == {leaf for leaf in leaves if not isinstance(network.get_submodule(leaf), PaddedShortcut)}
    functions = [node for node in torch.fx.symbolic_trace(network).graph.nodes if node.op == "call_function"]
    assert not any("relu" in str(node.target) or "pool" in str(node.target) for node in functions)


SIZES = {
    # TensorFlow's `SAME` pooling rounds up: 54 -> 27 -> 14, and the last one, `VALID`, down: 14 -> 6.
    "alexnet_bn": {
        "conv0": 54,
        "conv1": 54,
        "pool1": 27,
        "conv2": 27,
        "pool2": 14,
        "conv3": 14,
        "conv4": 14,
        "pool4": 6,
    },
    "svhn": {"conv0": 36, "pool0": 18, "conv1": 18, "pool2": 9, "conv3": 7, "conv4": 7, "conv5": 5, "conv6": 1},
    "vgg11_cifar": {"conv1": 32, "pool1": 16, "pool2": 8, "pool4": 4, "pool6": 2, "pool8": 1},
    "lenet": {"conv1": 24, "pool1": 12, "conv2": 8, "pool2": 4},
    "simplenet": {"conv1": 28, "pool1": 14, "conv2": 10, "pool2": 5},
    "resnet20": {"conv1": 32, "layer1": 32, "layer2": 16, "layer3": 8},
    "resnet20_dcq": {"conv1": 32, "layer1": 32, "layer2": 16, "layer3": 8},
    "resnet18_cifar": {"conv1": 32, "layer1": 32, "layer2": 16, "layer3": 8, "layer4": 4},
}


@pytest.mark.parametrize("name", SIZES)
def test_layers_put_out_images_of_their_sources_sizes(name: str) -> None:
    network, seen = NETWORKS[name]().eval(), {}
    for layer in SIZES[name]:
        network.get_submodule(layer).register_forward_hook(
            lambda _, __, output, layer=layer: seen.update({layer: tuple(output.shape[2:])})
        )
    with torch.no_grad():
        network(_example(name))
    assert seen == {layer: (size, size) for layer, size in SIZES[name].items()}


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("alexnet_bn", ["conv0", "relu0", "conv1", "bn1", "pool1", "relu1"]),
        ("vgg11_cifar", ["conv1", "bn1", "relu1", "pool1", "conv2", "bn2", "relu2", "pool2"]),
        ("lenet", ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2"]),
    ],
)
def test_the_authors_boundaries_of_dcq_are_at_their_places(name: str, places: list[str]) -> None:
    # AlexNet's after entry 5, VGG-11's after entry 7, LeNet's after the second pooling.
    assert [layer for layer, _ in NETWORKS[name]().named_children()][: len(places)] == places


def test_lenet_takes_other_sizes_and_channels_and_never_falls_below_zero() -> None:
    output = lenet(in_channels=3, num_classes=7, image_size=16)(torch.randn(4, 3, 16, 16))
    assert output.shape == (4, 7)
    assert (output >= 0).all()


def test_lenet_without_its_last_relu_keeps_its_parameters_and_loses_no_sign() -> None:
    with_relu, without = lenet().eval(), lenet(final_relu=False).eval()
    without.load_state_dict(with_relu.state_dict())
    with torch.no_grad():
        assert (without(_example("lenet")) < 0).any()
        assert torch.equal(without(_example("lenet")).relu(), with_relu(_example("lenet")))


@pytest.mark.parametrize("image_size", [21, 28, 32, 40, 41])
def test_svhn_takes_other_sizes(image_size: int) -> None:
    assert svhn(image_size=image_size).eval()(torch.randn(1, 3, image_size, image_size)).shape == (1, 10)


def test_the_last_convolution_of_svhn_is_the_papers_for_40x40_images() -> None:
    assert svhn().conv6.kernel_size == (5, 5)


def test_a_padded_shortcut_takes_every_second_pixel_between_channels_of_zeros() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    result = PaddedShortcut(3)(image)
    assert result.shape == (1, 4, 2, 2)
    assert result[0, 1].tolist() == [[0.0, 2.0], [8.0, 10.0]]
    assert result[0, [0, 2, 3]].count_nonzero() == 0


def test_resnet18_has_torchvisions_names_and_shapes_but_for_stem_and_head() -> None:
    from torchvision.models import resnet18

    ours, theirs = resnet18_cifar().state_dict(), resnet18().state_dict()
    assert set(ours) == set(theirs)
    assert {key for key in ours if ours[key].shape != theirs[key].shape} == {"conv1.weight", "fc.weight", "fc.bias"}


def test_convolutions_start_with_he_initialization() -> None:
    torch.manual_seed(0)
    weight = resnet20().get_submodule("layer3.1.conv1").weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lenet, {"image_size": 15}, "image_size: got 15, expected a whole number of at least 16"),
        (lenet, {"in_channels": 0}, "in_channels: got 0"),
        (svhn, {"image_size": 20}, "image_size: got 20, expected a whole number of at least 21"),
        (resnet20, {"num_classes": "10"}, "num_classes: got '10'"),
        (resnet20, {"num_classes": True}, "num_classes: got True"),
        (alexnet_bn, {"num_classes": -1}, "num_classes: got -1"),
    ],
)
def test_wrong_arguments_are_refused(make: type[nn.Module], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.data
@pytest.mark.parametrize("weights", TEACHERS)
def test_published_weights_load_under_their_own_names(weights: str, data_root: Path) -> None:
    state = load_file(data_root / "teachers" / f"{weights}.safetensors")
    NETWORKS[TEACHERS[weights]]().load_state_dict(state, strict=True)


MNIST = NormalizeSpec(mean=(0.1307,), std=(0.3081,))
# The published teachers' input, and (images, of which right): of the JPEG test set, or MNIST's, and of the 4,000 lossless images.
# All of a set where that is quick, else its first thousand; all of them were measured once, in per cent, as said beside.
RIGHT_ANSWERS = [
    ("lenet_mnist_dcq", "mnist", MNIST, 10_000, 9918),
    ("simplenet_cifar10_dcq", "jpeg", HALF, 10_000, 7114),
    ("simplenet_cifar10_dcq", "lossless", HALF, 4000, 3124),
    ("resnet20_cifar10_dcq", "jpeg", HALF, 1000, 763),  # 75.59
    ("resnet20_cifar10_dcq", "lossless", HALF, 4000, 3535),
    ("resnet20_cifar10_jpeg", "jpeg", IMAGENET, 10_000, 8810),
    ("resnet20_cifar10_akamaster", "jpeg", IMAGENET, 1000, 804),  # 81.03
    ("resnet20_cifar10_akamaster", "lossless", IMAGENET, 1000, 999),  # 99.80
    ("resnet32_cifar10_akamaster", "jpeg", IMAGENET, 1000, 840),  # 82.56
    ("resnet32_cifar10_akamaster", "lossless", IMAGENET, 1000, 1000),  # 100.00
    ("resnet44_cifar10_akamaster", "jpeg", IMAGENET, 1000, 821),  # 82.67
    ("resnet44_cifar10_akamaster", "lossless", IMAGENET, 1000, 999),  # 99.98
]


def _npz(folder: Path, file: str, normalize: NormalizeSpec) -> DataSpec:
    # The file serves as the train set too: decoding another one takes seconds, and it is not used.
    return DataSpec(
        dataset="npz",
        root=str(folder),
        train=file,
        test=file,
        normalize=normalize,
        train_samples=10,
        held_out_samples=10,
    )


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("weights", "images", "normalize", "num_images", "num_right"),
    RIGHT_ANSWERS,
    ids=[f"{weights}-{images}" for weights, images, *_ in RIGHT_ANSWERS],
)
def test_published_weights_give_exactly_as_many_right_answers_as_measured(
    weights: str, images: str, normalize: NormalizeSpec, num_images: int, num_right: int, data_root: Path
) -> None:
    data = {
        "mnist": DataSpec(dataset="mnist", root=str(data_root), normalize=normalize, download=False, train_samples=10),
        "jpeg": _npz(data_root / "cifar10-jpeg", "cifar10_jpeg_test.npz", normalize),
        "lossless": _npz(data_root / "cifar10-lossless4k", "cifar10_batch1_first4000.npz", normalize),
    }[images]
    network = NETWORKS[TEACHERS[weights]]().eval()
    network.load_state_dict(load_file(data_root / "teachers" / f"{weights}.safetensors"), strict=True)
    test = load_splits(data, seed=0, job_folder=".").test
    assert test is not None
    with torch.inference_mode():
        batches = islice(ordered_batches(test, 250), num_images // 250)
        right = [int((network(x).argmax(1) == y).sum()) for x, y in batches]
    assert (250 * len(right), sum(right)) == (num_images, num_right)
