"""What variance and covariance are over, and the covariance's divisor: `over` and `covariance_divisor` of vcr_loss."""

from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
import torch.distributed as dist
import ways
from processes import in_processes
from tolerances import relative
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.losses import VCRLoss, vcr_loss
from vjvcr_fast.losses.vcr import DIVISORS, OVERS, _regrouped

ALPHA, BETA = 1.7, 0.4
# N, T and d in every order, some of them 1.
SHAPES = [(5, 4, 3), (4, 3, 6), (3, 7, 4), (2, 2, 1), (6, 2, 5)]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Features that differ in spread, samples and time steps that differ in their means."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 1.2, shape[-1])
    return (x + torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)).to(dtype)


def options(over: str, divisor: str) -> dict[str, Any]:
    return {"alpha": ALPHA, "beta": BETA, "threshold": 1.2, "over": over, "covariance_divisor": divisor}


def by_definition(h: Tensor, over: str, divisor: str) -> tuple[Tensor, Tensor, Tensor]:
    """(N, T, d), one group of samples after the other."""
    n, steps, d = h.shape
    groups = {
        "samples": [h[:, t] for t in range(steps)],
        "time": [h[i] for i in range(n)],
        "both": [torch.cat([h[:, t] for t in range(steps)])],
    }[over]
    variance = covariance = h.new_zeros(())
    for rows in groups:
        c = torch.cov(rows.T).reshape(d, d)
        variance = variance + torch.clamp(1.2 - (c.diagonal() + 1e-4).sqrt(), min=0).mean() / len(groups)
        off = [c[i, j] ** 2 for i in range(d) for j in range(d) if i != j]
        count = d if divisor == "d" else max(len(off), 1)
        covariance = covariance + sum(off) / count / len(groups)
    return ALPHA * variance + BETA * covariance, variance, covariance


def assert_same(ours: Any, right: Any, leaf: Tensor, bound: float) -> None:
    """Each term, and its gradient alone. At d = 1 the covariance is zero."""
    for value, expected in zip(ours, right, strict=True):
        gradients = [
            torch.autograd.grad(x, leaf, retain_graph=True, materialize_grads=True)[0] for x in (value, expected)
        ]
        scale = 1.0 if leaf.shape[-1] == 1 else None
        assert relative(value, expected, scale) <= bound
        assert relative(*gradients, scale) <= bound


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("over", OVERS)
class TestValues:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_reference_is_the_definition(self, shape, over, divisor):
        leaf = random(*shape).requires_grad_()
        right = by_definition(leaf, over, divisor)
        right = [x + 0 * leaf.sum() for x in right]  # at d = 1 the covariance does not depend on h
        assert_same(reference.vcr(leaf, ALPHA, BETA, 1.2, 1e-4, over, divisor), right, leaf, tolerances.FLOAT64)

    @pytest.mark.parametrize("way", ways.WAYS)
    @pytest.mark.parametrize("form", ["gram", "covariance"])
    def test_is_the_reference(self, form, way, over, divisor, monkeypatch):
        ways.take(way, monkeypatch)
        for shape in SHAPES:
            leaf = random(*shape).requires_grad_()
            right = reference.vcr(leaf, ALPHA, BETA, 1.2, 1e-4, over, divisor)
            assert_same(vcr_loss(leaf, form=form, **options(over, divisor)), right, leaf, tolerances.FLOAT64)

    def test_other_routes_to_it(self, over, divisor):
        """backend="reference", the module, double backward, torch.func, half precision."""
        h, chosen = random(5, 4, 3), options(over, divisor)
        leaf = h.requires_grad_()
        right = reference.vcr(leaf, ALPHA, BETA, 1.2, 1e-4, over, divisor)
        assert_same(vcr_loss(leaf, backend="reference", **chosen), right, leaf, tolerances.FLOAT64)
        assert_same(VCRLoss(**chosen)(leaf), right, leaf, tolerances.FLOAT64)
        (first,) = torch.autograd.grad(vcr_loss(leaf, **chosen).loss, leaf, create_graph=True)
        (expected,) = torch.autograd.grad(right[0], leaf, create_graph=True)
        second = [torch.autograd.grad(g.square().sum(), leaf, retain_graph=True)[0] for g in (first, expected)]
        assert relative(*second) <= tolerances.FLOAT64
        functional = torch.func.grad(lambda x: vcr_loss(x, **chosen).loss)(h.detach())
        assert relative(functional, expected) <= tolerances.FLOAT64
        half = random(5, 4, 3, dtype=torch.bfloat16)
        exact = reference.vcr(half.double(), ALPHA, BETA, 1.2, 1e-4, over, divisor)
        assert all(relative(*pair) <= tolerances.FLOAT32 for pair in zip(vcr_loss(half, **chosen), exact, strict=True))

    def test_a_sequence_is_its_concatenation(self, over, divisor):
        leaves = [random(5, *middle, 3, seed=i).requires_grad_() for i, middle in enumerate(([], [3], [2, 2]))]
        whole = torch.cat([leaf.reshape(5, -1, 3) for leaf in leaves], dim=1)
        ours, right = (
            vcr_loss(leaves, **options(over, divisor)),
            reference.vcr(whole, ALPHA, BETA, 1.2, 1e-4, over, divisor),
        )
        for a, b in zip(ours, right, strict=True):
            assert relative(a, b) <= tolerances.FLOAT64
            for pair in zip(*(torch.autograd.grad(x, leaves, retain_graph=True) for x in (a, b)), strict=True):
                assert relative(*pair) <= tolerances.FLOAT64


@pytest.mark.parametrize(("over", "divisor"), [("samples", "d(d-1)"), ("time", "d"), ("both", "d(d-1)")])
def test_compiled(over, divisor):
    """In one graph, of any N, T and d."""
    torch._dynamo.reset()

    def step(h: Tensor) -> Tensor:
        terms = vcr_loss(h * 2, **options(over, divisor))
        return terms.loss + terms.covariance

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for shape in ((5, 4, 3), (6, 3, 4)):
        leaf = random(*shape).requires_grad_()
        pairs = [(value, *torch.autograd.grad(value, leaf)) for value in (compiled(leaf), step(leaf))]
        assert all(relative(*pair) <= tolerances.FLOAT64 for pair in zip(*pairs, strict=True))


# Layouts of (N, T, d) and more dimensions, which "both" views as rows.
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "as it is": lambda: random(4, 3, 5),
    "time first": lambda: random(3, 4, 5).transpose(0, 1),
    "time first, with places": lambda: random(3, 4, 2, 5).transpose(0, 1),
    "places first": lambda: random(2, 4, 3, 5).movedim(0, 2),
    "features in the middle": lambda: random(4, 5, 1, 1).movedim(1, -1),
    "one sample, features first": lambda: random(1, 5, 3, 2).movedim(1, -1),
    "every second feature": lambda: random(4, 3, 10)[..., ::2],
    "one time step": lambda: random(4, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_views(layout):
    h = LAYOUTS[layout]()
    (rows,) = _regrouped(h, "both", alone=True)
    assert rows.shape == (h[..., 0].numel(), 1, 5)
    assert rows.untyped_storage().data_ptr() == h.untyped_storage().data_ptr()


def test_time_is_a_view():
    h = random(3, 4, 5).transpose(0, 1)
    (found,) = _regrouped(h, "time", alone=True)
    assert (found.data_ptr(), found.shape, found.stride()) == (h.data_ptr(), (3, 4, 5), (20, 5, 1))


def test_rows_that_are_no_view():
    h = random(2, 5, 3).mT  # (2, 3, 5): the rows of a sample are 1 apart, the samples 15
    (rows,) = _regrouped(h, "both", alone=True)
    assert rows.squeeze(1).equal(h.flatten(0, 1))


@pytest.mark.parametrize(
    ("h", "chosen", "says"),
    [
        (random(4, 1, 3), {"over": "time"}, r"^over='time': h has T = 1, T >= 2 is needed"),
        (random(4, 3), {"over": "time"}, r"^over='time': h has T = 1, T >= 2 is needed"),
        (random(1, 1, 3), {"over": "both"}, r"^over='both': h has N T = 1, N T >= 2 is needed"),
        (random(1, 4, 3), {"over": "samples"}, r"shape \(1, 4, 3\).*N >= 2"),
        (random(4, 3), {"over": "frames"}, r"^over='frames': choose one of samples, time, both$"),
        (random(4, 3), {"covariance_divisor": "n"}, r"^covariance_divisor='n': choose one of d, d\(d-1\)$"),
        ([], {"over": "both"}, "empty sequence"),
        ([random(4, 2, 3), random(5, 2, 3)], {"over": "both"}, "must share N"),
    ],
)
def test_errors(h, chosen, says):
    for call in (lambda: vcr_loss(h, alpha=1, beta=1, **chosen), lambda: VCRLoss(1, 1, **chosen)(h)):
        with pytest.raises(ValueError, match=says):
            call()


def test_one_sample_or_one_time_step_is_enough_where_the_other_has_two():
    for h, over in ((random(1, 4, 3), "time"), (random(1, 4, 3), "both"), (random(4, 3), "both")):
        right = by_definition(h.reshape(len(h), -1, 3), over, "d")
        assert relative(vcr_loss(h, **options(over, "d")).loss, right[0]) <= tolerances.FLOAT64


# -- Several processes ----------------------------------------------------------------------------------------------

SAMPLES = {"even": (3, 3), "uneven": (1, 4)}


def _over(rank: int, world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    group = dist.group.WORLD
    for shards, samples in SAMPLES.items():
        for over in OVERS:
            for given in (None, samples, *(["equal"] if shards == "even" else [])):
                parts = random(sum(samples), 5, 4).split(list(samples))[rank].split([2, 3], dim=1)
                leaves = [part.clone().requires_grad_() for part in parts]
                terms = vcr_loss(leaves, group=group, samples=given, **options(over, "d(d-1)"))
                of = (terms.loss, terms.covariance)
                gradients = [torch.cat(torch.autograd.grad(x, leaves, retain_graph=True), dim=1) for x in of]
                found[shards, over, str(given)] = [x.detach() for x in terms], gradients
    h = random(2, 3, 4)[rank : rank + 1]
    for says, frames, wrong in (
        ("^route='time': with over='time' processes exchange the terms alone", 3, {"route": "time"}),
        ("^over='time': h has T = 1", 1, {}),
        ("one number a process", 3, {"samples": (1, 2, 3)}),
        (r"disagree in T: \[2, 3\]", 2 + rank, {}),
    ):
        with pytest.raises(ValueError, match=says):
            vcr_loss(h[:, :frames], group=group, over="time", alpha=1, beta=1, **wrong)
    return found


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_over_processes(tmp_path):
    """Terms and gradients are those of one process with all samples; each process has twice its gradient."""
    results = in_processes(_over, 2, tmp_path)
    assert len(results[0]) == 15
    for shards, over, given in results[0]:
        leaf = random(sum(SAMPLES[shards]), 5, 4).requires_grad_()
        right = reference.vcr(leaf, ALPHA, BETA, 1.2, 1e-4, over, "d(d-1)")
        for result in results:
            for value, expected in zip(result[shards, over, given][0], right, strict=True):
                assert relative(value, expected) <= tolerances.FLOAT64
        for i, term in enumerate((right[0], right[2])):
            gradient = torch.cat([result[shards, over, given][1][i] for result in results])
            assert relative(gradient, 2 * torch.autograd.grad(term, leaf, retain_graph=True)[0]) <= tolerances.FLOAT64
