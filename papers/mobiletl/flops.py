"""FLOPs of a training step: the honest count of multiply-accumulates, and the rule that was calibrated on the paper's figure.

The count of MACs is exact. The paper's own bars also hold element-wise work whose costs it does not print; :data:`CALIBRATED` holds
integers that were *chosen so that the bars come out*, so agreement with those bars is by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

from papers.mobiletl.counts import Layer, Role


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step (a whole batch)."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class ElementCosts:
    """FLOPs per element; forward, then backward of a trained layer."""

    norm: int = 6
    norm_frozen: int = 3
    act: tuple[tuple[str, int], ...] = (("hard_swish", 5), ("relu", 2), ("relu6", 2))
    se_map: int = 2
    se_gate: int = 5
    bias: int = 1
    add: int = 1
    pool: int = 1
    norm_backward: int = 16
    act_backward: tuple[tuple[str, int], ...] = (("hard_swish", 7), ("relu", 1), ("relu6", 1))
    se_map_backward: int = 5
    add_backward: int = 1
    per_parameter: int = 3
    inner_norm_backward: int = 2  # of MobileTL's internal norms and masks: ours, outside the fit
    inner_act_backward: int = 1


CALIBRATED = ElementCosts()


def mac_flops(layers: tuple[Layer, ...], roles: tuple[Role, ...]) -> StepFlops:
    """2 FLOPs per MAC; backward 2 for the gradient of the weights and 2 for that of the input, which the first trained layer lacks."""
    forward = 2.0 * sum(layer.macs for layer in layers)
    return StepFlops(forward, _mac_backward(layers, roles))


def _mac_backward(layers: tuple[Layer, ...], roles: tuple[Role, ...]) -> float:
    total, first = 0.0, True
    for layer, role in zip(layers, roles, strict=True):
        if role == "frozen" or not layer.macs:
            continue
        weight = role in ("trained", "inner")
        total += 2.0 * layer.macs * (weight + (not first))
        first = False
    return total


def step_flops(layers: tuple[Layer, ...], roles: tuple[Role, ...], costs: ElementCosts = CALIBRATED) -> StepFlops:
    """MACs and element-wise work by ``costs``."""
    macs = mac_flops(layers, roles)
    forward, backward = macs.forward, macs.backward
    for layer, role in zip(layers, roles, strict=True):
        f, b = _element_flops(layer, role, costs)
        forward += f
        backward += b
        if role == "trained" or role == "inner":
            backward += costs.per_parameter * (layer.vectors // 2 if role == "inner" else layer.weights + layer.vectors)
    return StepFlops(forward, backward)


def _element_flops(layer: Layer, role: Role, costs: ElementCosts) -> tuple[int, int]:
    n, on = layer.elements_in, role != "frozen"
    if layer.kind == "norm":
        if role == "trained" or role == "norm":
            return costs.norm * n, costs.norm_backward * n
        return costs.norm_frozen * n, costs.inner_norm_backward * n * on
    if layer.kind == "act":
        backward = costs.inner_act_backward if role == "inner" else dict(costs.act_backward)[layer.activation]
        return dict(costs.act)[layer.activation] * n, backward * n * on
    if layer.kind == "se":
        vectors = costs.se_gate * layer.channels + costs.bias * (layer.channels + layer.reduced)
        return costs.se_map * n + layer.batch * vectors, costs.se_map_backward * n * on
    if layer.kind == "add":
        return costs.add * n, costs.add_backward * n * on
    if layer.kind == "pool":
        return costs.pool * n, 0
    has_bias = layer.kind == "linear" or layer.vectors > 0
    return costs.bias * layer.elements_out * has_bias, 0
