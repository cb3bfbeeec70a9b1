"""`dynamask doctor`."""

from __future__ import annotations

from typing import Any

from cli.options import Json


def doctor(
    json: Json = None,
) -> None:
    """List the targets that this machine can run, and how to install the others.

    Example: dynamask doctor --json machine.json
    """
    from runtime.doctor import examine
    from runtime.files import write_json

    result = examine()
    if json is not None:
        write_json(json, result)
    _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = result["machine"]
    console = Console(markup=False, highlight=False)
    console.print(f"DynaMask {result['dynamask']}, Python {machine['python']}, {machine['system']}")
    memory = f"{machine['memory_gib']:.1f} GiB of memory" if machine["memory_gib"] is not None else "memory unknown"
    console.print(f"{machine['cpu']}: {machine['cores']} cores usable, {memory}")
    for gpu in result["gpus"]:
        console.print(f"{gpu['name']}: {gpu['memory_mib']} MiB, driver {gpu['driver']}, compute capability {gpu['compute_capability']}")
    if not result["gpus"]:
        console.print("no NVIDIA GPU found")
    for name, model in result["models"].items():
        console.print(f"model {name}: {_model(model)}", soft_wrap=True)
    table = Table()
    for column in ("target", "version", "runs here", "notes"):
        table.add_column(column)
    for name, target in result["targets"].items():
        table.add_row(name, target["version"] or "–", "yes" if target["available"] else "no", target["note"], end_section=True)
    console.print(table)


def _model(model: dict[str, Any]) -> str:
    if not model["checkpoint"]:
        return "not in this installation"
    return f"its bundle is {model['bundle']}" if model["made"] else f"its bundle will be made on first use, as {model['bundle']}"
