"""What may be needed next, and how surely: the seam behind which prediction hides."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Choice = NDArray[np.integer[Any]]  # [T, k]: the items (experts of the layer) that each token chose


class Predictor(Protocol):
    """Told what each layer chose, in the order in which layers run; asked what one that has not run yet will need.

    Not safe from several threads at once. Implementations are in `moe.predictors`.
    """

    def observe(self, layer: int, index: Choice) -> None:
        """The layer has chosen index [T, k]. What was predicted for it is settled by this."""
        ...

    def predict(self, layer: int) -> list[tuple[int, float]]:
        """(expert, probability) of what the layer will need when it runs next, the most probable first.

        Probabilities are measured ones: of those given as 0.8, eight in ten come true. Experts left out are not worth
        naming. Nothing is to be said: an empty list.
        """
        ...
