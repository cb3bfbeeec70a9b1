"""Miniatures of the published layouts: written by the command, read by the data sets, trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from dynamask.config import Config, load_config
from dynamask.data.cityscapes import CityscapesDataset
from dynamask.data.coco import LabelledDataset, coco_2017
from dynamask.data.lvis import lvis_v1
from dynamask.data.miniatures import HEIGHT, IMAGES, WIDTH, write_miniature
from dynamask.train import trainer
from runtime.errors import InputError
from tests.tiny import TINY

OPENERS: dict[str, Any] = {"coco": coco_2017, "lvis": lvis_v1, "cityscapes": CityscapesDataset}
FIELDS = {
    **TINY,
    "model.class_agnostic_largest": True,
    "train.batch": 3,
    "train.phase1_epochs": 0.5,
    "train.phase2_epochs": 0.5,
    "train.rate_drop_epochs": [],
    "train.warmup_steps": 2,
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("miniatures")
    for kind in OPENERS:
        write_miniature(kind, folder / kind)
    return {kind: folder / kind for kind in OPENERS}


def tiny(kind: str, root: Path | None, **more: Any) -> Config:
    return load_config("lite0-coco", FIELDS | {"data.kind": kind, "data.root": root and str(root)} | more)


@pytest.mark.parametrize("kind", OPENERS)
def test_the_data_set_reads_the_files_of_the_command(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, result = tmp_path / "mini", tmp_path / "result.json"
    assert main(["data", "prepare", kind, str(root), "--json", str(result)]) == 0
    assert capsys.readouterr().out.strip() == str(root)
    assert json.loads(result.read_text()) == {"kind": kind, "root": str(root), "images": {"train": 6, "val": 2}}
    assert main(["data", "prepare", kind, str(root)]) == 2
    assert str(root) in capsys.readouterr().err


def test_no_other_layout_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"voc .* coco, lvis, cityscapes"):
        write_miniature("voc", tmp_path / "voc")


@pytest.mark.parametrize("kind", OPENERS)
def test_both_parts_have_instances_to_train_and_evaluate_on(kind: str, roots: dict[str, Path]) -> None:
    parts: list[LabelledDataset] = [OPENERS[kind](roots[kind], part) for part in ("train", "val")]
    assert [len(part) for part in parts] == list(IMAGES.values())
    assert parts[0].classes == parts[1].classes
    for part in parts:
        assert part.indices_with_instances == list(range(len(part)))
        image, target = part[0]
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert set(target["labels"]) <= set(range(1, len(part.classes) + 1))
        judged = [entry for entry in part.coco_dict["annotations"] if entry["image_id"] == target["image_id"] and not entry["iscrowd"]]
        assert sorted(entry["area"] for entry in judged) == sorted(target["masks"].sum(axis=(1, 2)).tolist())
    assert not (parts[0][0][0] == parts[1][0][0]).all()  # other pictures


def test_the_miniature_of_lvis_is_federated(roots: dict[str, Path]) -> None:
    tree = lvis_v1(roots["lvis"], "train").coco_dict
    shown = {(entry["image_id"], entry["category_id"]) for entry in tree["annotations"]}
    absent = {(entry["id"], category) for entry in tree["images"] for category in entry["neg_category_ids"]}
    partial = {(entry["id"], category) for entry in tree["images"] for category in entry["not_exhaustive_category_ids"]}
    assert partial
    assert partial < shown
    assert absent
    assert not absent & shown
    assert len(absent | shown) < len(tree["images"]) * len(tree["categories"])
    assert {entry["frequency"] for entry in tree["categories"]} == {"r", "c", "f"}


def test_the_miniature_of_cityscapes_has_groups(roots: dict[str, Path]) -> None:
    tree = CityscapesDataset(roots["cityscapes"], "train").coco_dict
    assert {entry["iscrowd"] for entry in tree["annotations"]} == {0, 1}


@pytest.mark.parametrize("kind", OPENERS)
def test_every_kind_trains_and_is_evaluated(kind: str, roots: dict[str, Path], tmp_path: Path) -> None:
    result = trainer.train(tiny(kind, roots[kind]), tmp_path, quiet=True)
    assert (result["steps"], result["total_steps"]) == (2, 2)
    (entry,) = result["ap_by_epoch"]
    assert entry["images"] == 1
    assert entry["segm"]["AP"] is not None
    assert ("AP_r" in entry["segm"]) == (kind == "lvis")
    assert result["data"].keys() == (set() if kind == "cityscapes" else {"train", "val"})
    assert all(part["annotations"] and not part["annotations_left_out"] for part in result["data"].values())


@pytest.mark.parametrize("kind", OPENERS)
def test_a_missing_file_ends_the_run_before_it_begins(kind: str, roots: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/elsewhere/.* is missing"):
        trainer.train(tiny(kind, tmp_path / "elsewhere"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["lvis", "cityscapes"])
def test_the_folder_must_be_given_and_nothing_beside_it(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"data\.root is not given.*{kind}"):
        trainer.train(tiny(kind, None), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="root stands for all four paths"):
        tiny(kind, tmp_path, **{"data.val_images": "val2017"})


def test_an_image_of_coco_that_is_missing_is_named(tmp_path: Path) -> None:
    write_miniature("coco", tmp_path)
    (tmp_path / "val2017" / "000000000002.jpg").unlink()
    coco_2017(tmp_path, "train")
    with pytest.raises(InputError, match=r"val2017/000000000002\.jpg is missing: .*instances_train2017\.json.*cocodataset\.org"):
        coco_2017(tmp_path, "val")
