"""What goes into a plan: what a model asks of memory beside its weights, what may be used, choices made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from offload.planning.keys import SHARES, KVDemand, Way
from tiers import UsageError

READERS = 8  # requests in flight; 1 MiB × 8 is where this kind of disk levels off
# Thread stacks, bounce buffers' owners, lazily imported modules, allocator slack. Measured by tests/test_budget.py.
RESERVE = 72 << 20


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model asks of memory beside its weights, as functions of tokens.

    `kv` and `activations` hold where all keys and values are in memory; `tiered` where some are on disk (None: those of
    this family cannot be). `job`: so many sequences of any lengths run together, their keys and values in chunks if
    they can be; each beyond the first has `row` bytes of logits.
    """

    kv: Callable[[int], int]
    activations: Callable[[int, int], int]  # (new tokens in one pass, tokens of context)
    max_context: int
    whole_prompt: bool = False  # prompts of this family must be computed in one pass
    tiered: KVDemand | None = None
    job: int | None = None
    row: int = 0

    def way(self, asked: int | float | None, *, below: bool = False) -> Way:
        """Keep `asked`, bytes or a share, of keys and values in memory (None: all); in that `below` a device's."""
        tiered = self.tiered
        if asked is None:
            return Way(self.kv, self.activations, lambda tokens: None)
        if tiered is None:
            raise UsageError("--kv-resident: this model keeps no keys and values that could lie anywhere else")
        return Way(
            lambda tokens: (0 if below else tiered.resident(tokens, asked)) + tiered.others(tokens),
            tiered.activations,
            lambda tokens: tiered.tiers(tokens, asked),
        )

    def ways(self, budgets: Budgets) -> list[Way]:
        """The ways to keep keys and values that a plan may choose among, most in memory first.

        Nobody asked to have them on disk who did not say how long the context is to be.
        """
        below = budgets.kv_below and budgets.vram is not None
        if budgets.kv_resident is not None:
            return [self.way(budgets.kv_resident, below=below)]
        chunked = self.job is not None and self.tiered is not None
        ways = [self.way(1.0 if chunked else None, below=below)]
        if self.tiered is None or budgets.context is None:
            return ways
        context = min(budgets.context, self.max_context)
        whole, ring = self.tiered.whole(context), self.tiered.ring(context)
        if below:  # what RAM has left is theirs, whatever that is
            return ways
        fewer = [self.way(int(whole * share) + ring) for share in SHARES]
        return ways + [w for w in fewer if w.kv(context) < ways[0].kv(context)]  # windows may keep less than a share is


@dataclass(frozen=True, slots=True)
class Budgets:
    """What may be used. `vram` is None where compute is on the host; `device_base` is what the device takes itself.

    `kv_resident`: keys and values kept in memory, bytes or, as a float, a share; None leaves it to the planner. With
    `kv_below` none of that is a device's memory: they are attended to in RAM.
    """

    ram: int
    base: int
    vram: int | None = None
    device_base: int = 0
    resident: int | None = None
    context: int | None = None
    kv_resident: int | float | None = None
    kv_below: bool = False


@dataclass(frozen=True, slots=True)
class Overrides:
    """Choices made by hand; None leaves one to the planner.

    `resident_layers` decoder layers stay whole and the others are streamed whole; `lookahead` stream slots lie beyond
    those of the layer in use; `expert_slots` experts are cached where they are computed; `prefill_chunk` tokens of a
    prompt are computed in one pass; `kv_chunk` tokens of keys and values come and go together.
    """

    resident_layers: int | None = None
    lookahead: int | None = None
    expert_slots: int | None = None
    prefill_chunk: int | None = None
    kv_chunk: int | None = None

    @classmethod
    def of(cls, settings: Mapping[str, int]) -> Overrides:
        """From names and values. Raises `UsageError` for an unknown name or a value below its least."""
        least = {"resident_layers": 0, "lookahead": 0, "expert_slots": 1, "prefill_chunk": 1, "kv_chunk": 1}
        for name, value in settings.items():
            if name not in least:
                raise UsageError(f"--set {name}: not a choice there is; choices are {', '.join(least)}")
            if isinstance(value, bool) or not isinstance(value, int) or not least[name] <= value < 1 << 40:
                raise UsageError(f"--set {name}={value!r}: give a whole number from {least[name]} up")
        return cls(**settings)

    @property
    def any(self) -> bool:
        """Whether anything about weights is set."""
        return any(getattr(self, f.name) is not None for f in fields(self) if f.name != "kv_chunk")
