from __future__ import annotations

import json

from typer.testing import CliRunner

from cli.data import app


def test_shapes_command_writes_a_data_set_a_video_and_its_result(tmp_path):
    arguments = ["shapes", str(tmp_path / "set"), "--images", "2", "--size", "96x128", "--seed", "4"]
    arguments += ["--video", str(tmp_path / "film.mp4"), "--frames", "3", "--json", str(tmp_path / "result.json")]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["images"], result["frames"]) == (2, 3)
    tree = json.loads((tmp_path / "set" / "instances.json").read_text())
    assert [(entry["height"], entry["width"]) for entry in tree["images"]] == [(96, 128)] * 2
    assert (tmp_path / "film.mp4").stat().st_size > 0
