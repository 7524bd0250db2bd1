"""What runs of a model on this machine taught: kept beside the profile, applied to the next plan.

A run whose speed was predicted within a tenth teaches nothing. Any other corrects, by name and with the reason: how
long compute takes at this many tokens, how fast the disk was read, how often a token's expert was its predecessor's.

Runs whose keys and values lie on disk teach nothing (`Engine.learn`): attention over chunks, and a disk that is written
to meanwhile, would be taken for slow products and a slow disk, and plans without either would be the worse for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from offload.planning.facts import ModelFacts
from offload.planning.machine import Machine, Rates
from offload.planning.predict import Prediction
from offload.planning.routing import EVEN, Routing
from offload.stats import RequestStats
from tiers.folders import cache_folder

TOLERANCE = 0.10  # of the measured time
_VERSION = 1
_MOST = 20.0  # a correction beyond this is a mishap (a suspended machine), not knowledge
_LEAST_READ = 32 << 20  # bytes; fewer say nothing about a disk's rate
_MOST_REPEAT = 0.95
_LATER = 0.5  # how far (as a power) a correction is moved once there is one: runs are noisy
_LEAST_PROMPT = 16  # tokens; a shorter one's pass is mostly the first use of this and that


@dataclass(frozen=True, slots=True)
class Calibration:
    """`corrections` are (tokens of a pass, factor on its compute); the shares see `planning.routing.Routing`."""

    corrections: tuple[tuple[int, float], ...] = ()
    disk_bytes_per_s: float | None = None
    repeat: float = 0.0
    recall: float = EVEN.recall
    precision: float = EVEN.precision
    runs: int = 0
    reason: str = ""

    @property
    def routing(self) -> Routing:
        """What is known of the model's router."""
        return Routing(self.repeat, self.recall, self.precision)

    def apply(self, machine: Machine) -> Machine:
        """The machine as this model finds it."""
        rates = replace(machine.rates, corrections=self.corrections)
        disk = self.disk_bytes_per_s or machine.disk_bytes_per_s
        # an emulated device is the host's own cores
        host = replace(machine.host_rates, corrections=self.corrections) if machine.host_rates is not None else None
        host = host if machine.alone else machine.host_rates
        return replace(machine, rates=rates, disk_bytes_per_s=disk, host_rates=host)


Predict = Callable[["Calibration"], Prediction]  # one request's prediction under a calibration


def learn(
    known: Calibration, rates: Rates, prediction: Prediction, stats: RequestStats, predict: Predict
) -> Calibration | None:
    """What a run teaches, or None where it was predicted well.

    `rates` are those the prediction was made with; `predict` gives the same request's under another calibration.
    """
    slow, late = errors(prediction, stats)
    if max(abs(slow or 0.0), abs(late or 0.0)) <= TOLERANCE:
        return None
    new = observe(known, rates, prediction, stats, predict, beyond=TOLERANCE)
    return new if new.reason else None


def errors(prediction: Prediction, stats: RequestStats) -> tuple[float | None, float | None]:
    """How much longer than predicted a decode step, and the passes over the prompt, took, as shares of the time
    measured (what every error of a prediction is given in); None where too short to say.
    """
    steps = stats.new_tokens // max(1, stats.sequences) - 1
    decoded = steps >= 2 and stats.decode.seconds > 0
    prompted = stats.prefill_pass_tokens >= _LEAST_PROMPT and stats.prefill.seconds > 0
    return (
        1 - prediction.decode.seconds * steps / stats.decode.seconds if decoded else None,
        1 - prediction.prefill.seconds / stats.prefill.seconds if prompted else None,
    )


def observe(
    known: Calibration,
    rates: Rates,
    prediction: Prediction,
    stats: RequestStats,
    predict: Predict,
    *,
    beyond: float = 0.0,
    damped: bool = True,
) -> Calibration:
    """Speeds as this run had them, where they differ from the prediction by more than `beyond`.

    `damped`: a correction that is there already is moved half the way, because runs are noisy.
    """
    slow, late = errors(prediction, stats)
    steps = max(1, stats.new_tokens // max(1, stats.sequences) - 1)
    reasons: list[str] = []
    new = replace(known, runs=known.runs + 1, reason="")
    total = stats.total
    if total.bytes_read >= _LEAST_READ and total.read_busy_s > 0:
        rate = total.bytes_read / total.read_busy_s
        new = replace(new, disk_bytes_per_s=rate)
        reasons.append(f"the disk gave {rate / 1e9:.2f} GB/s")
    later = _LATER if damped else 1.0
    if slow is not None and abs(slow) > beyond:
        measured = (stats.decode.seconds - stats.decode.stall_s) / steps
        predicted = prediction.decode.seconds - prediction.decode.stall_s
        new = _correct(new, rates, stats.sequences, measured, predicted, later, reasons)
        use = stats.experts_use
        if use is not None and use.needed and use.predicted:
            # of the layers that are foreseen at all: nobody looks ahead to the first one
            needed = sum(u.asked for u in stats.experts_by_layer[1:])
            recall, precision = use.right / max(1, needed), use.precision or 0.0
            if abs(recall - new.recall) > beyond / 2:
                reasons.append(f"{100 * recall:.0f}% of experts were foreseen")
            new = replace(new, recall=round(recall, 3), precision=round(max(0.05, precision), 3))
        read, wanted = predict(new).decode.bytes_read, stats.decode.bytes_read / steps
        if use is not None and abs(read - wanted) > beyond * max(read, wanted):
            new = replace(new, repeat=_repeat(new, wanted, predict))
            reasons.append(f"{100 * new.repeat:.0f}% of experts were the token's before")
    if late is not None and abs(late) > beyond:
        measured = stats.prefill.seconds - stats.prefill.stall_s
        predicted = prediction.prefill.seconds - prediction.prefill.stall_s
        new = _correct(new, rates, stats.prefill_pass_tokens, measured, predicted, later, reasons)
    return replace(new, reason="; ".join(reasons))


def learn_widths(
    known: Calibration, rates: Rates, widths: Sequence[tuple[int, float, float]], read: tuple[int, float]
) -> Calibration | None:
    """What the passes of a batch job teach, or None where they were predicted well.

    `widths`: tokens of a pass, seconds that computing one was measured to take, and predicted. `read`: bytes from disk,
    and seconds in which it was busy.
    """
    new, reasons = replace(known, runs=known.runs + 1, reason=""), list[str]()
    nbytes, busy = read
    if nbytes >= _LEAST_READ and busy > 0:
        was = known.disk_bytes_per_s
        if was is None or abs(nbytes / busy / was - 1) > TOLERANCE:
            new = replace(new, disk_bytes_per_s=nbytes / busy)
            reasons.append(f"the disk gave {nbytes / busy / 1e9:.2f} GB/s")
    for tokens, measured, predicted in widths:
        if measured > 0 and abs(1 - predicted / measured) > TOLERANCE:
            new = _correct(new, rates, tokens, measured, predicted, _LATER, reasons)
    return replace(new, reason="; ".join(reasons)) if reasons else None


def _correct(
    known: Calibration, rates: Rates, tokens: int, measured: float, predicted: float, later: float, reasons: list[str]
) -> Calibration:
    """The factor at `tokens` so that compute takes what was measured."""
    points = dict(known.corrections)
    ratio = measured / predicted if predicted > 0 and measured > 0 else 1.0
    old = rates.correction(tokens)  # what the prediction used
    points[tokens] = min(_MOST, max(1 / _MOST, old * (ratio if tokens not in points else ratio**later)))
    reasons.append(f"computing {tokens} tokens took {ratio:.2f} of what was expected")
    return replace(known, corrections=tuple(sorted(points.items())))


def _repeat(known: Calibration, wanted: float, predict: Callable[[Calibration], Prediction]) -> float:
    """The share of repeated experts at which a step reads `wanted` bytes."""
    low, high = 0.0, _MOST_REPEAT
    for _ in range(6):
        middle = (low + high) / 2
        if predict(replace(known, repeat=middle)).decode.bytes_read > wanted:
            low = middle
        else:
            high = middle
    return round((low + high) / 2, 3)


def load(machine: str, facts: ModelFacts) -> Calibration:
    """What is known of a model on the machine of that name; nothing, if the file is absent, foreign or damaged."""
    try:
        raw = _path(machine, facts).read_bytes()
        if len(raw) > 1 << 16:
            return Calibration()
        outer = json.loads(raw)
        if hashlib.sha256(outer["body"].encode()).hexdigest() != outer["sha256"]:
            return Calibration()
        d = json.loads(outer["body"])
        points = tuple((int(t), float(f)) for t, f in d.pop("corrections"))
        return Calibration(points, **d)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Calibration()


def save(machine: str, facts: ModelFacts, value: Calibration) -> None:
    """Keep it; a cache that cannot be written is no reason to fail."""
    path = _path(machine, facts)
    body = json.dumps(asdict(value))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(fd, "w") as f:
            json.dump({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}, f)
        os.replace(temporary, path)


def kept_at(machine: str, facts: ModelFacts, folder: str, suffix: str) -> Path:
    """Where something about a model on the machine of that name is kept, in a `folder` of the cache."""
    shape = [_VERSION, machine, facts.model_type, facts.dtype, facts.weight_bytes, facts.params, len(facts.layers)]
    return cache_folder() / folder / f"{hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:24]}.{suffix}"


def _path(machine: str, facts: ModelFacts) -> Path:
    return kept_at(machine, facts, "calibrations", "json")
