"""Mixture-of-Experts: the experts function over blocks, what is fetched ahead, what is known of routing.

Knows nothing of KV. Wired into the engine so far: `experts`, `kernels`, `lookahead`. The policies, predictors and
traces are tested on replays (`moe.replay`, made-up traces in `moe.synthetic`) and wait for being compared on real
routing; who computes an expert (`schedule`) and which requests go together (`regrouping`) wait for their callers.
"""

from moe.experts import ExpertsModule, LayerExperts
from moe.lookahead import ExpertLookahead, Gate, LayerUse
from moe.policies import Adaptive, ExpectedUse, HearsRouter, PerLayer, RouterScore
from moe.predictors import Combination, GateAhead, HearsGate, LongRun, Repetition, RequestFrequency, Transitions
from moe.regrouping import regroup, touched, uses
from moe.schedule import Choice, Need, Place, Schedule, Speeds, Turn, divide
from moe.traces import Recorder, Routed, RoutingTrace

__all__ = [
    "Adaptive", "Choice", "Combination", "ExpectedUse", "ExpertLookahead", "ExpertsModule", "Gate", "GateAhead",
    "HearsGate", "HearsRouter", "LayerExperts", "LayerUse", "LongRun", "Need", "PerLayer", "Place", "Recorder",
    "Repetition", "RequestFrequency", "Routed", "RouterScore", "RoutingTrace", "Schedule", "Speeds", "Transitions",
    "Turn", "divide", "regroup", "touched", "uses",
]  # fmt: skip
