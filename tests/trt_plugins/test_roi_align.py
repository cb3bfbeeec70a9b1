"""RoiAlign's kernel, in Triton's interpreter, against torchvision's operator and the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from dynamask.roi import pyramid_level, pyramid_roi_align
from runtime.errors import InputError
from trt_plugins.on_torch import run
from trt_plugins.operator import Buffer, TensorSpec
from trt_plugins.roi_align import RoiAlign
from trt_plugins.roi_align.reference import roi_align as reference_roi_align

CANVAS = 128
EDGES = [
    [0.0, 0.0, 128.0, 128.0],
    [-40.0, -40.0, 20.0, 20.0],
    [100.0, 90.0, 200.0, 150.0],
    [50.0, 50.0, 50.0, 50.0],
    [60.0, 20.0, 40.0, 10.0],
    [1000.0, 1000.0, 1200.0, 1300.0],
    [-1e6, -1e6, -1e6 + 9, -1e6 + 9],
    [33.3, 12.7, 70.1, 99.9],
]
"""RoIs at borders, beyond them, without area, turned inside out and far outside."""


def _pyramid(channels: int, dtype: torch.dtype = torch.float32, levels: int = 4, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(CANVAS >> (2 + level), CANVAS >> (2 + level)) for level in range(levels)]
    return [torch.randn((batch, channels, *size), generator=generator).to(dtype) for size in sizes]


def _with_image(rois: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(rois[:, :1]), rois], dim=1)


@pytest.mark.parametrize(("samples", "aligned", "size", "channels"), [(1, 1, 4, 3), (2, 0, 3, 5), (3, 1, 2, 2)])
def test_one_map_agrees_with_torchvision(samples: int, aligned: int, size: int, channels: int) -> None:
    feature = torch.randn(1, channels, 32, 20, generator=torch.Generator().manual_seed(1))
    rois = torch.tensor(EDGES)
    [regions] = run(RoiAlign(strides=(4,), size=size, samples=samples, aligned=aligned), [feature, rois])
    expected = torchvision_roi_align(feature, [rois], size, 0.25, samples, bool(aligned))
    torch.testing.assert_close(regions, expected, atol=1e-5, rtol=1e-5)
    assert not regions[5:7].any(), "far outside there is nothing"


@pytest.mark.parametrize("aligned", [0, 1])
def test_each_roi_is_cropped_from_its_own_level(aligned: int) -> None:
    pyramid = _pyramid(6)
    rois = torch.tensor(EDGES)
    [regions] = run(RoiAlign(strides=(4, 8, 16, 32), size=3, samples=2, aligned=aligned, canonical_size=112.0), [*pyramid, rois])
    assert pyramid_level(_with_image(rois), 112.0).unique().tolist() == [0, 1, 2, 3]
    expected = pyramid_roi_align(pyramid, _with_image(rois), 3, 112.0, aligned=bool(aligned))
    torch.testing.assert_close(regions, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-200.0, 300.0, width=32)] * 4), max_size=2),
    st.sampled_from([16.0, 56.0, 224.0]),
    st.booleans(),
)
def test_any_rois_agree_with_the_model(boxes: list[tuple[float, ...]], canonical_size: float, aligned: bool) -> None:
    pyramid, rois = _pyramid(2), torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    operator = RoiAlign(strides=(4, 8, 16, 32), size=2, samples=2, aligned=int(aligned), canonical_size=canonical_size)
    [regions] = run(operator, [*pyramid, rois])
    torch.testing.assert_close(regions, pyramid_roi_align(pyramid, _with_image(rois), 2, canonical_size, aligned), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("canonical_size", [224.0, 100.0])
def test_level_boundaries_are_where_the_model_has_them(canonical_size: float) -> None:
    """Maps that hold their own index show which one each RoI was cropped from."""
    pyramid = [torch.full((1, 1, 2, 2), float(level)) for level in range(4)]
    exact = canonical_size * 2.0 ** torch.arange(-2, 2)
    sides = torch.cat([torch.nextafter(exact, torch.zeros(())), exact, exact * (1 - 1e-5), exact * (1 + 1e-5)])
    rois = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], dim=1)
    operator = RoiAlign(strides=(1024,) * 4, size=1, samples=1, aligned=1, canonical_size=canonical_size)
    [regions] = run(operator, [*pyramid, rois])
    assert regions.flatten().tolist() == pyramid_level(_with_image(rois), canonical_size).tolist()


def test_half_precision_is_the_rounded_result_of_single_precision() -> None:
    pyramid, rois = _pyramid(4, torch.float16), torch.tensor(EDGES[:4])
    [regions] = run(RoiAlign(strides=(4, 8, 16, 32), size=3, samples=2, aligned=1, canonical_size=112.0), [*pyramid, rois])
    assert regions.dtype == torch.float16
    expected = pyramid_roi_align([x.float() for x in pyramid], _with_image(rois), 3, 112.0)
    torch.testing.assert_close(regions.float(), expected, atol=1e-6, rtol=2**-11)


@pytest.mark.parametrize("levels", [2, 5])
def test_fewer_and_more_levels_agree_with_the_reference(levels: int) -> None:
    pyramid, rois = _pyramid(2, levels=levels), torch.tensor(EDGES[::2])
    strides = tuple(4 * 2**level for level in range(levels))
    [regions] = run(RoiAlign(strides=strides, size=2, samples=1, aligned=1, canonical_size=28.0), [*pyramid, rois])
    torch.testing.assert_close(regions, reference_roi_align(pyramid, rois, strides, 2, 1, True, 28.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "levels", "places"),
    [(torch.float32, 2, None), (torch.float16, 1, [0, 5, 1, 4, 4, 0])],
    ids=["two a map in order", "by their places, none of the second image's"],
)
def test_each_roi_is_cropped_from_its_own_image(dtype: torch.dtype, levels: int, places: list[int] | None) -> None:
    pyramid, rois = _pyramid(3, dtype, levels, batch=3), torch.tensor([*EDGES[:4], EDGES[7], EDGES[3]])
    values: dict[str, Any] = {"strides": (4, 8)[:levels], "size": 2, "samples": 1, "aligned": 1, "canonical_size": 28.0}
    given = [] if places is None else [torch.tensor(places)]
    [regions] = run(RoiAlign(**values, per_image=2), [*pyramid, rois, *given])
    images = torch.tensor(places or range(6)) // 2
    for image in range(3):
        own = images == image
        [alone] = run(RoiAlign(**values), [*(x[image : image + 1] for x in pyramid), rois[own]])
        assert torch.equal(regions[own], alone)
    expected = reference_roi_align(pyramid, rois, **values, per_image=2, places=given[0] if given else None)
    torch.testing.assert_close(regions, expected, atol=1e-5, rtol=2**-11)


@pytest.mark.parametrize("per_image", [0, 4])
def test_no_roi_gives_no_region(per_image: int) -> None:
    inputs = [torch.randn(2 if per_image else 1, 3, 8, 8), torch.zeros(0, 4)]
    operator = RoiAlign(strides=(4,), size=7, samples=2, aligned=0, per_image=per_image)
    [regions] = run(operator, [*inputs, torch.zeros(0, dtype=torch.int64)] if per_image else inputs)
    assert regions.shape == (0, 3, 7, 7)


def test_more_channels_and_bins_than_a_program_takes() -> None:
    feature, rois = torch.randn(1, 37, 9, 7, generator=torch.Generator().manual_seed(2)), torch.tensor([[3.0, 5.0, 60.0, 44.0]])
    [regions] = run(RoiAlign(strides=(8,), size=11, samples=1, aligned=1), [feature, rois])
    torch.testing.assert_close(regions, torchvision_roi_align(feature, [rois], 11, 0.125, 1, True), atol=1e-5, rtol=1e-5)


def test_one_kernel_serves_all_sizes_and_the_pyramid_is_one_launch() -> None:
    operator = RoiAlign(strides=(4, 8), size=7, samples=2, aligned=0, canonical_size=224.0)
    unknown = [TensorSpec((1, 256, None, None), "float16")] * 2 + [TensorSpec((None, 4), "float32")]
    known = [TensorSpec((1, 256, 40, 60), "float16"), TensorSpec((1, 256, 20, 30), "float16"), TensorSpec((9, 4), "float32")]
    operator.check_inputs(unknown)
    [kernel] = operator.kernels(unknown)
    [launch] = operator.launches(known, [TensorSpec((9, 256, 7, 7), "float16")])
    assert launch.kernel == kernel
    assert launch.grid == (9 * 256 * 64 // 512, 1, 1), "49 bins take two blocks of 32"
    assert launch.arguments[:6] == (*[Buffer("input", index) for index in (0, 1, 1, 1, 1)], Buffer("input", 2))


def test_the_places_are_an_input_of_their_own() -> None:
    operator = RoiAlign(strides=(4,), size=7, samples=2, aligned=0, per_image=100)
    unknown = [TensorSpec((None, 8, None, None), "float16"), TensorSpec((None, 4), "float32"), TensorSpec((None,), "int64")]
    known = [TensorSpec((2, 8, 40, 60), "float16"), TensorSpec((9, 4), "float32"), TensorSpec((9,), "int64")]
    operator.check_inputs(unknown)
    assert operator.output_shapes([["B", 8, "H", "W"], ["n", 4], ["n"]]) == [["n", 8, 7, 7]]
    for specs, places in [(known, Buffer("input", 2)), (known[:2], Buffer("input", 1))]:
        operator.check_inputs(specs)
        [launch] = operator.launches(specs, [TensorSpec((9, 8, 7, 7), "float16")])
        assert launch.kernel in operator.kernels(unknown[: len(specs)])
        assert launch.arguments[5:8] == (Buffer("input", 1), places, Buffer("output", 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": ()}, "strides"),
        ({"strides": (4,) * 6}, "strides"),
        ({"size": 0}, "size"),
        ({"samples": 0}, "samples"),
        ({"aligned": 2}, "aligned"),
        ({"strides": (4, 8)}, "canonical_size"),
        ({"per_image": -1}, "per_image"),
    ],
)
def test_wrong_attributes_are_refused(change: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"strides": (4,), "size": 7, "samples": 2, "aligned": 1}
    with pytest.raises(InputError, match=f"crop1: RoiAlign: {message}"):
        RoiAlign("crop1", **(values | change))


FEATURE = TensorSpec((1, 8, 4, 4), "float32")
ROIS = TensorSpec((None, 4), "float32")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([FEATURE, ROIS], "2 inputs"),
        ([FEATURE, TensorSpec((1, 9, 2, 2), "float32"), ROIS], "map 1"),
        ([TensorSpec((2, 8, 4, 4), "float32"), FEATURE, ROIS], "map 0"),
        ([FEATURE, TensorSpec((1, 8, 2, 2), "float16"), ROIS], "map 1 is float16"),
        ([FEATURE, FEATURE, TensorSpec((None, 5), "float32")], "RoIs"),
        ([FEATURE, FEATURE, TensorSpec((None, 4), "float16")], "RoIs"),
    ],
)
def test_wrong_inputs_are_refused(inputs: list[TensorSpec], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RoiAlign(strides=(4, 8), size=7, samples=2, aligned=1, canonical_size=224.0).check_inputs(inputs)


MAPS = TensorSpec((2, 8, 4, 4), "float32")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([MAPS, FEATURE, ROIS], r"map 1 is \(1, 8, 4, 4\); give \[B, C, H, W\], with the same B"),
        ([MAPS, MAPS], "2 inputs; 2 strides ask for 2 maps, then the RoIs and, if"),
        ([MAPS, MAPS, ROIS, ROIS], "the places are"),
        ([MAPS, MAPS, ROIS, TensorSpec((None,), "int32")], "the places are .* int32"),
        ([MAPS, MAPS, TensorSpec((3, 4), "float32"), TensorSpec((2,), "int64")], r"the places are \(2,\) int64 of RoIs \(3, 4\)"),
    ],
)
def test_wrong_inputs_of_several_images_are_refused(inputs: list[TensorSpec], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RoiAlign(strides=(4, 8), size=7, samples=2, aligned=1, canonical_size=224.0, per_image=3).check_inputs(inputs)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")
def test_places_and_boxes_of_any_content_read_within_the_maps() -> None:
    """Memory of any content is what plugins are timed on while an engine is built."""
    memory = torch.full((3, 4, 32, 20), float("nan"))
    memory[1] = torch.randn(4, 32, 20, generator=torch.Generator().manual_seed(1))
    nan, inf = float("nan"), float("inf")
    rois = torch.tensor([[0.0, 0.0, 64.0, 64.0]] * 3 + [[nan, 0.0, 64.0, 64.0], [0.0, 0.0, inf, 64.0], [-1e38, 0.0, 1e38, 9.0]])
    places = torch.tensor([0, 5_000_000_000, -7, 1, 1, 1])
    operator = RoiAlign(strides=(4,), size=3, samples=2, aligned=1, per_image=2)
    inside = run(operator, [memory[1:2], rois, places])[0]
    torch.testing.assert_close(inside[1], inside[0])
    torch.testing.assert_close(inside[2], inside[0])
    assert inside[:3].isfinite().all()
