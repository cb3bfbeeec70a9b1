"""The carried checkpoint, exported and built for real: what holds of the whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.utils
import onnxruntime
import pytest
import torch

import dynamask
from cli.main import main
from dynamask.data.shapes import draw_image, write_dataset, write_video
from dynamask.train.checkpoint import load_model
from export.deform_conv_fallback import replace_deform_conv
from export.export import export_bundle
from export.onnxruntime_engine import build_onnxruntime
from export.parity import BOX_TOLERANCE, MASK_TOLERANCE, SCORE_TOLERANCE
from runtime.bundle import MODEL, Bundle
from runtime.carried import carried_checkpoint
from runtime.coco import read_coco
from runtime.costs import GridCost
from runtime.errors import InputError
from runtime.predictor import Predictor, load
from runtime.preprocess import letterbox_normalise
from runtime.sinks import JsonLinesSink, VideoSink
from runtime.sources import open_source
from runtime.stream import run_stream
from runtime.targets.onnxruntime import has_deform_conv
from runtime.validate import validate
from tests.runtime.known_costs import costs

GRIDS = (14, 28, 56, 112)
ZERO = np.zeros((), np.float32)
NO_LIMIT = {"budget": ZERO, "total_budget": ZERO, "costs": np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32)}
needs_deform_conv = pytest.mark.skipif(not has_deform_conv(), reason="this ONNX Runtime has no DeformConv: engines use the fallback")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Path:
    write_dataset(folder / "shapes", 3, seed=77_001)
    return folder / "shapes"


@pytest.fixture(scope="module")
def bundle(folder: Path, dataset: Path) -> Path:
    export_bundle(carried_checkpoint("lite0-shapes"), folder / "bundle", None, sorted((dataset / "images").iterdir())[:1])
    build_onnxruntime(Bundle.open(folder / "bundle"))
    return folder / "bundle"


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> Predictor:
    return load(bundle, threads=1)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return draw_image(np.random.default_rng([77_002, 0]), 320, 320)[0]


def test_the_graph_agrees_with_pytorch(bundle: Path) -> None:
    parity = Bundle.open(bundle).manifest.parity
    assert parity is not None and parity["holds"] and parity["instances"] > 10
    assert parity["box_pixels"] < 0.1 and parity["score"] < 1e-3 and parity["mask_probability"] < 1e-3 and parity["other_grids"] == 0


def test_the_graph_agrees_with_pytorch_on_real_images(bundle: Path, shared_data: Path) -> None:
    """A model of shapes finds something in photographs too; what, does not matter here."""
    import torch

    from dynamask.train.checkpoint import load_model
    from export.parity import measure_parity
    from runtime.images import read_image
    from runtime.targets.registry import open_engine

    model, config, _ = load_model(carried_checkpoint("lite0-shapes"))
    paths = sorted((shared_data / "coco_mini" / "val").glob("*.jpg"))[:3]
    canvases = [letterbox_normalise(read_image(p), *config.model.canvas, config.model.mean, config.model.std)[0] for p in paths]
    torch.set_num_threads(1)
    with open_engine(Bundle.open(bundle), "onnxruntime", 1) as engine:
        assert measure_parity(model, engine, canvases).holds()


def test_the_graph_has_standard_operators_only(bundle: Path) -> None:
    model = onnx.load(bundle / MODEL)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [o.name for o in model.graph.output] == ["boxes", "scores", "labels", "grids"] + [
        f"{n}_{g}" for n in ("slots", "masks") for g in GRIDS
    ]


@needs_deform_conv
def test_a_stage_runs_on_its_instances_and_no_others(bundle: Path, image: np.ndarray) -> None:
    """The batch that each deformable convolution sees is the number of instances whose grid is its stage's or larger."""
    model = onnx.load(bundle / MODEL)
    nodes = [node for node in model.graph.node if node.op_type == "DeformConv"]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(node.output[0]) for node in nodes)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    canvas = letterbox_normalise(image, 320, 320, (0.5,) * 3, (0.5,) * 3)[0]
    override = np.arange(100) % 4
    for grids in (override, np.zeros_like(override), np.full_like(override, 3)):
        names = ["grids", *(node.output[0] for node in nodes)]
        given, *batches = session.run(names, {"image": canvas, "min_score": ZERO, **NO_LIMIT, "grid_override": grids})
        wanted = {GRIDS[k]: int((given >= k).sum()) for k in (1, 2, 3)}
        assert [(b.shape[2], b.shape[0]) for b in batches] == [(g, wanted[g]) for g in (28, 28, 56, 56, 112, 112)]


@needs_deform_conv
def test_the_deform_conv_fallback_gives_the_same_masks(bundle: Path, image: np.ndarray) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle / MODEL))
    assert replace_deform_conv(model) == 6
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    peer = onnxruntime.InferenceSession(str(bundle / MODEL), providers=["CPUExecutionProvider"])
    feeds = {
        "image": letterbox_normalise(image, 320, 320, (0.5,) * 3, (0.5,) * 3)[0],
        "min_score": ZERO,
        **NO_LIMIT,
        "grid_override": np.arange(100) % 4,
    }
    for ours, theirs in zip(session.run(None, feeds), peer.run(None, feeds), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_a_budget_is_kept_and_larger_ones_give_larger_grids(predictor: Predictor, image: np.ndarray) -> None:
    gmacs = predictor.bundle.manifest.grid_gmacs
    means = []
    for share in (0.1, 0.3, 0.5, 1.0):
        found = predictor(image, budget_gmacs=share * gmacs[112])
        means.append(float(np.mean([gmacs[int(g)] for g in found.grids])))
        assert means[-1] <= share * gmacs[112] * 1.00001
    assert means == sorted(means)


def test_a_budget_in_milliseconds_is_kept_by_the_predicted_time(
    predictor: Predictor, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = costs(grids={grid: GridCost(fixed_ms=2 + 0.1 * k, instance_ms=1 + k) for k, grid in enumerate(GRIDS)})
    monkeypatch.setattr(predictor.engine, "costs", known)
    count, free = len(predictor(image)), sum(predictor(image).predicted_ms.values())
    least, spent = known.least_ms(count), []
    for budget_ms in (least, least + 0.5 * (free - least), least + 0.9 * (free - least), free):
        found = predictor(image, budget_ms=budget_ms + 1e-3)
        spent.append(known.frame_ms(Counter(found.grids.tolist())))
        assert sum(found.predicted_ms.values()) == pytest.approx(spent[-1]) and spent[-1] <= budget_ms + 2e-3
    assert spent == sorted(spent) and spent[0] == pytest.approx(least) and spent[-1] == pytest.approx(free)
    assert least < spent[2] < free


def test_detections_below_min_score_have_no_mask(predictor: Predictor, image: np.ndarray) -> None:
    every, sure = predictor(image), predictor(image, min_score=0.5)
    kept = every[every.scores > 0.5]
    assert 0 < len(sure) == len(kept) < len(every)
    np.testing.assert_allclose(sure.boxes, kept.boxes, atol=1e-3)
    assert (sure.masks == kept.masks).mean() > 0.999


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (33, 700)])
def test_images_of_any_shape_run(predictor: Predictor, size: tuple[int, int]) -> None:
    found = predictor(np.full((*size, 3), 127, np.uint8))
    assert found.masks.shape == (len(found), *size)
    assert len(found.to_coco(1)) == len(found)


def test_a_frame_without_detections_has_none(predictor: Predictor) -> None:
    found = predictor(np.zeros((320, 320, 3), np.uint8), min_score=0.999999)
    assert len(found) == 0 and found.masks.shape == (0, 320, 320) and found.to_coco(1) == []


def test_the_model_finds_most_shapes(predictor: Predictor, dataset: Path) -> None:
    """Far under what docs/results/shapes.md reports; and half the largest grid's cost is kept to.

    Of three images, to 5%: what the last one spends too much, no later one makes up for.
    """
    result = validate(predictor, read_coco(dataset), ("routed@50%", "uniform-112"))["policies"]
    assert result["uniform-112"]["segm"]["AP50"] > 50 and result["uniform-112"]["bbox"]["AP50"] > 60
    assert result["routed@50%"]["gmacs"] <= 0.5 * result["uniform-112"]["gmacs"] * 1.05


def test_a_video_is_annotated(predictor: Predictor, folder: Path) -> None:
    write_video(folder / "shapes.mp4", 12, seed=77_003)
    source = open_source(folder / "shapes.mp4")
    sinks = [VideoSink(folder / "out.mp4", source.frame_rate), JsonLinesSink(folder / "out.jsonl")]
    report = run_stream(predictor, source, sinks)
    assert report.frames == 12
    assert len((folder / "out.jsonl").read_text().splitlines()) == 12
    with open_source(folder / "out.mp4") as written:
        assert sum(1 for _ in written) == 12 and written.size == (320, 320)


def test_a_real_video_runs(predictor: Predictor, shared_data: Path, folder: Path) -> None:
    source = open_source(shared_data / "video" / "car-detection.mp4")
    report = run_stream(predictor, source, [VideoSink(folder / "car.mp4", source.frame_rate)], limit=5)
    assert report.frames == 5


@pytest.mark.parametrize(
    ("policy", "budget_share", "grid_override"), [("routed", 0.0, None), ("routed@30%", 0.3, None), ("uniform-28", 0.0, 1)]
)
def test_predict_stream_and_load_agree_on_one_image(
    bundle: Path, dataset: Path, tmp_path: Path, policy: str, budget_share: float, grid_override: int | None
) -> None:
    """Boxes, scores, classes, grids and masks."""
    path = sorted((dataset / "images").iterdir())[0]
    options = ["--grid", policy, "--score", "0.4", "--threads", "1"]
    assert main(["predict", str(bundle), str(path), *options, "--json", str(tmp_path / "predict.json")]) == 0
    assert main(["stream", str(bundle), str(path), *options, "--jsonl", str(tmp_path / "stream.jsonl")]) == 0
    costs = Bundle.open(bundle).manifest.grid_gmacs
    with dynamask.load(bundle, budget_gmacs=budget_share * costs[112], threads=1) as loaded:
        found = loaded(dynamask.read_image(path), grid_override=grid_override, min_score=0.4).to_coco(0)
    (record,) = json.loads((tmp_path / "predict.json").read_text())["images"]
    (frame,) = (json.loads(line) for line in (tmp_path / "stream.jsonl").read_text().splitlines())
    assert len(found) > 3
    assert record["detections"] == found
    assert [{key: value for key, value in detection.items() if key != "class"} for detection in frame["detections"]] == found


def test_the_model_agrees_with_its_bundle(bundle: Path, predictor: Predictor) -> None:
    """On images of two sizes, neither of them of the canvas's shape."""
    model = load_model(carried_checkpoint("lite0-shapes"))[0]
    images = [draw_image(np.random.default_rng([3, i]), *size)[0] for i, size in enumerate([(240, 416), (400, 300)])]
    found = model([torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in images])
    for image, ours in zip(images, found, strict=True):
        theirs = predictor(image)
        scale = min(size / side for size, side in zip(predictor.bundle.manifest.canvas, image.shape[:2], strict=True))
        assert len(theirs) > 5
        np.testing.assert_allclose(ours["boxes"].numpy(), theirs.boxes, atol=BOX_TOLERANCE / scale, rtol=0)
        np.testing.assert_allclose(ours["scores"].numpy(), theirs.scores, atol=SCORE_TOLERANCE, rtol=0)
        assert ours["labels"].tolist() == (theirs.labels + 1).tolist() and ours["grids"].tolist() == theirs.grids.tolist()
        clear = np.abs(ours["masks"][:, 0].numpy() - 0.5) > 10 * MASK_TOLERANCE
        assert ((ours["masks"][:, 0].numpy() > 0.5) == theirs.masks)[clear].all()


def test_a_changed_byte_is_refused(bundle: Path, folder: Path) -> None:
    import shutil

    copy = folder / "damaged"
    shutil.copytree(bundle, copy)
    data = bytearray((copy / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / MODEL).write_bytes(data)
    with pytest.raises(InputError, match=MODEL):
        load(copy)
