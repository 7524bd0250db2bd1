"""Attention of one new token, put together from parts in whatever place and order they are computed.

Softmax needs only three things carried from part to part: the largest score so far, the sum of the weights relative to
it, and the sum of the values so weighted (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). A part whose
attention has been computed by somebody else (a device, a fused kernel) joins by its log-sum-exp, as the splits of
FlashDecoding do (Dao et al. 2023, https://pytorch.org/blog/flash-decoding/).

Plain torch, on any device. Decoding on a CPU adds chunks with a kernel that takes the three tensors; where there is no
such kernel `kvstore.attention.partial` computes a part, and `merge` adds it. Nothing here masks: parts hold only tokens
that the query may see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionState:
    """What is known of one token's attention per sequence and head; changed in place by all who add to it.

    largest [B, heads]: the largest score, -inf before the first; total [B, heads]: Σ e^(score - largest);
    mixed [B, heads, Dv]: Σ e^(score - largest)·value. All contiguous float32.
    """

    largest: torch.Tensor
    total: torch.Tensor
    mixed: torch.Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, width: int, device: torch.device | str | None = None) -> AttentionState:
        """Of nothing yet, for values of `width` elements."""
        return cls(
            torch.full((batch, heads), -torch.inf, dtype=torch.float32, device=device),
            torch.zeros(batch, heads, dtype=torch.float32, device=device),
            torch.zeros(batch, heads, width, dtype=torch.float32, device=device),
        )

    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Add a part: its attention out [B, heads, 1, Dv] and the log of its Σ e^score, lse [B, heads], of any type.

        A lse of -inf is a part without tokens, whatever `out` says.
        """
        lse = lse.to(self.largest)
        largest = torch.maximum(self.largest, lse)
        at = largest.masked_fill(largest == -torch.inf, 0)  # -inf - -inf is no number
        ours, theirs = (self.largest - at).exp(), (lse - at).exp()
        values = out.squeeze(2).to(self.mixed).masked_fill((lse == -torch.inf)[..., None], 0)
        self.total.mul_(ours).add_(theirs)
        self.mixed.mul_(ours[..., None]).add_(values * theirs[..., None])
        self.largest.copy_(largest)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention so far, out [B, heads, 1, Dv] float32, and its lse [B, heads]: zeros and -inf of no tokens."""
        total = self.total[..., None]
        out = (self.mixed / total).masked_fill(total == 0, 0)
        return out.unsqueeze(2), self.largest + self.total.log()
