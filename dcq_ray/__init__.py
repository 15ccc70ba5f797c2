"""dcq-ray: Divide and Conquer Quantization of PyTorch networks on Ray."""

from dcq_ray.version import __version__

__all__ = ["__version__"]
