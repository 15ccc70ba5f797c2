"""What quantizing adds to a training step: ResNet-18, batch 32, one thread, every scheme beside full precision.

    python tests/benchmarks/quantizer_step.py [--size 224] [--repeats 5] [--threads 1] [NAME…]

A step is forward, backward and Adam's update. Steps in full precision and quantized alternate, and the ratio is the median
over such pairs, so that a machine whose speed drifts does not matter. A Markdown table goes to standard output.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from dcq_ray.digests import library_versions
from dcq_ray.quantizers import LayerSite, activation_starts, plan_layers, put_quantizers
from dcq_ray.spec import QuantizeSpec

BATCH_SIZE = 32
MAX_ADDED = 0.15
WEIGHTS = (
    *(("dorefa", 1), ("dorefa", 2), ("xnor", 1), ("twn", 2), ("ttq", 2)),
    *(("lsq", 2), ("lsq-channel", 2), ("wrpn", 2)),
)
ACTIVATIONS = (("dorefa", 4), ("pact", 4), ("lsq", 4))


def cases() -> dict[str, dict[str, Any]]:
    """The quantizers of a job by the name of their row."""
    found: dict[str, dict[str, Any]] = {}
    for scheme, bits in WEIGHTS:
        found[f"weights {scheme} {bits}"] = {"weights": {"scheme": scheme, "bits": bits}}
    for scheme, bits in ACTIVATIONS:
        found[f"weights dorefa 2, inputs {scheme} {bits}"] = {
            "weights": {"scheme": "dorefa", "bits": 2},
            "activations": {"scheme": scheme, "bits": bits},
        }
    return found


def stepper(quantize: dict[str, Any] | None, images: Tensor) -> Callable[[], float]:
    """A function that takes one step of ResNet-18 and returns its seconds; None leaves the network in full precision."""
    torch.manual_seed(0)
    module = torchvision.models.resnet18().eval()
    if quantize is not None:
        sites = [
            LayerSite(name=name, module=part)
            for name, part in module.named_modules()
            if isinstance(part, nn.Conv2d | nn.Linear)
        ]
        layers = plan_layers(sites, QuantizeSpec.model_validate(quantize))
        put_quantizers(module, layers, activation_starts(module, layers, [images[:4]]))
    for part in module.modules():
        part.train(isinstance(part, nn.BatchNorm2d))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, foreach=True)
    target = torch.randn(len(images), 1000)

    def step() -> float:
        started = time.perf_counter()
        loss = (module(images) - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return time.perf_counter() - started

    step()
    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows to measure; default: all")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of steps")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = torch.randn(BATCH_SIZE, 3, arguments.size, arguments.size)
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    print(f"{os.cpu_count()} cores, {platform.machine()}, {arguments.threads} thread; {versions}")
    print(
        f"ResNet-18, batch {BATCH_SIZE}, {arguments.size}x{arguments.size}; bar: at most {100 * MAX_ADDED:.0f} % more\n"
    )
    print("| quantizers | full precision, s | ratio, median | least | most |\n| --- | --- | --- | --- | --- |")
    plain = stepper(None, images)
    for name, quantize in cases().items():
        if arguments.names and name not in arguments.names:
            continue
        quantized = stepper(quantize, images)
        pairs = [(plain(), quantized()) for _ in range(arguments.repeats)]
        ratios = sorted(after / before for before, after in pairs)
        seconds = statistics.median(before for before, _ in pairs)
        print(
            f"| {name} | {seconds:.2f} | {statistics.median(ratios):.2f} | {ratios[0]:.2f} | {ratios[-1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
