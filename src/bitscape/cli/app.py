"""The group of commands, its log lines on stderr, and how errors end it."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from bitscape.cli.bench import bench
from bitscape.cli.demo import demo
from bitscape.cli.evaluate import evaluate
from bitscape.cli.export import export
from bitscape.cli.latency import latency
from bitscape.cli.memory import keep_freed_memory
from bitscape.cli.methods import methods
from bitscape.cli.output import logging_to_stderr, printable_output, stdout_of_first_worker
from bitscape.cli.policy import policy
from bitscape.cli.report import report
from bitscape.cli.search import search
from bitscape.cli.solve import solve
from bitscape.cli.tiers import tiers
from bitscape.cli.train import train
from bitscape.errors import BitscapeError, one_line
from bitscape.version import __version__

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and leave the process with its exit code: 0, 2 for an error, 130 after Ctrl-C."""
    # Read when torch is imported. Beside other busy processes, threads that spin made a search 5 to 60 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_freed_memory()
    code: object = 0
    try:
        with printable_output(), logging_to_stderr(), stdout_of_first_worker():
            code = commands.main(args, prog_name="bitscape", standalone_mode=False)
    except (BitscapeError, OSError, click.ClickException) as error:
        click.echo(f"error: {one_line(_message(error))}", err=True)
        code = EXIT_ERROR
    except click.Abort as interrupt:  # what click makes of Ctrl-C
        click.echo(f"interrupted: {str(interrupt) or 'no result was written; run the command again'}", err=True)
        code = EXIT_INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


@click.group(invoke_without_command=True)
@click.version_option(__version__, prog_name="bitscape", message="%(prog)s %(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Find the bits of each layer of a vision network on a few images; train, evaluate and pack the result.

    \b
    Start with:
      bitscape demo
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _message(error: Exception) -> str:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.format_message()} See `{error.ctx.command_path} --help`."
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


for command in (demo, search, solve, train, evaluate, tiers, export, bench, latency, report, policy, methods):
    commands.add_command(command)
