"""Mixture-of-Experts: the experts function over blocks, what is fetched ahead, what is known of routing.

Knows nothing of KV. The way of one token through a layer: its router is heard and told to whoever wants to know
(`lookahead`: the cache's policy, the predictor, the recorder), the experts that are there are computed, the others as
they arrive (`experts`, `kernels`, on a device `grouped`), and meanwhile what the next layer will choose is foreseen
(`gates`, `predictors`) and fetched. `choices` names what can be chosen, `replay` compares it on traces, recorded
(`traces`) or made up (`synthetic`). `schedule` says who computes an expert that is not on the device,
`regrouping` which requests go together in a batch.
"""

from moe.experts import ExpertsModule, LayerExperts
from moe.gates import GateCorrection, Router
from moe.lookahead import ExpertLookahead, LayerUse
from moe.policies import Adaptive, ExpectedUse, HearsRouter, PerLayer, RouterScore
from moe.predictors import Combination, GateAhead, HearsGate, LongRun, Repetition, RequestFrequency, Transitions
from moe.regrouping import regroup, touched, uses
from moe.schedule import Choice, Need, Place, Schedule, Speeds, Turn, divide
from moe.traces import Recorder, Replay, Routed, RoutingTrace

__all__ = [
    "Adaptive", "Choice", "Combination", "ExpectedUse", "ExpertLookahead", "ExpertsModule", "GateAhead",
    "GateCorrection", "HearsGate", "HearsRouter", "LayerExperts", "LayerUse", "LongRun", "Need", "PerLayer", "Place",
    "Recorder", "Repetition", "Replay", "RequestFrequency", "Routed", "Router", "RouterScore", "RoutingTrace",
    "Schedule", "Speeds", "Transitions", "Turn", "divide", "regroup", "touched", "uses",
]  # fmt: skip
