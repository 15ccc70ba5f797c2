"""The steps of a run as plain functions, and `run_local`, which composes them in this process.

    prepare -> dump(slices) -> [train(0) … train(n-1)] -> reduce -> report

Every step takes a `RunContext` and opens what it needs from it, so the same functions run here, in a Ray task or in an
actor. The run directory is the state: a step whose valid result lies there is not repeated.
"""

from dcq_ray.phases.checkpoints import checkpoint_positions
from dcq_ray.phases.collect import FIT_DAYS, UNSEEN_DAYS, Collected, Rules, collect
from dcq_ray.phases.committed import section_failure, section_tasks
from dcq_ray.phases.context import Emit, Network, choose_device, ignore_progress, num_at_once, open_network, open_splits
from dcq_ray.phases.dump import DumpedSlice, dump_slices, num_slices
from dcq_ray.phases.footprint import Footprint, dump_footprint, section_footprint
from dcq_ray.phases.gpu_trial import Meter, cuda_card, cuda_meter, kept_gpu_memory, measure_gpu_memory
from dcq_ray.phases.local import run_local, section_done, section_failed
from dcq_ray.phases.objective import section_objective
from dcq_ray.phases.opening import open_run
from dcq_ray.phases.outlook import Outlook, outlook, scaled
from dcq_ray.phases.polish import polish_reached
from dcq_ray.phases.predict import Prediction, SampleCounts, longest_first, predict, sample_counts
from dcq_ray.phases.prepare import Prepared, obtain_teacher, part_top1, plan_job, planning_teacher, prepare
from dcq_ray.phases.reading import needs_images
from dcq_ray.phases.reduce import Finished, TestScores, finish, measure_sections, measure_untrained, measured_section
from dcq_ray.phases.reporting import plan_notes, report_failure, report_success
from dcq_ray.phases.requantized import requantized
from dcq_ray.phases.saving import SaveRequest, StopRequest, checkpoint_store
from dcq_ray.phases.session import (
    RunSession,
    keep_baseline,
    kept_baseline,
    kept_baselines,
    read_report,
    with_baselines,
    write_report,
)
from dcq_ray.phases.stream import Streamed, train_stream
from dcq_ray.phases.stream_saving import restart_tick, saved_tick
from dcq_ray.phases.train import activation_memory_bytes, train_section
from dcq_ray.phases.trial import SectionCosts, try_sections
from dcq_ray.phases.views import recomputes

__all__ = [
    "FIT_DAYS",
    "UNSEEN_DAYS",
    "Collected",
    "DumpedSlice",
    "Emit",
    "Finished",
    "Footprint",
    "Meter",
    "Network",
    "Outlook",
    "Prediction",
    "Prepared",
    "Rules",
    "RunSession",
    "SampleCounts",
    "SaveRequest",
    "SectionCosts",
    "StopRequest",
    "Streamed",
    "TestScores",
    "activation_memory_bytes",
    "checkpoint_positions",
    "checkpoint_store",
    "choose_device",
    "collect",
    "cuda_card",
    "cuda_meter",
    "dump_footprint",
    "dump_slices",
    "finish",
    "ignore_progress",
    "keep_baseline",
    "kept_baseline",
    "kept_baselines",
    "kept_gpu_memory",
    "longest_first",
    "measure_gpu_memory",
    "measure_sections",
    "measure_untrained",
    "measured_section",
    "needs_images",
    "num_at_once",
    "num_slices",
    "obtain_teacher",
    "open_network",
    "open_run",
    "open_splits",
    "outlook",
    "part_top1",
    "plan_job",
    "plan_notes",
    "planning_teacher",
    "polish_reached",
    "predict",
    "prepare",
    "read_report",
    "recomputes",
    "report_failure",
    "report_success",
    "requantized",
    "restart_tick",
    "run_local",
    "sample_counts",
    "saved_tick",
    "scaled",
    "section_done",
    "section_failed",
    "section_failure",
    "section_footprint",
    "section_objective",
    "section_tasks",
    "train_section",
    "train_stream",
    "try_sections",
    "with_baselines",
    "write_report",
]
