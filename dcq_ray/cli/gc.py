"""`dcq-ray gc`: remove from a cache what no run uses."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import click

from dcq_ray.cli.options import debug_option
from dcq_ray.errors import UsageError

if TYPE_CHECKING:
    from dcq_ray.phases import Collected

_DAYS_OF_UNIT = {"": 1.0, "d": 1.0, "w": 7.0, "h": 1 / 24, "m": 1 / 1440}


@click.command(epilog="\b\nExample:\n  dcq-ray gc runs/.cache --older-than 7d --dry-run")
@click.argument("cache_dir", metavar="[CACHE_DIR]", default="runs/.cache")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option(
    "--older-than",
    metavar="AGE",
    help="Only what nobody wrote or used for so long, such as 7d, 12h or 30m; default: 0 for activations, 30d for teachers "
    "and their fits.",
)
@click.option(
    "--forget", multiple=True, metavar="RUN", help="Do not count the uses of this run; may be given several times."
)
@click.option(
    "--unseen-after",
    metavar="AGE",
    default="30d",
    show_default=True,
    help="So long a run counts that cannot be asked, as one in a folder of another machine.",
)
@click.option("--verbose", is_flag=True, help="Say of what stays why it stays.")
@debug_option
def gc(
    cache_dir: str, dry_run: bool, older_than: str | None, forget: tuple[str, ...], unseen_after: str, verbose: bool
) -> None:
    """Remove from a cache the activations, teachers and fits that no run uses.

    A run uses them while it is live or unfinished. Finished runs keep their students and reports; another run of the same
    teacher and images then makes the activations anew.
    """
    days = None if older_than is None else _days("--older-than", older_than)
    unseen_days = _days("--unseen-after", unseen_after)

    from dcq_ray.phases import FIT_DAYS, Rules, collect
    from dcq_ray.storage import open_store

    rules = Rules(
        unused_days=0.0 if days is None else days,
        fit_days=FIT_DAYS if days is None else days,
        unseen_days=unseen_days,
        forgotten=frozenset(open_store(run).uri for run in forget),
        dry_run=dry_run,
    )
    cache = open_store(cache_dir)
    if not cache.list_names():
        # No error: a schedule may come before the first run. But a mistyped folder must not look like a clean one.
        click.echo(f"{cache.uri}: there is no cache, or an empty one", err=True)
    removed: list[Collected] = []
    kept: list[Collected] = []
    for one in collect(cache, rules):
        (removed if one.removed else kept).append(one)
        if one.removed or verbose:
            word = ("would remove" if dry_run else "removed") if one.removed else "kept"
            click.echo(f"{word} {one.kind} {one.name}, {one.num_bytes:,} bytes: {one.reason}")
    for word, ones in (("would remove" if dry_run else "removed", removed), ("kept", kept)):
        click.echo(f"{word} {len(ones)} in all, {sum(one.num_bytes for one in ones):,} bytes")


def _days(option: str, text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([dwhm]?)\s*", text)
    if match is None or not math.isfinite(float(match[1])):
        raise UsageError(
            f"{option} {text!r}: expected an age such as 7d (days), 12h (hours), 30m (minutes) or 2w (weeks)"
        )
    return float(match[1]) * _DAYS_OF_UNIT[match[2]]
