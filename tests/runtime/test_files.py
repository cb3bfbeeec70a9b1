"""Files are replaced whole; devices, pipes and descriptors are written into and stay what they are."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime.errors import DynaMaskError, InputError
from runtime.files import Output, atomic_path, check_apart, check_file, check_folder, input_path, natural_order, write_json

ROOT = Path(__file__).parents[2]
as_a_user = pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may write everywhere")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]
    with pytest.raises(RuntimeError, match="boom"), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert json.loads(path.read_text()) == [1]
        raise RuntimeError("boom")
    assert json.loads(path.read_text()) == [1]
    assert names(path.parent) == ["a.json"]


def test_links_stay_and_their_targets_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to("middle.json")
    (tmp_path / "middle.json").symlink_to("store/old.json")
    (tmp_path / "dangling.json").symlink_to("store/new.json")
    for name in ("link.json", "dangling.json"):
        write_json(tmp_path / name, 7)
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "middle.json").is_symlink()
    assert names(tmp_path / "store") == ["new.json", "old.json"]
    assert (tmp_path / "store" / "old.json").read_text() == (tmp_path / "store" / "new.json").read_text() == "7\n"


def test_mode_is_kept_and_a_new_file_has_the_usual_one(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("")
    (tmp_path / "old").chmod(0o640)
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "new", 1)
    finally:
        os.umask(before)
    write_json(tmp_path / "old", 1)
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_pipe_gets_the_content_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json(pipe, list(range(30_000)))
    reader.join()
    assert json.loads(read[0]) == list(range(30_000))
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names(tmp_path) == ["pipe.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_text("")
    except OSError:
        pytest.skip("no devices can be made here")
    (tmp_path / "link").symlink_to(null)
    for path in (null, tmp_path / "link"):
        write_json(path, 1)
        with Output(path).open() as file:
            file.write(b"x")
    assert stat.S_ISCHR(null.lstat().st_mode)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "null"]


def test_a_full_device_is_a_full_disk() -> None:
    with pytest.raises(DynaMaskError, match=r"/dev/full could not be written \(No space left on device\).* free some space") as caught:
        write_json("/dev/full", 1)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_a_descriptor_is_written_where_it_stands(tmp_path: Path, place: str, kind: str) -> None:
    code = f"from runtime.files import write_json; print('before'); write_json({place!r}, 5); print('after')"
    target = tmp_path / "out.txt"
    target.write_text("kept\n")
    with target.open("a") as file:
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=file if kind == "file" else subprocess.PIPE, check=True)
    written = target.read_text().removeprefix("kept\n") if kind == "file" else ran.stdout.decode()
    assert written == "before\n5\nafter\n"
    assert names(tmp_path) == ["out.txt"]


def test_process_substitution(tmp_path: Path) -> None:
    code = "import sys; from runtime.files import check_file, write_json; check_file(__import__('pathlib').Path(sys.argv[1]));"
    code += "write_json(sys.argv[1], 5)"
    script = f'{sys.executable} -c "{code}" >(cat > {tmp_path}/read); wait $!'
    subprocess.run(["bash", "-c", script], cwd=ROOT, check=True)
    assert (tmp_path / "read").read_text() == "5\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder, "it is a folder"),
        (lambda folder: folder / ("n" * 300), "name is too long"),
        (lambda folder: folder / "file" / "a.json", "a part of its path is a file"),
        (lambda folder: folder / "circle", "links lead in a circle"),
        (lambda _: Path("/dev/fd/999"), "no such descriptor is open"),
        (lambda _: Path("/proc/a.json"), "its folder takes no new file|no permission"),
    ],
)
def test_a_place_that_takes_no_file_is_bad_input(tmp_path: Path, make: object, said: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError, match=said) as caught:
        write_json(path, 1)
    assert "space" not in str(caught.value)
    if path.parent != Path("/proc"):  # Root finds out only by trying.
        with pytest.raises(InputError):
            check_file(path)
    assert names(tmp_path) == ["circle", "file"]


def test_the_error_names_a_folder_that_is_removed_while_writing(tmp_path: Path) -> None:
    with pytest.raises(DynaMaskError, match="its folder does not exist"), atomic_path(tmp_path / "f" / "a") as temporary:
        temporary.write_text("x")
        shutil.rmtree(tmp_path / "f")


@pytest.mark.parametrize(
    "name", ["-x.json", "--json", ".hidden", "..x", "a" * 255, "ж" * 127, os.fsdecode(b"caf\xe9.json"), "a\nb", "x." + "s" * 200]
)
def test_any_name_can_be_written(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, 1)
    assert names(tmp_path) == [name]


@as_a_user
def test_files_without_write_permission(tmp_path: Path) -> None:
    """A read-only folder takes no new file; a file in it that may be written is written in place; a read-only file is not replaced."""
    folder = tmp_path / "f"
    folder.mkdir()
    for name, mode in (("writable", 0o666), ("readonly", 0o444)):
        (folder / name).write_text("old")
        (folder / name).chmod(mode)
    inode = (folder / "writable").stat().st_ino
    folder.chmod(0o555)
    code = (
        "import sys\nfrom runtime.errors import InputError\nfrom runtime.files import write_json\n"
        "for name in sys.argv[1:]:\n    try: write_json(name, 1)\n    except InputError as error: print(error)"
    )
    prefix = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if prefix:
        for parent in (tmp_path, *tmp_path.parents[:-2]):
            parent.chmod(parent.stat().st_mode | 0o055)
    python = sys.executable if not prefix else shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    ran = subprocess.run(
        [*prefix, python, "-c", code, "new", "readonly", "writable"], cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    if ran.returncode and prefix:
        pytest.skip("another user cannot run Python here")
    said = ran.stdout.decode().splitlines()
    assert [line.split()[0] for line in said] == ["new", "readonly"]
    assert all("no permission" in line for line in said)
    assert (folder / "writable").read_text() == "1\n"
    assert (folder / "writable").stat().st_ino == inode
    assert (folder / "readonly").read_text() == "old"
    assert names(folder) == ["readonly", "writable"]


def test_outputs_are_kept_apart_but_may_share_a_device(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    null = Path("/dev/null")
    check_apart([null, null, tmp_path / "a"], [tmp_path / "b"])
    with pytest.raises(InputError, match="two outputs"):
        check_apart([tmp_path / "a", tmp_path / "link"])
    with pytest.raises(InputError, match="both read and written"):
        check_apart([tmp_path / "link"], [tmp_path / "a"])
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    check_apart([null, None, tmp_path / "bundle.json"], bundle=bundle)
    (tmp_path / "into").symlink_to(bundle)
    with pytest.raises(InputError, match=r"is in the bundle .*bundle, whose files must stay as they are"):
        check_apart([tmp_path / "into" / "manifest.json"], bundle=bundle)
    check_file(null)
    check_folder(tmp_path / "x" / "y")


def test_numbers_in_names_count_as_numbers() -> None:
    ordered = ["1.jpg", "2.jpg", "10.jpg", "a1b2", "a1b10", "A2", "img2.png", "IMG10.png", "x", "x0", "x00"]
    assert [str(path) for path in natural_order(map(Path, reversed(ordered)))] == ordered
    assert natural_order([Path("f10/1"), Path("f9/2")]) == [Path("f9/2"), Path("f10/1")]


def test_the_path_of_an_input_may_lead_to_nothing(tmp_path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / "a" / "b", tmp_path / "a\0b"):
        assert input_path(str(path)) == path


def test_a_path_that_cannot_be_looked_up_is_refused_for_its_cause(tmp_path):
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(InputError, match=r"circle cannot be read \(its links lead in a circle\): give another path\."):
        input_path(circle)
    with pytest.raises(InputError, match=r"x\.\.\. cannot be read \(its name is too long\)") as caught:
        input_path("x" * 5000)
    assert len(str(caught.value)) < 200
