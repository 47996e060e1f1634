"""Three accountings of training memory over the same traced layers: MobileTL's, TinyTL's and tiny-training's.

MobileTL's (Fig. 1, Fig. 2): bytes kept for the backward pass, fp32. A convolution or linear layer whose weight is trained keeps its
input; a norm whose scale is trained keeps its input and two vectors; ReLU one bit and ReLU6 two bits per element; Hard-Swish and SiLU
their input; in a MobileTL block an internal norm keeps one vector and an internal activation one bit per element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from papers.mobiletl.counts import Layer, Role, total_parameters, trained_parameters
from papers.mobiletl.layers import CODED

_EXACT_BITS = {"relu": 1, "relu6": 2, "hard_swish": 32, "silu": 32}
_GATE_BITS = {
    "hardsigmoid": 2,
    "sigmoid": 0,
}  # two thresholds; a sigmoid's derivative comes from its result, which is kept anyway


@dataclass(frozen=True)
class Rules:
    """MobileTL's accounting. ``vectors=False`` leaves out what is not as large as a map; the motivation table also takes ReLU6 at 1 bit."""

    vectors: bool = True
    relu6_bits: int = 2


def stored_bytes(layers: tuple[Layer, ...], roles: tuple[Role, ...], rules: Rules | None = None) -> int:
    """Bytes of activations that the layers keep for the backward pass, each map once."""
    return sum(layer_bytes(layer, role, rules) for layer, role in zip(layers, roles, strict=True))


def layer_bytes(layer: Layer, role: Role, rules: Rules | None = None) -> int:
    """What one layer keeps, in bytes."""
    rules = rules or Rules()
    if role == "frozen":
        return 0
    n, trains_weight = layer.elements_in, role in ("trained", "inner")
    if layer.kind in ("conv", "linear"):
        return 4 * n if trains_weight else 0
    if layer.kind == "norm":
        if role in ("inner", "shift", "through"):
            return 4 * layer.channels * rules.vectors
        return 4 * n + 8 * layer.channels * rules.vectors
    if layer.kind == "act":
        exact = rules.relu6_bits if layer.activation == "relu6" else _EXACT_BITS[layer.activation]
        bits = 1 if role == "inner" else CODED.get(role, exact)
        return math.ceil(bits * n / 8)
    if layer.kind == "se":
        return 4 * n + _se_vector_bytes(layer, trains_weight) * rules.vectors
    return 0


def _se_vector_bytes(layer: Layer, trains_weight: bool) -> int:
    b, c, r = layer.batch, layer.channels, layer.reduced
    inputs = 4 * b * (c + r) if trains_weight else 0
    return inputs + 4 * b * c + math.ceil((b * r * _EXACT_BITS[layer.activation] + b * c * _GATE_BITS[layer.gate]) / 8)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes while training: parameters (4 trained, 1 frozen) and the larger of two peaks."""

    parameter_bytes: int
    stored_bytes: int
    workspace_bytes: int
    inference_peak_bytes: int

    @property
    def total_bytes(self) -> int:
        """All together."""
        return self.parameter_bytes + max(self.inference_peak_bytes, self.stored_bytes + self.workspace_bytes)


def training_memory(
    layers: tuple[Layer, ...], roles: tuple[Role, ...], *, workspace_bytes: int = 0, rules: Rules | None = None
) -> TrainingMemory:  # fmt: skip
    """Parameters, stored activations and the inference peak of the frozen part.

    Args:
        workspace_bytes: what the backward pass holds beside the stored activations.
    """
    trained = trained_parameters(layers, roles)
    frozen = total_parameters(layers) - trained
    peak = max((4 * (layer.elements_in + layer.elements_out) for layer in layers if layer.kind == "conv"), default=0)
    return TrainingMemory(4 * trained + frozen, stored_bytes(layers, roles, rules), workspace_bytes, peak)


def tinytl_bytes(layers: tuple[Layer, ...], roles: tuple[Role, ...]) -> int:
    """TinyTL's profiler (mit-han-lab/tinyml, ``memory_cost_profiler.py``): parameters and batch · peak.

    The peak runs over the layers in forward order: what is stored so far, the layer's own temporaries, and a block's input while its
    residual waits. Stored is the input of a convolution, linear layer or norm whose weight is trained; ReLU and ReLU6 keep 1 bit,
    Hard-Swish and the sigmoids 4 bytes.
    """
    batch = layers[0].batch
    residual = {layer.block: 4 * layer.elements_out // batch for layer in layers if layer.kind == "add"}
    stored = peak = 0
    for layer, role in zip(layers, roles, strict=True):
        n_in, n_out = layer.elements_in // batch, layer.elements_out // batch
        temporary = 4 * (n_in + n_out // layer.groups) if layer.kind in ("conv", "linear") else 4 * n_in
        peak = max(peak, temporary + stored + residual.get(layer.block, 0) * bool(layer.block))
        stored += _tinytl_stored(layer, role, n_in)
    trained = trained_parameters(layers, roles)
    return 4 * trained + (total_parameters(layers) - trained) + batch * max(peak, stored)


def _tinytl_stored(layer: Layer, role: Role, n: int) -> int:
    if role == "frozen":
        return 0
    if layer.kind in ("conv", "linear"):
        return 4 * n if role in ("trained", "inner") else 0
    if layer.kind == "norm":
        return 4 * n if role in ("trained", "norm") else 0
    if layer.kind == "act":
        return math.ceil(n / 8) if role == "inner" or layer.activation in ("relu", "relu6") else 4 * n
    if layer.kind == "se":
        width = layer.channels
        fcs = 4 * (width + layer.reduced) if role in ("trained", "inner") else 0
        return 4 * n + 4 * width + fcs + math.ceil(layer.reduced / 8) + 4 * width
    return 0


@dataclass(frozen=True)
class SparseUpdate:
    """tiny-training's accounting of one image in int8 (mit-han-lab/tiny-training, ``partial_backward.py``), in bytes."""

    mask_bytes: int
    bias_bytes: int
    input_bytes: int
    weight_bytes: int

    @property
    def total_bytes(self) -> int:
        """All together."""
        return self.mask_bytes + self.bias_bytes + self.input_bytes + self.weight_bytes


def tiny_training_bytes(layers: tuple[Layer, ...], roles: tuple[Role, ...]) -> SparseUpdate:
    """Batch 1, int8: per updated convolution a saturation bit per output element and 4 bytes per bias; where its weight is updated, 1
    byte per input element and per weight. The classifier's weights are not counted, its input is. Norms are folded: a norm's shift is
    its convolution's bias. Momentum is 0.
    """
    bits = biases = inputs = weights = 0
    for layer, role in zip(layers, roles, strict=True):
        if role == "frozen" or layer.kind not in ("conv", "linear"):
            continue
        per_image = layer.elements_out // layer.batch
        if layer.kind == "conv":
            bits += per_image
            biases += layer.out_shape[1]
        if role in ("trained", "inner"):
            inputs += layer.elements_in // layer.batch
            weights += layer.weights if layer.kind == "conv" else 0
    return SparseUpdate(math.ceil(bits / 8), 4 * biases, inputs, weights)
