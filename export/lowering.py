"""Lowers a copy of the portable graph for TensorRT: replaces parts that TensorRT lacks, or would run as many small layers.

The lowered graph has standard operators and this project's operators: nodes of the domain `dynamask`, named `DynaMask` + the operator's
name (`trt_plugins`). The parts to replace lie between seams (`export.seams`); the facts are the numbers that their nodes do not show.

The portable graph takes one image on one canvas; a `Profile` lets the lowered one take several, and other canvases. Between this project's
operators nothing depends on either. Slots stay flat: slot k of image b is row `K b + k` of `boxes`, `scores`, `labels`, `grids` and
`grid_override`, and `slots_14` to `slots_112` hold row numbers. The budgets are of the instances of all images of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from export.seams import RPN_DELTAS, RPN_LOGITS, GraphFacts, read_facts
from runtime.bundle import MODEL, Profile
from runtime.errors import InputError
from runtime.graph import CONTINUE, COST_CONTROLS, DETECTIONS, EXIT, INPUTS, PYRAMID, SLOTS
from trt_plugins.deform_conv.operator import pack_weight
from trt_plugins.msm_route.operator import SIZES
from trt_plugins.operator import DType, Operator, TensorSpec
from trt_plugins.registry import DOMAIN, OPERATORS, PREFIX

_UNSUPPORTED = """
AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress ConcatFromSequence
ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial
NegativeLogLikelihoodLoss NonMaxSuppression NonZero Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch
RoiAlign SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss
SplitToSequence StringConcat StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique
"""
UNSUPPORTED = frozenset(_UNSUPPORTED.split())
"""Standard operators that TensorRT-RTX 1.7 does not build: its parser refuses them or, for NonMaxSuppression, NonZero and RoiAlign, takes
them and has nothing that runs them on every machine."""


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rewrite:
    """One kind of change: how often it was made, and the reason for it."""

    name: str
    count: int
    why: str


@dataclass(frozen=True)
class PlacedOperator:
    """An operator of the lowered graph and its inputs; a size that varies is None."""

    operator: Operator
    inputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Lowered:
    """The graph for TensorRT."""

    model: onnx.ModelProto
    rewrites: tuple[Rewrite, ...]
    operators: tuple[PlacedOperator, ...]
    """In the order in which they run."""
    ranges: Mapping[str, tuple[Shape, Shape, Shape]]
    """Each input of the graph -> its minimum, optimum and maximum shape."""


def lower(model: onnx.ModelProto, profile: Profile | None = None) -> Lowered:
    """Lower a portable graph, fp32 or fp16 inside; `model` itself is left as it is.

    Inputs, outputs and the names of the tensors that remain are those of the portable graph. Without a profile, so are the shapes.

    Raises:
        InputError: the graph lacks its facts or a seam, or holds an operator that neither TensorRT nor this project has; or the profile
            has more slots in a run than an operator takes.
    """
    facts = read_facts(model)
    profile = profile or Profile(canvas=(facts.canvas,) * 3)
    graph = gs.import_onnx(model)
    # Otherwise this project's domain would be added to the portable graph too.
    graph.import_domains = [onnx.helper.make_opsetid(entry.domain, entry.version) for entry in model.opset_import]
    rewrites = []
    for name, rewrite, why in REWRITES:
        rewrites.append(Rewrite(name, rewrite(graph, facts, profile), why))
        graph.cleanup()
    graph.toposort()
    set_sizes(graph, facts, profile)
    operators = tuple(place_operators(graph))
    identities = drop_identities(graph)
    rewrites.append(Rewrite("identities", identities, "casts and reshapes that change nothing would each be a layer of the engine"))
    graph.cleanup()
    check_supported(graph)
    lowered = gs.export_onnx(graph)
    lowered.metadata_props.extend(model.metadata_props)
    ranges = _ranges(facts, profile)
    return Lowered(lowered, tuple(rewrites), operators, {value.name: ranges[value.name] for value in lowered.graph.input})


def lower_proposals(graph: gs.Graph, facts: GraphFacts, profile: Profile) -> int:
    """Replace the nodes from the RPN's outputs to `proposals` and `proposal_count` by one DynaMaskProposals."""
    inputs = _seams(graph, *RPN_LOGITS, *RPN_DELTAS)
    attributes = {
        "strides": list(facts.strides),
        "per_level": facts.proposals_per_level,
        "proposals": facts.proposals,
        "nms_threshold": facts.proposal_nms_threshold,
    }
    anchors = gs.Constant("anchors", np.array(facts.anchors, np.float32))
    node = _operator("Proposals", "proposals", attributes, [*map(_widened, inputs), anchors])
    replace_between(graph, inputs, _seams(graph, "proposals", "proposal_count"), node)
    return 1


def lower_detections(graph: gs.Graph, facts: GraphFacts, profile: Profile) -> int:
    """Replace the nodes from the box head's outputs to the detections and the filled `slots` by one DynaMaskDetections."""
    inputs = _seams(graph, "class_logits", "box_deltas", "proposals", "proposal_count", "min_score")
    attributes = {
        "proposals": facts.proposals,
        "stride": facts.strides[0],
        "detections": facts.detections,
        "candidates": facts.candidates,
        "score_threshold": facts.score_threshold,
        "nms_threshold": facts.nms_threshold,
    }
    node = _operator("Detections", "detections", attributes, [*map(_widened, inputs), _finest_map(graph)])
    replace_between(graph, inputs, _seams(graph, *DETECTIONS, "slots"), node, sizes=["n"])
    return 1


def lower_routing(graph: gs.Graph, facts: GraphFacts, profile: Profile) -> int:
    """Replace the nodes from the MSM's logits to the grids and the lists of every stage by one DynaMaskMsmRoute."""
    inputs = _seams(graph, "msm_logits", "mask_boxes", "mask_overrides", "slots", "budget") + _cost_controls(graph, facts)
    attributes = {"batch": profile.batch[-1], "stride": facts.strides[0], "detections": facts.detections}
    node = _operator("MsmRoute", "msm_route", attributes, [*map(_widened, inputs), _finest_map(graph)])
    replace_between(graph, inputs, _seams(graph, "grids", *CONTINUE, *EXIT, *SLOTS), node, sizes=SIZES)
    return 1


def _cost_controls(graph: gs.Graph, facts: GraphFacts) -> list[gs.Tensor]:
    """The inputs `COST_CONTROLS`, or constants for a graph of an earlier version, which has its costs inside."""
    if any(tensor.name in COST_CONTROLS for tensor in graph.inputs):
        return _seams(graph, *COST_CONTROLS)
    values = (np.array(0, np.float32), np.array([facts.costs, [0.0] * len(facts.costs)], np.float32))
    return [gs.Constant(name, value) for name, value in zip(COST_CONTROLS, values, strict=True)]


def lower_pyramid_roi_align(graph: gs.Graph, facts: GraphFacts, profile: Profile) -> int:
    """Replace the nodes from P2..P5 and boxes to `box_region`, and those to `region`, by one DynaMaskRoiAlign each."""
    crops_of: tuple[tuple[str, str, int, Sequence[str]], ...] = (
        ("proposals", "box_region", facts.proposals, []),
        ("mask_boxes", "region", facts.detections, ["slots"]),
    )
    for boxes, region, per_image, places in crops_of:
        inputs, outputs = _seams(graph, *PYRAMID, boxes), _seams(graph, region)
        maps = [_widened(tensor) for tensor in inputs[:-1]]
        crops = {_widened(node.inputs[0]).name: node for node in region_between(inputs, outputs) if node.op == "RoiAlign"}
        if crops.keys() != {tensor.name for tensor in maps}:
            raise InputError(f"{MODEL}: {region} is not cropped from each of {', '.join(PYRAMID)} once: export the bundle again.")
        levels = [_roi_align_attributes(crops[tensor.name]) for tensor in maps]
        strides = [stride for level in levels for stride in level["strides"]]
        attributes = {**levels[0], "strides": strides, "canonical_size": facts.canonical_size}
        rois = [_widened(inputs[-1])]
        if profile.batch[-1] > 1:
            attributes["per_image"] = per_image
            rois += _seams(graph, *places)
        replace_between(graph, inputs, outputs, _operator("RoiAlign", region, attributes, [*maps, *rois]))
    return 2


def lower_roi_align(graph: gs.Graph, facts: GraphFacts, profile: Profile) -> int:
    """Replace every other RoiAlign, which is on one map, by a DynaMaskRoiAlign."""
    nodes = [node for node in graph.nodes if node.op == "RoiAlign"]
    slots: dict[str, gs.Tensor] = {}
    for node in nodes:
        feature, rois, _ = node.inputs
        if feature.shape is None or feature.shape[0] != 1:
            raise InputError(f"{MODEL}: {node.name} crops from {feature.shape}, which is not one image: export the bundle again.")
        attributes = {**_roi_align_attributes(node), "canonical_size": 0.0}
        name = f"crop_{attributes['size']}"
        inputs = [_widened(feature), _boxes(rois)]
        if profile.batch[-1] > 1:
            attributes["per_image"] = facts.detections
            inputs.append(_slots_of(graph, inputs[-1], slots))
        replace_between(graph, node.inputs, node.outputs, _operator("RoiAlign", name, attributes, inputs))
    return len(nodes)


def lower_resize(graph: gs.Graph, facts: GraphFacts, profile: Profile) -> int:
    """Give every Resize of the FPN its factor in place of a fixed size."""
    nodes = [node for node in graph.nodes if node.op == "Resize" and len(node.inputs) == 4]
    for node in nodes:
        x, _, _, sizes = node.inputs
        factors = [float(large / small) for large, small in zip(sizes.values.tolist(), x.shape, strict=True)]
        node.inputs = [x, gs.Variable.empty(), gs.Constant(f"{node.name}/factors", np.array(factors, np.float32))]
    return len(nodes)


def lower_reshape(graph: gs.Graph, facts: GraphFacts, profile: Profile) -> int:
    """Give every Reshape that keeps the first axis, and infers its size, the size 0, which copies it."""
    changed = 0
    for node in [node for node in graph.nodes if node.op == "Reshape" and isinstance(node.inputs[1], gs.Constant)]:
        before, after = node.inputs[0].shape or [], node.inputs[1].values.tolist()
        known = all(isinstance(size, int) and size > 0 for size in [*before[1:], *after[1:]])
        if len(after) > 1 and after[0] == -1 and known and math.prod(before[1:]) == math.prod(after[1:]):
            node.inputs[1] = gs.Constant(f"{node.name}/shape", np.array([0, *after[1:]]))
            # With it, 0 would be the size itself.
            node.attrs.pop("allowzero", None)
            changed += 1
    return changed


def lower_deform_conv(graph: gs.Graph, facts: GraphFacts, profile: Profile) -> int:
    """Replace every DeformConv, with a Relu that is its only consumer, by a DynaMaskDeformConv."""
    nodes = [node for node in graph.nodes if node.op == "DeformConv"]
    for node in nodes:
        if node.attrs.get("group", 1) != 1:
            raise InputError(f"{MODEL}: {node.name} has {node.attrs['group']} groups, not one: use --target onnxruntime.")
        x, weight, offset, *rest = node.inputs
        if not isinstance(weight, gs.Constant):
            raise InputError(f"{MODEL}: the weight of {node.name} is computed in the graph: export the bundle again.")
        output = node.outputs[0]
        relu = _only_consumer(graph, output, "Relu")
        bias = rest[0] if rest and not rest[0].is_empty() else gs.Constant(f"{node.name}/bias", np.zeros(weight.shape[0], weight.dtype))
        attributes = {
            "kernel_shape": list(weight.values.shape[2:]),
            "strides": list(node.attrs.get("strides", [1, 1])),
            "pads": list(node.attrs.get("pads", [0, 0, 0, 0])),
            "dilations": list(node.attrs.get("dilations", [1, 1])),
            "offset_group": node.attrs.get("offset_group", 1),
            "relu": int(relu is not None),
        }
        # The weight tells the module: model.mask_branch.rfpn.stages.0.align.weight, with more behind it in fp16.
        name = weight.name.removeprefix("model.").partition(".weight")[0].replace(".", "/")
        packed = gs.Constant(f"{weight.name}/packed", pack_weight(weight.values, attributes["offset_group"]))
        fused = _operator("DeformConv", name, attributes, [x, packed, offset, bias, *rest[1:]])
        replace_between(graph, node.inputs, relu.outputs if relu else [output], fused)
    return len(nodes)


REWRITES: tuple[tuple[str, Callable[[gs.Graph, GraphFacts, Profile], int], str], ...] = (
    ("Proposals", lower_proposals, "NonMaxSuppression has no implementation; top-k, decoding and NMS stay on the device"),
    ("Detections", lower_detections, "NonMaxSuppression and NonZero have no implementation; the number of detections stays on the device"),
    ("MsmRoute", lower_routing, "NonZero has no implementation; the routing stays on the device"),
    ("RoiAlign on the pyramid", lower_pyramid_roi_align, "each box on its own level in one launch, where NonZero sorted them by level"),
    ("RoiAlign", lower_roi_align, "the built-in one cannot be built without a GPU and takes no fp16 map with fp32 boxes"),
    ("DeformConv", lower_deform_conv, "there is no importer; bias and Relu are fused, the weight is packed once"),
    ("Resize", lower_resize, "the size depends on the canvas, the factor does not"),
    ("Reshape", lower_reshape, "TensorRT 11.1 has failed to infer the first size where it depends on the data; copied, it is known"),
)


def replace_between(
    graph: gs.Graph, inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor], node: gs.Node, sizes: Sequence[str] = ()
) -> None:
    """Replace the nodes that compute `outputs` from `inputs` by `node`.

    The graph's next `cleanup` removes them. `sizes` names further outputs of the node, `[] int64` each.

    Raises:
        InputError: an output depends on something besides `inputs` and constants.
    """
    region_between(inputs, outputs)
    tensors = list(outputs)
    for tensor in tensors:
        tensor.inputs.clear()
    node.outputs = [*tensors, *(gs.Variable(f"{node.name}/{size}", np.int64, []) for size in sizes)]
    graph.nodes.append(node)


def region_between(inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor]) -> list[gs.Node]:
    """The nodes that compute `outputs` from `inputs` and constants.

    Raises:
        InputError: they need something else.
    """
    ends = {tensor.name for tensor in inputs}
    nodes: dict[int, gs.Node] = {}
    pending = list(outputs)
    while pending:
        tensor = pending.pop()
        if tensor.is_empty() or tensor.name in ends or isinstance(tensor, gs.Constant):
            continue
        if not tensor.inputs:
            wanted, given = (", ".join(t.name for t in tensors) for tensors in (outputs, inputs))
            raise InputError(f"{MODEL}: {wanted} depends on {tensor.name}, and not on {given} alone: export the bundle again.")
        node = tensor.inputs[0]
        if id(node) not in nodes:
            nodes[id(node)] = node
            pending.extend(node.inputs)
    return list(nodes.values())


def set_sizes(graph: gs.Graph, facts: GraphFacts, profile: Profile) -> None:
    """Give the tensors of a lowered graph the shapes that they have under a profile; a size that varies becomes a name, or unknown."""
    images, canvas = profile.batch[0] if profile.batch[0] == profile.batch[-1] else None, profile.canvas[0]
    tensors = graph.tensors()

    def set_rows(names: Iterable[str], each: int) -> None:
        for tensor in _reached(tensors[name] for name in names):
            if tensor.shape and tensor.shape[0] == each:
                tensor.shape = [images * each if images else f"{each} x batch", *tensor.shape[1:]]

    for tensor in _reached([tensors["image"]]):
        tensor.shape = [images or "batch", *tensor.shape[1:]]
        if set(profile.canvas) != {facts.canvas} and len(tensor.shape) == 4:
            tensor.shape = [*tensor.shape[:2], None, None]
    if profile.canvas[-1] == canvas:
        tensors["image"].shape = [*tensors["image"].shape[:2], *canvas]
    tensors["proposal_count"].shape = [images or "batch"]
    set_rows(("proposals", "box_region"), facts.proposals)
    set_rows((*DETECTIONS, "grids", "grid_override"), facts.detections)


def _reached(tensors: Iterable[gs.Tensor]) -> list[gs.Tensor]:
    """`tensors` and all that standard operators compute from them."""
    found: dict[str, gs.Tensor] = {}
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if tensor.name not in found:
            found[tensor.name] = tensor
            pending += [output for node in tensor.outputs if node.domain != DOMAIN for output in node.outputs]
    return list(found.values())


def _ranges(facts: GraphFacts, profile: Profile) -> dict[str, tuple[Shape, Shape, Shape]]:
    """`Lowered.ranges`."""
    images: list[Shape] = [(count, 3, *canvas) for count, canvas in zip(profile.batch, profile.canvas, strict=True)]
    slots: list[Shape] = [(count * facts.detections,) for count in profile.batch]
    vary: dict[str, list[Shape]] = {"image": images, "grid_override": slots, "costs": [(2, len(facts.costs))] * 3}
    return {name: (minimum, optimum, maximum) for name in INPUTS for minimum, optimum, maximum in [vary.get(name, [(), (), ()])]}


def place_operators(graph: gs.Graph) -> Iterator[PlacedOperator]:
    """Construct the operator of each node of this project, in order, check its inputs, and set the types of its outputs.

    Raises:
        InputError: an attribute or an input does not fit the operator.
    """
    for node in [node for node in graph.nodes if node.domain == DOMAIN]:
        operator = OPERATORS[node.op.removeprefix(PREFIX)](node.name, **node.attrs)
        inputs = tuple(_spec(tensor) for tensor in node.inputs)
        operator.check_inputs(inputs)
        types = operator.output_types([spec.dtype for spec in inputs])
        for tensor, dtype in zip(list(node.outputs), types, strict=True):
            _set_type(graph, tensor, np.dtype(dtype))
        yield PlacedOperator(operator, inputs)


def drop_identities(graph: gs.Graph) -> int:
    """Bypass casts to the type that a tensor has, and reshapes of a row of values to a row; returns how many."""
    dropped = 0
    for node in graph.nodes:
        if node.op == "Cast":
            same = onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]) == node.inputs[0].dtype
        elif node.op == "Reshape":
            shape = node.inputs[1]
            same = len(node.inputs[0].shape or ()) == 1 and isinstance(shape, gs.Constant) and shape.values.tolist() == [-1]
        else:
            continue
        if same and not _is_output(graph, node.outputs[0]):
            _redirect(node.outputs[0], node.inputs[0])
            dropped += 1
    return dropped


def check_supported(graph: gs.Graph) -> None:
    """Refuse operators that neither TensorRT nor this project has.

    Raises:
        InputError: names the first node and its operator.
    """
    for node in graph.nodes:
        ours = node.domain == DOMAIN and node.op.removeprefix(PREFIX) in OPERATORS
        standard = node.domain in (None, "", "ai.onnx") and node.op not in UNSUPPORTED and onnx.defs.has(node.op)
        if not (ours or standard):
            kind = f"{node.domain}::{node.op}" if node.domain else node.op
            raise InputError(f"{MODEL}: TensorRT has no {kind}, which node {node.name} is: use --target onnxruntime.")


def _operator(name: str, node: str, attributes: dict[str, Any], inputs: Sequence[gs.Tensor]) -> gs.Node:
    return gs.Node(PREFIX + name, node, attributes, list(inputs), domain=DOMAIN)


def _seams(graph: gs.Graph, *names: str) -> list[gs.Tensor]:
    tensors = graph.tensors()
    for name in names:
        if name not in tensors:
            raise InputError(f"{MODEL} has no tensor {name}, at which it is cut: export the bundle again.")
    return [tensors[name] for name in names]


def _finest_map(graph: gs.Graph) -> gs.Tensor:
    """P2, whose size tells operators the canvas and the number of images."""
    return _widened(_seams(graph, PYRAMID[0])[0])


def _slots_of(graph: gs.Graph, boxes: gs.Tensor, known: dict[str, gs.Tensor]) -> gs.Tensor:
    """The slots that boxes of the mask branch belong to: `slots`, or a choice of them like that of the boxes from `mask_boxes`."""
    if boxes.name == "mask_boxes":
        return _seams(graph, "slots")[0]
    if boxes.name not in known:
        chosen = boxes.inputs[0] if boxes.inputs else None
        if chosen is None or chosen.op != "Gather":
            raise InputError(f"{MODEL}: {boxes.name} is not chosen from mask_boxes: export the bundle again.")
        before, index = _slots_of(graph, chosen.inputs[0], known), chosen.inputs[1]
        known[boxes.name] = gs.Variable(f"{boxes.name}/slots", np.int64, index.shape)
        graph.nodes.append(gs.Node("Gather", f"{boxes.name}/slots", {"axis": 0}, [before, index], [known[boxes.name]]))
    return known[boxes.name]


def _widened(tensor: gs.Tensor) -> gs.Tensor:
    """The fp16 tensor that `tensor` was cast to fp32 from, or `tensor` itself: this project's operators take both types."""
    producer = tensor.inputs[0] if tensor.inputs else None
    if producer is not None and producer.op == "Cast" and producer.inputs[0].dtype == np.float16 and tensor.dtype == np.float32:
        return producer.inputs[0]
    return tensor


def _boxes(rois: gs.Tensor) -> gs.Tensor:
    """`boxes` if `rois` is `Slice(Concat(index, boxes))`, where a column of batch indices is added and cut off again; else `rois`."""
    cut = rois.inputs[0] if rois.inputs else None
    if cut is None or cut.op != "Slice" or [t.values.tolist() for t in cut.inputs[1:4] if isinstance(t, gs.Constant)] != [[1], [5], [1]]:
        return rois
    joined = cut.inputs[0].inputs[0] if cut.inputs[0].inputs else None
    if joined is None or joined.op != "Concat" or [(t.shape or [])[1:] for t in joined.inputs] != [[1], [4]]:
        return rois
    return joined.inputs[1]


def _roi_align_attributes(node: gs.Node) -> dict[str, Any]:
    """`strides` (of the one map), `size`, `samples` and `aligned` of a standard RoiAlign."""
    attributes, stride = node.attrs, 1 / node.attrs.get("spatial_scale", 1.0)
    square = attributes.get("output_height", 1) == attributes.get("output_width", 1)
    if not square or attributes.get("mode", "avg") != "avg" or stride != round(stride):
        raise InputError(f"{MODEL}: {node.name} is no average of square crops from a map of whole stride: export the bundle again.")
    return {
        "strides": [round(stride)],
        "size": attributes.get("output_height", 1),
        "samples": attributes.get("sampling_ratio", 0),
        "aligned": int(attributes.get("coordinate_transformation_mode", "half_pixel") == "half_pixel"),
    }


def _only_consumer(graph: gs.Graph, tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node that takes `tensor`, if it is the only one and an `op`."""
    alone = len(tensor.outputs) == 1 and not _is_output(graph, tensor) and tensor.outputs[0].op == op
    return tensor.outputs[0] if alone else None


def _set_type(graph: gs.Graph, tensor: gs.Tensor, dtype: npt.DTypeLike) -> None:
    """Change a tensor's type; its consumers, except casts, get it cast back to the type they expect."""
    if tensor.dtype == dtype:
        return
    if _is_output(graph, tensor):
        raise InputError(f"{MODEL}: the output {tensor.name} would be {dtype}, not {tensor.dtype}: export the bundle again.")
    expected = gs.Variable(f"{tensor.name}/{tensor.dtype}", tensor.dtype, tensor.shape)
    tensor.dtype = np.dtype(dtype)
    others = [node for node in tensor.outputs if node.op != "Cast"]
    for node in others:
        node.inputs = [expected if value is tensor else value for value in node.inputs]
    if others:
        to = int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(expected.dtype)))
        graph.nodes.insert(
            next(i for i, node in enumerate(graph.nodes) if any(node is other for other in others)),
            gs.Node("Cast", f"{tensor.name}/cast", {"to": to}, [tensor], [expected]),
        )


def _redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Give `new` to all consumers of `old`."""
    for node in list(old.outputs):
        node.inputs = [new if value is old else value for value in node.inputs]


def _is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(tensor is output for output in graph.outputs)


def _spec(tensor: gs.Tensor) -> TensorSpec:
    dtype: DType = np.dtype(tensor.dtype).name
    return TensorSpec(tuple(size if isinstance(size, int) else None for size in tensor.shape), dtype)
