"""A quantized network whose layers get as many bits as each image needs: one small head a layer decides.

network = dynamic_network(model, policy, calibration_images, DynamicBits(low=2, high=8))
    begin_at(network, bitops)
train(network, batches, step=Dqmq(bitops=...), optimizer=DqmqSgd(), ...)
keep_bitops(network, calibration_images, bitops)
network(images); network.decision.activation      # (n, layers), whole numbers in eval mode
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bitscape.cost.layers import LayerCost, NetworkProfile
from bitscape.dynamic.decision import Decision, joined
from bitscape.dynamic.heads import Head, bounded, gumbel
from bitscape.dynamic.layers import DynamicActivation, DynamicWeight, make_static
from bitscape.dynamic.quality import IMAGE_FEATURES, IMAGE_PASSES, LAYER_FEATURES, SIDE, image_features, layer_features
from bitscape.dynamic.widths import Widths
from bitscape.engine.spending import Spent
from bitscape.errors import BitscapeError
from bitscape.models.layers import input_channels
from bitscape.models.modes import evaluating
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import batches_of
from bitscape.quant.layers import QuantizedLayer, quantized_layers, static_bits

Sampling = Literal["continuous", "gumbel", "whole"]
FEATURES = (*IMAGE_FEATURES, *LAYER_FEATURES, "share of the largest cost spent so far")
FEATURE_BITS = 8
"""Width at which the work of features and heads is counted."""


@dataclass(frozen=True, kw_only=True)
class DynamicBits:
    """What images decide about."""

    low: int = 2
    """Least width."""
    high: int = 8
    """Largest width."""
    weights: bool = False
    """Whether images decide the bits of weights too; a batch then runs each layer once for each weight width among its images."""
    static: tuple[str, ...] | None = None
    """Layers that keep the policy's bits; None: the first and the last."""

    def __post_init__(self) -> None:
        """Check the widths."""
        if not 1 <= self.low < self.high <= 8:
            raise BitscapeError(f"low = {self.low}, high = {self.high}: give widths from 1 to 8, low below high")


@dataclass
class _Pass:
    """What is known of the images under way."""

    seen: Tensor
    """(n, IMAGE_FEATURES)."""
    spent: Tensor
    """(n,): share of the largest cost, of the layers so far; no gradient."""
    weight: dict[str, Tensor] = field(default_factory=dict)
    activation: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> widths (n,) decided so far."""
    softness: list[Tensor] = field(default_factory=list)
    """Mean f (1 - f) of each layer's widths before they are rounded."""
    log_density: Tensor | float = 0.0
    """(n,) of the sampled decisions."""


class DynamicNetwork(nn.Module):
    """The quantized network, its heads, and what they decided for the last batch.

    In training mode widths are sampled and continuous; in eval mode they are whole and repeatable.

    Attributes:
        model: the quantized network.
        cost: what its layers do for one image.
        bits: what images decide about.
        names: its dynamic layers, in the order of their first run.
        heads: one for each of `names`.
        decisions: "per_image"; "per_batch" gives all images of a batch the mean of their widths.
        shift: buffer, bits added to every decision; `keep_bitops` sets it.
        hardness: share of sampled widths that are rounded, straight through; set by the step.
        sampling: in training. "continuous": a width between whole numbers mixes both. "gumbel": it falls to one of them by chance, relaxed,
            with a gradient too. "whole": it is rounded; only the cost and `log_density` have a gradient.
        decision: of the last batch, with its gradient.
        log_density: (n,), of the sampled decisions of the last batch.
        softness: mean of f (1 - f) over the sampled widths of the last batch, f the part between two whole numbers.
    """

    def __init__(self, model: nn.Module, cost: NetworkProfile, bits: DynamicBits) -> None:
        super().__init__()
        self.model, self.cost, self.bits = model, cost, bits
        layers = quantized_layers(model)
        self.names = tuple(name for name in cost.by_name if isinstance(layers[name].input_quantizer, DynamicActivation))
        self.heads = nn.ModuleList(Head(len(FEATURES), 1 + bits.weights, start=bits.high) for _ in self.names)
        self.decisions: Literal["per_image", "per_batch"] = "per_image"
        self.shift: Tensor
        self.register_buffer("shift", torch.zeros(()))
        self.hardness = 0.0
        self.sampling: Sampling = "continuous"
        self.decision = Decision(torch.zeros(0, len(cost.layers)), torch.zeros(0, len(cost.layers)))
        self.log_density, self.softness = torch.zeros(0), torch.zeros(())
        self._static = {name: static_bits(layer) for name, layer in layers.items() if name not in self.names}
        self._rows: Tensor
        self.register_buffer("_rows", self._static_widths(), persistent=False)
        self._given: Decision | None = None
        self._pass = _Pass(torch.zeros(0), torch.zeros(0))
        self._hooks = [
            layers[name].register_forward_pre_hook(partial(self._decide, at), with_kwargs=True) for at, name in enumerate(self.names)
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images (n, c, h, w); `decision` tells the bits they took."""
        if self._given is not None and len(self._given) != len(images):
            raise BitscapeError(f"decision: widths of {len(self._given)} images for a batch of {len(images)}; give one row for each image")
        self._pass = _Pass(image_features(images), images.new_zeros(len(images)))
        try:
            logits: Tensor = self.model(images)
            idle = [name for name in self.names if name not in self._pass.activation]
            if idle:
                raise BitscapeError(f"layers {', '.join(idle)} did not run: their bits cannot depend on the image; name them in `static`")
            self.decision, self.log_density = self._decided(len(images)), images.new_zeros(len(images)) + self._pass.log_density
            self.softness = torch.stack(self._pass.softness).mean() if self._pass.softness else images.new_zeros(())
        finally:
            self._forget()
        return logits

    def _forget(self) -> None:
        self._pass = _Pass(torch.zeros(0), torch.zeros(0))
        for name in self.names:
            layer = cast(QuantizedLayer, self.model.get_submodule(name))
            cast(DynamicActivation, layer.input_quantizer).widths = None
            if isinstance(layer.weight_quantizer, DynamicWeight):
                layer.weight_quantizer.widths = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies leave the last batch's graph behind: tensors within one cannot be copied.
        graphs = {"decision": self.decision.detach(), "log_density": self.log_density.detach(), "softness": self.softness.detach()}
        return {**self.__dict__, **graphs}

    @property
    def spent(self) -> Spent:
        """Bits and BitOps of each image of the last batch, the decision's own included."""
        decided = self.decision.detach()
        return Spent(bits=decided.activation_bits(self.cost), bitops=decided.bitops(self.cost) + self.decision_bitops)

    @contextmanager
    def using(self, decision: Decision) -> Iterator[None]:
        """Within the block batches take these widths instead of the heads' decision.

        Raises BitscapeError for widths that are not whole or out of range, and for other bits than those of what is static.
        """
        given = Decision(decision.weight.to(self.shift.device), decision.activation.to(self.shift.device))
        self._check(given)
        self._given = given
        try:
            yield
        finally:
            self._given = None

    def _check(self, decision: Decision) -> None:
        own, dynamic = self._static_rows(len(decision)), [layer.name in self.names for layer in self.cost.layers]
        free = {"weight": [each and self.bits.weights for each in dynamic], "activation": dynamic}
        for which, columns in free.items():
            widths, chosen = getattr(decision, which), torch.tensor(columns, device=self.shift.device)
            wrong = (widths != widths.round()) | (widths < self.bits.low) | (widths > self.bits.high)
            wrong = torch.where(chosen, wrong, widths != getattr(own, which))
            if bool(wrong.any()):
                row, column = wrong.nonzero()[0].tolist()
                allowed = f"a whole width in {self.bits.low}..{self.bits.high}" if columns[column] else "it is static"
                raise BitscapeError(
                    f"decision.{which}: {float(widths[row, column])} bits for layer {self.cost.layers[column].name}, image {row}; {allowed}"
                )

    @property
    def decision_bitops(self) -> float:
        """BitOps of features and heads for one image, at FEATURE_BITS."""
        channels, height, width = self.cost.input_shape
        of_image = IMAGE_PASSES * channels * height * width
        inputs = [self.cost.by_name[name] for name in self.names]
        of_layers = sum(2 * min(layer.input_elements, self._channels(layer) * SIDE**2) for layer in inputs)
        of_heads = sum(cast(Head, head).linear.weight.numel() for head in self.heads)
        return float((of_image + of_layers + of_heads) * FEATURE_BITS**2)

    def _channels(self, layer: LayerCost) -> int:
        """Of the layer's input."""
        return input_channels(self.model.get_submodule(layer.name))

    def policy(self, decision: Decision) -> Policy:
        """The static policy of one row, (1, layers) each, rounded."""
        weight, activation = (values.round().int().squeeze(0).tolist() for values in (decision.weight, decision.activation))
        bits = {layer.name: LayerBits(*each) for layer, *each in zip(self.cost.layers, weight, activation, strict=True)}
        return Policy({**bits, **{name: bits for name, bits in self._static.items() if name not in self.cost.by_name}})

    def static(self, policy: Policy) -> nn.Module:
        """An ordinary quantized network with these bits: a copy that keeps one scale of every dynamic layer."""
        copied = copy.deepcopy(self)
        for hook in copied._hooks:
            hook.remove()
        layers = quantized_layers(copied.model)
        for name in self.names:
            given, own = policy.layers[name], self._weight_bits(name)
            if not self.bits.weights and given.weight != own:
                raise BitscapeError(f"policy: {given.weight} bits for the weight of {name}, which is static at {own}")
            make_static(layers[name], given)
        return copied.model

    def even(self, images: int) -> Decision:
        """Widths drawn evenly from low..high, for that many images."""
        rows = self._static_rows(images)
        drawn = {
            name: torch.randint(self.bits.low, self.bits.high + 1, (2, images), device=self.shift.device).float() for name in self.names
        }
        weight = {name: pair[0] for name, pair in drawn.items()} if self.bits.weights else {}
        return self._joined(rows, weight, {name: pair[1] for name, pair in drawn.items()})

    def level(self, bits: float, images: int) -> Decision:
        """The same width for every dynamic tensor of that many images."""
        same = {name: torch.full((images,), bits, dtype=torch.float32, device=self.shift.device) for name in self.names}
        return self._joined(self._static_rows(images), same if self.bits.weights else {}, same)

    def _static_rows(self, images: int) -> Decision:
        """Widths of what is static; least ones in place of what is not."""
        return Decision(self._rows[0].expand(images, -1), self._rows[1].expand(images, -1))

    def _static_widths(self) -> Tensor:
        """(2, layers), of weights and of activations."""
        bits = [self._static.get(name) or LayerBits(self._weight_bits(name), self.bits.low) for name in self.cost.by_name]
        return torch.tensor([[each.weight for each in bits], [each.activation for each in bits]], dtype=torch.float32)

    def _weight_bits(self, name: str) -> int:
        quantizer = cast(QuantizedLayer, self.model.get_submodule(name)).weight_quantizer
        return self.bits.low if isinstance(quantizer, DynamicWeight) else int(cast(int, quantizer.bits))

    def _joined(self, rows: Decision, weight: dict[str, Tensor], activation: dict[str, Tensor]) -> Decision:
        def columns(static: Tensor, dynamic: dict[str, Tensor]) -> Tensor:
            return torch.stack([dynamic.get(name, static[:, at]) for at, name in enumerate(self.cost.by_name)], dim=1)

        return Decision(columns(rows.weight, weight), columns(rows.activation, activation))

    def _decided(self, images: int) -> Decision:
        if self._given is not None:
            return self._given
        weight = self._pass.weight if self.bits.weights else {}
        return self._joined(self._static_rows(images), weight, self._pass.activation)

    def _decide(self, at: int, layer: QuantizedLayer, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        name, under_way = self.names[at], self._pass
        if name in under_way.activation or not len(under_way.spent):  # its second run in this pass; or the model runs without the network
            return
        x = inputs[0] if inputs else named["input"]
        if len(x) != len(under_way.spent):
            raise BitscapeError(f"layer {name}: its input has {len(x)} rows for {len(under_way.spent)} images; name it in `static`")
        widths = self._given_at(name) if self._given is not None else self._sampled(at, layer_features(x, _channel_axis(layer)))
        cast(DynamicActivation, layer.input_quantizer).widths = widths[0]
        under_way.activation.setdefault(name, widths[0].value)
        if self.bits.weights:
            cast(DynamicWeight, layer.weight_quantizer).widths = widths[1]
            under_way.weight.setdefault(name, widths[1].value)
        share = self.cost.by_name[name].macs / self.cost.covered_macs
        under_way.spent = under_way.spent + share * widths[0].value.detach() / self.bits.high

    def _given_at(self, name: str) -> tuple[Widths, ...]:
        assert self._given is not None
        column = list(self.cost.by_name).index(name)
        return Widths(self._given.activation[:, column]), Widths(self._given.weight[:, column])

    def _sampled(self, at: int, features: Tensor) -> tuple[Widths, ...]:
        name, under_way = self.names[at], self._pass
        m, v = self.heads[at](torch.cat([under_way.seen, features, under_way.spent[:, None]], dim=1))
        m = m + self.shift
        beta = m + v * torch.randn_like(m) if self.training else m
        if self.training:
            density = -(beta.detach() - m).square() / (2 * v.square()) - v.log()
            under_way.log_density = under_way.log_density + density.sum(1)
        soft = bounded(beta.nan_to_num(), self.bits.low, self.bits.high)  # NaN reaches the loss, whose check explains it
        if self.decisions == "per_batch":
            soft = soft.mean(0, keepdim=True).expand_as(soft)
        if self.training:
            rest = soft - soft.detach().floor()
            under_way.softness.append((rest * (1 - rest)).mean())
        if self.training and self.sampling == "whole":  # the cost is differentiated all the same
            under_way.activation[name] = soft[:, 0]
            under_way.weight[name] = soft[:, -1]
        return tuple(self._width(column) for column in soft.unbind(1))

    def _width(self, soft: Tensor) -> Widths:
        if not self.training or self.sampling == "whole":
            return Widths(soft.detach().round())
        below = soft.detach().floor().clamp(max=self.bits.high - 1)
        share = soft - below
        if self.sampling == "gumbel":
            share = gumbel(share)
        hard = torch.rand_like(soft[:1] if self.decisions == "per_batch" else soft) < self.hardness
        return Widths(below, torch.where(hard, share + (share.round() - share).detach(), share))


def _channel_axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


@torch.no_grad()
def decide(network: DynamicNetwork, images: Tensor) -> Decision:
    """Return the whole widths that the network takes for normalized images (n, c, h, w), in eval mode."""
    with evaluating(network):
        found = []
        for batch in batches_of(images, network, batch_size=128):
            network(batch)
            found.append(network.decision.detach())
    return joined(found)
