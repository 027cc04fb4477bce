"""VICRegLoss against its definition, its other conventions, and over two processes."""

import pytest
import tolerances
import torch
from processes import in_processes
from tolerances import relative
from torch import Tensor, nn

from vjvcr_fast.losses import VICRegLoss, VICRegTerms, variance_hinge


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(0.8).to(dtype)


class TestVICReg:
    @staticmethod
    def by_definition(z_a: Tensor, z_b: Tensor, hinges: str = "mean", divisor: str = "d") -> Tensor:
        """With weights 25, 25, 1: each branch and time step on its own, entry by entry."""
        d = z_a.shape[-1]
        variance = covariance = torch.zeros((), dtype=z_a.dtype)
        slices = [
            (z_a.reshape(len(z_a), -1, d)[:, t], z_b.reshape(len(z_b), -1, d)[:, t]) for t in range(z_a[0].numel() // d)
        ]
        for pair in slices:
            for z in pair:
                c = torch.cov(z.T).reshape(d, d)
                hinge = torch.clamp(1 - (c.diagonal() + 1e-4).sqrt(), min=0).mean()
                variance = variance + hinge / (2 if hinges == "mean" else 1)
                off = (c - c.diagonal().diag()).pow(2).sum()
                covariance = covariance + off / (d if divisor == "d" else d * max(d - 1, 1))
        invariance = ((z_a - z_b) ** 2).sum() / z_a.numel()
        return 25 * invariance + 25 * variance / len(slices) + covariance / len(slices)

    @pytest.mark.parametrize("shape", [(2, 5), (6, 4), (4, 3, 5), (5, 2, 2, 3), (9, 1)])
    @pytest.mark.parametrize("hinges", ["mean", "sum"])
    @pytest.mark.parametrize("divisor", ["d", "d(d-1)"])
    def test_is_its_definition(self, shape, hinges, divisor):
        z = [random(*shape, dtype=torch.float64, seed=i).requires_grad_() for i in range(2)]
        loss = VICRegLoss(variance_branches=hinges, covariance_divisor=divisor)(*z)
        right = self.by_definition(*z, hinges, divisor)
        assert relative(loss, right) <= tolerances.FLOAT64
        for ours, gradient in zip(torch.autograd.grad(loss, z), torch.autograd.grad(right, z), strict=True):
            assert relative(ours, gradient) <= tolerances.FLOAT64

    @pytest.mark.parametrize("hinges", ["mean", "sum"])
    @pytest.mark.parametrize("divisor", ["d", "d(d-1)"])
    def test_terms(self, hinges, divisor):
        """Each term alone, and its gradient, is the loss with its weight alone."""
        z = [random(6, 3, 4, dtype=torch.float64, seed=i).requires_grad_() for i in range(2)]
        options = {"variance_branches": hinges, "covariance_divisor": divisor}
        terms = VICRegLoss(2.0, 3.0, 4.0, **options, return_terms=True)(*z)
        assert isinstance(terms, VICRegTerms)
        losses = [VICRegLoss(*weights, **options)(*z) for weights in ((2, 3, 4), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
        for term, loss in zip(terms, losses, strict=True):
            assert relative(term, loss) <= tolerances.FLOAT64
            of_both = [torch.autograd.grad(x, z, retain_graph=True) for x in (term, loss)]
            assert all(relative(*pair) <= tolerances.FLOAT64 for pair in zip(*of_both, strict=True))

    def test_weights_and_eps(self):
        z = [random(5, 4, dtype=torch.float64, seed=i) for i in range(2)]
        weighted = [float(VICRegLoss(*w)(*z)) for w in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 4))]
        assert weighted[3] == pytest.approx(2 * weighted[0] + 3 * weighted[1] + 4 * weighted[2])
        assert float(VICRegLoss(0, 1, 0, eps=0.5)(*z)) == pytest.approx(float(variance_hinge(z, eps=0.5)))

    def test_half_precision_is_computed_in_float32(self):
        z = [random(6, 3, 8, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(2)]
        loss = VICRegLoss()(*z)
        assert loss.dtype == torch.float32
        assert relative(loss, self.by_definition(*(x.double() for x in z))) <= tolerances.FLOAT32
        loss.backward()
        assert {x.grad.dtype for x in z} == {torch.bfloat16}

    def test_errors(self):
        with pytest.raises(ValueError, match="same shape"):
            VICRegLoss()(random(4, 2, 3), random(4, 1, 3))
        with pytest.raises(ValueError, match=r"covariance_divisor='n': choose one of d, d\(d-1\)"):
            VICRegLoss(covariance_divisor="n")
        with pytest.raises(ValueError, match="variance_branches='max': choose one of mean, sum"):
            VICRegLoss(variance_branches="max")


def _gathering(rank: int, size: int) -> dict[str, Tensor]:
    """One process of test_gathered_over_processes, with its shard. Gradients are averaged as in DDP."""
    model = _model()
    views = [x.chunk(size)[rank] for x in _views()]
    loss, *terms = VICRegLoss(gather_distributed=True, return_terms=True)(*(model(x) for x in views))
    loss.backward()
    gradient = model.weight.grad
    torch.distributed.all_reduce(gradient)
    torch.distributed.all_reduce(loss.detach_())
    found = {"loss": loss / size, "gradient": gradient / size, "second": _second_derivative(*views)}
    return found | {"terms": torch.stack(terms).detach()}


def _second_derivative(z_a: Tensor, z_b: Tensor) -> Tensor:
    leaf = z_a.clone().requires_grad_()
    loss = VICRegLoss(lambda_param=0.0, gather_distributed=True)(leaf, z_b)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum(), leaf)[0]


def _model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 7, bias=False).double()


def _views() -> list[Tensor]:
    return [random(8, 2, 5, dtype=torch.float64, seed=i) for i in (1, 2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_gathered_over_processes(tmp_path):
    """Two processes with half the batch each: the means of their losses and gradients are those of one process."""
    model = _model()
    whole = VICRegLoss(gather_distributed=True, return_terms=True)  # no process group: the batch is whole
    loss, *terms = whole(*(model(x) for x in _views()))
    loss.backward()
    results = in_processes(_gathering, 2, tmp_path)
    for result in results:
        assert relative(result["loss"], loss) <= tolerances.FLOAT64
        assert relative(result["gradient"], model.weight.grad) <= tolerances.FLOAT64
        assert relative(result["terms"], torch.stack(terms)) <= tolerances.FLOAT64
    # Both processes return the whole loss, so a first derivative counts it twice and its square four times.
    second = torch.cat([result["second"] for result in results])
    assert relative(second, 4 * _second_derivative(*_views())) <= tolerances.FLOAT64
