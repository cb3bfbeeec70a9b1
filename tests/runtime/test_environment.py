"""Libraries send nothing home, and a user without a name or a home folder is no fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without an entry in the password file, without HOME, and with temporary files in `tmp_path`."""

    def missing(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr("pwd.getpwuid", missing)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # So that the test's end restores it.
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.usefixtures("nobody")
def test_a_user_without_an_entry_gets_a_name_and_a_home_of_its_own(tmp_path: Path) -> None:
    import getpass

    from runtime.files import user_cache

    environment.prepare()
    assert getpass.getuser() == f"user{os.getuid()}"
    assert Path.home().parent == tmp_path
    assert Path.home().stat().st_mode & 0o077 == 0
    assert user_cache("engines") == Path.home() / ".cache" / "dynamask" / "engines"
    home = Path.home()
    environment.prepare()
    assert Path.home() == home


@pytest.mark.usefixtures("nobody")
def test_a_folder_that_others_may_write_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / f"dynamask-{os.getuid()}").mkdir()
    (tmp_path / f"dynamask-{os.getuid()}").chmod(0o777)
    environment.prepare()
    assert Path.home().parent == tmp_path
    assert Path.home().stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("nobody")
def test_caches_go_elsewhere_where_home_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setattr(os, "access", lambda *_: False)
    environment.prepare()
    assert os.environ["HOME"] == "/proc", "what stands there is still found"
    assert Path(os.environ["MPLCONFIGDIR"]).parents[1] == tmp_path
    assert Path(os.environ["TRITON_CACHE_DIR"]).parents[1] == tmp_path


def test_variables_that_are_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.setenv("LOGNAME", "somebody")
    environment.prepare()
    assert (os.environ["ORT_DISABLE_TELEMETRY"], os.environ["LOGNAME"]) == ("0", "somebody")


@pytest.mark.parametrize("module", ["runtime.targets.onnxruntime", "export.onnxruntime_engine", "runtime.doctor", "cli.main"])
def test_nothing_is_written_into_the_home_folder(tmp_path: Path, module: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI")}
    program = f"import {module}, numpy; from runtime.targets.ort import ort; print(ort.get_available_providers())"
    if module == "runtime.doctor":
        program = "from runtime.doctor import examine; print(examine())"
    if module == "cli.main":
        program = "import cli.main; cli.main.main(['doctor'])"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**variables, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_onnxruntime_is_imported_in_one_place() -> None:
    sources = [path for package in ("cli", "dynamask", "export", "runtime", "trt_plugins") for path in (ROOT / package).rglob("*.py")]
    importing = [str(path.relative_to(ROOT)) for path in sources if "import onnxruntime" in path.read_text(encoding="utf-8")]
    assert importing == ["runtime/targets/ort.py"]
