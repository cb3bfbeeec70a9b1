"""A hook of mkdocs: README, CONTRIBUTING and CHANGELOG, which stand outside docs/, as pages of the site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File in the repository's root -> page of the site."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages, their links turned to where the files are in the site."""
    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=for_the_site((root / name).read_text(encoding="utf-8"))))
    return files


def for_the_site(text: str) -> str:
    """Links to docs/ and to the other pages lead within the site; links to any other file of the repository become plain text."""

    def link(match: re.Match[str]) -> str:
        shown, target = match[1], match[2]
        if target.startswith(("http", "#")):
            return match[0]
        page, hash_sign, anchor = target.partition("#")
        page = PAGES.get(page, page.removeprefix("docs/") if page.startswith("docs/") else "")
        page += "README.md" if page.endswith("/") else ""
        return f"[{shown}]({page}{hash_sign}{anchor})" if page else shown

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, text)
