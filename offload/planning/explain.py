"""A loaded model's plan and its last request, told together."""

from __future__ import annotations

from offload.describe import Description
from offload.planning.calibration import Calibration
from offload.planning.machine import Machine
from offload.planning.plan import Plan
from offload.planning.predict import Prediction, Workload
from offload.planning.report import tell
from offload.planning.search import Chosen
from offload.stats import RequestStats


def explain(
    described: Description, plan: Plan, machine: Machine, known: Calibration, prediction: Prediction,
    workload: Workload, stats: RequestStats,
) -> str:  # fmt: skip
    """What lives where, what that should do, and how the last request compared."""
    lines = [tell(described, known.apply(machine), Chosen(plan, prediction, workload)).text()]
    measured, predicted = stats.decode_tokens_per_s, stats.predicted_decode_tokens_per_s
    if measured is not None and predicted is not None:
        lines.append(
            f"  last request: {measured:.3g} tokens/s measured, {predicted:.3g} predicted "
            f"({100 * (predicted / measured - 1):+.0f}%)"
        )
    if known.reason:
        lines.append(f"  corrected by earlier runs: {known.reason}")
    return "\n".join(lines)
