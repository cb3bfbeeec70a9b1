"""`dynamask build-engine` and `dynamask predict`: the files they write, and their errors on bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from cli.build_engine import build_engine
from cli.predict import predict
from runtime import predictor
from runtime.bundle import Bundle
from runtime.errors import InputError

app = typer.Typer()
app.command("build-engine")(build_engine)
app.command("predict")(predict)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    path = folder / "a.bundle"
    synthetic.create(path)
    result = run("build-engine", path, "--json", folder / "engine.json")
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.full((128, 96, 3), 255, np.uint8)).save(path)
    return path


def test_an_engine_is_reported(bundle):
    figures = json.loads((bundle.parent / "engine.json").read_text())
    folder = bundle / "engines" / "onnxruntime"
    assert figures["engine"] == str(folder) and figures["plugins"] == [] and figures["seconds"] > 0
    assert figures["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    Bundle.open(bundle).engine("onnxruntime")


@pytest.mark.parametrize("options", [("--target", "tensorrt"), ("--target", "tensorrt-rtx"), ("--precision", "int8")])
def test_options_that_do_not_fit_are_refused(bundle, options):
    assert isinstance(run("build-engine", bundle, *options).exception, InputError)


def test_detections_and_pictures_are_written(bundle, photo, tmp_path):
    result = run("predict", bundle, photo, "--json", tmp_path / "found.json", "--output", tmp_path / "pictures", "--score", 0.5)
    assert result.exit_code == 0, result.output
    (record,) = json.loads((tmp_path / "found.json").read_text())["images"]
    assert (record["height"], record["width"]) == (128, 96)
    assert [detection["grid"] for detection in record["detections"]] == [112, 14, 56]
    assert coco_mask.decode(record["detections"][0]["segmentation"]).shape == (128, 96)
    assert "2 star, 1 leaf" in result.output
    picture = np.asarray(Image.open(tmp_path / "pictures" / "photo.png"))
    assert picture.shape == (128, 96, 3) and (picture != 255).any()


def test_pictures_of_the_same_name_do_not_overwrite_each_other(bundle, photo, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").write_bytes(photo.read_bytes())
    run("predict", bundle, photo, tmp_path / "other" / "photo.png", "--output", tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").iterdir())) == 2


@pytest.mark.parametrize("arguments", [["--output", "."], ["--json", "photo.png"]])
def test_a_photograph_is_never_written_over(bundle, photo, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(photo.parent)
    before = photo.read_bytes()
    result = run("predict", bundle, photo, *arguments)
    assert isinstance(result.exception, InputError) and "both read and written" in str(result.exception)
    assert photo.read_bytes() == before


@pytest.mark.parametrize(("grid", "expected"), [("uniform-28", {28}), ("routed", {112, 14, 56}), ("routed@50%", {14})])
def test_the_grid_is_chosen(bundle, photo, tmp_path, grid, expected):
    run("predict", bundle, photo, "--grid", grid, "--json", tmp_path / "found.json")
    (record,) = json.loads((tmp_path / "found.json").read_text())["images"]
    assert {detection["grid"] for detection in record["detections"]} == expected


def test_an_unknown_policy_is_refused(bundle, photo):
    result = run("predict", bundle, photo, "--grid", "28")
    assert isinstance(result.exception, InputError) and "'28' is not a grid policy; take routed" in str(result.exception)


def test_a_folder_is_read_as_its_images(bundle, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "notes.txt").write_text("no image")
    result = run("predict", bundle, folder, photo, "--json", tmp_path / "found.json", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "found.json").read_text())["images"]
    assert [record["file_name"] for record in records] == [str(folder / "a.png"), str(folder / "b.png"), str(photo)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "photo.png"]
    limited = run("predict", bundle, folder, photo, "--limit", 1)
    assert limited.stdout.count("\n") == 1 and "a.png" in limited.stdout


def test_a_folder_without_images_is_refused(bundle, tmp_path):
    result = run("predict", bundle, tmp_path)
    assert isinstance(result.exception, InputError) and "holds no image" in str(result.exception)


def test_a_bad_image_is_named_and_the_others_still_run(bundle, photo, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    result = run("predict", bundle, tmp_path / "bad.png", photo, "--json", tmp_path / "found.json")
    assert result.exit_code == 2 and "bad.png is not an image" in result.output
    written = json.loads((tmp_path / "found.json").read_text())
    assert [record["file_name"] for record in written["images"]] == [str(photo)]
    assert [failure["image"] for failure in written["failures"]] == [str(tmp_path / "bad.png")]


def test_as_many_images_at_a_time_as_the_engine_takes(bundle, synthetic, tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}.png" for name in ("a", "bad", "c", "d", "e")]
    for index, path in enumerate(paths):
        Image.fromarray(np.full((40 + 10 * index, 64, 3), 50 * index, np.uint8)).save(path)
    paths[1].write_bytes(b"no image")
    alone = run("predict", bundle, *paths, "--json", tmp_path / "alone.json", "--output", tmp_path / "alone")
    engines, open_engine = [], predictor.open_engine
    monkeypatch.setattr(
        predictor, "open_engine", lambda *given: engines.append(synthetic.EngineOfSeveral(open_engine(*given), 3)) or engines[-1]
    )
    together = run("predict", bundle, *paths, "--json", tmp_path / "together.json", "--output", tmp_path / "together")
    # The image that cannot be read leaves no gap.
    assert engines[0].counts == [3, 1] and together.exit_code == alone.exit_code == 2
    assert together.stdout == alone.stdout and together.stderr == alone.stderr
    expected, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "together"))
    assert [record["id"] for record in found["images"]] == [0, 2, 3, 4]
    for result in (expected, found):
        for record in result["images"]:
            assert len(record["detections"]) == 4 and record.pop("times_ms")
            # The images of a run share its predicted time.
            assert record.pop("predicted_ms")["detector"] > 0
    assert found == expected
    for name in ("a", "c", "d", "e"):
        pictures = [(tmp_path / folder / f"{name}.png").read_bytes() for folder in ("alone", "together")]
        assert pictures[0] == pictures[1]
