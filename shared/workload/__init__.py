"""Count what a model executes: ``trace(model, inputs)`` gives a :class:`Workload`, a table of operators with FLOPs, bytes and types.

>>> model = meta_model(timm.create_model, "deit_small_patch16_224")
>>> work = trace(model, torch.empty(1, 3, 224, 224, device="meta"))
>>> work.macs, work.num_parameters
(4598882304, 22050664)

``cost`` states the conventions (2 FLOPs per MAC, vector operations apart, unfused traffic) and takes rules for custom operators;
``rules_*`` hold the built-in ones; ``fused`` and ``attention`` what counts as one kernel; ``saved`` what autograd keeps.
"""

from __future__ import annotations

from shared.workload.cost import KINDS, Call, Cost, UnknownOperator, register_rule
from shared.workload.table import CostArrays, Held, Op, Totals, Workload
from shared.workload.tracer import NeedsValues, meta_model, trace

__all__ = [
    "KINDS",
    "Call",
    "Cost",
    "CostArrays",
    "Held",
    "NeedsValues",
    "Op",
    "Totals",
    "UnknownOperator",
    "Workload",
    "meta_model",
    "register_rule",
    "trace",
]
