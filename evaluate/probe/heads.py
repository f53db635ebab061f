"""
Heads on frozen features: a 2-layer MLP (the paper's recognition protocol), logistic regression, nearest neighbours.

All heads of a grid, such as layers x learning rates x weight decays, train at once as one batched computation: they
see the same images in the same order and do not depend on each other. The best is chosen on a split of the training
set, and is trained again on all of it.

Shapes: L layers, G heads for each, N images, B images of a batch, D features, H hidden units, C classes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .lbfgs import minimise


KINDS = ("mlp", "linear", "knn", "whitened_knn")
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam
MIN_STD = 1e-6
STEPS = 64  # of an epoch, at least, where the batch size is not given
ROWS = 1024  # images that are classified at a time, at most
SIMILARITIES = 1 << 28  # to neighbours, in memory at a time
LEAST_VARIANCE = 1e-3  # of a whitened direction, relative to the largest: of smaller ones most is noise

Predict = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]
Transform = Callable[[torch.Tensor], torch.Tensor]  # of features (N, D)


@dataclass(frozen=True)
class HeadOptions:
    """What the paper leaves open, with defaults of this package."""

    epochs: int = 10
    hidden: int | None = None  # units of the MLP; None for the width of the features
    batch_size: int | None = None  # None for 256, or fewer so that an epoch has 64 steps
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    weight_decays: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0)
    strengths: tuple[float, ...] = (0.001, 0.01, 0.1, 1, 10, 100, 1000)  # C of logistic regression
    iterations: int = 200  # of L-BFGS
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
        ValueError: There are too few images for a split, or for the neighbours.
    """
    fit, split = split_of(len(labels), options)
    find = {"mlp": _fit_mlp, "linear": _fit_linear}.get(kind, partial(_fit_neighbours, kind))
    return find(features, labels.to(features.device), classes, options, fit, split)


def split_of(images: int, options: HeadOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the images to train on, and of those to choose on, drawn at random."""
    held_out = max(1, round(images * options.split))
    if images <= held_out:
        raise ValueError(f"expected at least 2 training images, got {images}")
    order = torch.randperm(images, generator=torch.Generator().manual_seed(options.seed))
    return order[held_out:].sort().values, order[:held_out].sort().values


def _fit_mlp(
    features: torch.Tensor, labels: torch.Tensor, classes: int, options: HeadOptions, fit: torch.Tensor,
    split: torch.Tensor,
) -> list[FittedHead]:  # fmt: skip
    grid = [(rate, decay) for rate in options.learning_rates for decay in options.weight_decays]
    trial = MLPs(features, classes, grid, options)
    accuracies: list[torch.Tensor] = []

    def measure() -> None:
        accuracies.append(accuracy(trial.classify(features[:, split]), labels[split]))

    losses = trial.train(features, labels, fit, measure)
    best = accuracies[-1].argmax(1).tolist()
    final = MLPs(features, classes, [[grid[index]] for index in best], options)
    last = final.train(features, labels, torch.arange(len(labels)))[-1]
    if not last.isfinite().all():
        raise ValueError("mlp: the training loss is NaN or infinite: give smaller --learning-rates")
    curves = {"train_loss": torch.stack(losses, -1).tolist(), "split_accuracy": torch.stack(accuracies, -1).tolist()}
    names = [{"learning_rate": rate, "weight_decay": decay} for rate, decay in grid]
    return [
        _fitted("mlp", layer, index, names, accuracies[-1][layer], final.predictor(layer),
                {name: values[layer][index] for name, values in curves.items()})
        for layer, index in enumerate(best)
    ]  # fmt: skip


def _fitted(
    kind: str, layer: int, best: int, candidates: list[dict[str, float]], accuracies: torch.Tensor, predict: Predict,
    curves: dict[str, list[float]],
) -> FittedHead:  # fmt: skip
    values = accuracies.tolist()
    listed = [{**one, "split_accuracy": value} for one, value in zip(candidates, values, strict=True)]
    return FittedHead(kind, layer, candidates[best], values[best], listed, curves, predict)


class MLPs:
    """
    G 2-layer MLPs on each of L layers, trained as one batched computation.

    Args:
        features: (L, N, D); for the shapes and the device.
        classes: C.
        candidates: G pairs of learning rate and weight decay, or L lists of G pairs.
        options: Epochs, hidden units, batch size, seed.
    """

    def __init__(self, features: torch.Tensor, classes: int, candidates: Sequence[Any], options: HeadOptions):
        self.options, self.device, (layers, _, width) = options, features.device, features.shape
        pairs = torch.tensor(candidates, dtype=torch.float32, device=self.device).expand(layers, -1, -1)  # (L, G, 2)
        self.rates, self.decays = pairs[..., 0, None, None], pairs[..., 1, None, None]
        hidden, generator = options.hidden or width, torch.Generator().manual_seed(options.seed)
        self.parameters: list[torch.Tensor] = []
        for inputs, outputs in ((width, hidden), (hidden, classes)):
            for rows in (inputs, 1):  # weight, bias; as nn.Linear begins
                values = torch.empty(rows, outputs)
                nn.init.uniform_(values, -1 / inputs**0.5, 1 / inputs**0.5, generator=generator)
                repeated = values.to(self.device).expand(*pairs.shape[:2], rows, outputs)
                self.parameters.append(repeated.clone().requires_grad_())

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (L, G, B, C) for features (L, B, D)."""
        first, bias, second, last_bias = self.parameters
        x = (features.to(self.device) - self.mean) / self.std
        hidden = torch.matmul(x[:, None], first) + bias
        return torch.matmul(F.gelu(hidden), second) + last_bias

    def train(
        self, features: torch.Tensor, labels: torch.Tensor, chosen: torch.Tensor,
        after_epoch: Callable[[], None] = lambda: None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """Train on the chosen images; return the mean loss (L, G) of each epoch."""
        self.mean, self.std = _statistics(features, chosen)
        batch = self.options.batch_of(len(chosen))
        steps = self.options.epochs * math.ceil(len(chosen) / batch)
        state = [torch.zeros(3, *one.shape, device=self.device) for one in self.parameters]
        generator, step, losses = torch.Generator().manual_seed(self.options.seed), 0, []
        for _ in range(self.options.epochs):
            total = torch.zeros(self.rates.shape[:2], device=self.device)
            order = chosen[torch.randperm(len(chosen), generator=generator)].to(self.device)
            for rows in order.split(batch):
                loss = self._loss(features[:, rows], labels[rows])
                gradients = torch.autograd.grad(loss.sum(), self.parameters)
                decline = (1 + math.cos(math.pi * step / steps)) / 2
                step += 1
                self._update(gradients, state, step, decline)
                total += loss.detach() * len(rows)
            losses.append(total / len(chosen))
            after_epoch()
        return losses

    def _loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy (L, G) over a batch."""
        logits = self.logits(features)
        targets = labels.expand(logits.shape[:-1])
        return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(targets.shape).mean(-1)

    @torch.no_grad()
    def _update(
        self, gradients: Sequence[torch.Tensor], state: Sequence[torch.Tensor], step: int,
        decline: float,
    ) -> None:  # fmt: skip
        """Take a step of AdamW (Loshchilov and Hutter, 2019), with the learning rate and weight decay of each head."""
        bias = math.sqrt(1 - BETAS[1] ** step)
        rates, kept = self.rates * (decline * bias / (1 - BETAS[0] ** step)), 1 - self.rates * decline * self.decays
        for parameter, gradient, (mean, square, change) in zip(self.parameters, gradients, state, strict=True):
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            torch.sqrt(square, out=change).add_(EPSILON * bias)
            torch.div(mean, change, out=change)
            parameter.mul_(kept).addcmul_(change, rates, value=-1)

    @torch.no_grad()
    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Return the classes (L, G, N) of features (L, N, D)."""
        return torch.cat([self.logits(part).argmax(-1) for part in features.split(ROWS, 1)], -1)

    def predictor(self, layer: int) -> Predict:
        """Return what predicts with the first MLP of a layer."""
        first, bias, second, last_bias = (one[layer, 0].detach() for one in self.parameters)
        mean, std = self.mean[layer], self.std[layer]

        def scores(part: torch.Tensor) -> torch.Tensor:
            x = (part.to(self.device) - mean) / std
            return F.gelu(x @ first + bias) @ second + last_bias

        return _by_scores(scores)


def _statistics(features: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (L, 1, D) of the chosen images."""
    pairs = [torch.std_mean(values[chosen.to(values.device)], 0, correction=0, keepdim=True) for values in features]
    stds, means = (torch.stack(values) for values in zip(*pairs, strict=True))
    return means, stds.clamp(min=MIN_STD)


def _second_moments(parts: Iterable[torch.Tensor], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return the sum (D, D) of x x^T over standardised features x in parts (n, D), in float64 on the CPU."""
    total: torch.Tensor | float = 0.0
    for part in parts:
        x = ((part - mean) / std).double()
        total = total + (x.T @ x).cpu()
    return total


def _by_scores(scores: Callable[[torch.Tensor], torch.Tensor], rows: int = ROWS) -> Predict:
    """Return what predicts the allowed class with the highest of the scores (B, C), on the CPU."""

    @torch.no_grad()
    def predict(features: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        parts = [scores(part).cpu() for part in features.split(rows)]
        if allowed is None:
            return torch.cat([part.argmax(-1) for part in parts])
        return torch.cat([allowed[part[:, allowed].argmax(-1)] for part in parts])

    return predict


# Linear classifiers


def _fit_linear(
    features: torch.Tensor, labels: torch.Tensor, classes: int, options: HeadOptions, fit: torch.Tensor,
    split: torch.Tensor,
) -> list[FittedHead]:  # fmt: skip
    grid = options.strengths
    trial = LogisticRegressions(features, classes, grid, fit)
    trial.solve(features, labels, fit, options.iterations)
    accuracies = accuracy(trial.classify(features[:, split]), labels[split])
    best, every = accuracies.argmax(1).tolist(), torch.arange(len(labels))
    final = LogisticRegressions(features, classes, [[grid[index]] for index in best], every)
    losses = final.solve(features, labels, every, options.iterations)
    names = [{"strength": strength} for strength in grid]
    return [
        _fitted("linear", layer, index, names, accuracies[layer], final.predictor(layer),
                {"train_loss": [loss[layer, 0].item() for loss in losses]})
        for layer, index in enumerate(best)
    ]  # fmt: skip


class LogisticRegressions:
    """
    G multinomial logistic regressions on each of L layers, solved at once by L-BFGS (Liu and Nocedal, 1989).

    Each minimises mean cross entropy + |w|^2 / (2 C N), with strength C as scikit-learn defines it, on standardised
    features. The variables are the weights in the basis of principal components, each divided by the square root of the
    loss's expected curvature: features of vision encoders are so correlated that other variables converge slowly.

    Args:
        features: (L, N, D).
        classes: Number of classes.
        strengths: G values of C, or L lists of G values.
        chosen: Numbers of the images to fit.
    """

    def __init__(self, features: torch.Tensor, classes: int, strengths: Sequence[Any], chosen: torch.Tensor):
        self.device = features.device
        self.dtype = torch.float64 if self.device.type == "cpu" else torch.float32  # GPUs may have few float64 units
        strength = torch.tensor(strengths, dtype=self.dtype, device=self.device).expand(len(features), -1)
        self.penalty = (1 / (strength * len(chosen)))[:, None, :, None]  # (L, 1, G, 1)
        self.mean, self.std = (values.to(self.dtype) for values in _statistics(features, chosen))
        eigen = [torch.linalg.eigh(self._covariance(layer, values, chosen)) for layer, values in enumerate(features)]
        self.basis = torch.stack([vectors for _, vectors in eigen]).to(self.device, self.dtype)  # (L, D, D)
        values = torch.stack([values for values, _ in eigen]).to(self.device, self.dtype)[..., None, None]
        curvature = (1 - 1 / classes) / classes  # of the loss where all classes are equally likely
        self.scale = (values.clamp(min=0) * curvature + self.penalty).sqrt()  # (L, D, G, 1)
        self.weights = self.scale.new_zeros(*self.scale.shape[:3], classes)  # (L, D, G, C)
        self.bias = self.scale.new_zeros(len(features), 1, self.scale.shape[2], classes)

    def _covariance(self, layer: int, values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        parts = (values[rows.to(values.device)] for rows in chosen.split(ROWS))
        return _second_moments(parts, self.mean[layer], self.std[layer]) / len(chosen)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (L, B, G, C) for features (L, B, D)."""
        x = (features - self.mean) / self.std
        return torch.bmm(x, self.weights.flatten(2)).unflatten(2, self.bias.shape[2:]) + self.bias

    @torch.no_grad()
    def solve(
        self, features: torch.Tensor, labels: torch.Tensor, chosen: torch.Tensor, iterations: int
    ) -> list[torch.Tensor]:
        """Minimise; return the objective (L, G) of each iteration."""
        rows = chosen.to(self.device)

        def objective(variables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self._set(variables)
            return self._objective(features, labels, rows)

        start = torch.cat([self.weights, self.bias], 1)
        variables, losses = minimise(objective, torch.zeros_like(start), iterations)
        self._set(variables)
        return losses

    def _set(self, variables: torch.Tensor) -> None:
        """Set weights and bias from variables (L, D + 1, G, C)."""
        self.components = variables[:, :-1] / self.scale
        self.weights = torch.bmm(self.basis, self.components.flatten(2)).view_as(self.weights)
        self.bias = variables[:, -1:]

    def _objective(
        self, features: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the objective (L, G) and its gradient (L, D + 1, G, C)."""
        loss, gradient, bias_gradient = 0, torch.zeros_like(self.weights), torch.zeros_like(self.bias)
        for part in rows.split(ROWS):
            x = (features[:, part] - self.mean) / self.std
            logits = torch.bmm(x, self.weights.flatten(2)).unflatten(2, self.bias.shape[2:]) + self.bias
            logarithms = logits.log_softmax(-1)
            targets = labels[part][None, :, None, None].expand(*logits.shape[:3], 1)
            loss = loss - logarithms.gather(-1, targets)[..., 0].sum(1)
            error = logarithms.exp_().scatter_add_(-1, targets, -torch.ones_like(targets, dtype=logits.dtype))
            gradient += torch.bmm(x.mT, error.flatten(2)).view_as(gradient)
            bias_gradient += error.sum(1, keepdim=True)
        rotated = torch.bmm(self.basis.mT, gradient.flatten(2)).view_as(gradient) / len(rows)
        total = loss / len(rows) + (self.penalty * self.components.square()).sum((1, 3)) / 2
        by_component = (rotated + self.penalty * self.components) / self.scale
        return total, torch.cat([by_component, bias_gradient / len(rows)], 1)

    @torch.no_grad()
    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Return the classes (L, G, N) of features (L, N, D)."""
        return torch.cat([self.logits(part).argmax(-1) for part in features.split(ROWS, 1)], 1).movedim(1, 2)

    def predictor(self, layer: int) -> Predict:
        """Return what predicts with the first classifier of a layer."""
        mean, std, weights, bias = self.mean[layer], self.std[layer], self.weights[layer, :, 0], self.bias[layer, :, 0]
        return _by_scores(lambda part: ((part.to(self.device) - mean) / std) @ weights + bias)


# Nearest neighbours


def limit_neighbours(options: HeadOptions, images: int) -> HeadOptions:
    """
    Return options whose numbers of neighbours are possible with so many training images.

    Raises:
        ValueError: None of them is.
    """
    known = len(split_of(images, options)[0])
    counts = tuple(count for count in options.neighbours if count <= known)
    if not counts:
        raise ValueError(
            f"--neighbours: expected a number up to {known}, the training images without the split, got "
            f"{_listed(options.neighbours)}"
        )
    return replace(options, neighbours=counts)


def _fit_neighbours(
    kind: str, features: torch.Tensor, labels: torch.Tensor, classes: int, options: HeadOptions, fit: torch.Tensor,
    split: torch.Tensor,
) -> list[FittedHead]:  # fmt: skip
    heads, counts = [], options.neighbours
    if max(counts) > len(fit):
        raise ValueError(
            f"--neighbours: expected up to {len(fit)}, the readable training images, got {_listed(counts)}"
        )
    prepare = whitening if kind == "whitened_knn" else lambda known: lambda values: values
    for layer, values in enumerate(features):
        known = _Neighbours(values[fit], labels[fit], classes, options.temperature, prepare(values[fit]))
        trials = [known.predictor(count) for count in counts]
        accuracies = torch.stack([accuracy(trial(values[split], None), labels[split].cpu()) for trial in trials])
        best = int(accuracies.argmax())
        predict = _Neighbours(values, labels, classes, options.temperature, prepare(values)).predictor(counts[best])
        names = [{"neighbours": count} for count in counts]
        heads.append(_fitted(kind, layer, best, names, accuracies, predict, {}))
    return heads


class _Neighbours:
    """
    Votes of the nearest images in cosine similarity s of transformed features, each weighted by exp(s / temperature),
    as in DINO (Caron et al., 2021).
    """

    def __init__(
        self, known: torch.Tensor, labels: torch.Tensor, classes: int, temperature: float, transform: Transform
    ):
        self.labels, self.classes, self.temperature, self.transform = labels, classes, temperature, transform
        self.keys = torch.empty_like(known)
        for part, keys in zip(known.split(ROWS), self.keys.split(ROWS), strict=True):  # one copy in memory
            keys.copy_(F.normalize(transform(part), dim=-1))

    def predictor(self, count: int) -> Predict:
        """Return what predicts with so many neighbours."""

        def votes(part: torch.Tensor) -> torch.Tensor:
            queries = F.normalize(self.transform(part.to(self.keys.device)), dim=-1)
            similarity, nearest = (queries @ self.keys.T).topk(count)
            weights = ((similarity - 1) / self.temperature).exp()
            empty = torch.zeros(len(part), self.classes, device=self.keys.device)
            return empty.scatter_add_(1, self.labels[nearest], weights)

        return _by_scores(votes, max(1, min(ROWS, SIMILARITIES // len(self.keys))))


def whitening(known: torch.Tensor) -> Transform:
    """
    Return what centres features and scales their principal components to variance 1, those of features (N, D).

    Eigenvalues of the covariance below LEAST_VARIANCE of the largest are raised to that.
    """
    mean = known.mean(0, dtype=torch.float64).to(known.dtype)
    values, vectors = torch.linalg.eigh(_second_moments(known.split(ROWS), mean, torch.ones_like(mean)) / len(known))
    scales = values.clamp(min=LEAST_VARIANCE * values[-1].clamp(min=MIN_STD**2)).sqrt()
    matrix = (vectors / scales).to(known.device, known.dtype)
    return lambda features: (features - mean) @ matrix


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the share of right predictions (..., N), in float64."""
    return (predicted == labels).double().mean(-1)


def describe_options(options: HeadOptions, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the options as they stand in results.json, and in words for the caption of a table."""
    votes = f"votes at temperature {options.temperature}, k of {_listed(options.neighbours)}."
    usual = f"256 (fewer where an epoch would have fewer than {STEPS} steps)"
    parts = {
        "mlp": f"mlp: 2 layers, {options.hidden or 'as many hidden units as features'}, GELU; {options.epochs} epochs "
        f"of AdamW (betas {BETAS[0]}, {BETAS[1]}), cosine decay to 0 without warm-up, "
        f"batch {options.batch_size or usual}, learning rate of {_listed(options.learning_rates)}, "
        f"weight decay of {_listed(options.weight_decays)}.",
        "linear": f"linear: logistic regression, C of {_listed(options.strengths)}, at most {options.iterations} "
        "iterations of L-BFGS.",
        "knn": f"knn: cosine similarity, {votes}",
        "whitened_knn": "whitened_knn: cosine similarity of features whitened by the covariance of the training set "
        f"(eigenvalues at least {LEAST_VARIANCE:g} of the largest), {votes}",
    }
    standardised = (
        "Features standardised by the training set, no augmentation. " if {*kinds} & {"mlp", "linear"} else ""
    )
    chosen = f"Chosen on {options.split:.0%} of the training set, then trained on all of it; seed {options.seed}."
    return {**asdict(options), "caption": " ".join([*(parts[kind] for kind in kinds), standardised + chosen])}


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
