"""What is needed next and when. Knows nothing of where bytes come from."""

from prefetch.prefetcher import Prefetcher
from prefetch.schedule import CyclicSchedule

__all__ = ["CyclicSchedule", "Prefetcher"]
