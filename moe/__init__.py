"""Mixture-of-Experts: the experts function over blocks. Knows nothing of KV."""

from moe.experts import ExpertsModule, LayerExperts

__all__ = ["ExpertsModule", "LayerExperts"]
