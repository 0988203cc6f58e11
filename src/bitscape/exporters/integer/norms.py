"""Batch norms in a traced network: folded into the integer layers they stand behind, or named in the log if they stay float."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter

import torch
from torch import Tensor, fx

from bitscape.exporters.integer.graph import LINEAR, Traced
from bitscape.exporters.integer.weights import IntegerWeight
from bitscape.quant.functional import MINIMUM_SCALE

_log = logging.getLogger("bitscape.exporters")
aten = torch.ops.aten


def fold_into_integers(traced: Traced, weights: dict[str, IntegerWeight]) -> dict[str, Tensor]:
    """Fold the norms behind layers into their scales and biases; return the biases, float64, of all layers that have one.

    A norm multiplies a channel by gamma / sigma, which goes into its scale: exact, whatever the quantizer was. Between layer and norm
    channels may have been moved to the axis where torch's norms want them. Every weight has one user (`separate_calls`).
    """
    biases = _biases(traced)
    staying: defaultdict[str, list[str]] = defaultdict(list)
    for node in list(traced.module.graph.nodes):
        if (norm := norm_arguments(node)) is None:
            continue
        layer, obstacle = _layer_before(traced, weights, node, norm)
        if layer is None:
            staying[obstacle].append(_name(node, norm))
            continue
        key = str(traced.weight_name(layer))
        weights[key], biases[key] = _folded(traced.module, norm, weights[key], biases.get(key))
        _remove(node)
    for reason, names in staying.items():
        _log.warning("batch norms that stay float, %d (%s): %s", len(names), reason, ", ".join(names))
    return biases


def spell_out_norms(traced: Traced) -> None:
    """Let the batch norms that stayed multiply by a constant of each channel, and add one: for files that know no norms."""
    module, graph = traced.module, traced.module.graph
    for node in list(graph.nodes):
        if (norm := norm_arguments(node)) is None or norm.get("training") or norm.get("running_mean") is None:
            continue
        factor, shift = (values.float() for values in _affine(module, norm))
        value = node.all_input_nodes[0]
        along = [1, -1, *[1] * (value.meta["val"].ndim - 2)]
        scaled = value
        for operator, constant in ((aten.mul.Tensor, factor), (aten.add.Tensor, shift)):
            name = f"{node.name}_{operator._schema.name.rpartition(':')[2]}"
            module.register_buffer(name, constant.reshape(along))
            with graph.inserting_before(node):
                scaled = graph.call_function(operator, (scaled, graph.get_attr(name)))
            scaled.meta = dict(value.meta)
        _remove(node, scaled)


def norm_arguments(node: fx.Node) -> dict[str, object] | None:
    """The arguments by name of a batch norm, of which torch.export knows several forms; None for any other node."""
    if not isinstance(node.target, torch._ops.OpOverload) or "batch_norm" not in node.target.name():
        return None
    names = (argument.name for argument in node.target._schema.arguments)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _layer_before(
    traced: Traced, weights: Mapping[str, IntegerWeight], node: fx.Node, norm: Mapping[str, object]
) -> tuple[fx.Node | None, str]:
    """The integer layer that a norm can be folded into; None and the reason if there is none."""
    source, users = node.all_input_nodes[0], 1
    axis: int | None = 1
    while source.target in _AXES_BEFORE and axis is not None:
        users = max(users, len(source.users))
        source, axis = source.all_input_nodes[0], _AXES_BEFORE[source.target](source, axis)
    if not traced.is_layer(source):
        return None, "it stands behind no integer layer"
    if norm.get("training") or norm.get("running_mean") is None:
        return None, "it takes mean and deviation from each batch"
    if max(users, len(source.users)) > 1:
        return None, "something else takes its layer's output, too"
    weight = weights[str(traced.weight_name(source))]
    if len(weight.scale) != len(weight.rows):
        return None, "groups share its layer's scales"
    if axis != (source.meta["val"].ndim - 1 if source.target is LINEAR else 1):
        return None, "its channels are not the layer's"
    return source, ""


def _before_transpose(move: fx.Node, axis: int) -> int:
    first, second = (given % move.meta["val"].ndim for given in move.args[1:3])
    return second if axis == first else first if axis == second else axis


def _before_permute(move: fx.Node, axis: int) -> int:
    axes: list[int] = move.args[1]  # type: ignore[assignment]  # of the input, in their new order
    return axes[axis] % len(axes)


def _before_view(move: fx.Node, axis: int) -> int | None:
    """Known for the last axis alone, where that keeps its size: what lies in it then is the same."""
    before, after = move.all_input_nodes[0].meta["val"], move.meta["val"]
    kept = isinstance(after.shape[-1], int) and before.shape[-1] == after.shape[-1]
    return before.ndim - 1 if kept and axis == after.ndim - 1 else None


_AXES_BEFORE: dict[object, Callable[[fx.Node, int], int | None]] = {
    aten.transpose.int: _before_transpose,
    aten.permute.default: _before_permute,
    aten.view.default: _before_view,
    aten._unsafe_view.default: _before_view,
    aten.reshape.default: _before_view,
    aten.clone.default: lambda move, axis: axis,
}
"""Operators that move channels -> the axis of the input that becomes an axis of the output; None if that cannot be told."""


def _affine(module: fx.GraphModule, norm: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """What a norm multiplies each channel by, and what it adds then, float64."""
    gamma, beta, mean, variance = (_value(module, norm.get(name)) for name in ("weight", "bias", "running_mean", "running_var"))
    epsilon = norm.get("eps", norm.get("epsilon"))
    assert mean is not None and variance is not None and isinstance(epsilon, float | int)
    factor = (variance + epsilon).rsqrt() * (1.0 if gamma is None else gamma)
    return factor, (0.0 if beta is None else beta) - mean * factor


def _folded(module: fx.GraphModule, norm: Mapping[str, object], weight: IntegerWeight, bias: Tensor | None) -> tuple[IntegerWeight, Tensor]:
    factor, shift = _affine(module, norm)
    # A negative gamma makes negative scales: turned codes would need one more bit, for -2^(b-1) has no opposite.
    scale = (weight.scale * factor).float()
    dead = scale.abs() < MINIMUM_SCALE  # such a channel is nothing but its bias
    codes = weight.q.masked_fill(weight.layout.along_scales(dead, weight.q.ndim), 0)
    shifted = shift if bias is None else bias * factor + shift
    return replace(weight, q=codes, scale=torch.where(dead, weight.scale, scale)), shifted


def _remove(node: fx.Node, by: fx.Node | None = None) -> None:
    """Let a norm's input, or `by`, stand for its output; some forms return that as the first of a tuple."""
    outputs = [user for user in node.users if getattr(user.target, "__name__", "") == "getitem"] or [node]
    for output in outputs:
        output.replace_all_uses_with(node.all_input_nodes[0] if by is None else by)
    for erased in dict.fromkeys([*outputs, node]):
        node.graph.erase_node(erased)


def _biases(traced: Traced) -> dict[str, Tensor]:
    """Name of the weight -> bias of its layer, float64."""
    found = {}
    for node in traced.module.graph.nodes:
        key = traced.weight_name(node)
        if key is not None and (bias := _value(traced.module, node.args[2] if len(node.args) > 2 else None)) is not None:
            found[key] = bias
    return found


def _value(module: fx.GraphModule, constant: object) -> Tensor | None:
    """What a node that reads a tensor of the module reads, float64; None for no node."""
    if not isinstance(constant, fx.Node):
        return None
    value: Tensor = attrgetter(str(constant.target))(module)
    return value.detach().double()


def _name(node: fx.Node, norm: Mapping[str, object]) -> str:
    """The norm's name in the network; the node's if nothing of it is stored."""
    stored = norm.get("running_mean") or norm.get("weight")
    return str(stored.target).rpartition(".")[0] if isinstance(stored, fx.Node) else node.name
