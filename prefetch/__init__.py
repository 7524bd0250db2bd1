"""What is needed next and when. Knows nothing of where bytes come from."""

from prefetch.predictor import Choice, Predictor
from prefetch.prefetcher import Prefetcher
from prefetch.schedule import CyclicSchedule
from prefetch.worth import ThrashGuard, pays, worthwhile

__all__ = ["Choice", "CyclicSchedule", "Predictor", "Prefetcher", "ThrashGuard", "pays", "worthwhile"]
