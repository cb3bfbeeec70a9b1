"""The command `python -m benchmarks.kernels`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.main import run
from cli.options import Json

if TYPE_CHECKING:
    from torch import Tensor, nn

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})

PARTS = (35, 34, 21, 10)
"""Shares of the instances at 14, 28, 56 and 112 (paper, Table 9)."""
MAX_INSTANCES = 400


@app.command()
def kernels(
    instances: Annotated[int, typer.Option(min=1, max=MAX_INSTANCES, help="Instances in the image.")] = 100,
    runs: Annotated[int, typer.Option(min=100, help="Timed runs of each contender; the figures are medians.")] = 100,
    json: Json = None,
) -> None:
    """Time the TensorRT plugins' kernels on an NVIDIA GPU, at r50's sizes, and torchvision's operators beside them.

    Example: python -m benchmarks.kernels --json kernels.json
    """
    from benchmarks.kernels.benchmark import bench_kernels, check_gpu
    from benchmarks.kernels.sizes import CANVAS, CLASSES
    from runtime.bench import random_boxes, spread
    from runtime.doctor import find_gpus
    from runtime.files import write_json
    from runtime.machine import machine

    check_gpu()

    import numpy as np
    import torch

    from dynamask.config import R50
    from dynamask.model import build_mask_branch

    boxes = torch.from_numpy(random_boxes(instances, *CANVAS, np.random.default_rng(0)))
    branch = build_mask_branch(R50, CLASSES).eval()
    result = bench_kernels(branch, _eager, boxes, spread(instances, PARTS), runs)
    result["machine"], result["cuda"], result["gpus"] = machine(), torch.version.cuda, find_gpus()
    result["machine"]["versions"]["triton"] = _version("triton")
    if json is not None:
        write_json(json, result)
    _print(result)


def _eager(branch: nn.Module, pyramid: Sequence[Tensor], boxes: Tensor, labels: Tensor, override: Tensor) -> Sequence[Tensor]:
    from typing import cast

    import torch

    from benchmarks.kernels.sizes import CANVAS
    from dynamask.detector import Detections
    from dynamask.mask_branch import MaskBranch

    detections = Detections(boxes, torch.ones_like(boxes[:, 0]), labels)
    masks = cast(MaskBranch, branch)
    return masks.segment(pyramid, detections, CANVAS, masks.gmac_budget(), override).logits


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    device, rates = result["device"], result["ceilings"]["rates"]
    console.print(f"{device['name']}, compute capability {device['compute_capability']}; medians of {result['runs']} runs in turns")
    peaks = ", ".join(f"{name} products {rate / 1e12:.1f} TFLOP/s" for name, rate in rates.items())
    console.print(f"measured ceilings: copy {result['ceilings']['bandwidth'] / 1e9:.0f} GB/s, {peaks}")
    table = Table()
    for column in ("case", "type", "error", "contender", "timed as"):
        table.add_column(column)
    for column in ("median ms", "10–90 %", "over kernel", "of roofline"):
        table.add_column(column, justify="right")
    for case in result["cases"]:
        share = f"{100 * case['roofline_share']:.0f} % ({case['limit']})" if "limit" in case else ""
        first = [case["name"], case["dtype"], "" if case["error"] is None else f"{case['error']:.0e}"]
        for name, times in case["times"].items():
            spread = f"{times['p10_ms']:.3f}–{times['p90_ms']:.3f}"
            ratio = f"{case['speedup'][name]:.2f}" if name in case["speedup"] else ""
            table.add_row(*first, name, times["timing"], f"{times['median_ms']:.3f}", spread, ratio, share)
            first, share = ["", "", ""], ""
    console.print(table)
    for dtype, ratios in result["routed_over_largest"].items():
        console.print(f"mask branch, {dtype}, routed / all at 112: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    sys.exit(run(app, "python -m benchmarks.kernels"))
