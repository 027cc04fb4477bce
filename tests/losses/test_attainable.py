"""How far VCR can lift features: the formula against other ways to compute it and against trained features."""

import math
import time
from typing import Any

import pytest
import torch

from vjvcr_fast.losses import attainable_std, vcr_loss
from vjvcr_fast.losses.attainable import batch_for

PAPER = {"alpha": 0.5, "beta": 0.1}


def by_sampling(s: torch.Tensor, alpha: float, beta: float, n: int, d: int, threshold: float) -> torch.Tensor:
    """What `attainable_std` minimises, at every s, with the hinge's mean over 200,000 deviations of n samples."""
    generator = torch.Generator().manual_seed(0)
    chi = torch.empty(200_000, dtype=torch.float64)
    for part in chi.split(20_000):
        part.copy_(torch.randn(n - 1, len(part), generator=generator).square().sum(dim=0).sqrt())
    r = chi / math.sqrt(n - 1)
    hinge = torch.stack([(threshold - value * r).clamp_min(0).mean() for value in s])
    return alpha * hinge + beta * (d - 1) / (n - 1) * s**4


@pytest.mark.parametrize(
    ("n", "d", "alpha", "beta", "threshold"),
    [(32, 256, 0.5, 0.1, 1.0), (64, 128, 0.5, 0.1, 1.0), (4, 3, 1.0, 0.4, 1.0), (64, 16, 0.5, 0.1, 2.0)],
)
def test_it_is_the_minimum(n: int, d: int, alpha: float, beta: float, threshold: float) -> None:
    found = attainable_std(alpha, beta, n, d, threshold)
    s = torch.linspace(0.5, 1.5, 101, dtype=torch.float64) * found
    assert abs(s[by_sampling(s, alpha, beta, n, d, threshold).argmin()] - found) <= 0.02 * found


@pytest.mark.parametrize(("n", "d", "expected"), [(32, 256, 0.53), (64, 128, 0.85), (256, 512, 0.85)])
def test_values_of_the_presets(n: int, d: int, expected: float) -> None:
    """Where the hinge is on for all features, s^3 = alpha (n - 1) / (4 beta (d - 1)); its own noise takes a little."""
    found, simple = attainable_std(**PAPER, n=n, d=d), (0.5 * (n - 1) / (0.4 * (d - 1))) ** (1 / 3)
    assert found == pytest.approx(expected, abs=0.015)
    assert 0.98 * simple < found < simple


@pytest.mark.parametrize(("n", "d"), [(32, 256), (64, 128)])
def test_free_features_on_fresh_samples_reach_it(n: int, d: int) -> None:
    """h = x W for new normal x in every step: any covariance of h can be had, and nothing but VCR acts on it."""
    generator = torch.Generator().manual_seed(0)
    weight, reached = (0.3 * torch.eye(d)).requires_grad_(), []
    optimizer = torch.optim.SGD([weight], lr=0.01 * d)  # the noise of larger steps correlates the features
    for _ in range(500):
        optimizer.zero_grad()
        vcr_loss(torch.randn(n, d, generator=generator) @ weight, **PAPER).loss.backward()
        optimizer.step()
        reached.append(weight.detach().norm(dim=0).mean().item())
    assert sum(reached[-150:]) / 150 == pytest.approx(attainable_std(**PAPER, n=n, d=d), abs=0.01)


def test_limits() -> None:
    assert attainable_std(0, 0.1, 32, 256) == 0
    assert attainable_std(0.5, 0.1, 32, 256, threshold=0) == 0
    assert attainable_std(0.5, 0, 32, 256) == math.inf
    assert attainable_std(0.5, 0.1, 32, 1) == math.inf
    # With ever more samples the penalty vanishes, and the hinge holds up to its threshold.
    assert attainable_std(**PAPER, n=10**9, d=256) == pytest.approx(1, abs=1e-3)
    found = [attainable_std(**PAPER, n=n, d=256) for n in (2, 3, 8, 32, 150, 10**4)]
    assert found == sorted(found)


def test_weights_count_by_their_ratio_and_the_threshold_is_the_unit() -> None:
    found = attainable_std(**PAPER, n=64, d=128)
    assert attainable_std(5, 1, 64, 128) == pytest.approx(found, rel=1e-12)
    # s -> t s changes the hinge by t and the penalty by t^4.
    assert attainable_std(0.5, 0.1 / 8, 64, 128, threshold=2) == pytest.approx(2 * found, rel=1e-12)


def test_the_least_batch_for_a_deviation() -> None:
    n = batch_for(0.9, **PAPER, d=256)
    assert attainable_std(**PAPER, n=n, d=256) >= 0.9 > attainable_std(**PAPER, n=n - 1, d=256)
    assert batch_for(0.9, 0.5, 0, d=256) == 2


def test_it_takes_milliseconds() -> None:
    attainable_std(**PAPER, n=64, d=128)
    began = time.perf_counter()
    for _ in range(10):
        attainable_std(**PAPER, n=64, d=128)
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"n": 1}, ValueError, "n=1: must be at least 2"),
        ({"n": 32.0}, TypeError, "n=32.0: a whole number is needed"),
        ({"n": math.nan}, TypeError, "n=nan: a whole number is needed"),
        ({"d": 0}, ValueError, "d=0: must be at least 1"),
        ({"d": True}, TypeError, "d=True: a whole number is needed"),
        ({"alpha": -0.5}, ValueError, "alpha=-0.5: must be at least 0"),
        ({"alpha": math.nan}, ValueError, "alpha=nan"),
        ({"beta": -1}, ValueError, "beta=-1: must be at least 0"),
        ({"beta": math.inf}, ValueError, "beta=inf"),
        ({"beta": "0.1"}, TypeError, "beta='0.1'"),
        ({"threshold": math.nan}, ValueError, "threshold=nan"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^{says}"):
        attainable_std(**{**PAPER, "n": 32, "d": 256, **changes})


@pytest.mark.parametrize("changes", [{"std": 1.0}, {"std": 0.0}, {"alpha": 0.0}])
def test_deviations_that_no_batch_need_reach(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="alpha must be above 0, std between 0 and threshold=1"):
        batch_for(**{"std": 0.9, **PAPER, "d": 256, **changes})
