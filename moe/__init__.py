"""Mixture-of-Experts: the experts function over blocks, what is known of routing. Knows nothing of KV.

Made-up traces are in `moe.synthetic`; nothing that runs a model needs them.
"""

from moe.experts import ExpertsModule, LayerExperts
from moe.traces import Recorder, Routed, RoutingTrace

__all__ = ["ExpertsModule", "LayerExperts", "Recorder", "Routed", "RoutingTrace"]
