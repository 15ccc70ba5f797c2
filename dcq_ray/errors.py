"""The exceptions that dcq-ray raises, and the exit code that each one means.

    DcqError                    1   whatever stops a run for a reason we can name
    ├── UsageError              2   a wrong command line
    ├── JobError                2   an invalid job file: every mistake, one a line
    ├── DataError               1   images or labels missing, malformed, too few
    ├── TeacherError            1   the teacher cannot be built, loaded, fitted or trusted
    ├── PartitionError          1   the teacher cannot be traced or cut as asked
    ├── QuantizeError           1   a quantizer cannot be put on a module
    ├── ExportError             1   an exported file cannot be made, is damaged, or differs from its student
    ├── StorageError            1   a file or folder cannot be read or written
    │   └── ShardError          1   a shard or its manifest is missing, damaged or foreign
    ├── SectionTrainingError    1   a section diverged or its worker failed
    ├── StaleRunError           1   a newer driver has taken this run over
    ├── ClusterError            1   Ray cannot be reached or has not the resources asked for
    ├── QualityGateMissed       3   the student lost more than was allowed
    ├── RunBusyError           75   another live run holds this run directory
    └── RunInterrupted        130   stopped by SIGINT; running it again resumes
        └── RunTerminated     143   stopped by SIGTERM; likewise

Every constructor takes one string, so that an exception raised in a Ray actor reaches the driver with its content. The
string is one paragraph: what, where, got, expected, remedy.
"""

from __future__ import annotations

import signal


class DcqError(Exception):
    """Whatever stops a run for a reason that we can name."""

    exit_code = 1


class UsageError(DcqError):
    """A wrong command line."""

    exit_code = 2


class JobError(DcqError):
    """An invalid job file; the message holds every mistake, one a line."""

    exit_code = 2


class DataError(DcqError):
    """Images or labels that are missing, malformed or too few."""


class TeacherError(DcqError):
    """A teacher that cannot be built, loaded, fitted or trusted."""


class PartitionError(DcqError):
    """A teacher that cannot be traced, or not be cut as asked."""


class QuantizeError(DcqError):
    """A quantizer that cannot be put on a module."""


class ExportError(DcqError):
    """An exported file that cannot be made, is damaged, or gives other results than its student."""


class StorageError(DcqError):
    """A file or folder that cannot be read or written."""


class ShardError(StorageError):
    """A shard or manifest that is missing, damaged or foreign."""


class SectionTrainingError(DcqError):
    """A section that diverged, or whose worker failed."""


class StaleRunError(DcqError):
    """A newer driver has taken over the run that this process works for."""


class ClusterError(DcqError):
    """Ray cannot be reached, or has not the resources asked for."""


class QualityGateMissed(DcqError):
    """A finished run whose student lost more accuracy than was allowed."""

    exit_code = 3


class RunBusyError(DcqError):
    """Another live run holds this run directory."""

    exit_code = 75


class RunInterrupted(DcqError):
    """A run stopped by SIGINT; running it again resumes it."""

    exit_code = 128 + signal.SIGINT


class RunTerminated(RunInterrupted):
    """A run stopped by SIGTERM; running it again resumes it."""

    exit_code = 128 + signal.SIGTERM
