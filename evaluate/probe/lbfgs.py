"""L-BFGS (Liu and Nocedal, 1989) for many independent convex functions at once, as one batched computation."""

from collections.abc import Callable, Sequence

import torch


HISTORY, HALVINGS, ARMIJO = 10, 20, 1e-4  # of L-BFGS and its line search
TOLERANCE, ROUNDING = 1e-5, 1e-7  # of gradients; of values in float32


def minimise(
    objective: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], start: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    Minimise independent convex functions at once by L-BFGS, each with a step of its own.

    Args:
        objective: Variables (L, V, G, C) -> values (L, G) and gradients (L, V, G, C).
        start: (L, V, G, C).
        iterations: At most; all stop when the largest gradient is below TOLERANCE.

    Returns:
        The variables, and the values of each iteration.
    """
    x, (value, gradient), pairs, losses = start, objective(start), [], []
    for _ in range(iterations):
        if gradient.abs().max() < TOLERANCE:
            break
        direction = -_inverse_hessian(gradient, pairs)
        slope = _dot(direction, gradient)
        is_active = (slope < 0) & (gradient.abs().amax((1, 3)) >= TOLERANCE)  # a function at its minimum stays
        step = is_active.to(x.dtype)[:, None, :, None]
        for _ in range(HALVINGS):
            new_value, new_gradient = objective(x + step * direction)
            enough = (new_value <= value + ARMIJO * step[:, 0, :, 0] * slope + ROUNDING * value.abs())[:, None, :, None]
            if enough.all():
                break
            step = torch.where(enough, step, step / 2)
        enough &= is_active[:, None, :, None]
        change = torch.where(enough, step * direction, 0.0)
        difference = torch.where(enough, new_gradient - gradient, 0.0)
        x, value = x + change, torch.where(enough[:, 0, :, 0], new_value, value)
        gradient = gradient + difference
        losses.append(value)
        if not change.any():
            break
        pairs = [*pairs[-HISTORY + 1 :], (change, difference)]
    return x, losses


def _inverse_hessian(gradient: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the product of the gradient and the inverse Hessian that changes and differences of gradients imply."""
    kept, result = [], gradient
    for change, difference in reversed(pairs):
        curvature = _dot(change, difference)
        inverse = torch.where(curvature > 0, 1 / curvature, 0.0)
        alpha = inverse * _dot(change, result)
        result = result - alpha[:, None, :, None] * difference
        kept.append((change, difference, inverse, alpha))
    if pairs:
        change, difference, inverse, _ = kept[0]
        ratio = _dot(change, difference) / _dot(difference, difference)
        result = result * torch.where(inverse > 0, ratio, 1.0)[:, None, :, None]
    for change, difference, inverse, alpha in reversed(kept):
        result = result + (alpha - inverse * _dot(difference, result))[:, None, :, None] * change
    return result


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first * second).sum((1, 3))
