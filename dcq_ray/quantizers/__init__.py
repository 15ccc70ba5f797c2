"""Quantizers as pure functions, which layer gets which, and putting them on the layers of a module."""

from dcq_ray.quantizers.activations import ActivationStart
from dcq_ray.quantizers.fitted import LayerFit, fit_num_bytes, fit_weights
from dcq_ray.quantizers.placing import activation_starts, bake, put_input_quantizers, put_quantizers
from dcq_ray.quantizers.policy import LayerSite, packed_num_bytes, plan_layers

__all__ = [
    "ActivationStart",
    "LayerFit",
    "LayerSite",
    "activation_starts",
    "bake",
    "fit_num_bytes",
    "fit_weights",
    "packed_num_bytes",
    "plan_layers",
    "put_input_quantizers",
    "put_quantizers",
]
