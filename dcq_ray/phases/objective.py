"""What a section is trained towards: which stored boundaries it reads, and the loss over them.

A section's own target is the boundary that it ends at. With look-ahead the student section's output also goes on through the
teacher's next sections, frozen, and the error at their boundaries is added: an error that the teacher would carry on counts
for more than one that it would level out. All targets lie in the cache, so a section stays as isolated as without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dcq_ray.losses import LossFunction, loss_function
from dcq_ray.phases.context import Network
from dcq_ray.records import RunContext

Targets = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Where the targets of a section come from, in the order in which its loss takes them."""

    boundaries: tuple[int, ...]
    """Indices of stored boundaries."""
    labels: bool
    """Whether the labels come last, in the place of the network's output."""
    loss_names: tuple[str, ...]
    """One for each target."""


def section_objective(context: RunContext, index: int) -> Objective:
    """The objective of a section: its own boundary, and those of the sections that `train.look_ahead` names."""
    train, last = context.job.train, len(context.plan.sections)
    ahead = last if train.look_ahead == "all" else train.look_ahead
    boundaries = tuple(range(index + 1, min(index + 1 + ahead, last) + 1))
    names: list[str] = [train.loss] * len(boundaries)
    labels = False
    if boundaries[-1] == last and train.last_loss is not None:
        names[-1] = train.last_loss
        labels = train.last_loss == "cross-entropy"
    return Objective(boundaries=boundaries[:-1] if labels else boundaries, labels=labels, loss_names=tuple(names))


def objective_loss(
    context: RunContext, index: int, network: Network, device: torch.device
) -> Callable[[Tensor, Targets], Tensor]:
    """The loss of a section's output and its targets: the sum over the boundaries of its objective.

    Boundaries beyond the section's own count `train.look_ahead_weight` each.
    """
    train = context.job.train
    losses: list[LossFunction] = [
        loss_function(name, temperature=train.temperature) for name in section_objective(context, index).loss_names
    ]
    following = [section.to(device) for section in network.sections[index + 1 : index + len(losses)]]

    def loss(output: Tensor, targets: Targets) -> Tensor:
        total = losses[0](output, targets[0])
        for section, ahead, target in zip(following, losses[1:], targets[1:], strict=True):
            # A clone, since a section may work in place on its input, of which the loss before needs the values.
            output = section(output.clone())
            total = total + train.look_ahead_weight * ahead(output, target)
        return total

    return loss
