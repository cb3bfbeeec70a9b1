"""Operators: their attributes, what their kernels compute on PyTorch tensors, and that knowing them loads no framework."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import DynaMaskError, InputError
from tests.trt_plugins.toy import Toy
from trt_plugins import on_torch
from trt_plugins.operator import ALIGNMENT, DataDependent, TensorSpec, Times, Workspace, alike, canvas_of, times
from trt_plugins.registry import OPERATORS

SHAPES = st.tuples(st.integers(0, 40), st.integers(1, 20))


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.sampled_from(["float32", "float16"]), st.integers(0, 2**32 - 1))
def test_kernels_on_tensors_agree_with_numpy(shape: tuple[int, int], dtype: str, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    rows, indices, m = on_torch.run(Toy("toy", scale=2, threshold=0.25), [torch.from_numpy(x), torch.tensor(3.0)])
    kept = np.flatnonzero(x[:, 0].astype(np.float32) > 0.25)
    assert m.item() == len(kept)
    np.testing.assert_array_equal(indices.numpy(), kept)
    np.testing.assert_array_equal(rows.numpy(), (x[kept].astype(np.float32) * 6).astype(dtype))


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(DynaMaskError, match="TRITON_INTERPRET=1"):
        on_torch.run(Toy(scale=1), [torch.zeros(1, 1), torch.zeros(())])


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "head/toy: Toy needs the attribute scale."),
        ({"scale": 1, "size": 2}, "head/toy: Toy has no attribute size; it has limits, scale, threshold."),
        ({"scale": "wide"}, "head/toy: Toy's attribute scale is 'wide', not float."),
        ({"scale": 1, "limits": 3}, "head/toy: Toy's attribute limits is 3, not ints."),
    ],
)
def test_wrong_attributes_are_refused_by_name(attributes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        Toy("head/toy", **attributes)
    assert str(error.value) == message


def test_kernels_are_the_same_after_attributes_were_kept_in_32_bits() -> None:
    """As in an engine's file: a threshold of 0.1 comes back as another number in 64 bits."""
    inputs = [TensorSpec((None, 8), "float32"), TensorSpec((), "float32")]
    kept = float(np.float32(0.1))
    assert kept != 0.1
    assert Toy(scale=0.1, threshold=0.1).kernels(inputs) == Toy(scale=kept, threshold=kept).kernels(inputs)


def test_data_dependent_outputs_have_their_largest_size() -> None:
    inputs = [TensorSpec((7, 5), "float16"), TensorSpec((), "float32")]
    assert Toy(scale=1).output_shapes([spec.shape for spec in inputs])[1] == [DataDependent(2, 7)]
    assert Toy(scale=1).max_output_specs(inputs) == [TensorSpec((7, 5), "float16"), TensorSpec((7,), "int64"), TensorSpec((), "int64")]


def test_sizes_that_are_known_are_multiplied_and_compared_at_once() -> None:
    assert times(3, 100) == 300 and times(None, 100) is None
    assert times("images", 100) == Times("images", 100)
    assert alike() and alike(None) and alike(2, None, 2) and not alike(1, None, 2)
    assert canvas_of(TensorSpec((None, None, 20, 30), "float16"), 4) == (80, 120)
    with pytest.raises(ValueError, match="axis 3"):
        canvas_of(TensorSpec((1, 1, 20, None), "float16"), 4)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(["float32", "float16", "int64", "bool"])), max_size=6))
def test_parts_of_a_workspace_are_aligned_and_apart(parts: list[tuple[int, str]]) -> None:
    workspace = Workspace()
    end = 0
    for index, (items, dtype) in enumerate(parts):
        part = workspace.take(str(index), items, dtype)  # type: ignore[arg-type]
        assert part.offset % ALIGNMENT == 0
        assert part.offset >= end
        end = part.offset + items * np.dtype(dtype).itemsize
    assert workspace.bytes >= end


def test_keys_tell_forms_of_a_kernel_apart() -> None:
    spec = Toy(scale=1).kernels([TensorSpec((4, 4), "float32"), TensorSpec((), "float32")])[0]
    others = [
        replace(spec, function="scale_rows"),
        replace(spec, signature=spec.signature[1:]),
        replace(spec, constants=(("BLOCK", 128),)),
        replace(spec, num_warps=2),
        replace(spec, num_stages=3),
    ]
    assert len({spec.key, *(other.key for other in others)}) == 6
    assert replace(spec, num_warps=spec.num_warps).key == spec.key


@pytest.mark.parametrize("name", OPERATORS)
def test_registered_operators_go_by_their_names(name: str) -> None:
    assert OPERATORS[name].name == name


def test_knowing_operators_loads_neither_tensorrt_triton_nor_pytorch() -> None:
    code = (
        "import sys, trt_plugins.aot, trt_plugins.kernels, trt_plugins.plugin, trt_plugins.tensorrt\n"
        "from trt_plugins.registry import OPERATORS\n"
        "list(OPERATORS.values())\n"
        "print({'tensorrt', 'tensorrt_rtx', 'triton', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
