"""Every row of the table in docs/guides/drop-in.md: our call, read from the page, is the other code's formula.

The formulas are written out here from what that code computes: value and gradient, in float64.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import in_processes
from tolerances import relative
from torch import Tensor

from vjvcr_fast import losses

DIRECTIONS = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double(), dim=0)
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "drop-in.md"
N, T, D = 9, 5, 6
WEIGHTS = {"sim": 3.0, "std": 1.3, "cov": 0.7, "std_t": 0.9, "cov_t": 0.4}


def random(*shape: int, seed: int) -> Tensor:
    """Features of different spread, some below 1 and some above, correlated with their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (x + 0.5 * x.roll(1, dims=-1)) * torch.linspace(0.3, 1.5, shape[-1], dtype=torch.float64) + 0.3


def inputs() -> dict[str, Tensor]:
    """What the rows call their tensors: two branches, a batch, one of videos (N, T, d), one of feature maps."""
    made = {"z_a": random(N, D, seed=1), "z_b": random(N, D, seed=2), "z": random(N, D, seed=3)}
    return made | {"h": random(N, T, D, seed=4), "x": random(4, D, T, 2, 3, seed=5), "v": random(4, N, D, seed=6)}


# -- Their formulas -------------------------------------------------------------------------------------------------


def hinge(z: Tensor) -> Tensor:
    """The spread over the first dimension; the mean over all others."""
    spread = torch.sqrt(((z - z.mean(0)) ** 2).sum(0) / (len(z) - 1) + 1e-4)
    return torch.clamp(1 - spread, min=0).mean()


def off_diagonal(z: Tensor) -> Tensor:
    """The sum of squares of z'z / (n - 1) outside its diagonal. z: (n, d), not centred here."""
    d = z.shape[1]
    pairs = [(i, j) for i in range(d) for j in range(d) if i != j]
    return sum(((z[:, i] * z[:, j]).sum() / (len(z) - 1)) ** 2 for i, j in pairs)


def penalty(z: Tensor, count: int) -> Tensor:
    return off_diagonal(z - z.mean(0)) / count


PAIRS = D * (D - 1)


def vicreg(z_a: Tensor, z_b: Tensor, hinges: float, count: int, sim: float, std: float, cov: float) -> Tensor:
    variance, covariance = hinge(z_a) + hinge(z_b), penalty(z_a, count) + penalty(z_b, count)
    return sim * ((z_a - z_b) ** 2).mean() + std * hinges * variance + cov * covariance


def lightly(z_a: Tensor, z_b: Tensor, sim: float, std: float, cov: float, **_: Any) -> Tensor:
    return vicreg(z_a, z_b, 1 / 2, D, sim, std, cov)


def solo_learn(z_a: Tensor, z_b: Tensor, sim: float, std: float, cov: float, **_: Any) -> Tensor:
    return vicreg(z_a, z_b, 1, D, sim, std, cov)


def of_one_branch(z: Tensor, std: float, cov: float, **_: Any) -> Tensor:
    return std * hinge(z) / 2 + cov * penalty(z, D)


def worldmodel(h: Tensor, std: float, cov: float, **_: Any) -> Tensor:
    return std * hinge(h) + cov * sum(penalty(h[:, t], PAIRS) for t in range(T)) / T


def worldmodel_std_t(h: Tensor, std_t: float, **_: Any) -> Tensor:
    c = h - h.mean(0)
    return std_t * sum(hinge(c[n]) for n in range(N)) / N


def worldmodel_cov_t(h: Tensor, cov_t: float, **_: Any) -> Tensor:
    c = h - h.mean(0)
    return cov_t * sum(off_diagonal(c[n]) / PAIRS for n in range(N)) / N


def eb_jepa(z_a: Tensor, z_b: Tensor, std: float, cov: float, **_: Any) -> Tensor:
    return vicreg(z_a, z_b, 1, PAIRS, 1.0, std, cov)


def eb_jepa_maps(x: Tensor, std: float, cov: float, **_: Any) -> Tensor:
    rows = torch.stack([x[n, :, t, i, j] for n in range(4) for t in range(T) for i in range(2) for j in range(3)])
    return std * hinge(rows) + cov * penalty(rows, PAIRS)


def eb_jepa_first(x: Tensor, std: float, cov: float, **_: Any) -> Tensor:
    rows = torch.stack([x[n, :, 0].reshape(-1) for n in range(4)])
    return std * hinge(rows) + cov * penalty(rows, rows.shape[1] * (rows.shape[1] - 1))


def distance(z: Tensor, knots: Tensor) -> Tensor:
    """Of the characteristic function of each projection from a normal one's, by the trapezoidal rule over `knots`."""
    values = []
    for t in knots:
        normal = torch.exp(-(t**2) / 2)
        empirical = torch.exp(1j * t * (z @ DIRECTIONS)).mean(0)
        values.append(normal * ((empirical.real - normal) ** 2 + empirical.imag**2))
    width = knots[1] - knots[0]
    return sum((a + b) / 2 * width for a, b in itertools.pairwise(values)).mean()


def both_halves(z: Tensor) -> Tensor:
    """With the factor N. The integrand is even, so one half counts twice."""
    return len(z) * 2 * distance(z, torch.linspace(0, 3, 17, dtype=torch.float64))


def to_centres(v: Tensor) -> Tensor:
    centre = (v[0] + v[1]) / 2
    return sum(((view - centre) ** 2).mean() for view in v) / len(v)


def lightly_sigreg(v: Tensor, **_: Any) -> Tensor:
    return sum(both_halves(view) for view in v) / len(v)


def lightly_lejepa(v: Tensor, **_: Any) -> Tensor:
    return 0.05 * lightly_sigreg(v) + 0.95 * to_centres(v)


def worldmodel_sigreg(h: Tensor, **_: Any) -> Tensor:
    return sum(both_halves(h[:, t]) for t in range(T)) / T


def sliced(z: Tensor, **_: Any) -> Tensor:
    return both_halves(z)


def pretraining_lejepa(v: Tensor, **_: Any) -> Tensor:
    return to_centres(v) + 0.02 * both_halves(torch.cat(list(v)))


def bcs(z_a: Tensor, z_b: Tensor, **_: Any) -> Tensor:
    knots = torch.linspace(-3, 3, 10, dtype=torch.float64)
    return ((z_a - z_b) ** 2).mean() + 10 * (distance(z_a, knots) + distance(z_b, knots)) / 2


THEIRS: dict[str, Callable[..., Tensor]] = {
    "lightly `VICRegLoss`": lightly,
    "facebookresearch/vicreg `main_vicreg.py`": lightly,
    "solo-learn `vicreg_loss_func`": solo_learn,
    "stable-pretraining `VICRegLoss`": lightly,
    "stable-pretraining `VCRegLoss`": of_one_branch,
    "stable-worldmodel `VCReg`, `std` and `cov`": worldmodel,
    "stable-worldmodel `VCReg`, `std_t`": worldmodel_std_t,
    "stable-worldmodel `VCReg`, `cov_t`": worldmodel_cov_t,
    "eb_jepa `VICRegLoss`": eb_jepa,
    "eb_jepa `VCLoss`": eb_jepa_maps,
    "eb_jepa `VC_IDM_Sim_Regularizer`, `std` and `cov`": eb_jepa_first,
    "lightly `SIGReg`": lightly_sigreg,
    "lightly `LeJEPALoss`": lightly_lejepa,
    "stable-worldmodel `SIGReg`": worldmodel_sigreg,
    "stable-pretraining `SlicedEppsPulley`": sliced,
    "stable-pretraining `LeJEPA`": pretraining_lejepa,
    "eb_jepa `BCS`": bcs,
}

# -- The rows -------------------------------------------------------------------------------------------------------


def rows() -> dict[str, str]:
    """Our calls, by what they stand for."""
    cells = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ") and "`" in line]
    return {name.removeprefix("| "): re.fullmatch("`(.*)`", ours)[1] for name, ours, _ in cells}


def test_every_row_is_tested():
    assert list(rows()) == list(THEIRS)


@pytest.mark.parametrize("name", THEIRS)
def test_is_the_same(name):
    tensors = {key: tensor.requires_grad_() for key, tensor in inputs().items()}
    names = vars(losses) | {
        "torch": torch,
        "F": F,
        "T": T,
        "A": DIRECTIONS,
        "c": tensors["h"] - tensors["h"].mean(dim=0),
    }
    ours = eval(rows()[name], names, tensors | WEIGHTS)
    right = THEIRS[name](**tensors, **WEIGHTS)
    found = [(value, *gradients(value, tensors)) for value in (ours[0] if isinstance(ours, tuple) else ours, right)]
    assert float(right.detach()) > 0.01
    assert all(relative(*pair) <= tolerances.FLOAT64 for pair in zip(*found, strict=True))


def gradients(value: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, [*tensors.values()], retain_graph=True, materialize_grads=True)


# -- Several processes ----------------------------------------------------------------------------------------------


class Gathered(torch.autograd.Function):
    """The samples of all processes; backward adds up the gradients of all. So do all that gather."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _gathering(rank: int, world: int) -> list[Tensor]:
    """The means over processes of the gradients of a shared weight, as DDP takes them: theirs and ours in turns."""
    found = []
    shard = [random(8, D, seed=i).chunk(world)[rank] for i in (1, 2)]
    sim, std, cov = 3.0, 1.3, 0.7
    for branches, hinges in (("mean", 1 / 2), ("sum", 1)):
        ours = losses.VICRegLoss(sim, std, cov, gather_distributed=True, variance_branches=branches)
        for mine in (False, True):
            weight = torch.linspace(0.5, 1.1, D, dtype=torch.float64).requires_grad_()
            z_a, z_b = (z * weight for z in shard)
            if mine:
                loss = ours(z_a, z_b)
            else:
                loss = sim * ((z_a - z_b) ** 2).mean()
                loss = loss + vicreg(Gathered.apply(z_a), Gathered.apply(z_b), hinges, D, 0.0, std, cov)
            loss.backward()
            dist.all_reduce(weight.grad)
            found.append(weight.grad / world)
    return found


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_those_that_gather_train_the_same(tmp_path):
    for found in in_processes(_gathering, 2, tmp_path):
        for theirs, ours in zip(found[::2], found[1::2], strict=True):
            assert relative(ours, theirs) <= tolerances.FLOAT64
