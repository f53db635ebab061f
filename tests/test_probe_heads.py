"""The heads of the probe compared with torch and scikit-learn, and its statistics with direct computation."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

from sailvit.evaluate.probe import heads as heads_module
from sailvit.evaluate.probe.heads import (
    KINDS,
    LEAST_VARIANCE,
    HeadOptions,
    LogisticRegressions,
    MLPs,
    fit_heads,
    split_of,
    whitening,
)
from sailvit.evaluate.statistics import compare_paired, wilson_interval


TRAIN = 700


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of all digits, as those of encoders are, and their classes."""
    loaded = load_digits()
    mixed = torch.tensor(loaded.data, dtype=torch.float32) @ torch.randn(
        64, 40, generator=torch.Generator().manual_seed(0)
    )
    return torch.cat([mixed, mixed.relu(), mixed[:, :8] * 1e-3], 1), torch.tensor(loaded.target)


def test_the_linear_head_agrees_with_scikit_learn(digits):
    features, labels = digits
    head = fit_heads("linear", features[None, :TRAIN], labels[:TRAIN], 10, HeadOptions(strengths=(0.01, 0.1, 1.0)))[0]
    scaler = StandardScaler().fit(features[:TRAIN])
    theirs = LogisticRegression(C=head.chosen["strength"], max_iter=5000, tol=1e-8)
    theirs.fit(scaler.transform(features[:TRAIN]), labels[:TRAIN])
    expected = theirs.predict(scaler.transform(features[TRAIN:]))
    predicted = head.predict(features[TRAIN:], None).numpy()
    assert abs((predicted == labels[TRAIN:].numpy()).mean() - (expected == labels[TRAIN:].numpy()).mean()) < 0.01
    assert (predicted == expected).mean() > 0.99


def test_logistic_regressions_solved_together_equal_each_alone(digits):
    features, labels = digits
    layers = torch.stack([features[:300, :48], features[:300, :48].sin()])
    every, strengths = torch.arange(300), (1e-4, 0.01, 1.0)
    together = LogisticRegressions(layers, 10, strengths, every)
    values = together.solve(layers, labels[:300], every, 200)[-1]
    for layer in range(2):
        for index, strength in enumerate(strengths):
            one = LogisticRegressions(layers[layer : layer + 1], 10, [strength], every)
            alone = one.solve(layers[layer : layer + 1], labels[:300], every, 200)[-1]
            torch.testing.assert_close(values[layer, index], alone[0, 0], rtol=1e-3, atol=1e-6)
            agree = together.classify(layers)[layer, index] == one.classify(layers[layer : layer + 1])[0, 0]
            assert agree.all()


def test_mlps_trained_together_equal_each_alone(digits):
    features, labels = digits
    layers = torch.stack([features[:640], features[:640].sin()])
    options, every = HeadOptions(epochs=2, hidden=24), torch.arange(640)
    grid = [(rate, decay) for rate in (1e-4, 1e-3, 1e-2, 3e-2) for decay in (0.0, 0.01, 0.1, 1.0, 10.0)]
    together = MLPs(layers, 10, grid, options)
    together.train(layers, labels[:640], every)
    predicted = together.classify(torch.stack([features, features.sin()]))
    for layer, index in ((0, 0), (1, 7), (0, 13), (1, 19)):
        alone = MLPs(layers[layer : layer + 1], 10, [grid[index]], options)
        alone.train(layers[layer : layer + 1], labels[:640], every)
        values = features.sin() if layer else features
        assert torch.equal(alone.classify(values[None])[0, 0], predicted[layer, index])


def test_an_mlp_trains_as_torchs_own(digits):
    features, labels = digits[0][:256], digits[1][:256]
    options, rate, decay = HeadOptions(epochs=2, hidden=16, batch_size=60), 3e-3, 0.1
    ours = MLPs(features[None], 10, [(1e-4, 0.0), (rate, decay)], options)
    theirs = nn.Sequential(nn.Linear(88, 16), nn.GELU(), nn.Linear(16, 10))
    with torch.no_grad():
        for parameter, value in zip(theirs.parameters(), ours.parameters, strict=True):
            parameter.copy_(value[0, 1].T if parameter.ndim == 2 else value[0, 1, 0])
    ours.train(features[None], labels, torch.arange(256))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / 10)) / 2)
    generator = torch.Generator().manual_seed(options.seed)
    scaled = (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-6)
    for _ in range(2):
        for rows in torch.randperm(256, generator=generator).split(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(scaled[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(ours.logits(features[None])[0, 1], theirs(scaled), rtol=1e-3, atol=1e-4)


def test_nearest_neighbours_are_scikit_learns(digits):
    features, labels = digits
    head = fit_heads("knn", features[None, :TRAIN], labels[:TRAIN], 10, HeadOptions(neighbours=(10,)))[0]
    theirs = KNeighborsClassifier(
        10, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.07)
    ).fit(features[:TRAIN], labels[:TRAIN])
    assert (head.predict(features[TRAIN:], None).numpy() == theirs.predict(features[TRAIN:])).mean() > 0.998


def test_whitened_neighbours_are_those_of_scikit_learns_principal_components(digits):
    features, labels = digits
    features = features[:, :30] + 40 * features[:, :1].sign() * torch.linspace(0, 1, 30)  # one direction above all
    head = fit_heads("whitened_knn", features[None, :TRAIN], labels[:TRAIN], 10, HeadOptions(neighbours=(10,)))[0]
    pca = PCA(whiten=True, svd_solver="full").fit(features[:TRAIN].double())
    assert pca.explained_variance_.min() > LEAST_VARIANCE * pca.explained_variance_.max()
    theirs = KNeighborsClassifier(
        10, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.07)
    ).fit(pca.transform(features[:TRAIN].double()), labels[:TRAIN])
    expected = theirs.predict(pca.transform(features[TRAIN:].double()))
    predicted = head.predict(features[TRAIN:], None).numpy()
    assert (predicted == expected).mean() > 0.998 and head.kind == "whitened_knn"
    plain = fit_heads("knn", features[None, :TRAIN], labels[:TRAIN], 10, HeadOptions(neighbours=(10,)))[0]
    assert (plain.predict(features[TRAIN:], None).numpy() == expected).mean() < 0.95


def test_whitening_does_not_scale_up_what_does_not_vary(digits):
    """Fewer images than features, and features that are constant."""
    features = torch.cat([digits[0][:40], torch.ones(40, 3)], 1)
    white = whitening(features)(features)
    largest = torch.cov(features.T.double(), correction=0).svd().S[0].sqrt()
    assert torch.allclose(white.mean(0), torch.zeros(91), atol=1e-3) and white.std(0).max() < 1.02
    assert whitening(features)(features + 1)[:, 0].abs().max() < 91 / (LEAST_VARIANCE**0.5 * largest)
    assert whitening(torch.ones(5, 4))(torch.ones(5, 4)).isfinite().all()


def test_more_neighbours_than_training_images_are_refused(digits):
    with pytest.raises(ValueError, match="expected up to 18, the readable training images, got 1, 19"):
        fit_heads("knn", digits[0][None, :20], digits[1][:20], 10, HeadOptions(neighbours=(1, 19)))


def test_neighbours_do_not_depend_on_how_many_similarities_fit_in_memory(digits, monkeypatch):
    features, labels = digits
    words = "knn", features[None, :TRAIN], labels[:TRAIN], 10
    expected = fit_heads(*words)[0].predict(features[TRAIN:], None)
    monkeypatch.setattr(heads_module, "SIMILARITIES", 7 * TRAIN)
    sizes: list[int] = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, count: (sizes.append(self.numel()), topk(self, count))[1])
    assert torch.equal(fit_heads(*words)[0].predict(features[TRAIN:], None), expected)
    assert max(sizes) <= 7 * TRAIN


def test_heads_are_chosen_on_the_split_and_trained_on_all(digits):
    features, labels = digits[0][:400], digits[1][:400]
    features, options = features[:, :48], HeadOptions(strengths=(1e-6, 1.0))
    head = fit_heads("linear", features[None], labels, 10, options)[0]
    fit, split = split_of(400, options)
    assert len(split) == 40 and sorted([*fit.tolist(), *split.tolist()]) == [*range(400)]
    accuracies = []
    for strength in options.strengths:
        trial = LogisticRegressions(features[None], 10, [strength], fit)
        trial.solve(features[None], labels, fit, 200)
        accuracies.append((trial.classify(features[None, split])[0, 0] == labels[split]).double().mean().item())
    assert [one["split_accuracy"] for one in head.candidates] == pytest.approx(accuracies)
    assert head.chosen == {"strength": 1.0} and head.split_accuracy == pytest.approx(max(accuracies))
    final = LogisticRegressions(features[None], 10, [1.0], torch.arange(400))
    final.solve(features[None], labels, torch.arange(400), 200)
    assert torch.equal(head.predict(features, None), final.classify(features[None])[0, 0])


def test_a_head_can_choose_among_some_classes(digits):
    features, labels = digits[0][:400], digits[1][:400]
    for kind in KINDS:
        head = fit_heads(
            kind,
            features[None],
            labels,
            10,
            HeadOptions(epochs=1, iterations=20, strengths=(1.0,), weight_decays=(0.0,)),
        )[0]
        allowed = torch.tensor([2, 5, 7])
        free, limited = head.predict(features, None), head.predict(features, allowed)
        assert {*limited.tolist()} <= {2, 5, 7} and {*free.tolist()} > {2, 5, 7}
        kept = torch.isin(free, allowed)
        assert torch.equal(free[kept], limited[kept])


def test_a_diverged_head_is_not_chosen(digits):
    features, labels = digits[0][:400], digits[1][:400]
    head = fit_heads(
        "mlp", features[None], labels, 10, HeadOptions(epochs=2, learning_rates=(1e30, 1e-3), weight_decays=(0.0,))
    )[0]
    assert head.chosen["learning_rate"] == 1e-3


def test_wilsons_interval_is_that_of_its_formula():
    low, high = wilson_interval(41, 60)
    z, share = norm.ppf(0.975), 41 / 60
    middle, half = share + z**2 / 120, z * math.sqrt(share * (1 - share) / 60 + z**2 / 14400)
    assert (low, high) == pytest.approx(((middle - half) / (1 + z**2 / 60), (middle + half) / (1 + z**2 / 60)))


def test_a_comparison_is_mcnemars_test_and_a_paired_bootstrap():
    generator = np.random.default_rng(0)
    first, second = generator.random(400) < 0.7, generator.random(400) < 0.78
    found = compare_paired(first, second)
    discordant = found.only_first + found.only_second
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert found.p_value == pytest.approx(
        min(1, 2 * binom.cdf(min(found.only_first, found.only_second), discordant, 0.5))
    )
    draws = generator.integers(400, size=(4000, 400))
    differences = second[draws].mean(1) - first[draws].mean(1)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=0.006)
