"""Numbers and sentences of a report as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dcq_ray.records import BaselineReport, BitsWork, Diagnosis, LayerPlan, RunReport, SectionReport

ABSENT = "-"
FULL_PRECISION = "fp32"
LAYER_COLUMNS = ("layer", "kind", "weights", "bits", "input", "bytes", "MACs")
STATE_COLUMNS = ("layer", "weights at its levels, ascending", "constant outputs")
TIME_COLUMNS = ("section", "seconds", "starting", "reading", "waiting", "computing", "device", "restarts")
WORK_COLUMNS = ("weight bits", "input bits", "MACs per sample", "share")


# Eighths of a character's height.
_BLOCKS = "▁▂▃▄▅▆▇█"


def percent(fraction: float | None) -> str:
    """A fraction as percent with one decimal; a dash where there is none."""
    return ABSENT if fraction is None else f"{100 * fraction:.1f} %"


def number(value: float | None) -> str:
    """A small number with three significant digits; a dash where there is none."""
    return ABSENT if value is None else f"{value:.3g}"


def size(num_bytes: int) -> str:
    """Bytes in the unit that suits them."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def modules(names: tuple[str, ...]) -> str:
    """A section's modules by their ends."""
    return ABSENT if not names else names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def verdict(report: RunReport) -> str:
    """What a reader wants to know first, in a sentence."""
    if report.status == "failed":
        failed = ", ".join(str(failure.index) for failure in report.failures) or "unknown"
        return f"The run failed in section {failed}; what was finished is kept."
    if report.status != "succeeded" or report.student is None:
        return f"The run is {report.status}: there is no student yet."
    ratio = report.teacher.num_bytes / max(1, report.student.num_bytes_packed)
    packed = f"in 1/{ratio:.0f} of the bytes ({size(report.student.num_bytes_packed)} packed)"
    teacher, student = report.teacher.top1, report.student.top1
    where = f"{report.num_test_samples:,} test images"
    if (teacher is None or student is None) and report.validation is not None:
        teacher, student = report.validation.teacher_top1, report.validation.top1
        where = f"{report.validation.num_samples:,} held-out images"
    if teacher is not None and student is not None:
        points = 100 * (student - teacher)
        scores = f"{percent(student)} top-1 on {where}, the teacher {percent(teacher)} ({points:+.1f} points)"
        return f"The student scores {scores}, {packed}."
    if report.validation is not None:
        agreed = percent(report.validation.agreement_with_teacher)
        return f"The student agrees with the teacher on {agreed} of {where}, {packed}."
    return f"The student is finished, {packed}."


def networks(report: RunReport) -> list[tuple[str, str, str, str]]:
    """Rows (network, top-1, bytes, bits) from the teacher to the student."""
    rows = [("teacher", percent(report.teacher.top1), size(report.teacher.num_bytes), "fp32")]
    if report.student is None:
        return rows
    packed, bits = size(report.student.num_bytes_packed), f"{report.student.bits:.2f}"
    rows.append(("untrained student", percent(report.untrained_top1), packed, bits))
    rivals = report.baselines or (() if report.baseline is None else (report.baseline,))
    rows.extend((rival_name(rival), percent(rival.top1), packed, bits) for rival in rivals)
    rows.append(("stitched student", percent(report.student.top1), packed, bits))
    return rows


def rival_name(rival: BaselineReport) -> str:
    """A rival as a row names it: how it is trained, and within which budget."""
    kind = {
        "hints": "hints, then distillation",
        "sequential": "section by section",
        "distill": "end-to-end distillation",
    }
    name = kind.get(rival.method, f"end-to-end {rival.method}")
    return name if rival.budget == "passes" else f"{name}, equal processor s"


def layer_rows(layers: Sequence[LayerPlan]) -> list[tuple[str, ...]]:
    """Rows of LAYER_COLUMNS: the bits of a layer's weights and input with their schemes, bytes packed, MACs per sample."""
    return [
        (
            layer.module,
            layer.kind,
            f"{layer.num_weights:,}",
            quantizer(layer.scheme, layer.bits),
            quantizer(layer.activation_scheme, layer.activation_bits),
            size(layer.num_bytes),
            count(layer.multiply_accumulates),
        )
        for layer in layers
    ]


def state_rows(diagnosis: Diagnosis) -> list[tuple[str, ...]]:
    """Rows of STATE_COLUMNS: what the weights of a layer are, and how many of its outputs say nothing."""
    return [
        (
            layer.module,
            # A number and its sign stay together on a narrow page.
            " ".join(f"{100 * share:.0f}\N{NO-BREAK SPACE}%" for share in layer.level_shares) or ABSENT,
            f"{layer.num_constant_channels} of {layer.num_channels}" if layer.num_channels else ABSENT,
        )
        for layer in diagnosis.layers
    ]


def time_rows(sections: Sequence[SectionReport]) -> list[tuple[str, ...]]:
    """Rows of TIME_COLUMNS: of a section's seconds, the shares of its start, of reading, waiting for batches, and the rest."""
    rows = []
    for section in sections:
        parts = (section.start_seconds, section.read_seconds, section.input_wait_seconds)
        split = (*parts, max(0.0, section.seconds - sum(parts)))
        shares = [percent(part / section.seconds if section.seconds > 0 else None) for part in split]
        rows.append((str(section.index), f"{section.seconds:.1f}", *shares, section.device, str(section.restarts)))
    return rows


def histogram(shares: Sequence[float]) -> str:
    """A character for each share, as high as it is beside the greatest."""
    greatest = max(shares, default=0.0) or 1.0
    return "".join(_BLOCKS[min(7, int(8 * share / greatest))] for share in shares)


def curve(section: SectionReport, width: int) -> str:
    """The losses of a section's training in so many characters, as heights between its least and its greatest logarithm."""
    losses = [math.log(point.loss) for point in section.loss_curve if point.loss > 0]
    if not losses:
        return ABSENT
    chosen = [losses[round(index * (len(losses) - 1) / max(1, width - 1))] for index in range(min(width, len(losses)))]
    if len(losses) < width:
        chosen = losses
    least, spread = min(losses), max(losses) - min(losses)
    return "".join(_BLOCKS[min(7, int(8 * (value - least) / spread))] if spread else _BLOCKS[0] for value in chosen)


def waterfall_rows(diagnosis: Diagnosis) -> list[tuple[str, str, str]]:
    """Rows (sections of the student, score, points lost there) from the teacher on."""
    rows = [("none", percent(diagnosis.teacher_score), "")]
    for index, score, loss in zip(diagnosis.after, diagnosis.scores, diagnosis.losses, strict=True):
        rows.append((f"up to {index}", percent(score), f"{round(-100 * loss, 1) + 0.0:+.1f}"))
    return rows


def own_errors(report: RunReport) -> dict[int, float]:
    """Of every section the error at its end on the student's own inputs."""
    return {} if report.validation is None else dict(enumerate(report.validation.boundary_errors))


def work_rows(works: Sequence[BitsWork]) -> list[tuple[str, ...]]:
    """Rows of WORK_COLUMNS: multiply-accumulates by the bits of weights and inputs."""
    total = sum(work.multiply_accumulates for work in works) or 1
    return [
        (
            bits(work.bits),
            bits(work.activation_bits),
            f"{work.multiply_accumulates:,}",
            percent(work.multiply_accumulates / total),
        )
        for work in works
    ]


def bits(number_of_bits: int) -> str:
    """A number of bits; 32 is full precision."""
    return FULL_PRECISION if number_of_bits == 32 else str(number_of_bits)


def quantizer(scheme: str | None, number_of_bits: int) -> str:
    """A scheme and its bits, as `dorefa 2`."""
    return FULL_PRECISION if number_of_bits == 32 else f"{scheme} {number_of_bits}"


def count(value: int) -> str:
    """A large number in thousands, millions or billions, with three digits."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return str(value)


def merge_lines(report: RunReport) -> list[str]:
    """What each step of the merge gave on held-out images, in a sentence."""
    return [
        f"{step.name}: {percent(step.score_before)} → {percent(step.score_after)} on held-out images"
        f"{'' if step.accepted else ', undone'}"
        for step in report.merge_steps
    ]


def seconds(report: RunReport) -> str:
    """Where the time went."""
    timings = report.timings
    cpu = timings.cpu_seconds
    return (
        f"dump {timings.dump_seconds:.1f} s, train {timings.train_seconds:.1f} s, reduce {timings.reduce_seconds:.1f} s, "
        f"total {timings.total_seconds:.1f} s; processor {cpu.teacher + cpu.dump + cpu.train + cpu.reduce:.1f} s"
    )
