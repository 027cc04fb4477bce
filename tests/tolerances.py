"""Every bound the tests use, with its reason, and what each is relative to.

The judge is always `vjvcr_fast.reference` (or a definition written out in the test) in float64, on the input as it
was rounded to its own dtype: a bound is about what we compute, not about what the input's dtype could not hold.
"""

import torch
from torch import Tensor

# float64 against float64: two summation orders of at most 1e5 products, 1e5 * 1.1e-16, and one order of slack.
FLOAT64 = 1e-10

# float32, well-conditioned input: sums of at most a few thousand products of unit size. Blocked summation
# grows the rounding 6e-8 by the root of the length at most, about 3e-6.
FLOAT32 = 1e-5

# float32 with column means of 30 sigma. Shifting by the first sample is exact to 6e-8 of the mean, 30 * 6e-8 of
# sigma; what was lost before that, in the input's own rounding, the judge loses too. The bound is wider.
MEAN_30_SIGMA = 2e-4

# The same at 1e3 sigma.
MEAN_1000_SIGMA = 1e-3

# bfloat16 and float16 input: the arithmetic is float32, so only the gradient's last rounding shows (2^-9, 2^-12).
BFLOAT16 = 1e-2
FLOAT16 = 2e-3

# A float32 quantity that is exactly zero in mathematics (the gradient of the penalty at d = 1), relative to the terms
# whose difference it is: a handful of roundings of 6e-8.
FLOAT32_ZERO = 1e-6

# The compiler fuses and reorders sums: same length, another order.
COMPILED = FLOAT32

# Iterative solvers against their optimality conditions: FISTA gains k^-2, here with strong convexity much faster.
CONVERGED = 1e-8

# Peak extra memory of forward and backward, in copies of h: the gradient is one; the issue allows three.
MEMORY_COPIES = 3.0


def relative(actual: Tensor, expected: Tensor, scale: Tensor | float | None = None) -> float:
    """|actual - expected| / scale in Frobenius norms and float64; scale defaults to |expected|. NaN stays NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    norm = expected.norm() if scale is None else torch.as_tensor(scale, dtype=torch.float64).detach()
    return float((actual - expected).norm() / norm.clamp_min(torch.finfo(torch.float64).tiny))


def penalty_scale(h: Tensor) -> Tensor:
    """||C||_F^2 / d, the mean over time steps, of h (N, T, d): what errors of the penalty are relative to.

    The Gram form subtracts the diagonal's share of this number from the whole, so this is what it rounds against;
    relative to the penalty itself the error of an almost decorrelated h has no bound.
    """
    z = (h.detach().double() - h.detach().double().mean(dim=0)).transpose(0, 1)
    c = z.mT @ z / (h.shape[0] - 1)
    return c.square().sum() / (h.shape[1] * h.shape[2])


# -- GPU kernels: terms and gradients, unless one bound holds for both ----------------------------------------------

# float32 input: operands split into two TF32 numbers each, the products of their lower halves (2^-22) left out. The
# project's promise; the interpreter, whose products are float32 for every type of input, keeps it for all terms.
TF32X3 = 1e-5

# float32 input where torch allows TF32, and float16: tensor cores cut operands off at 2^-10, 4e-4 of each on average
# and always downwards, so K and A are 7e-4 too small, their squares 1.4e-3; the gradient is two such products in a row,
# less the diagonal. Emulated for 6 to 4000 samples: 2e-3 and 4e-3, in whichever form is the smaller.
TF32 = 5e-3
TF32_GRADIENT = 1e-2

# bfloat16 input: the centred operands are rounded to 2^-9, as K or A and the gradient are; to nearest, so that sums
# average it out where they are long. Emulated likewise: 3e-3 and 7e-3.
BFLOAT16_PRODUCTS = 1e-2
BFLOAT16_PRODUCTS_GRADIENT = 2e-2

# Peak memory of forward and backward above h and its gradient, in copies of h: what backward keeps, T N^2 or T d^2, and
# the parts that it is added from.
CUDA_MEMORY_COPIES = 1.2

# -- Networks, training, probes -------------------------------------------------------------------------------------

# What a gradient is relative to at least, where it may vanish: float64 sums of ordinary numbers carry 1e-13 of these.
GRADIENT_FLOOR = 1e-3

# The losses of five steps under bfloat16 autocast against float32: 2^-9 a product, through eight layers.
BFLOAT16_TRAINING = 0.05

# The same training compiled: the first three losses differ by rounding, FLOAT32 amplified by Adam, whose first steps
# are lr * sign(g) and flip where g is rounding itself; by the twelfth that has grown.
COMPILED_TRAINING = 1e-4
COMPILED_TRAINING_LATER = 1e-2

# Speed MSEs of exact probes whose features differ by dependent ones: the squared rounding of float32 features is
# seen through a cut-off of 1e-10 of the largest variance, so about its root, 1e-5, and two orders of slack.
DEPENDENT_FEATURES = 1e-3

# Singular values, and RankMe from them, in float32 against float64 or rounded to four decimals.
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
