"""The configuration of a service with many streams, from YAML, checked with the line and the field at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from runtime.errors import InputError, shortened
from runtime.streams.address import Address, redacted, source_addresses
from runtime.streams.reader import SourceSettings


class StreamSettings(SourceSettings):
    """One source, or the files of a pattern, and how they are read."""

    source: str = Field(repr=False)
    """A file, a folder, a pattern (`clips/*.mp4`), a URL, `/dev/video0` or `-`. `${NAME}` in a URL is an environment variable."""
    name: str | None = Field(default=None, pattern=r"^[\w.-]{1,60}$")
    """Of the stream, in files, records, metrics and on the page; else made from the source."""

    @field_validator("source")
    @classmethod
    def _known(cls, source: str) -> str:
        try:
            Address(source)
        except InputError as error:
            raise ValueError(str(error)) from None
        return source


class OutputSettings(BaseModel):
    """Where the results go; nothing is written without one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    video: Path | None = None
    """Folder of annotated videos, `<stream>.mp4`."""
    jsonl: Path | None = None
    """Folder of detections, `<stream>.jsonl`."""
    parquet: Path | None = None
    """Folder of Parquet parts, of all streams."""
    mqtt: str | None = Field(default=None, repr=False)
    """`mqtt://host/topic`."""
    publish: str | None = Field(default=None, repr=False)
    """`rtsp://host/path` or `rtmp://host/path`: the annotated videos, `-<stream>` appended where there are several."""

    @field_validator("mqtt", "publish")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        schemes = ("mqtt", "mqtts", "rtsp", "rtsps", "rtmp", "rtmps")
        try:
            if value is not None and Address(value).scheme not in schemes:
                raise ValueError(f"it is no address of a server; take {', '.join(schemes)}")
        except InputError as error:
            raise ValueError(str(error)) from None
        return value


class ServiceSettings(BaseModel):
    """Many streams on one engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    streams: list[StreamSettings] = Field(min_length=1)
    outputs: OutputSettings = OutputSettings()
    grid: str = "routed"
    """The grid policy, as in `dynamask stream --grid`; a budget is kept over each stream by itself."""
    score: float = Field(default=0.3, ge=0, le=1)
    """Instances with this score or less are left out."""

    def named_streams(self) -> dict[str, tuple[Address, StreamSettings]]:
        """Each source's address and settings by the stream's name, which is numbered where it occurs twice.

        Raises:
            InputError: a pattern names no file.
        """
        found = [(address, stream) for stream in self.streams for address in source_addresses(stream.source)]
        names: dict[str, tuple[Address, StreamSettings]] = {}
        for address, stream in found:
            wanted = name = stream.name or address.name
            number = 1
            while name in names:
                number += 1
                name = f"{wanted}-{number}"
            names[name] = (address, stream)
        return names


def load_settings(path: Path) -> ServiceSettings:
    """Read a YAML file of streams.

    Raises:
        InputError: it cannot be read, is no YAML, or a field is wrong; the message has its line, and no credentials.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or 'it is no UTF-8'}); check the file.") from None
    try:
        root, value = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line} is not valid YAML ({getattr(error, 'problem', None) or 'nested too deep'}); correct it.") from None
    try:
        return ServiceSettings.model_validate(value)
    except ValidationError as error:
        raise InputError(_first_fault(path, root, error)) from None


def _first_fault(path: Path, root: yaml.Node | None, error: ValidationError) -> str:
    """The sentence for the first wrong field."""
    # Without the input, which may hold a password.
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part + 1) if isinstance(part, int) else shortened(part) for part in fault["loc"]) or "the file"
    where = f"{path}, line {_line(root, fault['loc'])}"
    if fault["type"] == "missing":
        return f"{where}: the field {field} is missing; docs/streams.md shows a whole file."
    if fault["type"] == "extra_forbidden":
        return f"{where}: there is no field {field}; docs/streams.md shows a whole file."
    reason = redacted(fault["msg"].removeprefix("Value error, ").rstrip("."))
    return f"{where}: {field} is wrong ({reason}); correct it."


def _line(node: yaml.Node | None, place: tuple[Any, ...]) -> int:
    """The line of a field, or of what it is missing in."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in place:
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == part:
                    line, found = key.start_mark.line + 1, value
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line = found.start_mark.line + 1 if found is not None else line
        if found is None:
            return line
        node = found
    return line
