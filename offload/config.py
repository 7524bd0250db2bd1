"""How a model is to be run: one frozen value, checked when made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvstore.cold import KVCodecs
from kvstore.selection import DEFAULT_SELECTOR, SELECTORS
from moe.choices import POLICIES, POLICY, PREDICTOR, PREDICTORS, checked
from offload.sizes import parse_budget, parse_rate, parse_size
from tiers import UsageError

DEVICES = ("auto", "cuda", "cpu", "emulated")
USUAL = 512  # tokens of a sequence of which nobody has said more
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be run: `requests` sequences of `prompt_tokens` that are continued by `new_tokens`, on average.

    `longest` tokens, of the prompt and new, is the most that one of them takes. `sequences` of them run at once (None:
    as many as are predicted to be fastest).
    """

    requests: int
    prompt_tokens: int
    new_tokens: int
    longest: int = 0
    sequences: int | None = None

    @property
    def each(self) -> int:
        """Tokens of a sequence at its end, on average."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What `offload.load` and the commands take.

    `ram`: peak resident bytes of the whole process (None: what is free). `vram`: peak bytes of device memory (None:
    what is free; an emulated device needs it, and its memory comes on top of `ram`). `resident`: most weight bytes
    kept in memory, bytes or a percentage of the model (None: as many as fit). `context`: tokens KV is reserved for
    (None: what fits, at most the model's own). `threads`: compute threads (None: all cores). `link`: rate of the
    emulated device's link, bytes per second. `trace`: file for a timeline. `overrides`: choices made by hand
    (`offload.planning.budgets.Overrides`). `graphs`: replay norms and MLPs of decode steps from CUDA graphs.
    `count_launches`: count kernel launches and host synchronisations of every pass, on a CUDA device; passes take much
    longer then. `expert_policy`, `expert_predictor`: which expert gives up its slot, and who foresees which are needed
    (`moe.choices`), `expert_depth` layers ahead. `expert_compute`: `both`, or `device` if the CPU is never to compute
    experts beside a device.
    `record_routing`: file to write what routers chose to, when the model is closed (`moe.traces`).
    `replay_routing`: such a file, whose routing is followed in place of the model's own: to measure real routing on
    random weights; what the model says means nothing then.
    `kv_resident`: keys and values kept in memory, bytes or a percentage of a request's at full length (None: the
    planner decides where `context` is given, else all); the others lie on disk, in an unnamed file in `spill_dir`
    (None: in the cache folder) of at most `disk` bytes.
    `kv_budget`: sparse attention, which changes what the model says: so many tokens, or that percentage of those there
    are, are attended to by each new token, chosen by `kv_policy` (`kvstore.selection`); with `kv_by_layer` the layers
    share what they may attend to by how their attention is spread over the prompt. How many neighbouring chunks a layer
    chooses together follows from that, too (`kvstore.shares.grain`).
    `kv_codec`: `int8` or `int4`, which change what the model says: how keys and values are coded that leave memory; for
    each tier `ram=int8,disk=int4`, where `ram` codes those that stay, too (`kvstore.cold`).
    `batch`: the plan is made for a batch job, of which so many sequences run at once, or for one that is described.
    """

    ram: str | int | None = None
    vram: str | int | None = None
    resident: str | int | None = None
    device: str = "auto"
    dtype: str = "auto"
    context: int | None = None
    threads: int | None = None
    link: str = "8GB"
    trace: str | None = None
    overrides: Mapping[str, int] | None = None
    graphs: bool = False
    count_launches: bool = False
    expert_policy: str = POLICY
    expert_predictor: str = PREDICTOR
    expert_depth: int = 1
    expert_compute: str = "both"
    record_routing: str | None = None
    replay_routing: str | None = None
    kv_resident: str | int | None = None
    spill_dir: str | None = None
    disk: str | int | None = None
    kv_budget: str | int | None = None
    kv_policy: str = DEFAULT_SELECTOR
    kv_by_layer: bool = False
    kv_codec: str | None = None
    batch: int | Job | None = None

    def __post_init__(self) -> None:
        for flag, size in (("--ram", self.ram), ("--vram", self.vram)):
            if size is not None:
                parse_size(size, of=1 << 40, flag=flag)
        parse_rate(self.link, flag="--link")
        if self.resident is not None:
            parse_size(self.resident, of=1 << 40, flag="--resident")
        if self.kv_resident is not None:
            parse_size(self.kv_resident, of=1 << 40, flag="--kv-resident")
        parse_budget(self.kv_budget)
        if self.kv_codec is not None:
            KVCodecs.parse(self.kv_codec)
        checked(self.kv_policy, tuple(SELECTORS), "--kv-policy")
        if self.disk is not None:
            parse_size(self.disk, flag="--disk")
        if self.device not in DEVICES:
            raise UsageError(f"--device: {self.device!r} is not one of {', '.join(DEVICES)}")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        checked(self.expert_policy, POLICIES, "--expert-policy")
        checked(self.expert_predictor, PREDICTORS, "--expert-predictor")
        checked(self.expert_compute, ("both", "device"), "--expert-compute")
        for flag, value in (
            ("--context", self.context), ("--threads", self.threads), ("--expert-depth", self.expert_depth),
            ("--batch", None if isinstance(self.batch, Job) else self.batch),
        ):  # fmt: skip
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{flag}: {value!r} is not a whole number above zero")
        for name, on in (
            ("graphs", self.graphs),
            ("count_launches", self.count_launches),
            ("kv_by_layer", self.kv_by_layer),
        ):
            if not isinstance(on, bool):
                raise UsageError(f"{name}: {on!r} is neither True nor False")

    @property
    def job(self) -> Job | None:
        """What `batch` asks to plan for: of a number of sequences alone, usual ones, as long as `context` has room."""
        if self.batch is None or isinstance(self.batch, Job):
            return self.batch
        each = USUAL if self.context is None else max(2, self.context // self.batch)
        return Job(self.batch, each - each // 4, each // 4, each, self.batch)

    @classmethod
    def of(cls, options: Mapping[str, Any], max_memory: Mapping[Any, str | int] | None = None) -> RunConfig:
        """From keyword arguments; unknown ones are refused. `max_memory` is accelerate's spelling of the budgets."""
        known = set(cls.__slots__)
        unknown = sorted(set(options) - known)
        if unknown:
            raise UsageError(f"unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
        merged = dict(options)
        for place, size in (max_memory or {}).items():
            if place not in ("cpu", 0):
                raise UsageError(f"max_memory: {place!r} is not a memory that can be used; 'cpu' and 0 are")
            budget = "ram" if place == "cpu" else "vram"
            if merged.get(budget) is not None:
                raise UsageError(f"give the budget as {budget} or as max_memory, not both")
            merged[budget] = size
        return cls(**merged)
