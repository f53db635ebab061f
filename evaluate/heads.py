"""
Heads on frozen features: a 2-layer MLP (the paper's recognition protocol), a linear classifier, nearest neighbours.

All heads of a grid of layers, learning rates and weight decays train at once, as one batched computation: they see the
same images in the same order and do not depend on each other. The best is chosen on a split of the training set, and is
trained again on all of it.

Shapes: L layers, G heads for each, N images, B images of a batch, D features, H hidden units, C classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


KINDS = ("mlp", "linear", "knn")
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam
MIN_STD = 1e-6
STEPS = 64  # of an epoch, at least, where the batch size is not given
ROWS = 1024  # images that are classified at a time

Predict = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]


@dataclass(frozen=True)
class HeadOptions:
    """What the paper leaves open, with defaults of this package."""

    epochs: int = 10
    hidden: int | None = None  # units of the MLP; None for the width of the features
    batch_size: int | None = None  # None for 256, or fewer so that an epoch has 64 steps
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    weight_decays: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0)
    neighbours: tuple[int, ...] = (1, 5, 10, 20)
    temperature: float = 0.07  # of the votes of neighbours
    split: float = 0.1  # of the training set, to choose on
    seed: int = 0

    def batch_of(self, images: int) -> int:
        return self.batch_size or max(1, min(256, images // STEPS))


@dataclass
class FittedHead:
    """The best head on one layer, trained on the whole training set."""

    kind: str
    layer: int  # position among the layers of the features
    chosen: dict[str, float]
    split_accuracy: float  # on which it was chosen
    candidates: list[dict[str, float]]  # all of the grid, with their accuracies on the split
    curves: dict[str, list[float]]  # by epoch, of the chosen candidate
    predict: Predict = field(repr=False)  # features (N, D), numbers of the classes to choose among or None -> (N,)


def fit_heads(
    kind: str, features: torch.Tensor, labels: torch.Tensor, classes: int, options: HeadOptions = HeadOptions()
) -> list[FittedHead]:
    """
    Return the best head for each layer.

    Args:
        kind: One of KINDS.
        features: (L, N, D), on the device to train on.
        labels: (N,), from 0.
        classes: Number of classes, C.

    Raises:
        ValueError: There are too few images for a split.
    """
    fit, split = split_of(len(labels), options)
    find = _fit_neighbours if kind == "knn" else _fit_trained
    return find(kind, features, labels.to(features.device), classes, options, fit, split)


def split_of(images: int, options: HeadOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the images to train on, and of those to choose on, drawn at random."""
    held_out = max(1, round(images * options.split))
    if images <= held_out:
        raise ValueError(f"expected at least 2 training images, got {images}")
    order = torch.randperm(images, generator=torch.Generator().manual_seed(options.seed))
    return order[held_out:].sort().values, order[:held_out].sort().values


def _fit_trained(
    kind: str, features: torch.Tensor, labels: torch.Tensor, classes: int, options: HeadOptions, fit: torch.Tensor,
    split: torch.Tensor,
) -> list[FittedHead]:  # fmt: skip
    grid = [(rate, decay) for rate in options.learning_rates for decay in options.weight_decays]
    trial = Heads(kind, features, classes, [grid] * len(features), options)
    accuracies: list[torch.Tensor] = []

    def measure() -> None:
        accuracies.append((trial.classify(features[:, split]) == labels[split]).double().mean(-1))

    losses = trial.train(features, labels, fit, measure)
    best = accuracies[-1].argmax(1).tolist()
    final = Heads(kind, features, classes, [[grid[index]] for index in best], options)
    final.train(features, labels, torch.arange(len(labels)))
    return [
        FittedHead(
            kind,
            layer,
            dict(zip(("learning_rate", "weight_decay"), grid[index], strict=True)),
            accuracies[-1][layer, index].item(),
            [
                {"learning_rate": rate, "weight_decay": decay, "split_accuracy": accuracy}
                for (rate, decay), accuracy in zip(grid, accuracies[-1][layer].tolist(), strict=True)
            ],
            {
                "train_loss": [epoch[layer, index].item() for epoch in losses],
                "split_accuracy": [epoch[layer, index].item() for epoch in accuracies],
            },
            final.predictor(layer),
        )
        for layer, index in enumerate(best)
    ]


class Heads:
    """
    G heads on each of L layers, as one batched computation.

    Args:
        kind: "linear" or "mlp".
        features: (L, N, D); for the shapes and the device.
        classes: C.
        candidates: For each layer, G pairs of learning rate and weight decay.
        options: Epochs, hidden units, batch size, seed.
    """

    def __init__(
        self, kind: str, features: torch.Tensor, classes: int, candidates: Sequence[Sequence[tuple[float, float]]],
        options: HeadOptions,
    ):  # fmt: skip
        self.kind, self.options, self.device = kind, options, features.device
        grid = torch.tensor(candidates, dtype=torch.float32, device=self.device)  # (L, G, 2)
        self.rates, self.decays = grid[..., 0, None, None], grid[..., 1, None, None]
        width, (layers, heads) = features.shape[-1], grid.shape[:2]
        hidden = options.hidden or width
        sizes = [(width, classes)] if kind == "linear" else [(width, hidden), (hidden, classes)]
        generator = torch.Generator().manual_seed(options.seed)
        self.parameters: list[torch.Tensor] = []
        for rows, columns in sizes:
            for size in ((rows, columns), (1, columns)):
                values = _initial(kind, size, rows, generator).to(self.device)
                self.parameters.append(values.expand(layers, heads, *size).clone().requires_grad_())
        self.mean = torch.zeros(layers, 1, width, device=self.device)
        self.std = torch.ones(layers, 1, width, device=self.device)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (L, G, B, C) for features (L, B, D)."""
        weight, bias, *second = self.parameters
        x = torch.einsum("lbd,ldgk->lgbk", (features - self.mean) / self.std, weight.transpose(1, 2)) + bias
        return torch.matmul(F.gelu(x), second[0]) + second[1] if second else x

    def train(
        self, features: torch.Tensor, labels: torch.Tensor, chosen: torch.Tensor,
        after_epoch: Callable[[], None] = lambda: None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """Train on the chosen images; return the mean loss (L, G) of each epoch."""
        self._set_statistics(features, chosen)
        batch = self.options.batch_of(len(chosen))
        steps = self.options.epochs * math.ceil(len(chosen) / batch)
        state = [(torch.zeros_like(one), torch.zeros_like(one)) for one in self.parameters]
        generator, step, losses = torch.Generator().manual_seed(self.options.seed), 0, []
        for _ in range(self.options.epochs):
            total = torch.zeros(self.rates.shape[:2], device=self.device)
            order = chosen[torch.randperm(len(chosen), generator=generator)].to(features.device)
            for rows in order.split(batch):
                loss = self._loss(features[:, rows].to(self.device), labels[rows].to(self.device))
                gradients = torch.autograd.grad(loss.sum(), self.parameters)
                decline = (1 + math.cos(math.pi * step / steps)) / 2
                step += 1
                self._update(gradients, state, step, decline)
                total += loss.detach() * len(rows)
            losses.append(total / len(chosen))
            after_epoch()
        return losses

    def _set_statistics(self, features: torch.Tensor, chosen: torch.Tensor) -> None:
        """Standardise by the training images."""
        for layer, values in enumerate(features):
            std, mean = torch.std_mean(values[chosen.to(features.device)], 0, correction=0)
            self.mean[layer, 0], self.std[layer, 0] = mean, std.clamp(min=MIN_STD)

    def _loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy (L, G) over a batch."""
        logits = self.logits(features)
        targets = labels.expand(logits.shape[:-1])
        return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(targets.shape).mean(-1)

    @torch.no_grad()
    def _update(
        self, gradients: Sequence[torch.Tensor], state: Sequence[tuple[torch.Tensor, torch.Tensor]], step: int,
        decline: float,
    ) -> None:  # fmt: skip
        """Take a step of AdamW (Loshchilov and Hutter, 2019), with the learning rate and weight decay of each head."""
        correction = math.sqrt(1 - BETAS[1] ** step) / (1 - BETAS[0] ** step)
        rates, kept = self.rates * decline * correction, 1 - self.rates * decline * self.decays
        for parameter, gradient, (mean, square) in zip(self.parameters, gradients, state, strict=True):
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            scale = square.sqrt().add_(EPSILON * math.sqrt(1 - BETAS[1] ** step))
            parameter.mul_(kept).sub_(rates * mean / scale)

    @torch.no_grad()
    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Return the classes (L, G, N) of features (L, N, D)."""
        return torch.cat([self.logits(part.to(self.device)).argmax(-1) for part in features.split(ROWS, 1)], -1)

    def predictor(self, layer: int) -> Predict:
        """Return what predicts with the first head of a layer."""
        heads = object.__new__(Heads)
        heads.device, heads.parameters = self.device, [one[layer, :1].detach()[None] for one in self.parameters]
        heads.mean, heads.std = self.mean[layer][None], self.std[layer][None]

        def predict(features: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
            return _choose((heads.logits(part[None].to(heads.device))[0, 0] for part in features.split(ROWS)), allowed)

        return predict


def _initial(kind: str, size: tuple[int, int], inputs: int, generator: torch.Generator) -> torch.Tensor:
    """Return zeros for a linear head, whose loss is convex; else what nn.Linear begins with."""
    if kind == "linear":
        return torch.zeros(size)
    return nn.init.uniform_(torch.empty(size), -1 / inputs**0.5, 1 / inputs**0.5, generator=generator)


@torch.no_grad()
def _choose(scores: Iterator[torch.Tensor], allowed: torch.Tensor | None) -> torch.Tensor:
    """Return the classes (N,) with the highest scores (B, C), of those allowed; on the CPU."""
    if allowed is None:
        return torch.cat([part.argmax(-1) for part in scores]).cpu()
    return torch.cat([allowed[part[:, allowed.to(part.device)].argmax(-1).cpu()] for part in scores])


# Nearest neighbours


def _fit_neighbours(
    kind: str, features: torch.Tensor, labels: torch.Tensor, classes: int, options: HeadOptions, fit: torch.Tensor,
    split: torch.Tensor,
) -> list[FittedHead]:  # fmt: skip
    heads = []
    for layer, values in enumerate(features):
        counts = [count for count in options.neighbours if count <= len(fit)] or [1]
        votes = [_neighbours(values[fit], labels[fit], classes, count, options.temperature) for count in counts]
        accuracies = [(vote(values[split], None) == labels[split].cpu()).double().mean().item() for vote in votes]
        best = max(range(len(counts)), key=accuracies.__getitem__)
        candidates = [
            {"neighbours": count, "split_accuracy": accuracy}
            for count, accuracy in zip(counts, accuracies, strict=True)
        ]
        predict = _neighbours(values, labels, classes, counts[best], options.temperature)
        heads.append(
            FittedHead(kind, layer, {"neighbours": counts[best]}, accuracies[best], candidates, {}, predict)
        )
    return heads


def _neighbours(
    known: torch.Tensor, labels: torch.Tensor, classes: int, count: int, temperature: float
) -> Predict:
    """
    Return a classifier by votes of the nearest images in cosine similarity s, each weighted by exp(s / temperature), as
    in DINO (Caron et al., 2021).
    """
    keys = F.normalize(known, dim=-1)

    def votes(part: torch.Tensor) -> torch.Tensor:
        similarity, nearest = (F.normalize(part.to(keys.device), dim=-1) @ keys.T).topk(count)
        weights = ((similarity - 1) / temperature).exp()
        return torch.zeros(len(part), classes, device=keys.device).scatter_add_(1, labels[nearest], weights)

    def predict(features: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        return _choose((votes(part) for part in features.split(ROWS)), allowed)

    return predict


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    return (predicted == labels).double().mean().item()


def describe_options(options: HeadOptions, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the options as they stand in results.json, and in words for the caption of a table."""
    return {**options.__dict__, "caption": _caption(options, kinds)}


def _caption(options: HeadOptions, kinds: Sequence[str]) -> str:
    batch = options.batch_size or f"256 (fewer where an epoch would have fewer than {STEPS} steps)"
    trained = (
        f"{options.epochs} epochs of AdamW (betas {BETAS[0]}, {BETAS[1]}), cosine decay to 0 without warm-up, batch "
        f"{batch}, features standardised by the training set, no augmentation, learning rate of "
        f"{_listed(options.learning_rates)} and weight decay of {_listed(options.weight_decays)}"
    )
    parts = {
        "mlp": f"mlp: 2 layers, {options.hidden or 'as many hidden units as features'}, GELU; {trained}",
        "linear": "linear: from zero" + ("; trained likewise" if "mlp" in kinds else f"; {trained}"),
        "knn": f"knn: cosine similarity, votes at temperature {options.temperature}, k of {_listed(options.neighbours)}",
    }
    chosen = f"chosen on {options.split:.0%} of the training set, then trained on all of it; seed {options.seed}"
    return ". ".join([*(parts[kind] for kind in kinds), chosen[0].upper() + chosen[1:]]) + "."


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
