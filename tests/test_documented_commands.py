"""Every `dynamask` command that README and docs show: command, options and values exist; the cheap ones run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

import cli.main
from cli.train import parse_assignments
from dynamask.config import CONFIGS, PRESETS, load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
APP: Any = typer.main.get_command(cli.main.app)
CHEAP = {("flops",), ("doctor",), ("data", "prepare")}
"""Commands that are run as they are shown."""
ELLIPSIS = {"…", "..."}


class Shown(NamedTuple):
    """A command line in a page, without the word `dynamask`."""

    page: Path
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name} {' '.join(self.arguments[:2])}"


def code_blocks(text: str) -> Iterator[str]:
    """Blocks of shell that name a command of `dynamask`: fenced ones, and those indented by four spaces."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    blocks = [match[2] for match in fence.finditer(text) if match[1] in ("", "bash", "console", "sh", "shell")]
    blocks += [match[1] for match in re.finditer(r"(?:\A|\n\n)((?:    .*(?:\n|\Z))+)", fence.sub("", text))]
    yield from (block for block in blocks if re.search(r"\bdynamask [a-z]", block))


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command in a block; variables that it assigns are put in."""
    joined = re.sub(r"(^|\s)#.*$", "", block.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(joined, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    variables: dict[str, list[str]] = {}
    for token in [*lexer, "\n"]:
        if not set(token) <= set(";&|\n"):
            name, equals, value = token.partition("=")
            if not words and equals and " " in value and name.isidentifier():
                variables[f"${name}"] = shlex.split(value)
            else:
                words += variables.get(token, [token])
        elif words:
            yield words
            words = []


def shown_commands() -> list[Shown]:
    """The command lines in code blocks."""
    found = []
    for page in PAGES:
        for block in code_blocks(page.read_text(encoding="utf-8")):
            for words in commands(block):
                if "dynamask" in words:
                    arguments = words[words.index("dynamask") + 1 :]
                    found.append(Shown(page, tuple(word for word in arguments if word not in ELLIPSIS)))
    return found


def mentioned_commands() -> list[Shown]:
    """The command lines within sentences and tables, in backticks."""
    return [
        Shown(page, tuple(word for word in shlex.split(match[1]) if word not in ELLIPSIS))
        for page in PAGES
        for match in re.finditer(r"`dynamask ([a-z-][^`]*)`", page.read_text(encoding="utf-8"))
        if "→" not in match[1]
    ]


def resolve(shown: Shown) -> tuple[tuple[str, ...], Any, list[str]]:
    """The command's path, the command, and the arguments behind it."""
    node, arguments, path = APP, list(shown.arguments), []
    while hasattr(node, "commands") and arguments and not arguments[0].startswith("-") and arguments[0] != "COMMAND":
        name = arguments.pop(0)
        assert name in node.commands, f"{shown.page} shows {shown.arguments}: {name} is no command"
        node = node.commands[name]
        path.append(name)
    return tuple(path), node, arguments


def values(arguments: list[str], option: str) -> list[str]:
    return [arguments[i + 1] for i, word in enumerate(arguments[:-1]) if word == option]


def test_pages_show_commands() -> None:
    """The parser finds what a reader sees: continued lines, several commands in a line, variables."""
    block = """
    TRY="torchrun --no-python dynamask train --config a
        --set b=1"
    $TRY --output c \\
        --resume   # again
    dynamask export c d && dynamask build-engine d
    """
    assert list(commands(block)) == [
        ["torchrun", "--no-python", "dynamask", "train", "--config", "a", "--set", "b=1", "--output", "c", "--resume"],
        ["dynamask", "export", "c", "d"],
        ["dynamask", "build-engine", "d"],
    ]
    assert len(shown_commands()) > 30
    assert len(mentioned_commands()) > 20


@pytest.mark.parametrize("shown", shown_commands(), ids=str)
def test_a_shown_command_is_a_valid_call(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, command, arguments = resolve(shown)
    for word in arguments:
        if word.startswith(("configs/", "dynamask/", "docs/", "examples/")):
            assert (ROOT / word).exists(), f"{word} does not exist"
    for model in [*values(arguments, "--model"), *values(arguments, "--preset")]:
        assert model in PRESETS
    monkeypatch.chdir(tmp_path)  # a callback may make the folder of a result
    command.make_context(" ".join(path), list(arguments))
    if path == ("train",):
        configs = values(arguments, "--config")
        assert configs or "--resume" in arguments
        weights = [f"weights={value}" for value in values(arguments, "--weights")]
        load_config(*configs or ["lite0-shapes"], parse_assignments([*weights, *values(arguments, "--set")]))


@pytest.mark.parametrize("shown", mentioned_commands(), ids=str)
def test_a_mentioned_command_and_its_options_exist(shown: Shown) -> None:
    _, command, arguments = resolve(shown)
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for word in arguments:
        if word.startswith("--"):
            assert word in options, f"{word} is no option"
    for config in values(arguments, "--config"):
        assert config in CONFIGS or config.isupper()


@pytest.mark.parametrize("shown", [shown for shown in shown_commands() if resolve(shown)[0] in CHEAP], ids=str)
def test_a_cheap_command_runs(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main.main(list(shown.arguments)) == 0


def test_readme_lists_every_command() -> None:
    """The table of commands in README has all commands and subcommands, and no others."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = {
        resolve(Shown(ROOT / "README.md", tuple(row.split())))[0] for row in re.findall(r"^\| `dynamask ([^`]+)`", readme, re.MULTILINE)
    }
    existing = {
        (name, inner) if hasattr(command, "commands") else (name,)
        for name, command in APP.commands.items()
        for inner in getattr(command, "commands", [""])
    }
    assert listed == existing
