"""Muon: momentum whose matrices are made orthogonal, for the hidden layers of a network."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Factors of Jordan et al. 2024: singular values tend to between 0.7 and 1.2, the largest first."""
STEPS = 3
"""Iterations. Language models use five; three were enough for the CIFAR-10 records of airbench, and cost less."""
MOST_NUMBERS = 1 << 22
"""Numbers in a batch of matrices: larger ones keep a GPU busy by themselves, and are slower on a CPU, whose caches they leave."""
RMS = 0.2
"""Root mean square of a step, equal to AdamW's, so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982)."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) in groups that have "orthogonal", AdamW in the others.

    The momentum of a convolution counts as a matrix [outputs, inputs * height * width]. Decay is decoupled in both kinds of
    groups. `dtype` is what the matrices are multiplied in: bfloat16 where it is fast, for its rounding does no harm there.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        *,
        nesterov: bool,
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "nesterov": nesterov, "eps": 1e-8}
        super().__init__(groups, {**defaults, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # there is nothing to return
        # Each call works on a list of weights: a GPU takes longer to be told of a small kernel than to run it.
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["orthogonal"]:
                for batch in batches(weights):
                    self._orthogonal_step(batch, group)
            elif weights:
                self._adam_step(weights, group)

    def _orthogonal_step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Move weights of one shape."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        grads = _grads(weights)
        moved = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(moved, grads, 1 - group["momentum"])
        if group["nesterov"]:
            moved = list(torch._foreach_lerp(grads, moved, group["momentum"]))
        # A view [outputs, inputs * height * width] of each; the order of the columns, which follows memory, does not matter.
        flat = weights[0].is_contiguous()
        targets, sources = (
            [(value if flat else value.movedim(1, -1)).flatten(1) for value in values] for values in (weights, moved)
        )
        matrices = targets[0].new_empty(len(targets), *targets[0].shape, dtype=self.dtype)
        torch._foreach_copy_(matrices.unbind(), sources)
        updates = orthogonal(matrices).to(targets[0].dtype, memory_format=torch.contiguous_format)
        scale = RMS * max(updates.shape[1:]) ** 0.5
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(targets, updates.unbind(), alpha=-group["lr"] * scale)

    def _adam_step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] |= {"step": 0, "mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}
            self.state[weight]["step"] += 1
        steps, means, squares = (
            [self.state[weight][name] for weight in weights] for name in ("step", "mean", "square")
        )
        grads, (beta1, beta2) = _grads(weights), group["betas"]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        deviations = torch._foreach_div(squares, [1 - beta2**step for step in steps])
        torch._foreach_sqrt_(deviations)
        torch._foreach_add_(deviations, group["eps"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(weights, means, deviations, [-group["lr"] / (1 - beta1**step) for step in steps])


def _grads(weights: list[Tensor]) -> list[Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]


def batches(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield weights of one shape together, at most `MOST_NUMBERS` in all, or a single weight."""
    same: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        same.setdefault(weight.shape, []).append(weight)
    for shape, members in same.items():
        size = max(1, MOST_NUMBERS // shape.numel())
        yield from (members[start : start + size] for start in range(0, len(members), size))


def orthogonal(matrices: Tensor) -> Tensor:
    """Approximate U Vᵀ of each matrix U S Vᵀ of [N, rows, columns], by Newton-Schulz iterations of the fifth order.

    Each multiplies X by a + b G + c G², where G = X Xᵀ. These factors are polynomials of the first G, so they are found and
    multiplied as squares of the shorter side, and meet X once (Zhang, Amsel, Chen and Dao 2026, "Gram Newton-Schulz"). Half
    the time for a ResNet-18 in fp32, as exact; in bf16 some 2 % off in place of 1 %, too little for the restart that they make.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1e-7)
    gram = torch.bmm(x, x.mT)  # not @, which copies a transposed matrix that is a batch by itself
    factor = product = _factor(gram)
    for _ in range(STEPS - 1):
        gram = torch.bmm(torch.bmm(factor, gram), factor)
        factor = _factor(gram)
        product = torch.bmm(factor, product)
    x = torch.bmm(product, x)
    return x if wide else x.mT


def _factor(gram: Tensor) -> Tensor:
    a, b, c = QUINTIC
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor
