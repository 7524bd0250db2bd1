"""What a plan may decide about keys and values: all of them in memory, or a share there and the others on disk.

Pure arithmetic of bytes and tokens; how long reading them takes is `offload.planning.timeline`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# shares tried, beside all of them. The chunks being filled are an eighth of a request at most: less cannot be kept.
SHARES = (1 / 2, 1 / 4, 1 / 8)
LEAST_SHARE = 8  # one in so many
# A plan that reads keys and values must be this much faster than one that does not. Where weights are streamed a byte
# is worth about the same wherever it lies, and what is not simulated (other requests' lengths, Python) decides.
WORTH = 1.02
WORTH_JOB = 1.15  # many sequences read many small chunks, and the link that their weights come over, too


@dataclass(frozen=True, slots=True)
class KVTiers:
    """Keys and values over memory and disk.

    `kept` tokens, of all sequences together, stay in memory, which is `share` of those the plan is made for; the others
    pass through `ring` bytes of slots. `of_request`: that share of every request's own tokens is kept instead.
    """

    share: float
    kept: float
    ring: int
    of_request: bool = False

    def kept_of(self, tokens: int) -> float:
        """Tokens kept of a request that grows to so many, all sequences together."""
        return self.share * tokens if self.of_request else self.kept


@dataclass(frozen=True, slots=True)
class KVDemand:
    """What keys and values ask of memory where they lie over memory and disk, as functions of tokens.

    `per_token` bytes are of the layers whose chunks come and go; `others` are the bytes of all other layers' states.
    """

    per_token: int
    ring: Callable[[int], int]  # bytes of the slots that chunks pass through
    others: Callable[[int], int]
    activations: Callable[[int, int], int]  # (new tokens in one pass, tokens of context)

    def whole(self, tokens: int) -> int:
        """Bytes of all that comes and goes."""
        return self.per_token * tokens

    def resident(self, tokens: int, asked: int | float) -> int:
        """Bytes that `asked`, bytes or a share (a float), means: at least the chunks being filled and the ring."""
        whole, ring = self.whole(tokens), self.ring(tokens)
        least = whole // LEAST_SHARE + 16 * self.per_token + ring
        return min(max(int(whole * asked) if isinstance(asked, float) else asked, least), whole + ring)

    def tiers(self, tokens: int, asked: int | float) -> KVTiers:
        """What these bytes come to."""
        resident, ring = self.resident(tokens, asked), self.ring(tokens)
        kept = tokens if resident >= self.whole(tokens) else (resident - ring) / self.per_token
        return KVTiers(kept / tokens, kept, ring, isinstance(asked, float))


@dataclass(frozen=True, slots=True)
class Way:
    """One way to keep keys and values, as functions of tokens."""

    kv: Callable[[int], int]
    activations: Callable[[int, int], int]
    tiers: Callable[[int], KVTiers | None]
