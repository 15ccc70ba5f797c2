"""End-to-end DoReFa in plain PyTorch, to see whether the rival of `dcq-ray baseline --method dorefa` is a good one.

    dcq-ray run JOB.yaml --run-dir RUN --baseline
    python tests/benchmarks/plain_dorefa.py JOB.yaml --run-dir RUN [--set a.b=c]…

Quantizer, optimizer, schedule, training loop and choice of rate and epoch are written here anew, from the papers and from what a
job means; images and the teacher are dcq-ray's. Weights only, DoReFa or three levels (TWN), without overrides of bits.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dcq_ray.data import Part, Splits, load_splits
from dcq_ray.jobfile import load_job
from dcq_ray.phases import ignore_progress, obtain_teacher
from dcq_ray.spec import Job
from dcq_ray.storage import open_store

FACTORS = (0.3, 1.0, 3.0)
NUM_BATCHNORM_IMAGES = 5120
GOOD_POINTS = 0.5
SAMPLE_STREAM = 777
"""Of the order of images, which is not the order that dcq-ray draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One rate's training: the best epoch by held-out accuracy, BatchNorm re-estimated."""

    lr: float
    held_out_top1: float
    network: nn.Module


# -- the quantizer -----------------------------------------------------------------------------------------------------


def quantized_weight(weight: Tensor, scheme: str, bits: int, scale: float = 1.0) -> Tensor:
    """The quantized weight, with a straight-through gradient.

    dorefa, 1 bit: sign(w) mean|w|, sign(0) = 1 (DoReFa-Net, arXiv 1606.06160, eq. 8); k bits: scale (2 q - 1), q being
    tanh(w) / (2 max|tanh(w)|) + 1/2 rounded to 2^k - 1 steps (eq. 9). twn: a sign(w) where |w| > 0.75 mean|w|, a being the mean
    of the magnitudes there, else 0 (arXiv 1605.04711).
    """
    if scheme == "twn":
        magnitudes = weight.detach().abs()
        kept = (magnitudes > 0.75 * magnitudes.mean()).float()
        level = (magnitudes * kept).sum() / kept.sum()
        return weight + (level * kept * weight.sign() - weight).detach()
    if bits == 1:
        signs = (weight.detach() >= 0).float() * 2 - 1
        return weight + (signs * weight.detach().abs().mean() - weight).detach()
    bounded = weight.tanh()
    unit = bounded / (2 * bounded.detach().abs().max()) + 0.5
    steps = 2**bits - 1
    rounded = unit + ((unit * steps).round() / steps - unit).detach()
    return scale * (2 * rounded - 1)


class Quantized(nn.Module):
    """What `torch.nn.utils.parametrize` puts before a weight; DoReFa's scale of 2 bits and more is fitted to the first one."""

    def __init__(self, weight: Tensor, scheme: str, bits: int) -> None:
        super().__init__()
        self.scheme, self.bits, self.scale = scheme, bits, 1.0
        if scheme == "dorefa" and bits > 1:
            levels = quantized_weight(weight.detach(), scheme, bits)
            self.scale = float((weight.detach() * levels).sum() / levels.square().sum())

    def forward(self, weight: Tensor) -> Tensor:
        return quantized_weight(weight, self.scheme, self.bits, self.scale)


def quantize(network: nn.Module, job: Job) -> nn.Module:
    """A copy of the network with quantized Conv and Linear weights; raises ValueError where the job asks for more."""
    asked = job.quantize
    more = asked.activations is not None or asked.overrides or job.train.augment is not None
    if more or asked.weights.scheme not in ("dorefa", "twn"):
        raise ValueError(
            f"job {job.name}: quantizes activations, has overrides, augments, or its scheme is {asked.weights.scheme}; expected "
            "dorefa or twn weights alone, on images as they are"
        )
    student = copy.deepcopy(network).requires_grad_(True)
    layers = [module for module in student.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in layers:
        at_end = layer in (layers[0], layers[-1]) and asked.first_last_bits is not None
        bits = asked.first_last_bits if at_end else asked.weights.bits
        assert bits is not None
        if bits == 32:
            continue
        scheme = asked.weights.scheme if bits == asked.weights.bits else "dorefa"
        parametrize.register_parametrization(layer, "weight", Quantized(layer.weight, scheme, bits))
    return student


# -- the training loop -------------------------------------------------------------------------------------------------


def train(network: nn.Module, job: Job, splits: Splits, lr: float) -> Outcome:
    """Train a quantized copy of the network with cross-entropy on the train part."""
    labels = splits.train.labels
    assert labels is not None
    student = quantize(network, job)
    optimizer, factor = optimizer_of(student, job, lr), schedule_of(job)
    batch_size = min(job.train.batch_size, len(splits.train))
    num_steps = job.train.epochs * (len(splits.train) // batch_size)
    best, state, step = -1.0, copy.deepcopy(student.state_dict()), 0
    generator = torch.Generator().manual_seed(SAMPLE_STREAM + job.seed)
    for epoch in range(job.train.epochs):
        batchnorm_alone_trains(student)
        order = torch.randperm(len(splits.train), generator=generator).numpy()
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            for group in optimizer.param_groups:
                group["lr"] = lr * factor(step / num_steps)
            loss = nn.functional.cross_entropy(student(splits.train.images(chosen)), torch.from_numpy(labels[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        top1 = accuracy(student, splits.held_out)
        print(f"  lr {lr:g} epoch {epoch + 1}: held-out {100 * top1:.2f} %", file=sys.stderr, flush=True)
        if top1 >= best:
            best, state = top1, copy.deepcopy(student.state_dict())
    student.load_state_dict(state)
    if job.reduce.reestimate_batchnorm:
        reestimate(student, splits.train, job.data.batch_size)
    return Outcome(lr=lr, held_out_top1=accuracy(student, splits.held_out), network=student)


def optimizer_of(network: nn.Module, job: Job, lr: float) -> torch.optim.Optimizer:
    """The job's optimizer; weight decay is for what has two dimensions and more."""
    parameters = list(network.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [value for value in parameters if value.dim() > 1], "weight_decay": job.train.weight_decay},
        {"params": [value for value in parameters if value.dim() <= 1], "weight_decay": 0.0},
    ]
    if job.train.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=job.train.momentum)


def schedule_of(job: Job) -> Callable[[float], float]:
    """The share of the rate at a share of the steps."""
    return {
        "constant": lambda _: 1.0,
        "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
        "step": lambda done: 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01,
    }[job.train.schedule]


def batchnorm_alone_trains(network: nn.Module) -> None:
    """Batch statistics for BatchNorm, and no dropout: so a job trains."""
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()


@torch.no_grad()
def accuracy(network: nn.Module, part: Part) -> float:
    """Top-1 on a part."""
    assert part.labels is not None
    network.eval()
    labels = torch.from_numpy(part.labels)
    right = sum(
        int((network(images).argmax(1) == labels[start : start + len(images)]).sum())
        for start, images in _pieces(part, len(part), 200)
    )
    return right / len(part)


@torch.no_grad()
def reestimate(network: nn.Module, part: Part, batch_size: int) -> None:
    """BatchNorm's statistics as averages over the first train images."""
    batchnorm_alone_trains(network)
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for _, images in _pieces(part, min(len(part), NUM_BATCHNORM_IMAGES), batch_size):
        network(images)
    network.eval()


def _pieces(part: Part, num_images: int, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, num_images, batch_size):
        positions = torch.arange(start, min(start + batch_size, num_images)).numpy()
        yield start, part.images(positions)


# -- beside dcq-ray's --------------------------------------------------------------------------------------------------


def kept_rival(run_dir: Path) -> dict[str, Any]:
    """The rival of equal passes in a run's report; raises ValueError where there is none."""
    report = json.loads((run_dir / "report.json").read_text())
    for found in report.get("baselines") or [report.get("baseline")]:
        if found is not None and found["method"] == "dorefa" and found.get("budget", "passes") == "passes":
            return dict(found)
    raise ValueError(f"{run_dir}/report.json: no rival dorefa at equal passes; `dcq-ray run … --baseline` adds it")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train at three rates, test the best by held-out images, and print both; 1 where dcq-ray's is more than 0.5 points worse."""
    parser = argparse.ArgumentParser(description="Plain PyTorch DoReFa beside dcq-ray's.")
    parser.add_argument("job")
    parser.add_argument("--run-dir", type=Path, required=True, help="a finished run of the job with its baseline")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="a.b=c")
    options = parser.parse_args(arguments)
    rival = kept_rival(options.run_dir)
    job = load_job(options.job, overrides=options.settings, environment=os.environ)
    torch.set_num_threads(job.train.num_threads)
    torch.manual_seed(job.seed)
    folder = str(Path(options.job).resolve().parent)
    splits = load_splits(job.data, seed=job.seed, job_folder=folder)
    cache = open_store(job.storage.cache_dir)
    teacher = obtain_teacher(job, folder, splits, cache, device=torch.device("cpu"), emit=ignore_progress)
    started = time.process_time()
    outcomes = [train(teacher.module, job, splits, factor * job.train.lr) for factor in FACTORS]
    best = max(outcomes, key=lambda outcome: outcome.held_out_top1)
    seconds = time.process_time() - started
    assert splits.test is not None
    top1 = accuracy(best.network, splits.test)
    behind = 100 * (top1 - rival["top1"])
    print(
        f"{job.name}, seed {job.seed}: {len(splits.train):,} images x {job.train.epochs} epochs, {seconds:.0f} processor s\n"
    )
    print("| end-to-end DoReFa | lr | held-out | test |\n| --- | --- | --- | --- |")
    print(f"| plain PyTorch | {best.lr:g} | {100 * best.held_out_top1:.2f} | {100 * top1:.2f} |")
    held_out = rival["held_out_top1"]
    print(f"| dcq-ray baseline | {rival['lr']:g} | {100 * held_out:.2f} | {100 * rival['top1']:.2f} |")
    print(
        f"\ndcq-ray's is {abs(behind):.2f} points {'worse' if behind > 0 else 'better'}; good: at most {GOOD_POINTS} worse"
    )
    return 1 if behind > GOOD_POINTS else 0


if __name__ == "__main__":
    sys.exit(main())
