"""Where files live: a local folder or any `pyarrow.fs` URI, with atomic commit, run and boundary locks, and uses.

    store         `Store`, the one way to read and write files; every failure is a StorageError that names the file
    local_files   the same on a local (or network-mounted) folder: temporary name, fsync, rename
    object_files  the same on a `pyarrow.fs` file system such as S3: collected here, uploaded whole; no rename
    file_systems  the file system of a URI, with our timeouts
    copies        local copies of remote files, under a limit of bytes
    retries       begins again what a network broke off
    locks         one live run a run directory, one writer a boundary; the epoch that tells a new driver from an old one
    leases        the locks' files, and locks that expire, for storage that has no locks
    uses          which runs use a boundary

It must not know what the files hold.
"""

from dcq_ray.storage.copies import Copies, copied, local_copies
from dcq_ray.storage.local_files import StoredFile
from dcq_ray.storage.locks import current_epoch, hold_boundary, hold_run, run_is_held
from dcq_ray.storage.store import Store, open_store
from dcq_ray.storage.uses import Use, add_use, read_uses, remove_use

__all__ = [
    "Copies",
    "Store",
    "StoredFile",
    "Use",
    "add_use",
    "copied",
    "current_epoch",
    "hold_boundary",
    "hold_run",
    "local_copies",
    "open_store",
    "read_uses",
    "remove_use",
    "run_is_held",
]
