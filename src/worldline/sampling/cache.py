"""Step cache: what a network's blocks add to their input is reused while that input hardly changes.

Sources: the accumulated threshold is TeaCache's (arXiv 2411.19108), the filter of what is compared
SeaCache's (arXiv 2602.18993); `docs/LOG.md` has what others did. The first step and the last are
always computed.
Axes: B batch, C channels, T/H/W latent grid, L tokens, D width.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

OFF, AUTO, PATTERN = "off", "auto", "steps:"


def parse_steps(pattern: str, count: int) -> list[int]:
    """Steps that a pattern such as "steps:0-3,5,8" names, of a sampler that makes `count`.

    Raises:
        ValueError: it names others, or leaves out the first or the last.
    """
    steps: list[int] = []
    for part in pattern.removeprefix(PATTERN).split(","):
        first, _, last = part.partition("-")
        steps += range(int(first), int(last or first) + 1) or [-1]
    if any(step >= following for step, following in pairwise([-1, *steps])):
        raise ValueError("it must name steps in rising order, each once")
    if steps[0] or steps[-1] != count - 1:
        raise ValueError(f"there are steps 0 to {count - 1}, of which it must name both ends")
    return steps


def format_steps(steps: list[int]) -> str:
    """The pattern that names some steps, which rise."""
    ends = [n for n, (a, b) in enumerate(pairwise([-2, *steps])) if b > a + 1]
    runs = [steps[a:b] for a, b in pairwise([*ends, len(steps)])]
    return PATTERN + ",".join("-".join(map(str, sorted({run[0], run[-1]}))) for run in runs)


def filtered_spectrum(x: Tensor, ratio: float) -> Tensor:
    """Spectrum of noised latents (B, C, T, H, W), complex, filtered to what is their content.

    That is Wiener's filter of a signal whose power falls with the square of frequency, as pictures'
    does, in white noise; scaled to the same mean at all noise levels.

    Args:
        x: float32.
        ratio: of the noise's amplitude to the signal's, 0 or more.
    """
    axes, sides = (-3, -2, -1), x.shape[-3:]
    waves = [torch.fft.fftfreq(side, device=x.device) for side in sides]
    squares = torch.stack(torch.meshgrid(*waves, indexing="ij")).square().sum(0)
    # half a wave over the longest side stands for the means, whose frequency is 0
    power = 1 / (squares + (2 * max(sides)) ** -2)
    gain = power / (power + ratio**2 * power.mean())
    return torch.fft.fftn(x, dim=axes) * (gain / gain.mean())


class StepCache:
    """What the blocks of a network added to their input, in the steps of one sampler's run.

    A step's blocks run once its input has changed enough since they last did: relative changes from
    step to step add up to a threshold. Both branches of guidance have the same input, so they run,
    or not, together. A step reads one number from the device.

    Attributes:
        computed: steps in which the blocks ran.
    """

    def __init__(
        self,
        rule: str,
        ratios: Sequence[float],
        share: Callable[[Tensor], Tensor] = lambda change: change,
    ) -> None:
        """A cache of a run.

        Args:
            rule: threshold, or pattern of `parse_steps`.
            ratios: amplitude of the noise over the signal's in each step, an evaluation of the
                guided network.
            share: makes a number that of the first of several processes, which decide alike.
        """
        self.rule, self.ratios, self.share = rule, ratios, share
        pattern = rule.startswith(PATTERN)
        self.steps = parse_steps(rule, len(ratios)) if pattern else None
        self.threshold = 0.0 if pattern else float(rule)
        self.computed: list[int] = []
        self.step, self.change, self.branch = -1, 0.0, True
        self.spectrum: Tensor | None = None  # of the step before
        self.residuals: dict[bool, Tensor] = {}  # by branch

    def enter(self, x: Tensor, branch: bool = True) -> None:
        """Begin a branch of a step; that with the prompt comes first, and decides.

        The network's input `x` (B, C, T, H, W), float32, is without known frames.
        """
        self.branch = branch
        if branch:
            self.step += 1
            if self._must_compute(x):
                self.computed.append(self.step)
                self.change = 0.0

    def _must_compute(self, x: Tensor) -> bool:
        if self.steps is not None:
            return self.step in self.steps
        if self.threshold:
            before, self.spectrum = self.spectrum, filtered_spectrum(x, self.ratios[self.step])
            if before is not None:
                change = torch.dist(self.spectrum, before) / torch.linalg.vector_norm(before)
                self.change += self.share(change).item()
        return self.step in (0, len(self.ratios) - 1) or self.change >= self.threshold

    def reuse(self, stream: Tensor) -> Tensor | None:
        """The stream (B, L, D) behind the blocks, from that before them; None where they must run.

        Then `keep` is owed the result.
        """
        if self.computed[-1] < self.step:
            return stream + self.residuals[self.branch]
        # a copy: kernels work in the memory of the stream
        kept = self.residuals.setdefault(self.branch, torch.empty_like(stream))
        kept.copy_(stream)
        return None

    def keep(self, stream: Tensor) -> None:
        """Remember what the blocks added, by the stream behind them."""
        kept = self.residuals[self.branch]
        torch.sub(stream, kept, out=kept)
