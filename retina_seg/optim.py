"""What changes the weights: the Muon optimiser, the EMA of the weights, the learning-rate schedule.

Sources of Muon: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024) for the method and the
coefficients of its iteration; arXiv 2502.16982 for the size of a step, which lets learning rate and weight decay be
those of AdamW. Deviation: the iteration runs in float32, since these layers are small. `torch.optim.Muon` takes matrices
only and refuses the four-dimensional weights of convolutions; hence this one.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from retina_seg.config import TrainConfig


def orthogonalized(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest matrix of orthonormal rows (or columns, whichever are fewer), roughly: (R, C) float -> the same.

    With matrix = U S V^T this is U f(S) V^T, f(s) between 0.7 and 1.2 for all but the smallest s, by a Newton-Schulz
    iteration x <- p(x x^T) x with a polynomial p. Only square matrices are iterated, which halves the time for a 3x3
    convolution. Rounding costs some 1e-4. The scale of `matrix` does not matter. A matrix of zeros stays one.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalized(matrix.T, iterations).T
    x = matrix / (matrix.norm() + 1e-7)
    square, product = x @ x.T, None  # x x^T of the iterate, and what it is the first x times
    for number in range(iterations):
        step = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        step.diagonal().add_(3.4445)
        product = step if product is None else step @ product
        if number < iterations - 1:
            square = step @ square @ step
    return x if product is None else product @ x


class Muon(torch.optim.Optimizer):
    """Muon for the weights of convolutions and linear layers, AdamW for all else (biases, normalisation, one output).

    A weight (out, in, k, k) is taken as a matrix (out, in k k). With gradient g, momentum m <- b m + (1 - b) g:
    w <- (1 - lr decay) w - lr 0.2 sqrt(max(out, in k k)) orthogonalized((1 - b) g + b m). The factor gives a step the
    size that AdamW's usually have, so one learning rate serves both. `momentum` is b, `weight_decay` the decay.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float = 2e-3, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for value in parameters:
            groups[value.dim() > 1 and min(len(value), value[0].numel()) > 1].append(value)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": (0.9, 0.999), "eps": 1e-8}
        super().__init__([{"params": part, "muon": muon} for muon, part in groups.items() if part], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Change the weights by their gradients; a parameter without one stays as it is. No closure is called."""
        for group in self.param_groups:
            change = self._muon if group["muon"] else self._adam
            for value in group["params"]:
                if value.grad is not None:
                    value.mul_(1 - group["lr"] * group["weight_decay"])
                    value.add_(change(value, value.grad, group), alpha=-group["lr"])

    def _muon(self, value: nn.Parameter, grad: Tensor, group: dict) -> Tensor:
        state, momentum = self.state[value], group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(value)
        mean = state["momentum"].lerp_(grad, 1 - momentum)
        matrix = grad.lerp(mean, momentum).flatten(1)
        return (orthogonalized(matrix) * (0.2 * math.sqrt(max(matrix.shape)))).view_as(value)

    def _adam(self, value: nn.Parameter, grad: Tensor, group: dict) -> Tensor:
        state, (first, second) = self.state[value], group["betas"]
        if not state:
            state.update(step=0, mean=torch.zeros_like(value), square=torch.zeros_like(value))
        state["step"] += 1
        mean = state["mean"].lerp_(grad, 1 - first)
        square = state["square"].lerp_(grad.square(), 1 - second)
        root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        return mean / (1 - first ** state["step"]) / root


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Muon; or Adam, AdamW where the config decays weights, fused: one pass over each parameter instead of a dozen."""
    if config.optimizer == "muon":
        return Muon(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizer_class = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
    return optimizer_class(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


class EMA:
    """The exponential moving average of a network's weights and buffers: a copy that follows it (arXiv 1703.01780).

    Over the first steps the decay is lower, (1 + step) / (10 + step), so that the start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model` after its `step`-th step (from 1 on)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for mine, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, share)
            else:
                mine.copy_(theirs)


def learning_rate_factor(step: int, steps: int, warmup: float | None) -> float:
    """The learning rate at `step` of `steps` as a share of its peak: linear up, cosine down; 1 for `warmup` None."""
    if warmup is None:
        return 1.0
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
