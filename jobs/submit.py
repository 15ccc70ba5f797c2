"""What `ray submit CLUSTER.yaml jobs/submit.py -- JOB.yaml …` runs on a cluster's head: `dcq-ray run` in the mounted project.

Ray puts this file alone into the head's home, and runs it there; so paths are resolved against the project that the cluster's
file mounts at ~/dcq-ray (DCQ_PROJECT names another place), whose arguments and exit code are those of `dcq-ray run`. Its name is
neither ray.py nor dcq_ray.py, which would hide those packages.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Become `python -m dcq_ray run …` in the project's folder, so that signals and exit codes are its own."""
    project = Path(os.environ.get("DCQ_PROJECT") or Path.home() / "dcq-ray")
    if not project.is_dir():
        sys.exit(
            f"jobs/submit.py: no project at {project}; mount it there by the cluster's file_mounts, or set DCQ_PROJECT"
        )
    os.chdir(project)
    arguments = sys.argv[1:]
    if "--address" not in arguments:
        arguments += ["--address", "auto"]
    os.execv(sys.executable, [sys.executable, "-m", "dcq_ray", "run", *arguments])


if __name__ == "__main__":
    main()
