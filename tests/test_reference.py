"""reference.py against definitions written out as numpy loops, or known in closed form."""

import math

import numpy as np
import pytest
import tolerances
import torch

from vjvcr_fast import reference

ALPHA, BETA, GAMMA, TAU, EPS = 1.7, 0.3, 0.6, 1.2, 1e-3


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def hinge_by_hand(h: np.ndarray, threshold: float, eps: float) -> float:
    n, steps, d = h.shape
    total = 0.0
    for t in range(steps):
        for k in range(d):
            mean = sum(h[i, t, k] for i in range(n)) / n
            variance = sum((h[i, t, k] - mean) ** 2 for i in range(n)) / (n - 1)
            total += max(0.0, threshold - math.sqrt(variance + eps))
    return total / (steps * d)


def penalty_by_hand(h: np.ndarray) -> float:
    _, steps, d = h.shape
    total = 0.0
    for t in range(steps):
        c = np.atleast_2d(np.cov(h[:, t], rowvar=False))
        total += sum(c[i, j] ** 2 for i in range(d) for j in range(d) if i != j)
    return total / (steps * d)


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 3, 4), (5, 2, 3), (9, 1, 6), (4, 3, 1)])
class TestVCR:
    """Equations (1) to (4)."""

    def test_variance_hinge(self, shape, generator):
        h = random(*shape, generator=generator)
        expected = hinge_by_hand(h.numpy(), TAU, EPS)
        assert float(reference.variance_hinge(h, TAU, EPS)) == pytest.approx(expected, rel=tolerances.FLOAT64)

    def test_covariance(self, shape, generator):
        h = random(*shape, generator=generator)
        expected = np.stack([np.atleast_2d(np.cov(h[:, t].numpy(), rowvar=False)) for t in range(shape[1])])
        np.testing.assert_allclose(reference.covariance(h).numpy(), expected, rtol=tolerances.FLOAT64, atol=1e-14)

    def test_penalty(self, shape, generator):
        h = random(*shape, generator=generator)
        expected = penalty_by_hand(h.numpy())
        assert float(reference.covariance_penalty(h)) == pytest.approx(expected, rel=tolerances.FLOAT64, abs=1e-14)

    def test_vcr(self, shape, generator):
        h = random(*shape, generator=generator)
        hinge, penalty = hinge_by_hand(h.numpy(), TAU, EPS), penalty_by_hand(h.numpy())
        terms = [float(x) for x in reference.vcr(h, ALPHA, BETA, TAU, EPS)]
        assert terms == pytest.approx([ALPHA * hinge + BETA * penalty, hinge, penalty], rel=tolerances.FLOAT64)


def test_hinge_of_known_columns():
    """Columns of variance 1/2 (N = 2: values 0 and 1) and 0, so sqrt(1/2) and 0 below a threshold of 1."""
    h = torch.tensor([[[0.0, 3.0]], [[1.0, 3.0]]], dtype=torch.float64)
    assert float(reference.variance_hinge(h, 1.0, 0.0)) == pytest.approx((1 - math.sqrt(0.5) + 1) / 2)
    assert float(reference.variance_hinge(2 * h, 1.0, 0.0)) == pytest.approx(0.5), "a spread column costs nothing"


def test_penalty_of_known_columns():
    """Two equal columns of variance v: both off-diagonal entries are v, 2 v^2 over d = 2."""
    column = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    h = torch.stack([column, column], dim=-1).unsqueeze(1)
    assert float(reference.covariance_penalty(h)) == pytest.approx(float(column.var()) ** 2)


class TestEnergies:
    """Equations (5) to (7)."""

    def test_distance_is_the_mean_squared_error(self, generator):
        a, b = random(3, 2, 4, generator=generator), random(3, 2, 4, generator=generator)
        expected = sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / 24
        assert float(reference.distance(a, b)) == pytest.approx(expected)

    def test_vjvcr(self, generator):
        h_x, h_y, predicted = (random(4, t, 3, generator=generator) for t in (2, 3, 3))
        decoded, y = (random(4, 3, 1, 2, 2, generator=generator) for _ in range(2))
        h = np.concatenate([h_x.numpy(), h_y.numpy()], axis=1)
        vcr = ALPHA * hinge_by_hand(h, 1.0, 1e-4) + BETA * penalty_by_hand(h)
        fit = float(((predicted - h_y) ** 2).sum()) / 36
        energy = reference.energy_vjvcr(h_x, h_y, predicted, ALPHA, BETA)
        assert float(energy) == pytest.approx(fit + vcr, rel=tolerances.FLOAT64)

        pixels = float(((decoded - y) ** 2).sum()) / 48
        energy = reference.energy_vjvcr(h_x, h_y, predicted, ALPHA, BETA, GAMMA, decoded, y)
        assert float(energy) == pytest.approx(fit + vcr + GAMMA * pixels, rel=tolerances.FLOAT64)

    def test_vjvcr_reaches_both_representations(self, generator):
        h_x, h_y, predicted = (random(4, 2, 3, generator=generator).requires_grad_() for _ in range(3))
        reference.energy_vjvcr(h_x, h_y, predicted, ALPHA, BETA).backward()
        assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (h_x, h_y, predicted))

    def test_per_sample_energies_average_to_the_distance(self, generator):
        a, b = random(5, 2, 3, generator=generator), random(5, 2, 3, generator=generator)
        energies = reference.energy_per_sample(a, b)
        assert energies.shape == (5,)
        assert float(energies[3]) == pytest.approx(float(((a[3] - b[3]) ** 2).mean()))
        assert float(energies.mean()) == pytest.approx(float(reference.distance(a, b)))

    def test_generative(self, generator):
        decoded, y = (random(4, 3, 1, 2, 2, generator=generator) for _ in range(2))
        h = random(4, 5, 3, generator=generator)
        pixels = float(((decoded - y) ** 2).sum()) / 48
        assert float(reference.energy_generative(decoded, y)) == pytest.approx(pixels)
        vcr = ALPHA * hinge_by_hand(h.numpy(), 1.0, 1e-4) + BETA * penalty_by_hand(h.numpy())
        energy = reference.energy_generative(decoded, y, h, ALPHA, BETA)
        assert float(energy) == pytest.approx(pixels + vcr, rel=tolerances.FLOAT64)


class TestSpectra:
    def test_singular_values_are_not_centred(self):
        """Equal rows (1, 1): one singular value sqrt(2 N), none if the mean went first."""
        singular = reference.singular_values(torch.ones(8, 2, dtype=torch.float64))
        np.testing.assert_allclose(singular.numpy(), [4.0, 0.0], atol=1e-12)

    def test_cumulative_spectrum(self):
        curve = reference.cumulative_spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
        np.testing.assert_allclose(curve.numpy(), [0.4, 0.7, 0.9, 1.0])

    @pytest.mark.parametrize("d", [1, 2, 7, 32])
    def test_rank_me_of_the_identity_is_d(self, d):
        assert float(reference.rank_me(torch.eye(d, dtype=torch.float64))) == pytest.approx(d, rel=1e-5)

    def test_rank_me_of_equal_values_is_their_number(self, generator):
        """Three orthonormal directions of ten."""
        q = torch.linalg.qr(random(20, 3, generator=generator))[0]
        rows = q @ torch.linalg.qr(random(10, 3, generator=generator))[0].T
        assert float(reference.rank_me(rows)) == pytest.approx(3, rel=1e-4)

    def test_rank_me_of_one_direction_is_one(self, generator):
        rows = random(20, 1, generator=generator) @ random(1, 10, generator=generator)
        assert float(reference.rank_me(rows)) == pytest.approx(1, rel=1e-4)

    def test_rank_me_by_hand(self):
        p = np.array([0.75, 0.25]) + 1e-7
        rows = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        assert float(reference.rank_me(rows)) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


class TestSparse:
    def test_soft_threshold(self):
        z = torch.tensor([-3.0, -0.5, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
        assert reference.soft_threshold(z, 1.0).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.0, 2.0]
        assert reference.soft_threshold(z, 0.0).tolist() == z.tolist()

    def test_soft_threshold_is_the_proximal_map(self):
        """argmin_z (z - x)^2 / 2 + w |z|, found by search on a grid."""
        grid = np.linspace(-4, 4, 80001)
        for x in (-2.5, -0.3, 0.4, 1.9):
            best = grid[np.argmin((grid - x) ** 2 / 2 + 0.7 * np.abs(grid))]
            found = reference.soft_threshold(torch.tensor(x, dtype=torch.float64), 0.7)
            assert float(found) == pytest.approx(best, abs=2e-4)

    def test_fista_meets_the_lasso_conditions(self, generator):
        """Three problems |A z - b|^2 + w |z|_1 at once: at the optimum the gradient of the smooth part is -w sign(z)
        where z != 0, and at most w in size where z = 0."""
        a = random(12, 6, generator=generator)
        b = random(3, 12, generator=generator)
        weight = 6.0

        def smooth(z: torch.Tensor) -> torch.Tensor:
            return (z @ a.T - b).square().sum(dim=1)

        step = 1 / (2 * float(torch.linalg.matrix_norm(a, 2)) ** 2)
        z = reference.fista(smooth, torch.zeros(3, 6, dtype=torch.float64), weight, step, steps=3000)
        gradient = 2 * (z @ a.T - b) @ a
        active = z != 0
        assert not z.requires_grad
        assert active.any()
        assert not active.all()
        assert float((gradient + weight * z.sign())[active].abs().max()) < tolerances.CONVERGED
        assert float(gradient[~active].abs().max()) <= weight + tolerances.CONVERGED

    def test_fista_without_a_penalty_is_least_squares(self, generator):
        a, b = random(12, 4, generator=generator), random(1, 12, generator=generator)
        step = 1 / (2 * float(torch.linalg.matrix_norm(a, 2)) ** 2)
        z = reference.fista(lambda z: (z @ a.T - b).square().sum(dim=1), torch.zeros(1, 4).double(), 0.0, step, 3000)
        assert tolerances.relative(z.T, torch.linalg.lstsq(a, b.T).solution) < tolerances.CONVERGED

    def test_fista_first_step_by_hand(self):
        """z0 = 0, (z - 5)^2, step 1/2: the gradient step lands on 5, the threshold takes 1/2."""
        z = reference.fista(lambda z: (z - 5).square().sum(dim=1), torch.zeros(1, 1).double(), 1.0, 0.5, steps=1)
        assert z.tolist() == [[4.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype, generator):
    h = random(4, 2, 3, generator=generator).to(dtype)
    frames = torch.rand(4, 2, 1, 2, 2, generator=generator, dtype=dtype)
    scalars = [
        *reference.vcr(h, 1.0, 1.0),
        reference.covariance(h),
        reference.energy_vjvcr(h, h, h, 1.0, 1.0, 0.5, frames, frames),
        reference.energy_generative(frames, frames, h, 1.0, 1.0),
        reference.energy_per_sample(h, h),
        reference.rank_me(h[:, 0]),
        reference.cumulative_spectrum(reference.singular_values(h[:, 0])),
        reference.soft_threshold(h, 0.1),
        reference.fista(lambda z: z.square().sum(dim=1), h[:, 0], 0.1, 0.5, 2),
    ]
    assert {x.dtype for x in scalars} == {dtype}
