"""Ablation plans: what they train and judge, that nothing is done twice, and that Ctrl-C loses nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cli import main as command_line
from dynamask import ablation
from dynamask.ablation import markdown, read_plan, run_plan
from dynamask.train import trainer
from dynamask.train.log import RunLog
from runtime.errors import InputError
from runtime.graph import GRIDS
from tests.tiny import TINY

PLANS = sorted((Path(__file__).parents[2] / "configs" / "ablations").glob("*.yaml"))
FIELDS = {
    **TINY,
    "data.shapes_train": 2,
    "data.shapes_val": 1,
    "data.workers": 0,
    "train.batch": 2,
    "train.phase1_epochs": 1,
    "train.phase2_epochs": 1,
}
MASK_RCNN = {"name": "Mask R-CNN 28", "set": {"model.mask_head": "maskrcnn", "model.mask_grid": 28}}


def write(folder: Path, **fields: Any) -> Path:
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump({"base": "lite0-shapes", "set": FIELDS, **fields}))
    return plan


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The run's folder at every call of the trainer."""
    calls: list[str] = []
    run = trainer.train

    def record(config: Any, output: Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
        calls.append(f"{output.parent.name}/{output.name}{' again' if resume else ''}")
        return run(config, output, resume, quiet)

    monkeypatch.setattr(ablation, "train", record)
    return calls


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """The policy of every evaluation, which then has figures of its own: AP is the evaluation's number."""
    calls: list[tuple[str, float, int]] = []

    def figures(model: Any, dataset: Any, config: Any, images: int, policy: Any, iou_types: Any) -> dict[str, Any]:
        calls.append(tuple(policy))  # type: ignore[arg-type]
        metrics = {"AP": float(len(calls)), "AP50": None, "AP75": 2.0}
        return {**dict.fromkeys(iou_types, metrics), "share": {"14": 0.5, "28": 0.5, "56": 0.0, "112": 0.0}}

    monkeypatch.setattr(ablation, "evaluate", figures)
    return calls


def test_a_plan_of_two_rows_is_interrupted_and_continues(tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write(tmp_path, rows=[MASK_RCNN, {"name": "DynaMask", "policies": ["routed", "uniform-14", "size-based", "routed@50%"]}])
    step = RunLog.step

    def stop(self: RunLog, record: dict[str, Any]) -> None:
        step(self, record)
        if "dynamask" in str(self.path) and record["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, tmp_path / "out", quiet=True)
    kept = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["name"] for row in kept["rows"]] == ["Mask R-CNN 28"] and not kept["complete"]
    assert "same command continues" in (tmp_path / "out" / "table.md").read_text()

    table = run_plan(plan, tmp_path / "out", quiet=True)
    assert trained == ["mask-r-cnn-28/seed-0", "dynamask/seed-0", "dynamask/seed-0 again"]
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == table and table["complete"]
    assert table["rows"][0] == kept["rows"][0]
    policies = [(row["name"], row["policy"]) for row in table["rows"]]
    assert policies == [("Mask R-CNN 28", "uniform-28"), *(("DynaMask", p) for p in ("routed", "uniform-14", "size-based", "routed@50%"))]
    assert table["rows"][0]["share"] == {"14": 0.0, "28": 1.0, "56": 0.0, "112": 0.0}
    assert table["rows"][2]["share"]["14"] == 1.0
    assert set(table["rows"][0]["gmacs"]) == {"28"} and set(table["rows"][1]["gmacs"]) == {str(g) for g in GRIDS}
    for row in table["rows"]:
        assert row["mean_gmacs"]["mean"] == pytest.approx(sum(row["gmacs"].get(g, 0.0) * share for g, share in row["share"].items()))
        assert row["AP"]["mean"] is not None and row["boundary_AP"]["mean"] is not None
    assert table["rows"][4]["mean_gmacs"]["mean"] <= 0.5 * table["rows"][1]["gmacs"]["112"] * (1 + 1e-6)

    assert run_plan(plan, tmp_path / "out", quiet=True) == table
    assert len(trained) == 3


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that end at once, with a checkpoint of random weights."""
    calls: list[str] = []

    def end(config: Any, output: Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
        from dynamask.model import build_model
        from dynamask.train.checkpoint import save_checkpoint

        calls.append(f"{output.parent.name}/{output.name}")
        classes = [{"id": 1, "name": "thing"}]
        save_checkpoint(output / "model.safetensors", build_model(config, classes), config, classes)
        (output / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        result = {"interrupted": False, "seconds": 60.0 + config.train.seed}
        (output / "metrics.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(ablation, "train", end)
    return calls


def test_seeds_give_means_and_spreads(tmp_path: Path, untrained: list[str], evaluated: list[Any]) -> None:
    table = run_plan(write(tmp_path, seeds=[3, 5], rows=[{"name": "DynaMask"}]), tmp_path / "out", quiet=True)
    assert untrained == ["dynamask/seed-3", "dynamask/seed-5"]
    row = table["rows"][0]
    assert row["seeds"] == [3, 5]
    assert row["AP"] == {"mean": 1.5, "spread": pytest.approx(0.5**0.5), "values": [1.0, 2.0]}
    assert row["AP50"] == {"mean": None, "spread": None, "values": []}
    assert row["mean_gmacs"]["mean"] == pytest.approx((row["gmacs"]["14"] + row["gmacs"]["28"]) / 2)
    assert row["training_seconds"]["mean"] == 64.0
    cells = (tmp_path / "out" / "table.md").read_text().splitlines()[2].split(" | ")
    assert cells[1:5] == ["routed", "1.5 ± 0.7", "–", "2.0 ± 0.0"] and "50 / 50 / 0 / 0" in cells


def test_a_row_from_another_trains_nothing_and_no_evaluation_is_repeated(
    tmp_path: Path, untrained: list[str], evaluated: list[Any]
) -> None:
    rows = [{"name": "DynaMask"}, {"name": "Rule", "from": "DynaMask", "policies": ["size-based", "routed"]}]
    table = run_plan(write(tmp_path, rows=rows), tmp_path / "out", quiet=True)
    assert untrained == ["dynamask/seed-0"] and evaluated == [("routed", 0.0, -1, 0.0), ("size-based", 0.0, 4, 0.0)]
    assert [(row["policy"], row["AP"]["mean"]) for row in table["rows"]] == [("routed", 1.0), ("size-based", 2.0), ("routed", 1.0)]
    assert table["rows"][1]["training_seconds"]["mean"] is None

    (tmp_path / "out" / "dynamask" / "seed-0" / "metrics.json").unlink()
    run_plan(write(tmp_path, set={**FIELDS, "train.evaluate_images": 2}, rows=rows[:1]), tmp_path / "out", quiet=True)
    assert len(untrained) == 2 and evaluated[2:] == [("routed", 0.0, -1, 0.0)]  # other images: evaluated again


def test_a_run_with_other_fields_than_its_row_is_refused(tmp_path: Path, trained: list[str], evaluated: list[Any]) -> None:
    run_plan(write(tmp_path, rows=[MASK_RCNN]), tmp_path / "out", quiet=True)
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        run_plan(write(tmp_path, set={**FIELDS, "train.learning_rate": 0.01}, rows=[MASK_RCNN]), tmp_path / "out", quiet=True)
    with pytest.raises(InputError, match=r"holds a run with train\.phase2_epochs 1\.0, not 2\.0 as the plan says: choose another --output"):
        run_plan(write(tmp_path, set={**FIELDS, "train.phase2_epochs": 2}, rows=[MASK_RCNN]), tmp_path / "out", quiet=True)
    assert json.loads((tmp_path / "out" / "mask-r-cnn-28" / "seed-0" / "metrics.json").read_text())["steps"] == 2
    quicker = run_plan(write(tmp_path, set={**FIELDS, "train.threads": 1}, rows=[MASK_RCNN]), tmp_path / "out", quiet=True)
    assert quicker["complete"] and len(trained) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rows": []}, "rows"),
        ({"rows": [{"name": "a"}, {"name": "A!"}]}, "'a' gives no folder of its own"),
        ({"rows": [{"name": "a", "from": "b"}]}, "no row 'b'; the rows are a"),
        (
            {"rows": [{"name": "a"}, {"name": "b", "from": "a"}, {"name": "c", "from": "b"}]},
            "'c' evaluates the models of 'b', which trains none",
        ),
        ({"rows": [{"name": "a"}, {"name": "b", "from": "a", "set": {"train.learning_rate": 1}}]}, "leave set and seeds out"),
        ({"rows": [{"name": "a", "set": {"model.fusion": "sum"}}]}, "row 'a': .*fusion"),
        ({"rows": [{"name": "a", "set": {"model.no_such": 1}}]}, "no_such"),
        ({"rows": [{"name": "a", "policies": ["uniform-15"]}]}, "uniform-15"),
        ({"rows": [{**MASK_RCNN, "policies": ["routed"]}]}, "leave policies out"),
        ({"rows": [{"name": "a"}], "seeds": []}, "seeds"),
        ({"rows": [{"name": "a"}, {"name": "b", "seeds": [0, 0]}]}, "contain one twice"),
        ({"rows": [{"name": "a"}, {"name": "b", "seeds": [3, -1]}]}, "row 'b': .*seed"),
        ({"rows": [{"name": "a", "set": {"train.seed": 3}}]}, "train.seed is in set"),
        ({"rows": [{"name": "a"}, {"name": "b", "set": {"weights": "no-such.pth"}}]}, "weights no-such.pth is not a file"),
        ({"rows": [{"name": "a"}], "base": "no-such"}, "no-such"),
        ({"rows": [{"name": "a", "polices": []}]}, "polices"),
        ({"rows": [{"name": "a"}], "base": "x" * 300}, "its name is too long"),
        ({"rows": [{"name": "a"}], "set": {"weights": "x" * 300}}, "its name is too long"),
        ({"rows": [{"name": "a" * 300}]}, "rows.0.name"),
        ({"rows": [{"name": "a", "from": "b" * 3000}]}, "no row 'b"),
        ({"rows": [{"name": "a", "policies": ["routed" + "9" * 3000]}]}, "is not a grid policy"),
        ({"rows": [{"name": "a", "policies": ["routed@" + "9" * 3000]}]}, "no budget that can be kept"),
        ({"rows": [{**MASK_RCNN, "policies": ["routed@" + "9" * 300 + "%"]}]}, "leave policies out"),
        ({"rows": [{"name": "a"}], "seeds": [*range(3000), 0]}, "seeds"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_before_anything_is_trained(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    plan = write(tmp_path, **fields)
    with pytest.raises(InputError, match=f"plan.yaml.*{said}") as caught:
        run_plan(plan, tmp_path / "out", quiet=True)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "out").exists()


def test_a_row_by_an_earlier_name_takes_the_place_of_the_plans_field(tmp_path: Path) -> None:
    plan = ablation.read_plan(write(tmp_path, rows=[{"name": "long", "set": {"train.epochs": 5}}]))
    assert plan.config(plan.rows[0], 0).train.phase2_epochs == 5
    both = {"name": "both", "set": {"train.epochs": 5, "train.phase2_epochs": 5}}
    with pytest.raises(InputError, match=r"plan\.yaml, set: train\.epochs and train\.phase2_epochs are the same field"):
        ablation.read_plan(write(tmp_path, rows=[both]))


@pytest.mark.parametrize("content", [None, b"rows: [", b"\xff\xfe", b"- 1"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.yaml"):
        read_plan(path)


def test_an_output_that_is_no_folder_is_refused(tmp_path: Path, untrained: list[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file cannot be made or written .*: choose another folder"):
        run_plan(write(tmp_path, rows=[MASK_RCNN]), tmp_path / "file", quiet=True)
    assert not untrained


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_of_the_papers_tables_fit(path: Path) -> None:
    plan = read_plan(path)
    configs = [plan.config(row, 0) for row in plan.rows if row.source is None]
    free = {"target_paper_gmacs": 0, "regularisation_weight": 0}
    same = {each.model_copy(update={"model": None, "train": each.train.model_copy(update=free)}).model_dump_json() for each in configs}
    assert len(same) == 1, "rows differ in more than the model and the budget"
    assert len({config.model_dump_json() for config in configs}) == len(configs)


def test_there_is_a_plan_for_each_table() -> None:
    # Tables 5, 7, 8 and 9 judge the same models, and so share one.
    assert {path.stem for path in PLANS} == {"table-1-shapes", "budget-shapes", "table-11-shapes"}


def test_the_command_prints_the_table_and_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], untrained: list[str], evaluated: list[Any]
) -> None:
    arguments = ["ablate", str(write(tmp_path, rows=[MASK_RCNN])), "--output", str(tmp_path / "out"), "--json", str(tmp_path / "t.json")]
    assert command_line.main(arguments) == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "t.json").read_text() == (tmp_path / "out" / "table.json").read_text()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "run_plan", interrupt)
    assert command_line.main(arguments) == 130
    assert "continue with: dynamask ablate" in capsys.readouterr().err


figure = st.lists(st.floats(0, 100), max_size=3)


@given(st.lists(figure, min_size=9, max_size=9), st.booleans())
def test_every_row_of_the_table_has_every_column(figures: list[list[float]], complete: bool) -> None:
    names = ["AP", "AP50", "AP75", "boundary_AP", "box_AP", "mean_gmacs", "training_seconds", "evaluation_seconds"]
    cells = {
        n: {"mean": sum(f) / len(f) if f else None, "spread": 1.0 if len(f) > 1 else None} for n, f in zip(names, figures, strict=False)
    }
    share = {str(grid): 0.25 for grid in GRIDS}
    row = {"name": "a", "policy": "routed", "seeds": [0], "gmacs": {"28": 0.5}, "image_gmacs": 0.1, "share": share, **cells}
    lines = markdown({"complete": complete, "rows": [row]}).strip().splitlines()
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert ("same command" in lines[-1]) is not complete
