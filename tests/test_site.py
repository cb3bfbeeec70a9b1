"""The documentation builds as a site without a warning, and asks nothing of other hosts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dynamask
from scripts.site_pages import for_the_site

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]*src=\"(?:https?:)?//", text), page
        assert not re.findall(r"<link[^>]*rel=\"stylesheet\"[^>]*href=\"(?:https?:)?//", text), page


def test_the_reference_has_every_public_name(site: Path) -> None:
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("*.html"))
    missing = [name for name in dynamask.__all__ if name != "__version__" and f'id="dynamask.{name}"' not in reference]
    assert missing == []


def test_links_of_root_files_lead_within_the_site() -> None:
    text = "[a](docs/training.md#x) [b](docs/results/) [c](CHANGELOG.md) [d](LICENSE) [e](https://x.org) ![f](docs/pictures/p.jpg)"
    expected = "[a](training.md#x) [b](results/README.md) [c](changelog.md) d [e](https://x.org) ![f](pictures/p.jpg)"
    assert for_the_site(text) == expected
