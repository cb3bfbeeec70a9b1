"""The checks of a GPU, on machines that are made up and on this one: which parts run, what is written, and what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.targets.base import EngineOutput
from scripts import gpu_checks
from scripts.gpu_checks import Machine, Outcome, Part

ROOT = Path(__file__).parents[1]
BUNDLE = Path("lite0.bundle")
RTX_CARD = Machine(frozenset(("torch", "triton", "onnx", "tensorrt_rtx")), True, "8.9", "/usr/bin/compute-sanitizer", None)
ORIN = Machine(frozenset(("triton", "onnx", "tensorrt")), False, "8.7", None, BUNDLE)
SERVER = Machine(frozenset(("torch", "triton", "onnx", "tensorrt")), True, "9.0", "/usr/bin/compute-sanitizer", None)
PYTORCH_ONLY = Machine(frozenset(("torch", "triton", "onnx")), True, "9.0", None, None)
RTX_PARTS, FULL_PARTS = ["tensorrt-rtx fp16", "tensorrt-rtx fp32"], ["tensorrt fp16", "tensorrt fp32"]
TORCH_PARTS = ["kernels", "speed of kernels", "training step"]
LAST_PARTS = ["engines against ONNX Runtime", "memcheck", "racecheck"]
NO_SANITIZER = "compute-sanitizer is not"


def reasons(machine: Machine) -> dict[str, str | None]:
    return {part.name: part.skip(machine) for part in gpu_checks.parts(Path("out"), machine.bundle)}


@pytest.mark.parametrize(
    ("machine", "run", "skipped"),
    [
        (
            RTX_CARD,
            ["bundle", *RTX_PARTS, *TORCH_PARTS, "engines against ONNX Runtime", "memcheck", "racecheck"],
            {"tensorrt fp16": "tensorrt"},
        ),
        (
            ORIN,
            FULL_PARTS,
            {"bundle": "lite0.bundle is given", "kernels": "PyTorch is not installed", "memcheck": NO_SANITIZER},
        ),
        (
            SERVER,
            ["bundle", *FULL_PARTS, *TORCH_PARTS, "engines against ONNX Runtime", "memcheck", "racecheck"],
            {"tensorrt-rtx fp16": "_rtx"},
        ),
        (
            PYTORCH_ONLY,
            ["bundle", *TORCH_PARTS],
            {
                "tensorrt fp32": "not installed: tensorrt",
                "engines against ONNX Runtime": "neither",
                "racecheck": "compute-sanitizer is not",
            },
        ),
        (replace(ORIN, bundle=None), [], {"tensorrt fp16": "give one with --bundle", "bundle": "exporting needs PyTorch"}),
        (
            replace(SERVER, capability=None, torch_gpu=False),
            [],
            {"bundle": "no NVIDIA GPU", "tensorrt fp16": "no NVIDIA GPU", "kernels": "no NVIDIA GPU"},
        ),
    ],
    ids=["RTX card", "Orin", "server with TensorRT", "server with PyTorch", "Orin without a bundle", "no GPU"],
)
def test_each_machine_runs_what_it_can_and_says_why_not_the_rest(machine: Machine, run: list[str], skipped: dict[str, str]) -> None:
    found = reasons(machine)
    assert [name for name, reason in found.items() if reason is None] == ["doctor", *run]
    for name, reason in skipped.items():
        assert reason in (found[name] or "")


def test_parts_pass_fail_are_skipped_and_are_left(tmp_path: Path) -> None:
    write = f"import pathlib; pathlib.Path({str(tmp_path / 'a.json')!r}).write_text('[1]'); print('done')"
    chosen = [
        Part("good", ("-c", write), lambda machine: None, results="a.json"),
        Part("bad one", ("-c", "print('why'); raise SystemExit(3)"), lambda machine: None),
        Part("elsewhere", ("-c", "raise SystemExit"), lambda machine: "no such card"),
        Part("endless", ("-c", "import time; print('step 7', flush=True); time.sleep(60)"), lambda machine: None),
        Part("late", ("-c", "raise SystemExit"), lambda machine: None),
    ]
    good, bad, elsewhere, endless, late = gpu_checks.run_parts(chosen, PYTORCH_ONLY, tmp_path, 8)
    assert (good.state, good.results) == ("passed", [1])
    assert (bad.state, bad.note) == ("failed", "why") and (tmp_path / "bad-one.log").read_text() == "why\n"
    assert (elsewhere.state, elsewhere.note) == ("skipped", "no such card")
    assert endless.state == "left" and "step 7" in endless.note
    assert late.state == "left" and "before it began" in late.note


def test_the_page_has_every_part_and_figure() -> None:
    engine = {image: {"instances": 3, "boxes_px": 0.0123, "routed_ms": 1.5} for image in gpu_checks.IMAGES}
    speed = {"cases": [{"name": "RoiAlign", "dtype": "float16", "times": {"kernel": {"median_ms": 0.25}}}]}
    outcomes = [
        Outcome("doctor", "passed", 1),
        Outcome("tensorrt fp16", "passed", 61.2, results=engine),
        Outcome("speed of kernels", "passed", 9, results=speed),
        Outcome("memcheck", "skipped", note="a | b"),
    ]
    text = gpu_checks.page(replace(SERVER, name="NVIDIA H100"), outcomes, "2026-01-02")
    assert text.startswith("# NVIDIA H100\n") and "2026-01-02. Compute capability 9.0." in text
    for line in ("| tensorrt fp16 | passed | 61 |  |", r"| memcheck | skipped | 0 | a \| b |", "| RoiAlign | float16 | kernel | 0.250 |"):
        assert line in text.splitlines()
    assert "| tensorrt fp16 | blank | 3 |  | 0.0123 |" in text and text.count("| tensorrt fp16 | drawn |") == 1


def output(scores: list[float], logits: float) -> EngineOutput:
    slots, count = np.nonzero(np.array(scores) > 0)[0], len(scores)
    grids = np.where(np.array(scores) > 0, 1, -1)
    empty: Any = (np.zeros(0, np.int64), np.zeros((0, 1, 1), np.float32))
    masks: Any = {14: empty, 28: (slots, np.full((len(slots), 28, 28), logits, np.float32)), 56: empty, 112: empty}
    boxes = np.full((count, 4), logits, np.float32)
    return EngineOutput(boxes, np.array(scores, np.float32), np.zeros(count, np.int64), grids, masks, {})


def test_two_engines_are_compared_where_both_found_something() -> None:
    found = gpu_checks._compare(output([0.9, 0.5, 0], 0.5), output([0.8, 0.5, 0.3], 0.0))
    assert (found["instances"], found["expected_instances"], found["same"], found["same_grids"]) == (2, 3, 2, 1)
    assert found["boxes_px"] == 0.5 and found["scores"] == pytest.approx(0.1)
    assert found["probabilities"] == pytest.approx(1 / (1 + np.exp(-0.5)) - 0.5)
    assert gpu_checks._compare(output([0], 0.5), output([0], 0.0)) == {"instances": 0, "expected_instances": 0, "same": 0}


def test_an_engine_runs_on_a_drawn_and_a_blank_image(example_files: dict[str, Any]) -> None:
    """ONNX Runtime's target in the place of TensorRT's: it agrees with itself."""
    found = gpu_checks.check_engine(example_files["bundle"], "onnxruntime", "fp32", runs=2, build=False)
    assert set(found) == {"drawn", "blank"}
    for image in found.values():
        assert image["instances"] == image["same"] == 4
        assert (image["boxes_px"], image["scores"], image["probabilities"], image["same_grids"]) == (0, 0, 0, 1)
        assert image["first_ms"] > 0
    assert found["drawn"]["routed_ms"] > 0 and found["drawn"]["largest_ms"] > 0 and "routed_ms" not in found["blank"]


def test_the_script_writes_its_results_on_this_machine(tmp_path: Path) -> None:
    """Whatever this machine has: its doctor runs, and a part that does not exist is refused."""
    environment = {**os.environ, "PYTHON": sys.executable, "WHEELS": str(tmp_path)}
    script = [str(ROOT / "scripts" / "gpu_checks.sh"), str(tmp_path / "out")]
    ran = subprocess.run([*script, "--parts", "doctor,memcheck"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [part["name"] for part in content["parts"]] == ["doctor", "memcheck"]
    assert content["parts"][0]["state"] == "passed" and content["parts"][0]["results"]["machine"]["python"]
    assert "| doctor | passed |" in (tmp_path / "out" / "gpu.md").read_text()
    refused = subprocess.run([*script, "--parts", "magic"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "no part is called magic; there are doctor, bundle" in refused.stderr
