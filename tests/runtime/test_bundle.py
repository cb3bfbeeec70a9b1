"""A bundle is whole or refused, and what is refused is named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from export.onnxruntime_engine import build_onnxruntime
from runtime.bundle import Bundle, check_replaceable
from runtime.errors import DynaMaskError, InputError
from runtime.predictor import load


@pytest.fixture
def bundle(tmp_path, synthetic):
    return synthetic.create(tmp_path / "a.bundle")


def change(bundle, **fields):
    file = bundle.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(path, *words):
    with pytest.raises(InputError) as caught:
        Bundle.open(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_opened_bundle_equals_the_created_one(bundle):
    opened = Bundle.open(bundle.path)
    assert opened.manifest == bundle.manifest
    assert opened.manifest.grid_gmacs[112] == 0.4 and opened.manifest.classes[0].name == "leaf"
    assert sorted(file.name for file in bundle.path.iterdir()) == ["manifest.json", "model.onnx"]


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    refused(tmp_path / "missing", "missing", "not a folder")
    refused(tmp_path, "manifest.json", "not a bundle")
    for content in ("no JSON", "[]", '"text"', '{"schema_version": 1}'):
        (tmp_path / "manifest.json").write_text(content)
        refused(tmp_path, "manifest.json", "export the bundle again")


@pytest.mark.parametrize(
    "fields",
    [{"std": [0.2, 0.0, 0.2]}, {"mean": [0.5, float("nan"), 0.5]}, {"grids": [14, 28, 56]}, {"classes": []}, {"canvas": [65, 64]}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_manifest_that_no_model_can_have_is_refused(bundle, fields):
    change(bundle, **fields)
    refused(bundle.path, "manifest.json", next(iter(fields)), "export the bundle again")


def test_a_class_that_the_manifest_lacks_is_no_index_error(tmp_path, synthetic):
    bundle = synthetic.create(tmp_path / "a.bundle", classes=[{"id": 1, "name": "leaf"}])  # the graph finds two
    build_onnxruntime(bundle)
    with (
        load(bundle, "onnxruntime", threads=1) as predictor,
        pytest.raises(InputError, match=r"a\.bundle has 1 classes .* class 1; export"),
    ):
        predictor(np.full((128, 96, 3), 255, np.uint8))


def test_a_place_where_no_bundle_can_be_is_refused_before_it_is_made(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "a.bundle", r"because of .*file \(it is a file\)"),
        (tmp_path, "not a bundle"),
    ):
        with pytest.raises(InputError, match=reason):
            check_replaceable(path)
    check_replaceable(tmp_path / "new" / "a.bundle")


def test_a_newer_schema_is_refused(bundle):
    change(bundle, schema_version=2)
    refused(bundle.path, "schema 2", "update")


def test_one_changed_byte_is_refused(bundle):
    model = bundle.path / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    refused(bundle.path, "model.onnx", "SHA-256")
    Bundle.open(bundle.path, verify=False)
    model.write_bytes(content[:-1])
    with pytest.raises(InputError, match="size"):
        Bundle.open(bundle.path, verify=False)
    model.unlink()
    refused(bundle.path, "model.onnx", "missing")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a\\b", "C:file", "", "manifest.json"])
def test_names_that_lead_out_of_the_folder_are_refused(bundle, name):
    change(bundle, files={name: {"sha256": "0" * 64, "bytes": 1}})
    refused(bundle.path, "not the name of a file inside the bundle")


def test_a_bundle_is_replaced_and_another_folder_is_not(bundle, tmp_path, synthetic):
    bundle.add_engine("onnxruntime", {"x": b"1"}, "fp32", {})
    again = synthetic.create(bundle.path, score_threshold=0.5)
    assert Bundle.open(bundle.path).manifest == again.manifest and not again.manifest.engines
    assert not (bundle.path / "engines").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"precious")
    for path in (tmp_path / "photos", tmp_path / "photos" / "a.jpg"):
        with pytest.raises(InputError, match=path.name):
            Bundle.create(path, synthetic.manifest(), {})
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"precious"


def test_a_failed_creation_leaves_the_bundle_before(bundle, synthetic, monkeypatch):
    def full_disk(source, destination):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(DynaMaskError, match="No space left"):
        Bundle.create(bundle.path, synthetic.manifest(score_threshold=0.9), {"model.onnx": bundle.path / "model.onnx"})
    assert Bundle.open(bundle.path).manifest == bundle.manifest
    assert [path.name for path in bundle.path.parent.iterdir() if path.name.startswith(".")] == []


def test_an_engine_is_added_replaced_and_checked(bundle, tmp_path):
    with pytest.raises(InputError, match=r"dynamask build-engine .*a\.bundle --target onnxruntime"):
        bundle.engine("onnxruntime")
    (tmp_path / "part").write_bytes(b"second")
    bundle.add_engine("onnxruntime", {"old": b"old"}, "fp32", {})
    bundle.add_engine("onnxruntime", {"a": b"first", "b": tmp_path / "part"}, "fp32", {"onnxruntime": "1.0"})
    opened = Bundle.open(bundle.path)
    entry = opened.engine("onnxruntime")
    assert {name: (opened.path / name).read_bytes() for name in entry.files} == {
        "engines/onnxruntime/a": b"first",
        "engines/onnxruntime/b": b"second",
    }
    assert sorted(file.name for file in (bundle.path / "engines" / "onnxruntime").iterdir()) == ["a", "b"]
    with pytest.raises(InputError, match="built: onnxruntime"):
        opened.engine("tensorrt")
    (bundle.path / "engines" / "onnxruntime" / "a").write_bytes(b"firsT")
    with pytest.raises(InputError, match="build it again"):
        Bundle.open(bundle.path).engine("onnxruntime")


def test_an_engine_that_could_not_be_written_is_not_there(bundle, monkeypatch):
    bundle.add_engine("onnxruntime", {"a": b"first"}, "fp32", {})

    def full_disk(source, destination):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(DynaMaskError, match="No space left"):
        bundle.add_engine("onnxruntime", {"a": bundle.path / "model.onnx"}, "fp32", {})
    with pytest.raises(InputError, match="not built"):
        Bundle.open(bundle.path).engine("onnxruntime")


def test_a_manifest_needs_the_cost_of_every_grid(synthetic):
    with pytest.raises(ValidationError, match="costs are needed"):
        synthetic.manifest(grid_gmacs={14: 0.1})


def test_a_manifest_that_is_nested_too_deeply_is_refused(bundle):
    (bundle.path / "manifest.json").write_text("[" * 100_000)
    refused(bundle.path, "manifest.json", "nested too deeply")
