"""Commands finish whatever standard output is: closed, left by its reader, full, or without Unicode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(arguments: list[str], redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command under a shell, which does to its standard output and error what `redirect` says."""
    script = f'"$@" {redirect}; exit ${{PIPESTATUS[0]}}'
    variables = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", script, "bash", *arguments], cwd=ROOT, capture_output=True, env=variables)


def code(lines: str) -> list[str]:
    """A command line whose only command runs these lines, and then writes `done` where JSON goes."""
    program = (
        "import sys, typer, cli.main\nfrom pathlib import Path\napp = typer.Typer()\n@app.command()\ndef command(out: Path):\n"
        + "".join(f"    {line}\n" for line in lines.splitlines())
        + "    from runtime.files import write_json\n    write_json(out, 'done')\nsys.exit(cli.main.run(app, 'command'))"
    )
    return [sys.executable, "-c", program]


@pytest.mark.parametrize("redirect", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "| head -1", "2>&1 | true", "> /dev/null"])
def test_files_are_finished_whatever_becomes_of_standard_output(tmp_path: Path, redirect: str) -> None:
    lines = "for i in range(3000): typer.echo(f'line {i} ' + 'x' * 100)\nprint('progress', file=sys.stderr)"
    ran = run([*code(lines), str(tmp_path / "out.json")], redirect)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == "done"
    assert b"Error" not in ran.stderr


def test_no_file_gets_the_number_of_a_closed_descriptor(tmp_path: Path) -> None:
    lines = "file = open(out.with_suffix('.bin'), 'wb')\nimport os; os.write(1, b'stray'); os.write(2, b'stray')"
    assert run([*code(lines), str(tmp_path / "out.json")], ">&- 2>&-").returncode == 0
    assert (tmp_path / "out.bin").read_bytes() == b""


def test_rich_tables_and_progress_survive_a_reader_that_has_gone(tmp_path: Path) -> None:
    lines = (
        "from rich.console import Console; from rich.table import Table\n"
        "for i in range(300):\n    table = Table('a'); table.add_row('x' * 50); Console().print(table)"
    )
    ran = run([*code(lines), str(tmp_path / "out.json")], "| head -1")
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert (tmp_path / "out.json").exists()


def test_a_full_disk_under_standard_output_is_a_failure(tmp_path: Path) -> None:
    ran = run([*code("typer.echo('x')"), str(tmp_path / "out.json")], "> /dev/full")
    assert ran.returncode == 1
    assert ran.stderr.startswith(b"Standard output could not be written (No space left on device): free some space")
    assert (tmp_path / "out.json").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_help_and_tables_print_in_any_encoding(encoding: str) -> None:
    commands = [["--help"], ["stream", "--help"], ["validate", "--help"], ["doctor"], ["flops", "--model", "lite0"]]
    program = f"import sys, cli.main; sys.exit(max([cli.main.main(arguments) for arguments in {commands}]))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert ran.returncode == 0, ran.stderr
    assert "\\u" not in ran.stdout.decode(encoding), "every character that the program prints has a substitute"


def test_other_characters_and_bytes_of_names_are_escaped() -> None:
    from cli.terminal import _replacement

    def replaced(text: str, encoding: str) -> bytes:
        import codecs

        codecs.register_error("dynamask-test", _replacement)
        return text.encode(encoding, "dynamask-test")

    assert replaced("1 → 2 … 3×4 – é ж", "ascii") == rb"1 -> 2 ... 3x4 - \xe9 \u0436"
    assert replaced(os.fsdecode(b"caf\xe9") + " ж", "utf-8") == rb"caf\xe9" + " ж".encode()


def test_names_that_are_no_utf8_are_printed_and_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.json")
    ran = run([*code("typer.echo(f'writes {out}'); print(out, file=sys.stderr)"), str(tmp_path / name)])
    assert ran.returncode == 0
    assert rb"caf\xe9.json" in ran.stdout and rb"caf\xe9.json" in ran.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_streams_that_others_put_in_place_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from cli import terminal

    before: tuple[Any, Any] = sys.stdout, sys.stderr
    terminal.prepare()
    assert (sys.stdout, sys.stderr) == before
    assert terminal.failed_output() is None
