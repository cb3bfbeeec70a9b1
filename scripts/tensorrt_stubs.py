"""Correct the lines of the type stubs of tensorrt-stubs that are not valid Python, in the folder that they were installed to.

    pip install --no-deps --target FOLDER tensorrt-stubs && python scripts/tensorrt_stubs.py FOLDER

As a dependency the package would install TensorRT itself, which comes from another source: hence --no-deps and a separate folder.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path


def mend(text: str) -> str:
    """The stub with arguments named `in` called `in_`, and with a default for one that follows others with a default.

    Raises:
        SyntaxError: the result is still not valid Python.
    """
    text = re.sub(r"\bin: (?=list\[)", "in_: ", text)
    text = re.sub(r"(def add_scale_nd\(.*, channel_axis: int)(?=\))", r"\1 = ...", text)
    ast.parse(text)
    return text


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    stubs = sorted(folder.rglob("*.pyi"))
    if not stubs:
        sys.exit(f"{folder} holds no stubs: pip install --no-deps --target {folder} tensorrt-stubs")
    for stub in stubs:
        try:
            stub.write_text(mend(stub.read_text(encoding="utf-8")), encoding="utf-8")
        except SyntaxError as error:
            sys.exit(f"{stub}, line {error.lineno}: {error.msg}; take the version of constraints.txt.")
