"""The bundle: a folder with a model, its manifest, and the engines built from it. Nothing in it is unpickled."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from runtime.carried import CHECKPOINTS, bundle_folder
from runtime.costs import MeasuredCosts
from runtime.errors import InputError
from runtime.files import atomic_path, check_folder, input_path, sha256, unwritable, write_json
from runtime.graph import GRIDS
from runtime.instances import ClassName

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or path.as_posix() in (".", MANIFEST):
        raise ValueError(f"{name!r} is not the name of a file inside the bundle")
    return name


def _every_grid(costs: dict[int, float]) -> dict[int, float]:
    if tuple(sorted(costs)) != GRIDS:
        raise ValueError(f"costs are needed for the grids {GRIDS}")
    return costs


def _paper_grids(grids: tuple[int, ...]) -> tuple[int, ...]:
    if grids != GRIDS:
        raise ValueError(f"{grids} are not the grids {GRIDS}")
    return grids


def _rising(values: tuple[int, int, int]) -> tuple[int, int, int]:
    if not values[0] <= values[1] <= values[2]:
        raise ValueError(f"{values} are not in the order minimum, optimum, maximum")
    return values


def _rising_sides(canvases: tuple[Canvas, Canvas, Canvas]) -> tuple[Canvas, Canvas, Canvas]:
    for sides in zip(*canvases, strict=True):
        _rising(sides)
    return canvases


FileName = Annotated[str, AfterValidator(_inside)]
"""A file's path inside the bundle, with forward slashes."""
Side = Annotated[int, Field(gt=0, multiple_of=32)]
Canvas = tuple[Side, Side]
Count = Annotated[int, Field(gt=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """The hash and size that a file must have."""

    sha256: str
    bytes: int


class Profile(_Strict):
    """The inputs that one run of an engine takes: the minimum, the optimum (for which it is tuned) and the maximum."""

    batch: Annotated[tuple[Count, Count, Count], AfterValidator(_rising)] = (1, 1, 1)
    """Images."""
    canvas: Annotated[tuple[Canvas, Canvas, Canvas], AfterValidator(_rising_sides)]
    """Height and width in pixels; each of them is in that order."""


class EngineEntry(_Strict):
    """An engine built from the bundle's model."""

    files: dict[FileName, FileEntry]
    precision: str
    versions: dict[str, str]
    """Name and version of the libraries that built it."""
    profile: Profile | None = None
    """None: one image on the bundle's canvas."""
    costs: MeasuredCosts | None = None
    """Measured times on one machine (`dynamask calibrate`); None where none were measured."""


class Manifest(_Strict):
    """The content of `manifest.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    preset: str
    """The preset of the model: `lite0`, `r50`."""
    files: dict[FileName, FileEntry] = Field(default_factory=dict)
    """The bundle's files without those of engines; `Bundle.create` fills it."""
    classes: Annotated[list[ClassName], Field(min_length=1)]
    """In the order of the model's labels."""
    canvas: Canvas
    """Height and width, pixels."""
    mean: tuple[Finite, Finite, Finite]
    std: tuple[Positive, Positive, Positive]
    """`mean` and `std` normalise an image: `(x / 255 - mean) / std`, RGB."""
    detections: Count
    """K, the detection slots of the graph."""
    score_threshold: Finite
    grids: Annotated[tuple[int, ...], AfterValidator(_paper_grids)] = GRIDS
    grid_gmacs: Annotated[dict[int, float], AfterValidator(_every_grid)]
    """Grid -> cost in GMAC of the mask of an instance that exits there, counted from the layers, cumulative."""
    msm_gmacs: float
    detector_gmacs: float | None = None
    precision: str = "fp32"
    versions: dict[str, str] = Field(default_factory=dict)
    """Name and version of the libraries that exported it."""
    parity: dict[str, Any] | None = None
    """The differences between the outputs of the graph and of PyTorch at export."""
    engines: dict[str, EngineEntry] = Field(default_factory=dict)
    """Target -> engine."""


class Bundle:
    """An opened bundle: its folder (`path`) and its `manifest`. It holds no file open and needs no closing.

    Example:
        >>> import dynamask
        >>> opened = dynamask.Bundle.open(bundle)
        >>> sorted(opened.manifest.grid_gmacs)
        [14, 28, 56, 112]
        >>> list(opened.manifest.engines)
        ['onnxruntime']
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Open a bundle. With `verify` the model is compared with its hash; the files of an engine are compared in `engine`.

        Args:
            path: its folder, or the name of a model that comes with the package (`runtime.carried.CHECKPOINTS`): `everyday`.
            verify: compare the model with its hash.

        Raises:
            InputError: the folder or a file is missing, the manifest is damaged or of a newer schema, or a file has another size or hash.
        """
        path = bundle_folder(path)
        bundle = cls(path, _read_manifest(path))
        bundle._check(bundle.manifest.files, verify)
        return bundle

    @classmethod
    def create(cls, path: str | os.PathLike[str], manifest: Manifest, files: Mapping[str, str | os.PathLike[str]]) -> Bundle:
        """Make a bundle; an existing one at `path` is replaced when the new one is complete.

        Args:
            files: name inside the bundle -> the file to copy.
            manifest: its `files` and `engines` are set here.

        Raises:
            InputError: something other than a bundle or an empty folder stands at `path`.
            DynaMaskError: the disk is full or the folder cannot be written.
        """
        path = Path(path).absolute()
        check_replaceable(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.mkdir(parents=True)
            for name, source in files.items():
                destination = temporary / _inside(name)
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, destination)
            entries = {name: _file_entry(temporary / name) for name in files}
            manifest = manifest.model_copy(update={"files": entries, "engines": {}})
            _write_manifest(temporary, manifest)
            _replace_folder(temporary, path)
        except OSError as error:
            raise unwritable(path, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(path, manifest)

    def add_engine(
        self, target: str, files: Mapping[str, bytes | Path], precision: str, versions: Mapping[str, str], profile: Profile | None = None
    ) -> EngineEntry:
        """Add an engine as `engines/<target>/`; it replaces an earlier one for that target.

        Args:
            files: name inside that folder -> content, or the file to copy.
            precision: `fp32`, …
            versions: name -> version of the libraries that built it.
            profile: the inputs of one run; None for one image on the bundle's canvas.

        Raises:
            DynaMaskError: the disk is full or the folder cannot be written; the bundle then has no engine for the target.
        """
        # The manifest does not list the engine while its files change: an interruption leaves a bundle that still opens.
        others = {name: entry for name, entry in self.manifest.engines.items() if name != target}
        self._set_engines(others)
        folder = self.path / "engines" / target
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in files.items():
            with atomic_path(folder / _inside(name)) as temporary:
                if isinstance(content, bytes):
                    temporary.write_bytes(content)
                else:
                    shutil.copyfile(content, temporary)
        entries = {f"engines/{target}/{name}": _file_entry(folder / name) for name in files}
        entry = EngineEntry(files=entries, precision=precision, versions=dict(versions), profile=profile)
        self._set_engines({**others, target: entry})
        return entry

    def engine(self, target: str, verify: bool = True) -> EngineEntry:
        """The engine for a target; `bundle.path / name` is the path of each `name` in its `files`.

        Args:
            target: `onnxruntime`, `tensorrt-rtx` or `tensorrt`.
            verify: compare its files with their hashes.

        Raises:
            InputError: it was not built, or one of its files is missing or has another size or hash.
        """
        entry = self.manifest.engines.get(target)
        if entry is None:
            built = f" (built: {', '.join(self.manifest.engines)})" if self.manifest.engines else ""
            raise InputError(
                f"{self.path} holds no engine for {target}{built}: not built; run dynamask build-engine {self.path} --target {target}."
            )
        self._check(entry.files, verify, f"build it again with dynamask build-engine {self.path} --target {target}.")
        return entry

    def set_costs(self, target: str, costs: MeasuredCosts) -> None:
        """Keep the measured times of the engine for a target; they replace earlier ones.

        Raises:
            InputError: no engine was built for it.
            DynaMaskError: the disk is full or the folder cannot be written; the manifest stays as it was.
        """
        entry = self.engine(target, verify=False).model_copy(update={"costs": costs})
        self._set_engines({**self.manifest.engines, target: entry})

    def _set_engines(self, engines: dict[str, EngineEntry]) -> None:
        manifest = self.manifest.model_copy(update={"engines": engines})
        _write_manifest(self.path, manifest)
        self.manifest = manifest

    def _check(self, files: Mapping[str, FileEntry], verify: bool, remedy: str = "export the bundle again.") -> None:
        for name, entry in files.items():
            file = self.path / name
            try:
                size = file.stat().st_size if file.is_file() else None
                fits = size == entry.bytes and (not verify or sha256(file) == entry.sha256)
            except OSError as error:
                raise InputError(f"{file} could not be read ({error.strerror}); check its permissions.") from error
            if size is None:
                raise InputError(f"{file} is missing; {remedy}")
            if not fits:
                raise InputError(f"{file} was changed or damaged: its size or SHA-256 is not what the manifest says; {remedy}")


def _read_manifest(path: Path) -> Manifest:
    if not input_path(path).is_dir():
        names = ", ".join(CHECKPOINTS)
        raise InputError(f"{path} is not a folder; give a bundle, as dynamask export writes it, or the name of a model: {names}.")
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"{path} holds no {MANIFEST}, so it is not a bundle; make one with dynamask export.")
    try:
        fields = json.loads(file.read_bytes())
    except RecursionError:
        raise InputError(f"{file} is nested too deeply for a bundle's manifest; export the bundle again.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} could not be read as JSON ({error}); export the bundle again.") from error
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(f"{file} is of schema {version}, and this version reads up to {SCHEMA_VERSION}; update dynamask or export again.")
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "its content"
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{file} is not a bundle's manifest: {field}: {reason}; export the bundle again.") from error


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def _file_entry(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256(path), bytes=path.stat().st_size)


def check_replaceable(path: Path) -> None:
    """Check that a bundle can be written at `path`, before any work is done.

    Raises:
        InputError: something other than a bundle or an empty folder stands there, or its folder cannot be made or written.
    """
    check_folder(path.absolute().parent)
    if input_path(path).is_dir():
        if not (path / MANIFEST).is_file() and any(path.iterdir()):
            raise InputError(f"{path} is a folder that is not a bundle, so it is not replaced; give another folder.")
    elif path.exists():
        raise InputError(f"{path} is a file; give a folder for the bundle.")


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = new.with_name(new.name + ".old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
