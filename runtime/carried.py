"""The models that come with the package, by name. Their bundles are made on first use, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.files import check_folder, input_path, sha256, unwritable, user_cache

CHECKPOINTS = {"everyday": "everyday.safetensors", "lite0-shapes": "lite0-shapes.safetensors"}
"""Name -> file in `dynamask/assets`. `everyday` finds everyday things in photos, `lite0-shapes` finds drawn shapes."""
MAKER = "export.carried:make_bundle"
"""`module:function` that makes a bundle with an engine from a checkpoint; found by name, because it needs PyTorch."""
_SOURCES = ("dynamask", "export", "runtime")
"""The packages whose code decides what a bundle holds."""


def bundle_folder(bundle: str | os.PathLike[str]) -> Path:
    """The folder of a bundle: that at the path, or, for a name in `CHECKPOINTS` where no such path exists, the one in the cache.

    That one is made if it is not there yet, which takes some ten seconds and says so on standard error. Of several processes, one makes it
    and the others wait.

    Raises:
        InputError: this installation lacks the checkpoint or a package that makes the bundle, or the cache cannot be written.
        DynaMaskError: the bundle cannot be made.
    """
    path = input_path(bundle)
    if str(bundle) not in CHECKPOINTS or path.exists():
        return path
    name = str(bundle)
    folder = cached_bundle(name)
    if not folder.is_dir():
        _make(name, folder)
    return folder


def carried_checkpoint(name: str) -> Path:
    """The file of a model that comes with the package.

    Raises:
        InputError: this installation lacks it.
    """
    path = _package("dynamask") / "assets" / CHECKPOINTS[name]
    if not path.is_file():
        raise InputError(f"{path} is missing, so this installation has no model {name}: install the package again, or name a checkpoint.")
    return path


def cached_bundle(name: str) -> Path:
    """Where the bundle of a model is kept, made or not. Another checkpoint or other code of the package has another folder.

    Raises:
        InputError: this installation lacks the checkpoint.
    """
    digest = hashlib.sha256(sha256(carried_checkpoint(name)).encode())
    for package in _SOURCES:
        for file in sorted(_package(package).rglob("*.py")):
            digest.update(file.read_bytes())
    return user_cache("bundles") / f"{name}-{digest.hexdigest()[:16]}"


def models() -> dict[str, dict[str, Any]]:
    """Of each name: `checkpoint` (whether this installation has it), `bundle` (its folder, or None) and `made`."""
    found: dict[str, dict[str, Any]] = {}
    for name in CHECKPOINTS:
        try:
            folder = cached_bundle(name)
        except InputError:
            found[name] = {"checkpoint": False, "bundle": None, "made": False}
            continue
        found[name] = {"checkpoint": True, "bundle": str(folder), "made": folder.is_dir()}
    return found


def _package(name: str) -> Path:
    """The folder of a package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations is not None, name
    return Path(next(iter(spec.submodule_search_locations)))


def _make(name: str, folder: Path) -> None:
    checkpoint = carried_checkpoint(name)
    check_folder(folder.parent)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{folder.name}.lock"):
            if folder.is_dir():
                return
            print(f"Making the bundle of the model {name}, once, in {folder} …", file=sys.stderr)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                _maker(name)(checkpoint, temporary / "bundle")
                (temporary / "bundle").rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def _maker(name: str) -> Any:
    module, _, function = MAKER.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise InputError(
            f"The bundle of the model {name} is made on first use, which needs {error.name}, and that is not installed: run "
            "pip install -e '.[export]' in the checkout, or copy a bundle from another machine and give its folder."
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock in the block. The system frees the lock of a process that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
