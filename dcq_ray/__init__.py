"""dcq-ray: Divide and Conquer Quantization of PyTorch networks on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcq_ray.version import __version__

if TYPE_CHECKING:
    from torch import nn

__all__ = ["__version__", "load"]


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
