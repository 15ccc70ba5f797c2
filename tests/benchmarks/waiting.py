"""A section's worker that waits instead of training: what `scale.py` puts in the place of `SectionWorker`.

It takes the same calls and leaves the same files: checkpoints of the size of weights and Adam's two moments, weights in an
attempt of its own, last the result that names it, all under the driver's lease. It imports no torch, so that 64 of it fit on one
machine; its files' contents are zeros.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dcq_ray.errors import StaleRunError
from dcq_ray.records import Progress, RunContext, SectionResult, SectionTask, seal_json
from dcq_ray.storage import Store, current_epoch, open_store

SECONDS_BETWEEN_REPORTS = 0.25
SECONDS_BETWEEN_LOOKS = 0.05
BYTES_PER_PARAMETER = 4
# Weights, and Adam's two moments.
CHECKPOINT_COPIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """What the workers of a simulated cluster are told."""

    seconds: Mapping[int, float]
    """Of each section's training."""
    num_steps: int
    """Of each section's training, as it reports them."""
    num_workers: int
    """So many begin together, once all are ready."""
    ready_folder: str
    """Where every worker leaves a file as it is ready."""


class WaitingWorker:
    """Waits as long as a section's training takes, and commits as it does; a subclass names the `waits`."""

    waits: Waits

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._progress: Progress | None = None
        if "torch" in sys.modules:
            raise RuntimeError("a waiting worker has imported torch, and 64 of them would not fit")
        Path(self.waits.ready_folder, f"{os.getpid()}-{uuid.uuid4().hex}").touch()

    def progress(self) -> Progress | None:
        """The latest line of the work."""
        return self._progress

    def save(self, timeout_seconds: float) -> bool:
        """Say that nothing was saved."""
        return False

    def train(self, task: SectionTask, num_at_once: int, restarts: int) -> SectionResult:
        """Wait, save now and then, commit."""
        while len(os.listdir(self.waits.ready_folder)) < self.waits.num_workers:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        store = open_store(self._context.run_dir).child("sections", f"{task.index:02d}")
        checkpoints = store.child("checkpoints", task.digest)
        num_bytes = BYTES_PER_PARAMETER * self._context.plan.sections[task.index].num_parameters
        started = saved = time.monotonic()
        self._refuse_stale()
        total, seconds = self.waits.num_steps, self.waits.seconds[task.index]
        while (waited := time.monotonic() - started) < seconds:
            done = int(total * waited / seconds)
            self._progress = Progress(phase="train", index=task.index, done=done, total=total, unit="steps", loss=0.0)
            if time.monotonic() - saved >= self._context.job.storage.checkpoint_seconds:
                saved = time.monotonic()
                self._save(checkpoints, done, num_bytes)
            time.sleep(min(SECONDS_BETWEEN_REPORTS, max(0.0, seconds - (time.monotonic() - started))))
        return self._commit(store, task, num_bytes, restarts, time.monotonic() - started)

    def _refuse_stale(self) -> None:
        epoch = current_epoch(open_store(self._context.run_dir))
        if epoch != self._context.epoch:
            raise StaleRunError(f"{self._context.run_dir}: lease {self._context.epoch} was replaced by {epoch}")

    def _save(self, store: Store, num_steps: int, num_bytes: int) -> None:
        """As `save_checkpoint` does: tensors, the mark, and then no older ones; with the lease looked at before each."""
        name = f"{num_steps:010d}-{uuid.uuid4().hex[:8]}"
        self._refuse_stale()
        store.write_bytes(f"{name}.safetensors", bytes(CHECKPOINT_COPIES * num_bytes))
        self._refuse_stale()
        store.write_bytes(f"{name}.json", b"{}")
        self._refuse_stale()
        for old in sorted(set(store.list_names()) - {f"{name}.json", f"{name}.safetensors"}):
            store.delete(old)

    def _commit(self, store: Store, task: SectionTask, num_bytes: int, restarts: int, seconds: float) -> SectionResult:
        """As `commit_section` does, and removes the checkpoints."""
        attempt, content = f"{self._context.epoch}-{uuid.uuid4().hex[:8]}", bytes(num_bytes)
        store.child(attempt).write_bytes("weights.safetensors", content)
        result = SectionResult(
            index=task.index,
            task_digest=task.digest,
            epoch=self._context.epoch,
            attempt=attempt,
            weights_sha256=hashlib.sha256(content).hexdigest(),
            initial_loss=0.0,
            final_loss=0.0,
            num_steps=self.waits.num_steps,
            num_sample_passes=0,
            seconds=seconds,
            cpu_seconds=0.0,
            input_wait_seconds=0.0,
            device="cpu",
            restarts=restarts,
            loss_curve=(),
        )
        self._refuse_stale()
        store.write_bytes("result.json", seal_json(result))
        store.child("checkpoints").delete_tree()
        return result
