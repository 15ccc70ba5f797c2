"""The command line: reads arguments and the environment, calls the phases, prints, and exits with the contract's code.

Commands import what they need when they run, so that `--help` is instant and `plan` works without Ray.
"""

from __future__ import annotations

import sys
import traceback

import click

from dcq_ray.cli.baseline import baseline
from dcq_ray.cli.export import export
from dcq_ray.cli.gc import gc
from dcq_ray.cli.inspect import evaluate, ls, report, schema, status
from dcq_ray.cli.prepare import plan, teacher
from dcq_ray.cli.run import run
from dcq_ray.cli.search import search
from dcq_ray.cli.submit import attach, submit
from dcq_ray.errors import DcqError
from dcq_ray.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dcq-ray")
def cli() -> None:
    """Quantize a pretrained PyTorch network to 1- to 8-bit weights, section by section, in parallel.

    \b
    Example:
      dcq-ray run jobs/quickstart.yaml
    """


for _command in (
    run,
    search,
    plan,
    teacher,
    baseline,
    report,
    status,
    ls,
    evaluate,
    schema,
    gc,
    export,
    submit,
    attach,
):
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or job, 3 gate missed, 75 busy, 130/143 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        code = cli.main(arguments, prog_name="dcq-ray", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        _fail("interrupted", 130, debug)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except DcqError as error:
        _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to resume", 130, debug)
    except BrokenPipeError:
        sys.exit(1)
    except MemoryError:
        _fail("out of memory; use a smaller batch_size, fewer train_samples, or storage.dtype: float16", 1, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    click.echo(f"dcq-ray: {message}", err=True)
    sys.exit(code)
