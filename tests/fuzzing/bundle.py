"""Bundles: damaged and changed manifests and models. In most, hashes fit what was changed, so that all further checks are reached."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st

from export.onnxruntime_engine import build_onnxruntime
from runtime.bundle import MANIFEST, MODEL, Bundle
from runtime.errors import DynaMaskError
from runtime.predictor import load
from tests.fuzzing import Files
from tests.fuzzing.damage import damaged
from tests.fuzzing.odd import ODD_TEXTS, changed_trees
from tests.runtime import synthetic_bundle

_ENGINE_FILES = ("engines/onnxruntime/detector.onnx", "engines/onnxruntime/masks.onnx")
_OPERATORS = (
    "Add",
    "Cast",
    "Concat",
    "ConstantOfShape",
    "Expand",
    "Gather",
    "Identity",
    "Loop",
    "NonZero",
    "Range",
    "Reshape",
    "Tile",
    "None",
)
_SIZES = (-(2**63), -1, 0, 1, 7, 2**16, 2**31 - 1, 2**40, 2**63 - 1)


@functools.cache
def sound_files() -> Files:
    """A bundle whose model has known boxes and masks, with its ONNX Runtime engine."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = synthetic_bundle.create(Path(folder) / "bundle")
        build_onnxruntime(bundle)
        return Files({str(path.relative_to(bundle.path)): path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()})


def _with_hashes(tree: Any, files: Files) -> Any:
    """The manifest with the sizes and hashes of the files."""
    for entries in (tree["files"], *(engine["files"] for engine in tree["engines"].values())):
        for name in entries:
            entries[name] = {"sha256": hashlib.sha256(files[name]).hexdigest(), "bytes": len(files[name])}
    return tree


@st.composite
def _changed_models(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of an ONNX graph that is still one: its nodes, attributes, constants, and tensors' shapes and types are changed."""
    model = onnx.load_from_string(content)
    graph = model.graph
    for _ in range(draw(st.integers(1, 2))):
        change = draw(st.integers(0, 9))
        values = [*graph.input, *graph.output, *graph.value_info]
        if change < 4 and graph.node:
            _change_node(draw, graph, draw(st.integers(0, len(graph.node) - 1)))
        elif change < 6 and graph.initializer:
            _change_constant(draw, draw(st.sampled_from(list(graph.initializer))))
        elif change < 8 and values:
            value = draw(st.sampled_from(values))
            if value.type.tensor_type.shape.dim and draw(st.booleans()):
                draw(st.sampled_from(list(value.type.tensor_type.shape.dim))).dim_value = draw(st.sampled_from(_SIZES))
            elif draw(st.booleans()):
                value.type.tensor_type.elem_type = draw(st.integers(0, 24))
            else:
                value.name = draw(st.sampled_from(["", "image", "scores", "labels", "masks_14"]))
        elif change == 8:
            names = (graph.input, graph.output, graph.node, graph.initializer)[draw(st.integers(0, 3))]
            if names:
                del names[draw(st.integers(0, len(names) - 1))]
        else:
            model.opset_import[0].version = draw(st.sampled_from([-1, 0, 1, 9, 13, 24, 2**40]))
    return bytes(model.SerializeToString())


def _change_node(draw: st.DrawFn, graph: onnx.GraphProto, index: int) -> None:
    node = graph.node[index]
    change = draw(st.integers(0, 4))
    if change == 0:
        node.op_type = draw(st.sampled_from(_OPERATORS))
    elif change == 1 and node.attribute:
        attribute = draw(st.sampled_from(list(node.attribute)))
        attribute.i = draw(st.sampled_from(_SIZES))
        if attribute.ints:
            attribute.ints[draw(st.integers(0, len(attribute.ints) - 1))] = draw(st.sampled_from(_SIZES))
    elif change == 2 and node.input:
        tensors = [name for other in graph.node for name in (*other.input, *other.output)]
        node.input[draw(st.integers(0, len(node.input) - 1))] = draw(st.sampled_from([*tensors, "", "nothing"]))
    elif change == 3:
        graph.node.append(copy.deepcopy(node))
    elif node.output:
        node.output[0] = draw(st.sampled_from(["", "boxes", "new"]))


def _change_constant(draw: st.DrawFn, constant: onnx.TensorProto) -> None:
    change = draw(st.integers(0, 4))
    if change == 0:
        constant.data_type = draw(st.integers(0, 24))
    elif change == 1:
        constant.dims.append(draw(st.sampled_from(_SIZES)))
    elif change == 2 and constant.dims:
        constant.dims[0] = draw(st.sampled_from(_SIZES))
    elif change == 3 and constant.raw_data:
        constant.raw_data = draw(damaged(constant.raw_data))
    else:
        constant.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": draw(st.sampled_from(ODD_TEXTS[:12])), "offset": "0", "length": "8"}.items():
            constant.external_data.add(key=key, value=value)


@st.composite
def inputs(draw: st.DrawFn) -> Files:
    """The files of a bundle."""
    files = Files(sound_files())
    tree = json.loads(files[MANIFEST])
    change = draw(st.integers(0, 9))
    if change == 0:
        files[MANIFEST] = draw(damaged(files[MANIFEST]) | st.sampled_from([b"[" * 100_000, b'{"parity": ' * 2000]))
        return files
    if change == 1:
        name = draw(st.sampled_from(sorted(files)))
        if draw(st.booleans()):
            del files[name]
        else:
            files[name] = draw(damaged(files[name]))
        return files
    if change < 5:
        tree = draw(changed_trees(tree))
        files[MANIFEST] = json.dumps(tree).encode()
        return files
    name = draw(st.sampled_from([*_ENGINE_FILES, *_ENGINE_FILES, MODEL]))
    files[name] = draw(damaged(files[name]) if change == 5 else _changed_models(files[name]))
    files[MANIFEST] = json.dumps(_with_hashes(tree, files)).encode()
    return files


def check(folder: Path) -> bool:
    """Load the bundle and run it on an image; where its model is changed, build its engine again, and run that."""
    accepted = _runs(folder)
    changed = (folder / MODEL).is_file() and (folder / MODEL).read_bytes() != sound_files()[MODEL]
    try:
        if changed:
            build_onnxruntime(Bundle.open(folder))
            _runs(folder)
    except DynaMaskError as error:
        _check_sentence(error)
        accepted = False
    return accepted


def _runs(folder: Path) -> bool:
    try:
        with load(folder, threads=1) as predictor:
            for name, content in _manifest_files(predictor.bundle).items():
                assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == content
            found = predictor(np.zeros((48, 64, 3), np.uint8))
    except DynaMaskError as error:
        _check_sentence(error)
        return False
    assert len(found) == len(found.scores) == len(found.labels) == len(found.grids) == len(found.mask_data) == len(found.boxes)
    assert found.boxes.shape == (len(found), 4) and found.masks.shape == (len(found), 48, 64)
    return True


def _manifest_files(bundle: Bundle) -> dict[str, str]:
    engine = bundle.engine("onnxruntime", verify=False)
    return {name: entry.sha256 for name, entry in (bundle.manifest.files | engine.files).items()}


def _check_sentence(error: DynaMaskError) -> None:
    assert "\n" not in str(error)
    str(error).encode()
