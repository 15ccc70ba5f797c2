"""Trying again what a network broke off: whole operations, each of which may be done twice without harm.

The file system's own client tries each request again first; what gets here has failed so often already.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

MAX_TRIES = 4
FIRST_PAUSE_SECONDS = 1.0
"""Doubled after every failure."""
GIVE_UP_SECONDS = 120.0
"""Nothing is begun again so long after the first try."""

# Of the AWS client's messages; an unknown failure may pass, and costs seconds if it does not.
_LASTING = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|NO_SUCH_KEY|INVALID_|SIGNATURE|NOT_FOUND|HTTP status 4(?!08|29)|Bucket .* not found"
)

T = TypeVar("T")
_logger = logging.getLogger(__name__)


def tried_again(operation: Callable[[], T], max_tries: int | None = None) -> T:
    """What an idempotent operation gives, begun again where it fails with an OSError that may pass; raises the last one.

    `max_tries`: None for `MAX_TRIES`.
    """
    started = time.monotonic()
    pause_seconds = FIRST_PAUSE_SECONDS
    max_tries = MAX_TRIES if max_tries is None else max_tries
    for number in range(1, max_tries + 1):
        try:
            return operation()
        except OSError as error:
            late = time.monotonic() - started + pause_seconds > GIVE_UP_SECONDS
            if number == max_tries or late or not may_pass(error):
                if number > 1:
                    raise OSError(f"{error} (tried {number} times)") from error
                raise
            _logger.info("tried again in %g s: %s", pause_seconds, error)
        time.sleep(pause_seconds)
        pause_seconds *= 2
    raise AssertionError("unreachable: the last try returns or raises")


def may_pass(error: OSError) -> bool:
    """Whether an error may be the network's or a busy server's; an errno is this machine's own, or says what is missing."""
    return error.errno is None and _LASTING.search(str(error)) is None
