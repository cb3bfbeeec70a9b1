"""`dynamask build-engine`: what it passes on, what it says, and how it ends."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from export import engine


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Nothing is built; the arguments of every call, progress aside."""
    found: list[tuple[Any, ...]] = []

    def build(*arguments: Any) -> dict[str, Any]:
        *rest, progress = arguments
        found.append(tuple(rest))
        for done in range(3):
            progress("Compiling kernels", done, 2)
        kernels = [
            {"kernel": f"k{i}", "compute_capability": c, "registers": 32, "spills": 0, "shared": 0} for i, c in enumerate(("9.0", "12.0"))
        ]
        nodes = {"DeformConv": 6, "MsmRoute": 1}
        batch, canvas = rest[4], rest[5] or ((320, 384),) * 3
        result = {
            "profile": {"batch": list(batch), "canvas": [list(size) for size in canvas]},
            "engine": "a.bundle/engines/tensorrt-rtx",
            "bytes": 2_500_000,
            "seconds": 1.25,
            "precision": "fp16",
            "reused": False,
        }
        return {**result, "plugins": list(nodes), "plugin_nodes": nodes, "kernels": kernels}

    monkeypatch.setattr(engine, "build_engine", build)
    monkeypatch.setattr("cli.build_engine._calibrate", lambda *_: None)
    return found


def test_options_reach_the_builder(calls: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--target", "tensorrt-rtx", "--precision", "fp16", "--compute-capability", "8.7, 8.9", "--compute-capability", "12.0"]
    assert main(["build-engine", "a.bundle", *options, "--json", str(tmp_path / "r.json")]) == 0
    assert calls == [(Path("a.bundle"), "tensorrt-rtx", "fp16", ["8.7", "8.9", "12.0"], (1, 1, 1), None)]
    assert json.loads((tmp_path / "r.json").read_text())["plugin_nodes"] == {"DeformConv": 6, "MsmRoute": 1}
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "a.bundle/engines/tensorrt-rtx (2.5 MB, fp16, 1.2 s)",
        "plugins: DeformConv ×6, MsmRoute ×1",
        "2 kernels for compute capability 9.0, 12.0",
    ]


def test_without_options_it_is_fp32_for_onnx_runtime(calls: list[tuple[Any, ...]]) -> None:
    assert main(["build-engine", "a.bundle"]) == 0
    assert calls == [(Path("a.bundle"), "onnxruntime", "fp32", [], (1, 1, 1), None)]


@pytest.mark.parametrize(
    ("options", "passed", "said"),
    [
        (["--batch", "4"], ((4, 4, 4), None), "a run takes 4 images of 320x384"),
        (["--batch", "1:4:8"], ((1, 4, 8), None), "a run takes 1 to 8 images, tuned for 4, of 320x384"),
        (["--size", "320x320"], ((1, 1, 1), ((320, 320),) * 3), None),
        (
            ["--size", "192x320:256x320:320x320"],
            ((1, 1, 1), ((192, 320), (256, 320), (320, 320))),
            "a run takes 1 image of 192x320 to 320x320, tuned for 256x320",
        ),
    ],
)
def test_a_profile_reaches_the_builder(
    options: list[str], passed: tuple[Any, ...], said: str | None, calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-engine", "a.bundle", "--target", "tensorrt-rtx", *options]) == 0
    assert calls[0][4:] == passed
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("a run")] == ([said] if said else [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "cuda"], ["cuda", "onnxruntime"]),
        (["--precision", "int8"], ["int8", "fp16"]),
        ([], ["missing.bundle", "dynamask export"]),
        (["--batch", "1:4"], ["1:4", "MIN:OPT:MAX"]),
        (["--batch", "some"], ["some", "1:4:8"]),
        (["--size", "320"], ["320", "HxW"]),
    ],
)
def test_a_wrong_call_is_one_sentence(options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-engine", str(tmp_path / "missing.bundle"), *options]) == 2
    said = capsys.readouterr().err.strip()
    assert all(word in said for word in words) and "\n" not in said and "Traceback" not in said


def test_a_missing_library_is_named_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["build-engine", str(tmp_path), "--target", "tensorrt"]) == 2
    assert "pip install tensorrt" in capsys.readouterr().err


def test_help_names_the_images_and_the_gpus_of_an_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-engine", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(words in said for words in ("one image at a time", "canvas", "tensorrt-rtx", "--compute-capability", "fp16"))
