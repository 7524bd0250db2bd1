"""Mixture-of-Experts: the experts function over blocks, what is known of routing. Knows nothing of KV.

Replays of traces are in `moe.replay`, made-up traces in `moe.synthetic`; nothing that runs a model needs them.
"""

from moe.experts import ExpertsModule, LayerExperts
from moe.policies import Adaptive, ExpectedUse, HearsRouter, PerLayer, RouterScore
from moe.predictors import Combination, GateAhead, HearsGate, LongRun, Repetition, RequestFrequency, Transitions
from moe.traces import Recorder, Routed, RoutingTrace

__all__ = [
    "Adaptive", "Combination", "ExpectedUse", "ExpertsModule", "GateAhead", "HearsGate", "HearsRouter", "LayerExperts",
    "LongRun", "PerLayer", "Recorder", "Repetition", "RequestFrequency", "Routed", "RouterScore", "RoutingTrace",
    "Transitions",
]  # fmt: skip
