"""The job: what a user may ask for, as frozen models with every default, range and unit.

This module owns the vocabulary of the job file and nothing else: `jobfile` reads and checks a file against it, and the
JSON schema for editors comes out of the same definitions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(min_length=1)]
Callable_ = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
MAX_WEIGHT_BITS = 8
WeightBits = Annotated[int, Field(ge=1, le=MAX_WEIGHT_BITS)]
LayerBits = Annotated[int, Field(ge=1, le=32)]


WeightScheme = Literal["dorefa", "xnor", "twn", "ttq", "lsq", "lsq-channel", "wrpn"]
ActivationScheme = Literal["dorefa", "pact", "lsq"]

WEIGHT_SCHEME_BITS: dict[str, tuple[int, ...]] = {
    "dorefa": (1, 2, 3, 4, 5, 6, 7, 8),
    "xnor": (1,),
    "twn": (2,),
    "ttq": (2,),
    "lsq": (2, 3, 4, 5, 6, 7, 8),
    "lsq-channel": (2, 3, 4, 5, 6, 7, 8),
    "wrpn": (2, 3, 4, 5, 6, 7, 8),
}
"""The bits that a weight scheme has; the three levels of twn and ttq take 2."""


class SpecModel(BaseModel):
    """A frozen part of a job that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class OptimizerSpec(SpecModel):
    """What any training loop needs: how long, how fast, how many at once."""

    epochs: Count = 2
    """Passes over the train part; 0 trains nothing."""
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Rate = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """cosine: to zero at the last step; step: a tenth after one half and after three quarters of the steps."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD; Adam's first beta stays at its 0.9."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """L2 penalty on weights of two and more dimensions; biases, BatchNorm and quantizers' scales go without."""
    batch_size: PositiveInt = 128


class FitSpec(OptimizerSpec):
    """Training or fine-tuning of the teacher on the train part, with cross-entropy and without dropout."""

    epochs: PositiveInt = 10
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """So long, of `epochs`, the learning rate rises in equal parts to `lr`; the schedule takes the rest."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of every label that is spread evenly over all classes."""
    flip: bool = False
    """Mirror every training image left to right with probability one half."""
    crop_padding: Count = 0
    """Pad training images by this many pixels on each side and crop at random back to size."""


class AugmentSpec(SpecModel):
    """Augmented views of the train images, each dumped once and seen by every `views`-th epoch."""

    views: PositiveInt = 2
    """Each takes a dump, and the disk space of one; as many as epochs give every epoch a fresh view, and where
    `storage.activations` is recomputed every epoch has one anyway."""
    flip: bool = True
    """Mirror every image left to right with probability one half."""
    crop_padding: Count = 4
    """Pad images by this many pixels on each side and crop at random back to size."""


class TrainSpec(OptimizerSpec):
    """Training of every section."""

    loss: Literal["nmse", "channel-nmse", "mse", "cosine", "attention"] = "nmse"
    """nmse: mean of (student - teacher)^2 over mean of teacher^2, per batch; channel-nmse: over each channel's variance."""
    last_loss: Literal["cross-entropy", "distillation"] | None = None
    """The loss of the last section, where it is to differ: on labels, or on the teacher's softened outputs."""
    temperature: Rate = 2.0
    """Of distillation."""
    start: Literal["nearest", "fitted"] = "fitted"
    """nearest: quantized weights start at the levels nearest to the teacher's; fitted: at those that least squares on
    `start_samples` images finds, layer by layer, to give what the teacher's layers give (Conv2d and Linear, up to 4 bits,
    4 million weights, and 5,000 of them for an output)."""
    start_samples: PositiveInt = 1000
    """start: fitted only. Train images on which the start is fitted; fewer where a section's inputs from them exceed 512 MiB."""
    inputs: Literal["teacher", "student"] = "teacher"
    """student: over `anneal` of a section's training its inputs turn from the teacher's into those that it will meet, streamed
    from the sections before it as they train, which start earlier (`stagger`)."""
    anneal: Fraction = 0.5
    """inputs: student only. The share of a training over which its inputs turn."""
    stagger: Fraction = 0.35
    """inputs: student only. How much of a training the first section is ahead of the last; it makes the run so much longer."""
    look_ahead: Count | Literal["all"] = 0
    """Take the loss also at the ends of so many of the teacher's next sections, run frozen on the section's output."""
    look_ahead_weight: Rate = 1.0
    """Of each of those losses, beside 1 for the section's own."""
    input_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Noise on half of a section's inputs, as a share of their root mean square; it stands for the errors before."""
    augment: AugmentSpec | None = None
    """null: every epoch sees the images as they are."""
    num_threads: PositiveInt = 1
    """CPU threads of a worker; part of the job, because two threads give other sums than one."""


class TeacherSpec(SpecModel):
    """The full-precision network and where its weights come from."""

    model: Text
    """`dcq_ray:NAME`, `torchvision:NAME`, or `package.module:function` of your own."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that function."""
    weights: Text | None = None
    """A .safetensors or torch file (path or URI), the name of a torchvision weights enum, or null."""
    fit: FitSpec | None = None
    """Train or fine-tune it first, on the train part."""
    min_top1: Fraction | Literal["auto"] = "auto"
    """`run` refuses a teacher that scores less on held-out images; auto: 1.5 x chance; 0 switches it off."""


class NormalizeSpec(SpecModel):
    """Per-channel mean and standard deviation of images in [0, 1]."""

    mean: tuple[float, ...] = Field(min_length=1)
    std: tuple[Rate, ...] = Field(min_length=1)


class DataSpec(SpecModel):
    """The images, how they are brought into shape, and how they are split."""

    dataset: Literal["digits", "mnist", "fashion-mnist", "cifar10", "svhn", "imagefolder", "npz"] | Callable_
    """A data set's name, or `package.module:function` that returns one (see the README)."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of your own function."""
    root: Text | None = None
    """The folder of the data set."""
    train: Text | None = None
    """npz only: file below root with `images` [N,H,W,C] uint8, or `jpeg` + `offsets`; `labels` [N] optional."""
    test: Text | None = None
    """npz only: likewise."""
    download: bool = True
    """Fetch a torchvision data set into root where it is missing and the network allows."""
    channels: Literal[1, 3] | None = None
    """Turn images to grey or to colour; null: as they are."""
    image_size: tuple[PositiveInt, PositiveInt] | None = None
    """Resize to [height, width]; null: as they are."""
    normalize: NormalizeSpec | None = None
    """null: images stay in [0, 1]."""
    transform: Callable_ | None = None
    """`package.module:function` from float32 [B,C,H,W] in [0, 1] to float32 [B,C,H,W], before normalize."""
    metric: Callable_ | None = None
    """`package.module:function` from logits [N,K] and labels [N] to a float, reported beside top-1."""
    train_samples: PositiveInt | None = None
    """null: all; a fixed, seeded, class-balanced choice."""
    held_out_samples: PositiveInt | None = None
    """Taken from the train set, never trained on; null: a tenth of it, at most 5,000."""
    test_samples: PositiveInt | None = None
    on_error: Literal["fail", "skip"] = "fail"
    """What to do with a chosen image that cannot be read, has NaN, or another size than the first: fail names it; skip leaves it
    out and counts it in the report. To know them, skip reads every chosen image once in every process."""
    batch_size: PositiveInt = 128
    """Images per forward pass of the teacher in dump and validation."""


class SectionsSpec(SpecModel):
    """How the teacher is cut: by exactly one of count, every and cuts."""

    count: PositiveInt | None = None
    """So many sections, the slowest as fast as possible under measured cost."""
    every: Literal["block", "layer"] | None = None
    cuts: tuple[Text, ...] | None = Field(default=None, min_length=1)
    """Names of modules after which to cut, as `dcq-ray plan` prints them."""


class WeightsSpec(SpecModel):
    """The weight quantizer."""

    scheme: WeightScheme = "dorefa"
    """dorefa: 1 to 8 bits; xnor: 1, a scale per channel; twn, ttq: 2, three levels; lsq, lsq-channel, wrpn: 2 to 8."""
    bits: WeightBits = 1


class ActivationsSpec(SpecModel):
    """The quantizer of layers' inputs."""

    scheme: ActivationScheme = "pact"
    """dorefa: clip fixed, from data; pact: clip learned; lsq: step learned."""
    bits: WeightBits = 4


class OverrideSpec(SpecModel):
    """Another scheme or other bits for some layers; 32 bits leave them alone, null means no change."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    bits: LayerBits | None = None
    """Of the weights."""
    scheme: WeightScheme | None = None
    activation_bits: LayerBits | None = None
    """Of the layers' inputs."""
    activation_scheme: ActivationScheme | None = None


class QuantizeSpec(SpecModel):
    """Which weights and layers' inputs are quantized, and to how many bits."""

    weights: WeightsSpec = WeightsSpec()
    activations: ActivationsSpec | None = None
    """null: activations stay in floating point."""
    first_last_bits: LayerBits | None = 8
    """Bits of the first and the last layer, weights and (but for the image) inputs; 32: alone; null: no exception."""
    overrides: dict[str, OverrideSpec] = Field(default_factory=dict)
    """Pattern of layers' names (as of a shell: `layer1.*`) or `section:N` -> {bits: …}; the last match wins."""


class ReduceSpec(SpecModel):
    """Stitching and validation."""

    reestimate_batchnorm: bool = True
    """Recompute BatchNorm statistics on the stitched student's own activations."""
    refit: bool = False
    """Try every section fitted anew, on the teacher's activations and on the stitched student's own, in place of its training,
    and take what is better on held-out images; no training, no labels."""
    refit_metric: Literal["outputs", "predictions"] = "predictions"
    """refit only. outputs: a layer's fit is of every output channel's own squared error; predictions: of all channels' errors
    together, by what they do to the teacher's predictions, which one backward pass of the teacher tells."""
    rounds: Literal[1] = 1
    """Only 1: a section is trained once; `train.inputs: student` does better what rounds on the student's own inputs would."""
    polish_epochs: Count = 0
    """Passes of end-to-end distillation from the teacher after stitching; no longer parallel, so keep them few."""
    polish_lr: Rate | None = None
    """Peak learning rate of the polish; null: 0.3 of `train.lr`."""
    roll_back: bool = True
    """Undo a step of the merge (BatchNorm re-estimated, an epoch of polish) that is worse on held-out images."""
    test: Literal["all", "student", "none"] = "all"
    """Who is scored on test images: teacher, untrained student and student; teacher and student; or nobody."""
    max_drop: Annotated[float, Field(ge=0, le=100)] | None = None
    """Quality gate: percentage points that the student may lose against the teacher (1.5 means 0.015)."""


class ResourcesSpec(SpecModel):
    """What Ray reserves for each section."""

    gpus_per_section: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """auto: the cluster's GPUs over the sections, at most one each; where there are more sections than GPUs, a unit fraction, as
    many on a card as fit by peak memory, which is measured on one card before the run; 0: CPU."""
    cpus_per_section: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    memory_per_section: PositiveInt | Literal["auto"] = "auto"
    """Bytes of activations that a section keeps in memory, also asked of Ray; auto: half of what is free, and nothing asked."""
    accelerator: Text | None = None
    """The only type of GPU to use, as Ray names it (`A100`, `H100`); null: any."""
    wait_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Ask a cluster's autoscaler for all sections' CPUs and GPUs, and wait so long for its nodes; 0: take those that are there.
    Give gpus_per_section in numbers where GPUs are to come: auto means those that are there."""


class StorageSpec(SpecModel):
    """Where files go, and in what form activations are stored."""

    run_dir: Text = "runs/default"
    """The run directory: a folder or a pyarrow.fs URI."""
    cache_dir: Text = "runs/.cache"
    """Boundaries and fitted teachers, shared between runs: a folder or a pyarrow.fs URI."""
    activations: Literal["stored", "recomputed"] = "stored"
    """stored: dumped once, read by every section; recomputed: nothing is dumped, and every section runs the teacher up to its
    own end again for each of its batches, in float32. For activations that do not fit, and for fresh views in every epoch."""
    dtype: Literal["float16", "float32"] = "float16"
    compression: Literal["none", "zstd"] = "none"
    checkpoint_seconds: Rate = 30.0
    """How often a section, or a teacher's fit, saves a checkpoint, beside the end of every epoch."""
    max_bytes: PositiveInt | None = None
    """Refuse a dump that needs more bytes than this; null: what is free on the disk."""


class Job(SpecModel):
    """One job: a teacher, images, how to cut, quantize and train, and where to put the result."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    teacher: TeacherSpec
    data: DataSpec
    sections: SectionsSpec = SectionsSpec(count=4)
    quantize: QuantizeSpec = QuantizeSpec()
    train: TrainSpec = TrainSpec()
    reduce: ReduceSpec = ReduceSpec()
    resources: ResourcesSpec = ResourcesSpec()
    storage: StorageSpec = StorageSpec()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
