"""The plan: the teacher cut into sections, the bits of every layer, the tensors at the boundaries."""

from __future__ import annotations

from dataclasses import dataclass

from dcq_ray.records.version import FORMAT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """The tensor between two sections: boundary 0 is the network's input, the last one its output."""

    index: int
    cut: str
    """The module whose output this is; `input` and `output` at the ends."""
    shape: tuple[int, ...]
    """Of one sample, without the batch."""
    num_samples: int
    dtype: str
    """As stored: float16 or float32."""
    digest: str
    """Of all that determines the stored activations; their folder's name in the cache."""
    view: int | None = None
    """Of which augmented view of the images; None: of the images as they are."""

    @property
    def bytes_per_sample(self) -> int:
        size = 2 if self.dtype == "float16" else 4
        for extent in self.shape:
            size *= extent
        return size

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, uncompressed, without the few of the headers."""
        return self.bytes_per_sample * self.num_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One Conv or Linear layer and the bits of its weights and of its input; 32 bits: left alone."""

    module: str
    kind: str
    num_weights: int
    scheme: str
    bits: int
    activation_scheme: str | None = None
    activation_bits: int = 32
    multiply_accumulates: int = 0
    """Per sample."""
    num_bytes: int = 0
    """Of the weights, packed in bits, with their scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsWork:
    """Multiply-accumulates per sample with weights and inputs of so many bits."""

    bits: int
    activation_bits: int
    multiply_accumulates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionPlan:
    """Section k maps boundary k to boundary k + 1."""

    index: int
    modules: tuple[str, ...]
    """Names of the leaf modules in order of execution."""
    layers: tuple[LayerPlan, ...]
    num_parameters: int
    forward_seconds: float
    """Measured: one batch through the section, on this machine."""
    step_seconds: float
    """Measured: forward and backward of one batch."""
    multiply_accumulates: int
    """Per sample, in Conv and Linear layers."""

    @property
    def bits(self) -> float:
        """Mean bits per quantized weight; 32 where nothing is quantized."""
        quantized = [layer for layer in self.layers if layer.bits < 32]
        num_weights = sum(layer.num_weights for layer in quantized)
        return sum(layer.num_weights * layer.bits for layer in quantized) / num_weights if num_weights else 32.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPlan:
    """The teacher cut into sections; there is one boundary more than sections."""

    format_version: int = FORMAT_VERSION
    key: str
    """Digest of all that the plan was made from; a plan with another key is made again."""
    teacher_sha256: str
    teacher_num_bytes: int
    input_shape: tuple[int, ...]
    boundaries: tuple[Boundary, ...]
    sections: tuple[SectionPlan, ...]
    unquantized_parameters: tuple[str, ...]
    """Parameters with two or more dimensions that no quantizer reaches."""
    num_parameters: int
    """Of the whole network."""
    num_unquantized: int
    """Numbers in `unquantized_parameters`."""
    unused_parameters: tuple[str, ...] = ()
    """Parameters that the network does not use in eval mode, as those of auxiliary heads; they stay as they are."""
    uncalled_layers: tuple[str, ...] = ()
    """Layers that the network never calls, but uses the weight of in a function; their inputs cannot be quantized."""
    num_bytes_packed: int
    """Of the student, its quantized weights packed in bits."""
    total_multiply_accumulates: int
    """Per sample, those outside of Conv and Linear layers too as far as they are counted (attention's projections)."""

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the interior boundaries; put them under `sections.cuts` to pin this plan."""
        return tuple(boundary.cut for boundary in self.boundaries[1:-1])

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for section in self.sections for layer in section.layers)

    @property
    def unquantized_share(self) -> float:
        """The share of the network's parameters that are weights outside of Conv and Linear layers."""
        return self.num_unquantized / self.num_parameters if self.num_parameters else 0.0

    @property
    def multiply_accumulates_by_bits(self) -> tuple[BitsWork, ...]:
        """Multiply-accumulates per sample by bits of weights and inputs, most first; 32 bits for what is left alone."""
        counts: dict[tuple[int, int], int] = {}
        for layer in self.layers:
            key = (layer.bits, layer.activation_bits)
            counts[key] = counts.get(key, 0) + layer.multiply_accumulates
        rest = self.total_multiply_accumulates - sum(counts.values())
        if rest > 0:
            counts[32, 32] = counts.get((32, 32), 0) + rest
        return tuple(
            BitsWork(bits=bits, activation_bits=activation_bits, multiply_accumulates=count)
            for (bits, activation_bits), count in sorted(counts.items(), key=lambda item: -item[1])
            if count
        )
