"""From logits to a token: temperature, top-k, top-p, and the draw. All in float32.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/utils/sampling.py`; nucleus sampling from
arXiv 1904.09751. Axes: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and ignores the rest.
        top_p: the smallest set of likely tokens whose probability exceeds this stays; 1 keeps all.
        top_k: as many of the likeliest tokens stay; None keeps all. Not together with top_p < 1.
    """

    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} is below 1")
        if self.top_k is not None and self.top_p < 1:
            raise ValueError("give top_k or top_p, not both")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the filtered distribution, most likely token first.

    Args:
        logits: (B, V), any floating dtype; equal logits keep the order of their ids.
        sampling: not greedy.

    Returns:
        Probabilities (B, V), float32, falling, 0 where filtered out; and their token ids (B, V).
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    # float32: bf16 sums of 64,000 probabilities would end anywhere
    probs = (ordered.float() / sampling.temperature).softmax(-1)
    if sampling.top_k is not None:
        # equal to the k-th largest stays too, as in the reference
        kth = ordered[:, min(sampling.top_k, ordered.shape[1]) - 1, None]
        probs = probs.masked_fill(ordered < kth, 0)
    elif sampling.top_p < 1:
        # strict: the token that crosses the threshold stays, so at least one always does
        probs = probs.masked_fill(probs.cumsum(-1) - probs > sampling.top_p, 0)
    return probs / probs.sum(-1, keepdim=True), ids


def draw(logits: Tensor, sampling: Sampling, noise: Tensor | None = None) -> Tensor:
    """Return one token id (B,), int64, for each row of `logits` (B, V).

    Args:
        logits: (B, V).
        sampling: the rule.
        noise: (B, V) float32, exponential with mean 1; probability / noise is largest at token i
            with that token's probability. Needed unless greedy.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    assert noise is not None
    probs, ids = probabilities(logits, sampling)
    return ids.gather(-1, (probs / noise).argmax(-1, keepdim=True)).squeeze(-1)
