"""What happened: counters of one pass over the weights (`StepStats`) and of one request (`RequestStats`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore import NO_LOSS, KVLoss
from moe import LayerUse

if TYPE_CHECKING:
    from offload.planning.predict import Prediction


@dataclass(slots=True)
class StepStats:
    """One pass over the weights. Bytes and seconds.

    `needed` are the bytes of the blocks the pass used, `hit` those of them that were in memory from before. Where
    nobody asks which experts were chosen (`moe.grouped`), both count as many as could have been.
    `launches` and `syncs` mean something only where `counted` is not 0: it is the number of passes that were counted.
    """

    tokens: int = 0
    sequences: int = 0
    seconds: float = 0.0
    stall_s: float = 0.0
    read_busy_s: float = 0.0  # wall time with at least one disk request in flight
    bytes_read: int = 0  # from disk, whether into host or device memory
    link_busy_s: float = 0.0
    bytes_up: int = 0  # from host to device memory
    needed: int = 0
    hit: int = 0
    late: int = 0
    missed: int = 0
    launches: int = 0  # kernels and graphs the computing thread launched
    syncs: int = 0  # times it waited for the device
    counted: int = 0
    kv_bytes_read: int = 0  # of `bytes_read`
    kv_bytes_written: int = 0  # keys and values that were spilled
    kv_loss: KVLoss = NO_LOSS  # what coding them did

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(*(getattr(self, n) + getattr(other, n) for n in self.__slots__))


@dataclass(slots=True)
class RequestStats:
    """One request, all its passes. Times count from the request; loading the model is apart (`load_s`)."""

    sequences: int = 1
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt: known from before, and not computed
    new_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    decode_s: float = 0.0  # from the first token to the last
    load_s: float = 0.0
    prefill: StepStats = field(default_factory=StepStats)
    decode: StepStats = field(default_factory=StepStats)
    peak_rss_bytes: int = 0
    budget_bytes: int = 0
    experts_by_layer: tuple[LayerUse, ...] = ()  # of all passes; empty where no expert ever moves
    expert_bytes: tuple[int, ...] = ()  # of one expert of each of these layers
    prefill_pass_tokens: int = 0  # of the first pass over the prompt, all sequences together
    prediction: Prediction | None = None  # None where none is made: beam search, several batches in one call
    inexact: tuple[str, ...] = ()  # what was asked for that changes what the model says
    kv_codec: str | None = None  # how keys and values were coded; None: as they are
    kv_grains: tuple[int, ...] = ()  # chunks chosen together, of each layer attended to sparsely (`kvstore.shares`)
    learned: str = ""  # what this run corrected for the next plan, and why

    @property
    def exact(self) -> bool:
        """False: attention was sparse, or keys and values were coded with a loss."""
        return not self.inexact

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after each sequence's first, per second; None if there were none."""
        if self.new_tokens <= self.sequences or self.decode_s <= 0:
            return None
        return (self.new_tokens - self.sequences) / self.decode_s

    @property
    def experts_use(self) -> LayerUse | None:
        """All layers together; None where no expert ever moves."""
        return sum(self.experts_by_layer, LayerUse()) if self.experts_by_layer else None

    @property
    def predicted_decode_tokens_per_s(self) -> float | None:
        """What was predicted for `decode_tokens_per_s`."""
        return self.prediction.decode_tokens_per_s if self.prediction is not None else None

    @property
    def predicted_ttft_s(self) -> float | None:
        """What was predicted for `ttft_s`."""
        return self.prediction.ttft_s if self.prediction is not None else None

    @property
    def prediction_error(self) -> float | None:
        """Predicted over measured decode rate, less 1; None without either."""
        predicted, measured = self.predicted_decode_tokens_per_s, self.decode_tokens_per_s
        return predicted / measured - 1 if predicted is not None and measured is not None else None

    @property
    def total(self) -> StepStats:
        """Prefill and decode together."""
        return self.prefill + self.decode

    @property
    def hit_rate(self) -> float | None:
        """Share of the bytes of needed blocks that did not have to be read for this use."""
        return self.total.hit / self.total.needed if self.total.needed else None

    @property
    def bottleneck(self) -> str:
        """`disk` if compute waited for reads for more than half of the time spent in passes, else `compute`."""
        steps = self.decode if self.decode.seconds else self.prefill
        return "disk" if steps.seconds and steps.stall_s > 0.5 * steps.seconds else "compute"

    def one_line(self) -> str:
        """For a status line."""
        rate = self.decode_tokens_per_s
        parts = [f"{self.new_tokens} tokens", f"first after {self.ttft_s:.2f} s"]
        if rate is not None:
            predicted = self.predicted_decode_tokens_per_s
            told = f" (predicted {predicted:.3g})" if predicted is not None else ""
            parts.append(f"{rate:.3g} tokens/s{told}")
        if self.total.bytes_read >= 1 << 20:
            parts.append(f"{self.total.bytes_read / max(1, self.new_tokens) / 1e6:.1f} MB read per token")
        if self.reused_tokens:
            parts.append(f"{self.reused_tokens} of {self.prompt_tokens} prompt tokens known from before")
        if self.hit_rate is not None:
            parts.append(f"{100 * self.hit_rate:.0f}% found in memory")
        parts.append(f"{self.bottleneck}-bound")
        if not self.exact:
            parts.append(f"not exact: {', '.join(self.inexact)}")
        return " · ".join(parts)
