"""`dynamask`: the command line. The commands import other packages only when they run, so that --help is fast."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cli import terminal
from cli.ablate import ablate
from cli.bench import app as bench
from cli.build_engine import build_engine
from cli.calibrate import calibrate
from cli.data import app as data
from cli.demo import demo
from cli.doctor import doctor
from cli.export import export
from cli.finetune import finetune
from cli.flops import flops
from cli.predict import predict
from cli.stream import stream
from cli.train import train
from cli.validate import validate
from runtime import environment
from runtime.errors import INTERRUPTED, DynaMaskError
from runtime.files import failure

EXTRAS = {
    "onnx": "export",
    "onnx_graphsurgeon": "export",
    "onnxscript": "export",
    "safetensors": "train",
    "tensorboard": "train",
    "timm": "train",
    "torch": "train",
    "torchvision": "train",
}
"""Module -> the extra of this package that brings it."""

app = typer.Typer(
    name="dynamask",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "From nothing to a video: [bold]dynamask demo[/bold]. Step by step: [bold]train → export → build-engine → stream[/bold]. "
        "Every command takes --json FILE, and exits with 0, 2 (bad input) or 1 (failure)."
    ),
)

app.command(rich_help_panel="Begin")(demo)
app.command(rich_help_panel="Begin")(doctor)
app.add_typer(data, name="data", rich_help_panel="Make")
app.command(rich_help_panel="Make")(finetune)
app.command(rich_help_panel="Make")(train)
app.command(rich_help_panel="Make")(export)
app.command("build-engine", rich_help_panel="Make")(build_engine)
app.command(rich_help_panel="Make")(calibrate)
app.command(rich_help_panel="Run")(predict)
app.command(rich_help_panel="Run")(stream)
app.command(rich_help_panel="Measure")(validate)
app.add_typer(bench, name="bench", rich_help_panel="Measure")
app.command(rich_help_panel="Measure")(flops)
app.command(rich_help_panel="Measure")(ablate)


def _print_version(asked: bool) -> None:
    if asked:
        from dynamask import __version__

        typer.echo(f"dynamask {__version__}")
        raise typer.Exit


@app.callback()
def dynamask(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Instance segmentation in which the mask of each instance gets the resolution that it needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dynamask` and return its exit status, as `run` does."""
    return run(app, "dynamask", arguments)


def run(command: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0, 2 on a wrong call or bad input, 1 on failure, 130 on Ctrl-C.

    An error is one sentence on standard error; `DYNAMASK_TRACEBACK=1` shows the traceback too. Where standard output is closed or its
    reader goes away (`| head`), the command still finishes its files, and its status is the usual one; a full disk under standard output
    is a failure.

    Args:
        name: the program's name, for its help and errors.
        arguments: the process's own by default.
    """
    terminal.prepare()
    environment.prepare()
    try:
        status = command(args=arguments, prog_name=name, standalone_mode=False) or 0
        sys.stdout.flush()
    except typer.exceptions.TyperException as error:
        return _fail(_usage_sentence(error), error.exit_code)
    except DynaMaskError as error:
        return _fail(str(error), error.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        return _fail(_unexpected_sentence(error), 1)
    if status == INTERRUPTED:
        return _fail("Interrupted: finished files are kept, and no half-written file is left.", INTERRUPTED)
    if not status and (lost := terminal.failed_output()) is not None:
        cause, way_out = failure(lost)
        return _fail(f"Standard output could not be written ({cause}): {way_out}.", 1)
    return int(status)


def _fail(sentence: str, status: int) -> int:
    if os.environ.get("DYNAMASK_TRACEBACK"):
        traceback.print_exc()
    typer.echo(sentence, err=True)
    return status


def _usage_sentence(error: typer.exceptions.TyperException) -> str:
    context = getattr(error, "ctx", None)
    message = error.format_message().replace(": Value error, ", ": ")
    if context is None or not message:
        return message
    return f"{message.rstrip('.')}: see {context.command_path} --help."


def _unexpected_sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        return f"This command needs {error.name}, which is not installed: run pip install -e '.[{extra}]' in the checkout."
    if isinstance(error, FileNotFoundError) and error.filename is None and _current_folder_is_gone():
        return "The current folder was removed: change to another one (cd), and run the command again."
    if isinstance(error, OSError) and error.strerror:
        _, way_out = failure(error, "check the path, its permissions and the disk")
        return f"{error.filename or 'A file'} could not be read or written ({error.strerror}): {way_out}."
    if isinstance(error, MemoryError):
        return "There is not enough memory: use a smaller batch, smaller images or fewer workers."
    lines = str(error).splitlines()
    cause = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"An unexpected error ({cause}): please report it with what DYNAMASK_TRACEBACK=1 shows."


def _current_folder_is_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
