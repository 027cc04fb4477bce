"""Every bound the tests use, the reason for it, and what it is relative to.

Results are always compared with `vjvcr_fast.reference` (or with a definition written out in the test) in float64. It
gets the input after rounding to its own dtype, so a bound covers our arithmetic, not what the dtype could not hold.
"""

import torch
from torch import Tensor

# float64 against float64: sums of at most 1e5 products in two orders, 1e5 * 1.1e-16, with a factor 10 of slack.
FLOAT64 = 1e-10

# float32, well-conditioned input: sums of at most a few thousand products of unit size. In blocked summation the
# rounding error, 6e-8, grows at most with the root of the length, to about 3e-6.
FLOAT32 = 1e-5

# float32 with column means of 30 sigma. Subtracting the first sample is exact to 6e-8 of the mean, which is 30 * 6e-8
# of sigma. What rounding the input had lost before, the reference has lost too. The promised bound is wider.
MEAN_30_SIGMA = 2e-4

# The same at 1e3 sigma.
MEAN_1000_SIGMA = 1e-3

# bfloat16 and float16 input: the arithmetic is float32, so only the gradient's last rounding shows (2^-9, 2^-12).
BFLOAT16 = 1e-2
FLOAT16 = 2e-3

# A float32 number that is exactly zero in mathematics (the gradient of the penalty at d = 1), relative to the terms it
# is the difference of: a few roundings of 6e-8.
FLOAT32_ZERO = 1e-6

# The compiler fuses and reorders sums. They have the same length, so the bound is the same.
COMPILED = FLOAT32

# Iterative solvers against their optimality conditions. FISTA converges as k^-2, and much faster on our strongly convex
# problems.
CONVERGED = 1e-8

# Peak extra memory of forward and backward, in copies of h. The gradient is one; three are allowed.
MEMORY_COPIES = 3.0

# SIGReg beyond its gradient and the directions, in copies of h: a group's projections, and the sums.
SIGREG_MEMORY_COPIES = 1.2


def relative(actual: Tensor, expected: Tensor, scale: Tensor | float | None = None) -> float:
    """|actual - expected| / scale in Frobenius norms and float64; scale defaults to |expected|. NaN stays NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    norm = expected.norm() if scale is None else torch.as_tensor(scale, dtype=torch.float64).detach()
    return float((actual - expected).norm() / norm.clamp_min(torch.finfo(torch.float64).tiny))


def penalty_scale(h: Tensor) -> Tensor:
    """||C||_F^2 / d of h (N, T, d), averaged over time steps. Errors of the penalty are relative to this number.

    The Gram form computes the penalty as this number minus the diagonal's part of it, so its rounding errors are of
    this size. Relative to the penalty itself they have no bound when h is almost decorrelated.
    """
    z = (h.detach().double() - h.detach().double().mean(dim=0)).transpose(0, 1)
    c = z.mT @ z / (h.shape[0] - 1)
    return c.square().sum() / (h.shape[1] * h.shape[2])


# -- GPU kernels: terms and gradients, unless one bound holds for both ----------------------------------------------

# float32 input: each operand is split into two TF32 numbers, and the product of the lower halves (2^-22) is left out.
# This is the project's promise. Triton's interpreter multiplies in float32 for every input type and keeps it as well.
TF32X3 = 1e-5

# float32 input if torch allows TF32, and float16 input. Tensor cores cut operands off at 2^-10, always downwards and by
# 4e-4 on average. So ZZ' and Z'Z are 7e-4 too small and their squares 1.4e-3. The gradient is two such products in a
# row, less the diagonal. Emulated for 6 to 4000 samples, in the smaller form: errors of 2e-3 and 4e-3.
TF32 = 5e-3
TF32_GRADIENT = 1e-2

# bfloat16 input: the centred operands, the product and the gradient are rounded to 2^-9. That is to nearest, so long
# sums average the errors out. Emulated in the same way: errors of 3e-3 and 7e-3.
BFLOAT16_PRODUCTS = 1e-2
BFLOAT16_PRODUCTS_GRADIENT = 2e-2

# Peak memory of forward and backward beyond h and its gradient, in copies of h: the product that backward needs, T N^2
# or T d^2 numbers, and the parts it is summed from.
CUDA_MEMORY_COPIES = 1.2

# -- Networks, training, probes -------------------------------------------------------------------------------------

# The least number a gradient's error is relative to, for gradients that may vanish. float64 sums of ordinary numbers
# have errors of 1e-13.
GRADIENT_FLOOR = 1e-3

# The losses of five training steps under bfloat16 autocast against float32: 2^-9 for each product, in eight layers.
BFLOAT16_TRAINING = 0.05

# The same training, compiled. The first three losses differ by FLOAT32, amplified by Adam: its first steps are
# lr * sign(g), which flips if g itself is a rounding error. By the twelfth step the difference has grown.
COMPILED_TRAINING = 1e-4
COMPILED_TRAINING_LATER = 1e-2

# Speed MSEs of exact probes, with and without linearly dependent features. Directions below 1e-10 of the largest
# variance are cut off, which lets float32 rounding through at about the root, 1e-5. Two orders of slack.
DEPENDENT_FEATURES = 1e-3

# Singular values, and RankMe computed from them: float32 against float64, or values rounded to four decimals.
SPECTRUM = 1e-3

# -- Latents --------------------------------------------------------------------------------------------------------

# Energies at z* by the closed form and by autograd in float32: both end within rounding, 6e-8 a term, of a minimum; the
# bound is the issue's.
LATENT_ROUTES = 1e-4

# A hundred float32 steps against thousands in float64, mean energy: the bound. Minima of a network with ReLUs
# differ by more, sample by sample.
LATENT_OPTIMUM = 0.01

# z after tens of float64 steps, the same steps in another order of summation: 1e-16, but step sizes are quotients of
# differences, which near the end are 1e-8 of their terms.
LATENT_PLAIN = 1e-6

# Energies by FISTA with backtracking against coordinate descent, convex, after hundreds of float64 steps.
LATENT_CONVEX = 1e-8

# The iterates of the CUDA kernels' source after six float32 steps against float64: step sizes and momenta are quotients
# of differences, which carry a few hundred roundings of 6e-8.
LATENT_SIX_STEPS = 1e-4

# The mean energy at z* where products are of bfloat16: the bound.
LATENT_BFLOAT16 = 0.01
