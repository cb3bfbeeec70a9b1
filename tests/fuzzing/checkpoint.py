"""Checkpoints: safetensors files with damaged headers, tensors and configurations."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from dynamask.config import load_config
from dynamask.model import DynaMask, build_model
from dynamask.train.checkpoint import load_model, save_checkpoint
from dynamask.train.learner import load_initial_weights
from runtime.errors import DynaMaskError
from tests.fuzzing import Files
from tests.fuzzing.damage import damaged
from tests.fuzzing.odd import ODD_TEXTS, changed_trees
from tests.tiny import TINY

_CLASSES = [{"id": 1, "name": "circle"}, {"id": 7, "name": "square"}]
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X")
_SIZES = (0, 1, 2, 3, 2**31, 2**62, 2**63)
_METADATA = "__metadata__"


@functools.cache
def sound_model() -> DynaMask:
    """The smallest model, with random weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return build_model(load_config("lite0-shapes", TINY), _CLASSES)


@functools.cache
def sound_file() -> bytes:
    """Its checkpoint."""
    model = sound_model()
    with tempfile.NamedTemporaryFile() as file:
        save_checkpoint(file.name, model, model.config, _CLASSES, half=True)
        return Path(file.name).read_bytes()


def _parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the values of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _joined(header: dict[str, Any], values: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


@st.composite
def _changed_tensors(draw: st.DrawFn, header: dict[str, Any]) -> dict[str, Any]:
    """The header with tensors of another name, type or shape, at other places, or without one."""
    names = [name for name in header if name != _METADATA]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        tensor, change = header[name], draw(st.integers(0, 5))
        if change == 0:
            tensor["dtype"] = draw(st.sampled_from(_DTYPES))
        elif change == 1 and tensor["shape"]:
            tensor["shape"][draw(st.integers(0, len(tensor["shape"]) - 1))] = draw(st.sampled_from(_SIZES))
        elif change == 2:
            tensor["shape"] = draw(st.permutations(tensor["shape"]) | st.just([1, *tensor["shape"]]) | st.just([]))
        elif change == 3:
            other = header[draw(st.sampled_from(names))] if draw(st.booleans()) else tensor
            tensor["data_offsets"] = [other["data_offsets"][0], draw(st.sampled_from([other["data_offsets"][1], *_SIZES]))]
        elif change == 4:
            header[draw(st.sampled_from([*names, *ODD_TEXTS[:12]]))] = header.pop(name)
        else:
            del header[name]
    return header


@st.composite
def inputs(draw: st.DrawFn) -> Files:
    """One checkpoint."""
    header, values = _parts(sound_file())
    change = draw(st.integers(0, 9))
    if change == 0:
        size = 8 + int.from_bytes(sound_file()[:8], "little")
        return Files({"model.safetensors": draw(damaged(sound_file(), [range(8), range(8, size)]))})
    if change == 1:
        return Files({"model.safetensors": _joined(header, draw(damaged(values)))})
    if change < 4:
        return Files({"model.safetensors": _joined(draw(_changed_tensors(header)), values)})
    metadata = header[_METADATA]
    if change == 4:
        name = draw(st.sampled_from(sorted(metadata)))
        metadata[name] = draw(st.sampled_from([*ODD_TEXTS, "[" * 100_000, "{}", "[]", "2"]))
    elif change == 5:
        header[_METADATA] = draw(changed_trees(metadata))
    else:
        name = "classes" if change == 6 else "config"
        tree = json.loads(metadata[name])
        metadata[name] = json.dumps(draw(_enlarged(tree) if change == 7 else changed_trees(tree)))
    return Files({"model.safetensors": _joined(header, values)})


@st.composite
def _enlarged(draw: st.DrawFn, tree: Any) -> Any:
    """The configuration of another model, some of which no memory holds."""
    model = copy.deepcopy(tree["model"])
    name = draw(st.sampled_from([name for name, value in model.items() if isinstance(value, int) and not isinstance(value, bool)]))
    model[name] = draw(st.sampled_from([1, 2, 7, 1000, 2**20, 2**31, 2**40]))
    return {**tree, "model": model}


def check(folder: Path) -> bool:
    """Load the model as `export` does, and as the first weights of a training run."""
    path = folder / "model.safetensors"
    accepted = _is_loaded(path)
    model = sound_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_initial_weights(model, model.config.model_copy(update={"weights": str(path)}), lambda _: None)
    except DynaMaskError as error:
        _check_sentence(error)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "a refused file changed the model"
    model.load_state_dict(before)
    return accepted


def _is_loaded(path: Path) -> bool:
    try:
        model, _, classes = load_model(path)
    except DynaMaskError as error:
        assert str(path) in str(error)
        _check_sentence(error)
        return False
    assert len({entry["id"] for entry in classes}) == len(classes) > 0
    header, values = _parts(path.read_bytes())
    state = model.state_dict()
    assert state.keys() == header.keys() - {_METADATA}
    types: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}
    for name, tensor in state.items():
        start, end = header[name]["data_offsets"]
        assert not tensor.is_floating_point() or header[name]["dtype"].startswith(("F", "BF"))
        if header[name]["dtype"] in types:
            written = np.frombuffer(values[start:end], types[header[name]["dtype"]]).reshape(header[name]["shape"])
            assert np.array_equal(tensor.numpy(), written.astype(tensor.numpy().dtype), equal_nan=tensor.is_floating_point())
    return True


def _check_sentence(error: DynaMaskError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 2000
    str(error).encode()
