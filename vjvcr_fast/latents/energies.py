"""Energies whose form makes inference faster: of an MLP predictor, and of a predictor with several heads.

The energy that a model is trained with is in models/energy.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

LatentEnergy: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)  # Dynamo of torch 2.11 asks for a hash before there are fields to make it of
class MLPEnergy:
    """The prediction term through an MLP: |W3 u + b3 - h_y|^2 / M, with u = relu(W2 a + b2), a = relu(W1z z + P).

    p: (N, H), W1h h_x + b1, the part that does not depend on z. w1z: (H, m). w2, b2: (H, H), (H,). w3, b3: (M, H),
    (M,). target: (N, M), h_y with its frames side by side, M = T_y d.

    Calling it computes the residual itself. Inference uses `expand` instead, whose steps touch nothing of size M.
    """

    p: Tensor
    w1z: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor
    target: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """z (N, m) -> (N,)."""
        return self.residual(self.activations(z)[1]).square().mean(dim=1)

    def activations(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (N, m) -> the hidden layers a and u, (N, H) each."""
        a = torch.relu(torch.addmm(self.p, z, self.w1z.mT))
        return a, torch.relu(F.linear(a, self.w2, self.b2))

    def residual(self, u: Tensor) -> Tensor:
        """u (N, H) -> prediction minus target (N, M)."""
        return F.linear(u, self.w3, self.b3) - self.target

    def to(self, dtype: torch.dtype) -> "MLPEnergy":
        """The same energy with all tensors in another dtype."""
        # Written out: Dynamo of torch 2.11 cannot go through the fields of a frozen dataclass.
        own = self.p, self.w1z, self.w2, self.b2, self.w3, self.b3, self.target
        return MLPEnergy(*(tensor.to(dtype) for tensor in own))

    def expand(self, z0: Tensor) -> "ExpandedMLPEnergy":
        """The same energy, exactly, expanded about z0 (N, m). Raises ValueError if z0 has another shape."""
        if z0.shape != (shape := (len(self.p), self.w1z.shape[1])):
            raise ValueError(f"z has shape {tuple(z0.shape)}: this predictor and batch need {shape}")
        u0 = self.activations(z0)[1]
        residual = self.residual(u0)
        return ExpandedMLPEnergy(
            self, u0, self.w3.mT @ self.w3, -residual @ self.w3, residual.square().mean(dim=1), 1 / residual.shape[1]
        )


class ExpandedMLPEnergy(NamedTuple):
    """E(z) = E(z0) + (D'G D - 2 r'D) / M with D = u(z) - u(z0); its gradient in u is 2 (G D - r) / M.

    Expanded about the start and not about u = 0, so that it rounds against the change of the energy and not against
    |h_y|^2. If torch allows TF32, its products round to that.

    u0: (N, H), u(z0). G: (H, H), W3'W3. r: (N, H), W3'(h_y - Pred(h_x, z0)). start: (N,), E(z0). scale: 1 / M.
    """

    mlp: MLPEnergy
    u0: Tensor
    G: Tensor
    r: Tensor
    start: Tensor
    scale: float

    def curvature(self) -> Tensor:
        """(m, m): the Hessian in z if every unit of both layers is active. It is the same for all samples."""
        slopes = self.mlp.w2 @ self.mlp.w1z
        return 2 * self.scale * (slopes.mT @ (self.G @ slopes))

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (N, m) -> energies (N,), gradients (N, m)."""
        a, u = self.mlp.activations(z)
        change = u - self.u0
        gradient = torch.addmm(self.r, change, self.G, beta=-1)
        value = self.start + self.scale * torch.linalg.vecdot(gradient - self.r, change)
        gradient = torch.ops.aten.threshold_backward(gradient, u, 0) @ self.mlp.w2
        return value, 2 * self.scale * (torch.ops.aten.threshold_backward(gradient, a, 0) @ self.mlp.w1z)

    def operands(self, z0: Tensor) -> list[Tensor]:
        """The tensors that the operators `fista_mlp` and `newton_mlp` take first, contiguous."""
        mlp = self.mlp
        tensors = (z0, mlp.p, mlp.w1z, mlp.w2, mlp.b2, self.G, self.u0, self.r, self.start)
        return [tensor.contiguous() for tensor in tensors]


@dataclass(frozen=True, eq=False)
class HeadEnergy:
    """The energy of a predictor with `heads` last layers, one of which z selects.

    energy: of any z (N, heads). of_head: i -> (N,), the energy of the i-th one-hot, computed from the i-th head alone.
    """

    heads: int
    energy: LatentEnergy
    of_head: Callable[[int], Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        """z (N, heads) -> (N,)."""
        return self.energy(z)

    def all(self) -> Tensor:
        """The energies of all one-hots, (N, heads)."""
        return torch.stack([self.of_head(i) for i in range(self.heads)], dim=1)
