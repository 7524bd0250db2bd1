"""Mixture-of-Experts: the experts function over blocks, and what is fetched ahead. Knows nothing of KV."""

from moe.experts import ExpertsModule, LayerExperts
from moe.lookahead import ExpertLookahead, Gate, LayerUse

__all__ = ["ExpertLookahead", "ExpertsModule", "Gate", "LayerExperts", "LayerUse"]
