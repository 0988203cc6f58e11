"""The group of commands, its log lines on stderr, and how errors end it."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress

import click

from bitscape.cli.analyze import analyze
from bitscape.cli.bench import bench
from bitscape.cli.compress import compress
from bitscape.cli.demo import demo
from bitscape.cli.evaluate import evaluate
from bitscape.cli.export import export
from bitscape.cli.interrupts import EXIT_SIGNAL, INTERRUPTED, interrupting
from bitscape.cli.latency import latency
from bitscape.cli.memory import keep_freed_memory
from bitscape.cli.methods import methods
from bitscape.cli.output import logging_to_stderr, printable_output, stdout_of_first_worker
from bitscape.cli.policy import policy
from bitscape.cli.report import report
from bitscape.cli.search import search
from bitscape.cli.solve import solve
from bitscape.cli.streams import outlived_streams
from bitscape.cli.tiers import tiers
from bitscape.cli.train import train
from bitscape.errors import BitscapeError, first_line, is_out_of_memory, one_line
from bitscape.version import __version__

EXIT_ERROR = 2


def run(args: Sequence[str] | None) -> int:
    """Run a command; return the exit code of the process."""
    # Read when torch is imported. Beside other busy processes, threads that spin made a search 5 to 60 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_freed_memory()
    with interrupting() as received:
        try:
            with outlived_streams(), printable_output(), logging_to_stderr(), stdout_of_first_worker():
                code: object = commands.main(args, prog_name="bitscape", standalone_mode=False)
        except click.Abort as interrupt:  # what click makes of Ctrl-C
            _complain(f"interrupted: {interrupt!s}" if str(interrupt) else INTERRUPTED)
            return EXIT_SIGNAL + next(iter(received), signal.SIGINT)
        except Exception as error:
            if (message := _message(error)) is None:
                raise
            _complain(f"error: {one_line(message)}")
            return EXIT_ERROR
    return code if isinstance(code, int) else 0


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


def _complain(line: str) -> None:
    with suppress(OSError):  # nobody reads it
        click.echo(line, err=True)


def _message(error: Exception) -> str | None:
    """One line for what a user can mend; None for a fault of the program, whose traceback is needed."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.format_message()} See `{error.ctx.command_path} --help`."
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return f"not enough memory: {first_line(error)}; use fewer or smaller images, or a smaller --batch-size"
    return str(error) if isinstance(error, BitscapeError | OSError) else None


for command in (
    *(demo, compress, search, solve, train, evaluate, analyze, tiers, export, bench, latency),
    *(report, policy, methods),
):
    commands.add_command(command)
