"""What a reader may do next, from a report's numbers: sentences that say what was measured, and what is only likely."""

from __future__ import annotations

from dcq_ray.records import LayerPlan, RunReport, SectionReport
from dcq_ray.records.packing import SCALE_BYTES, num_scales, weight_num_bytes
from dcq_ray.report.words import number, percent, size

# Of the loss between teacher and student: below it nothing is to be gained, above it a section stands out.
LEAST_LOSS = 0.005
LEAST_SHARE = 0.3
# Where k images are lost and none is won, the standard error of their number is the root of k: two of it are all of 4.
LEAST_IMAGES = 4
# Of the error at the student's end to that of the last section alone.
DRIFT_RATIO = 1.5
WAIT_SHARE = 0.05
# What more bits a layer is offered.
MORE_BITS = {1: 2, 2: 4, 3: 4, 4: 8}
# Schemes that have one number of bits only, and what has more.
WIDER_SCHEME = {"xnor": "dorefa", "twn": "lsq", "ttq": "lsq"}


def advice(report: RunReport) -> list[str]:
    """Sentences for a finished run; one that says so where nothing stands out."""
    if report.student is None or report.diagnosis is None:
        return []
    found = [
        *_kept_starts(report),
        *_costly_section(report),
        *_drift(report),
        *_constant_channels(report),
        *_waiting(report),
    ]
    return found or ["Nothing stands out: no section costs much, no layer is dead, and none waited for its inputs."]


def _kept_starts(report: RunReport) -> list[str]:
    kept = [str(section.index) for section in report.sections if section.kept_start]
    if not kept:
        return []
    name, verb = ("Section", "was") if len(kept) == 1 else ("Sections", "were")
    return [
        f"{name} {', '.join(kept)} {verb} better at the fitted start than after training, and kept it: a lower train.lr, or more "
        "epochs, may do better."
    ]


def _costly_section(report: RunReport) -> list[str]:
    diagnosis = report.diagnosis
    assert diagnosis is not None
    total = diagnosis.teacher_score - diagnosis.scores[-1]
    step = max(range(len(diagnosis.losses)), key=lambda index: diagnosis.losses[index])
    loss = diagnosis.losses[step]
    if total < LEAST_LOSS or loss < LEAST_SHARE * total or round(loss * diagnosis.num_samples) < LEAST_IMAGES:
        return []
    first = 0 if step == 0 else diagnosis.after[step - 1] + 1
    last = diagnosis.after[step]
    sections = [section for section in report.sections if first <= section.index <= last]
    name = f"Section {last}" if first == last else f"Sections {first} to {last}"
    verb = "costs" if first == last else "cost"
    told = (
        f"{name} {verb} {100 * loss:.1f} of the {100 * total:.1f} points (on {diagnosis.num_samples:,} held-out images)"
    )
    return [f"{told}{_more_bits(report, sections)}."]


def _more_bits(report: RunReport, sections: list[SectionReport]) -> str:
    """What wider weights there would take, where there are any."""
    inside = {name for section in sections for name in section.modules}
    layers = [layer for layer in report.layers if layer.module in inside and layer.bits in MORE_BITS]
    if not layers or len(sections) != 1:
        return ""
    least = min(layers, key=lambda layer: layer.bits)
    bits = MORE_BITS[least.bits]
    narrow = [layer for layer in layers if layer.bits < bits]
    more = sum(_num_bytes(layer, bits) - layer.num_bytes for layer in narrow)
    return f"; {bits} bits there would take {size(more)} more: quantize.overrides {_override(sections[0].index, least, bits)}"


def _num_bytes(layer: LayerPlan, bits: int) -> int:
    """Of a layer's weights and scales, were they of so many bits."""
    scheme = WIDER_SCHEME.get(layer.scheme, layer.scheme)
    # The scheme that takes its place has a scale for each channel only where this one has.
    own_scales_num_bytes = layer.num_bytes - weight_num_bytes(layer.num_weights, layer.scheme, layer.bits)
    scales = num_scales(scheme, own_scales_num_bytes // SCALE_BYTES)
    return weight_num_bytes(layer.num_weights, scheme, bits) + SCALE_BYTES * scales


def _override(index: int, layer: LayerPlan, bits: int) -> str:
    scheme = f"scheme: {WIDER_SCHEME[layer.scheme]}, " if layer.scheme in WIDER_SCHEME else ""
    return f'"section:{index}": {{{scheme}bits: {bits}}}'


def _drift(report: RunReport) -> list[str]:
    if report.validation is None or len(report.sections) < 2 or not report.validation.boundary_errors:
        return []
    own, alone = report.validation.boundary_errors[-1], report.sections[-1].relative_error
    diagnosis = report.diagnosis
    assert diagnosis is not None
    if alone is None or own < DRIFT_RATIO * alone or diagnosis.teacher_score - diagnosis.scores[-1] < LEAST_LOSS:
        return []
    return [
        f"Errors add up along the network: the last section's relative error is {number(own)} on the student's own inputs, and "
        f"{number(alone)} on the teacher's. train.inputs: student, train.look_ahead: 1 or reduce.polish_epochs: 1 train against "
        "that, where the job does not have them yet."
    ]


def _constant_channels(report: RunReport) -> list[str]:
    assert report.diagnosis is not None
    dead = [layer for layer in report.diagnosis.layers if layer.num_constant_channels]
    if not dead:
        return []
    worst = max(dead, key=lambda layer: layer.num_constant_channels / layer.num_channels)
    others = f"; {len(dead) - 1} other layers have some, too" if len(dead) > 1 else ""
    return [
        f"{worst.num_constant_channels} of {worst.num_channels} outputs of {worst.module} are the same on all "
        f"{report.diagnosis.num_samples:,} images{others}: they carry nothing; more bits there, or a scale for each channel "
        "(lsq-channel), may bring them back."
    ]


def _waiting(report: RunReport) -> list[str]:
    waiting = [
        (section.input_wait_seconds / section.seconds, section) for section in report.sections if section.seconds > 1
    ]
    if not waiting:
        return []
    share, section = max(waiting, key=lambda pair: pair[0])
    if share < WAIT_SHARE:
        return []
    return [
        f"Section {section.index} spent {percent(share)} of its training waiting for batches: more memory "
        "(resources.memory_per_section) or a faster place for storage.cache_dir would help."
    ]
