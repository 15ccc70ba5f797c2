"""dcq-ray: Divide and Conquer Quantization of PyTorch networks on Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dcq_ray.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from dcq_ray.fewlines import Quantized

__all__ = ["__version__", "load", "quantize"]


def load(path: str, *, network: nn.Module | None = None) -> nn.Module:
    """The student of a packed file (`dcq-ray export --format packed`) as a plain network in eval mode, without gradients.

    Args:
        path: a path or URI.
        network: where the teacher is a function of your own, what it returns; the student is loaded into it, in place.

    Raises:
        ExportError: no packed file, a damaged one, or one of another version; its network cannot be built, or is another.
    """
    # Here, so that the command line's help does not wait for torch.
    from dcq_ray.export.loading import load_packed

    return load_packed(path, network=network)


def quantize(
    model: nn.Module | str,
    dataset: Any,
    *,
    bits: int = 2,
    sections: int = 4,
    scheme: str = "dorefa",
    activations: int | None = None,
    epochs: int = 2,
    test: Any = None,
    name: str | None = None,
    run_dir: str | None = None,
    address: str | None = None,
    settings: Mapping[str, Any] | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Quantized:
    """Quantize a pretrained model: the phases of `dcq-ray run`, and its run directory, from Python; `.student` has the result.

    Called again with the same arguments it resumes, or returns what is finished. The model itself is not changed.

    Args:
        model: a module with its weights, or a name as in a job file: `torchvision:NAME`, `dcq_ray:NAME`, `package.module:function`.
        dataset: a torch Dataset of (image, label); a pair (images, labels or None), uint8 [N, H, W, C] or [N, H, W], or float32
            [N, C, H, W] in [0, 1], arrays or tensors; or the name of a data set. Held-out images are taken from it.
        bits: of the weights, 1 to 8; the first and the last layer keep 8.
        sections: how many, cut where they are equally slow.
        scheme: the weights' quantizer.
        activations: bits of layers' inputs, 1 to 8; None: in full precision.
        epochs: passes over the train part for every section.
        test: as `dataset`, for the figures of the report; not beside a data set's name.
        name: of the run; None: the model's.
        run_dir: a folder or URI; None: `runs/<name>`.
        address: None: in this process; `local`, `auto` or a Ray cluster's address: on Ray, where model and dataset are names.
        settings: anything else of a job file by its key: `{"train.lr": 3e-4, "data.normalize": {…}}`.
        fresh: start over.
        progress: print a line that rewrites itself in a notebook and on a terminal, lines elsewhere.

    Raises:
        UsageError: arguments of the wrong kind; objects together with an `address`.
        JobError: a value that no job may have.
        DcqError: what a run raises.
    """
    from dcq_ray import fewlines

    return fewlines.quantize(
        model,
        dataset,
        bits=bits,
        sections=sections,
        scheme=scheme,
        activations=activations,
        epochs=epochs,
        test=test,
        name=name,
        run_dir=run_dir,
        address=address,
        settings=settings,
        fresh=fresh,
        progress=progress,
    )
