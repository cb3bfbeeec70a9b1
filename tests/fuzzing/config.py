"""Configuration files of training and plans of ablations (YAML), and values of `--set`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from cli.train import parse_assignments
from dynamask.ablation import read_plan
from dynamask.config import CONFIGS, load_config, load_run_config
from runtime.errors import DynaMaskError
from tests.fuzzing import Files
from tests.fuzzing.damage import damaged
from tests.fuzzing.odd import ODD_TEXTS, changed_trees

_TREES = [CONFIGS[name].model_dump(mode="json") for name in ("lite0-shapes", "lite0-coco")]
_FIELDS = [f"{section}.{name}" for section, fields in _TREES[0].items() if isinstance(fields, dict) for name in fields]
_PLAN = {
    "base": "lite0-shapes",
    "set": {"weights": "none", "train.phase1_epochs": 0.5},
    "seeds": [0, 1],
    "rows": [
        {"name": "one", "set": {"model.fusion": "add"}, "policies": ["routed", "uniform-14"], "seeds": [3]},
        {"name": "other", "from": "one", "policies": ["routed@50%"]},
    ],
}
_BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])
"""Each line holds nine times the line before: 9^29 values if they were written out."""
_YAML = (
    "*nothing",
    "&a [*a]",
    "&a {model: *a}",
    "{model: &a {mean: *a}}",
    "{? [1, 2] : 3}",
    "{? {a: b} : 3}",
    "{<<: 1}",
    "{<<: [1]}",
    "{<<: &a {<<: *a}}",
    "!!python/object/apply:os.getcwd []",
    "!!int x",
    "!!float x",
    "!!binary x",
    "!!timestamp x",
    "!!set {a, b}",
    "!!omap [1]",
    "2026-99-99",
    "2026-02-30 99:99:99",
    "190:20:30.15",
    "0b_",
    "0x_",
    "0o7",
    "._",
    "1e400",
    "-.inf",
    ".nan",
    "9" * 5000,
    "0x" + "f" * 5000,
    "[" * 500,
    "[" * 400 + "]" * 400,
    "{a: " * 3000,
    "- " * 3000,
    "'",
    '"\\ud800"',
    '"\\x00"',
    "%YAML 9.9\n---\na: b",
    "a: b\n---\nc: d",
    "a: b\na: c",
    "\ta: b",
    "|\n  text",
    "\ufeff",
    "\x00",
    "\x85\u2028",
    _BOMB,
    f"{{{', '.join(_BOMB.splitlines())}}}",
)
"""Text that YAML reads in a special way, or not at all."""
_odd_yaml = st.sampled_from(_YAML) | st.sampled_from(ODD_TEXTS) | st.text(max_size=6)


@st.composite
def _documents(draw: st.DrawFn, tree: Any) -> bytes:
    """A YAML file: fields changed, special YAML among them, or damaged bytes."""
    form = draw(st.integers(0, 9))
    text = _dump(draw(changed_trees(tree)) if form < 6 else tree)
    if form in (4, 5, 6, 7):
        lines = text.splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(":")
        lines[at] = f"{key}{colon} {draw(_odd_yaml)}" if draw(st.booleans()) else draw(_odd_yaml)
        text = "\n".join(lines)
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"])), "surrogatepass")
    if form == 8:
        return draw(damaged(content))
    return draw(_odd_yaml).encode("utf-8", "surrogatepass") if form == 9 else content


def _dump(tree: Any) -> str:
    # PyYAML cannot write deep nesting, and where it stops depends on the caller's stack. JSON is YAML too.
    return json.dumps(tree) if _depth(tree) > 20 else yaml.safe_dump(tree)


def _depth(tree: Any) -> int:
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return 1 + max(map(_depth, children), default=0)


_values = st.one_of(_odd_yaml, st.floats().map(str), st.integers().map(str))
_OTHER_KEYS = ("weights", "model", "", ".", "a.b.c", "train.epochs")
_keys = st.one_of(st.sampled_from(_FIELDS), st.sampled_from(_FIELDS), st.sampled_from(_OTHER_KEYS))
_assignments = st.one_of(st.builds("{}={}".format, _keys, _values), _values)


@st.composite
def inputs(draw: st.DrawFn) -> Files:
    """A configuration (`config.yaml`) or a plan (`plan.yaml`), and the values of `--set`, as JSON."""
    assignments = json.dumps(draw(st.lists(_assignments, max_size=2))).encode()
    if draw(st.integers(0, 3)) == 0:
        return Files({"plan.yaml": draw(_documents(_PLAN)), "set.json": assignments})
    sound = draw(st.integers(0, 2)) == 0
    content = _dump(draw(st.sampled_from(_TREES))).encode() if sound else draw(_documents(draw(st.sampled_from(_TREES))))
    return Files({"config.yaml": content, "set.json": assignments})


def check(folder: Path) -> bool:
    """Read the file as `train` and `ablate` do, first with `--set`, then without."""
    assignments: list[str] = json.loads((folder / "set.json").read_bytes())
    return any([_loads(folder, assignments), _loads(folder, [])])


def _loads(folder: Path, assignments: list[str]) -> bool:
    try:
        overrides = parse_assignments(assignments)
        if (folder / "plan.yaml").is_file():
            plan = read_plan(folder / "plan.yaml")
            assert plan.rows and all(plan.policies(row) for row in plan.rows)
            return True
        load_run_config(folder, parse_assignments(assignments))
        config = load_config(str(folder / "config.yaml"), overrides)
    except DynaMaskError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        str(error).encode()
        return False
    # What a run writes is what it reads again.
    again = folder / "again.yaml"
    again.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    assert load_config(str(again)) == config
    return True
