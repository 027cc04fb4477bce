"""SIGReg and its gradient. For one time step with samples z_n (N, d), directions a_k and x_nk = <z_n, a_k>, J knots t_j
above zero, their phi_j = exp(-t_j^2 / 2) and weights w_j, losses/projections.py has

    D_jk = sum_n (cos(t_j x_nk) - phi_j),   S_jk = sum_n sin(t_j x_nk),   loss = scale * sum_jk w_j (D_jk^2 + S_jk^2)
    y_nk = sum_j w_j t_j (S_jk cos(t_j x_nk) - D_jk sin(t_j x_nk)),       dz_n = 2 scale * dL/dloss * sum_k y_nk a_k

A tile of projections is made by tensor cores and stays in registers, where one sine and cosine of each goes from knot
to knot. Backward makes the projections again. Its slopes y go through memory, a panel of samples or time steps at a
time: made where they are needed, they would be made again for each block of features. These buffers lie in between, K'
is K rounded up to a multiple of 16:

| buffer | shape | written by | read by | safe because |
|---|---|---|---|---|
| part_sums | parts, T, 2, J, K, float32 | `_sums` | `_sums`, `_finish` | one program has it, barriers between rounds |
| sums | T, 2, J, K, float32 | `_finish` | `_slopes` | each entry has one writer |
| losses | one number per program, float32 | `_finish` | `_loss` | each program writes its own |
| slopes | panel's T, its N, K', as multiplied | `_slopes` | `_product` | a panel's two launches follow one another |

Whoever reads a buffer is launched after its writer. Sums run in a fixed order, so results repeat bit by bit.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from vjvcr_fast.kernels.finish import total
from vjvcr_fast.kernels.gram import pitch
from vjvcr_fast.kernels.launch import (
    Config,
    Kernel,
    Mode,
    ceil_div,
    mode_of,
    operand_dtype,
    precision,
    sizes,
    split,
    workspace,
)


class Knots(NamedTuple):
    """t_j = step * (1, 2, ... count), or with `half` step * (1/2, 3/2, ... count - 1/2)."""

    count: int
    step: float
    half: bool


# Bytes of a panel of slopes, unless half of h is more. Smaller panels would not fill the GPU.
PANEL = 32 << 20

# -- On the device --------------------------------------------------------------------------------------------------


@triton.jit
def _operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of a product. TF32 operands are rounded to nearest: tensor cores would cut them off, and
    numbers that are all too small would move every cosine the same way."""
    x = x.to(DTYPE)
    if PRECISION == "tf32" and x.dtype == tl.float32:
        near = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, near.to(tl.float32, bitcast=True), x)  # NaN stays NaN
    return x


@triton.jit
def _projections(
    base, directions, rows, last, ks, stride_n, d, count, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x' (BK, BN): by directions first, so that a sum over samples stays within a warp. Zero from `last` on.

    Samples of half precision are exact as operands. The directions are then in two parts: rounded once, they would be
    other directions for all samples, and the error of D would grow beside it as sqrt(N).
    """
    x = tl.zeros((BK, BN), tl.float32)
    for i in range(0, d, BD):
        cols = i + tl.arange(0, BD)
        inside = cols < d
        at = cols.to(tl.int64)[:, None] * count + ks[None, :]
        a = tl.load(directions + at, mask=inside[:, None] & (ks < count)[None, :], other=0.0)
        at = rows.to(tl.int64)[:, None] * stride_n + cols[None, :]
        z = tl.load(base + at, mask=(rows < last)[:, None] & inside[None, :], other=0.0)
        near, right = _operand(a, DTYPE, PRECISION), tl.trans(_operand(z, DTYPE, PRECISION))
        x = tl.dot(tl.trans(near), right, x, input_precision=PRECISION)
        if z.dtype != tl.float32:
            rest = _operand(a - near.to(tl.float32), DTYPE, PRECISION)
            x = tl.dot(tl.trans(rest), right, x, input_precision=PRECISION)
    return x


@triton.jit
def _turn(x, high, low):
    """cos and sin of pi (high + low) x, within 2e-7 while that is below 2^21 half-turns. Beyond, they are those of some
    angle; infinity gives NaN. csrc/sigreg_cpu_kernels.h explains the polynomials."""
    shifted = x * high + 12582912.0  # 1.5 * 2^23, which rounds it to a whole number
    f = tl.fma(x, high, 12582912.0 - shifted) + x * low
    f = tl.clamp(f, -0.5, 0.5, propagate_nan=tl.PropagateNan.ALL)
    u = f * f
    s = 0.077659408465195662 * u - 0.598292159585975455
    s = s * u + 2.55007765974673762
    s = s * u - 5.16771009033306807
    s = s * u + 3.14159264018405142
    c = -0.0243967165369615099 * u + 0.234937558900749127
    c = c * u - 1.33521225665375180
    c = c * u + 4.05870916434129545
    c = c * u - 4.93480213722832232
    c = c * u + 0.999999999780652162
    odd = shifted.to(tl.int32, bitcast=True) << 31
    c = (c.to(tl.int32, bitcast=True) ^ odd).to(tl.float32, bitcast=True)
    s = ((s * f).to(tl.int32, bitcast=True) ^ odd).to(tl.float32, bitcast=True)
    return c, s


@triton.jit
def _place(j, HALF: tl.constexpr):
    """t_j in steps, j from 0."""
    return j + (0.5 if HALF else 1.0)


@triton.jit
def _phi(j, high, HALF: tl.constexpr):
    """phi_j in float32."""
    t = tl.cast(_place(j, HALF), tl.float32) * (high * 3.141592653589793)
    return tl.exp(-0.5 * t * t)


@Kernel
def _sums(
    h, directions, part_sums, stride_n, stride_t, n, steps, d, count, rows, knots, high, low, BN: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D, with phi rounded to float32, and S of BK directions over `rows` samples of one time step.

    high + low: pi times that is the step between knots.

    A sum is over BN samples, less BN phi, so that what these are added to does not grow with the number of samples. It
    is in memory: the sums of all knots would take more registers than there are. Bytes: h once from memory, and K / BK
    times more from the cache; for each BN samples the directions from the cache, and 16 J K to it and back; 8 J K a
    part. Operations: 2 N d K for the product, 6 N K J for the sums.
    """
    panels = tl.cdiv(count, BK)
    pid = tl.program_id(0)
    ks = pid % panels * BK + tl.arange(0, BK)
    t = pid // panels % steps
    part = pid // (panels * steps)
    last = tl.minimum(part * rows + rows, n)
    base = h + t.to(tl.int64) * stride_t
    to = part_sums + (part * steps + t).to(tl.int64) * 2 * knots * count + ks
    for start in range(part * rows, last, BN):
        at = start + tl.arange(0, BN)
        x = _projections(base, directions, at, last, ks, stride_n, d, count, BN, BK, BD, DTYPE, PRECISION)
        step_c, step_s = _turn(x, high, low)
        if HALF:
            c, s = _turn(x, 0.5 * high, 0.5 * low)
        else:
            c, s = step_c, step_s
        c, s = tl.where((at < last)[None, :], c, 0.0), tl.where((at < last)[None, :], s, 0.0)
        number = tl.minimum(last - start, BN).to(tl.float32)
        before = (ks < count) & (start > part * rows)
        tl.debug_barrier()  # what other threads of this program have stored is there
        for j in range(knots):
            D = tl.load(to + j * count, mask=before, other=0.0)
            S = tl.load(to + (knots + j) * count, mask=before, other=0.0)
            D += tl.sum(c, axis=1) - number * _phi(j, high, HALF)
            S += tl.sum(s, axis=1)
            tl.store(to + j * count, D, mask=ks < count)
            tl.store(to + (knots + j) * count, S, mask=ks < count)
            turned = c * step_c - s * step_s
            s = s * step_c + c * step_s
            c = turned


@Kernel
def _finish(
    part_sums, sums, losses, parts, n, steps, count, knots, high, low, BJ: tl.constexpr, BK: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """D and S of BJ knots and BK directions of one time step from their parts, and their sum of w (D^2 + S^2). D gets
    what phi lacks in float32. Bytes: 4 parts + 4 an entry of sums."""
    panels, blocks = tl.cdiv(count, BK), tl.cdiv(knots, BJ)
    pid = tl.program_id(0)
    ks = pid % panels * BK + tl.arange(0, BK)
    js = pid // panels % blocks * BJ + tl.arange(0, BJ)
    t = (pid // (panels * blocks)).to(tl.int64)
    mask = (js < knots)[:, None] & (ks < count)[None, :]
    at = (t * 2 * knots + js)[:, None] * count + ks[None, :]
    size = tl.cast(knots, tl.int64) * count
    D = tl.zeros((BJ, BK), tl.float32)
    S = tl.zeros((BJ, BK), tl.float32)
    for part in range(parts):
        part_at = at + part * steps * 2 * size
        D += tl.load(part_sums + part_at, mask=mask, other=0.0)
        S += tl.load(part_sums + part_at + size, mask=mask, other=0.0)
    step = (tl.cast(high, tl.float64) + tl.cast(low, tl.float64)) * 3.141592653589793
    place = tl.cast(_place(js, HALF), tl.float64) * step
    phi = tl.exp(-0.5 * place * place)
    D += (n * (_phi(js, high, HALF).to(tl.float64) - phi)).to(tl.float32)[:, None]
    tl.store(sums + at, D, mask=mask)
    tl.store(sums + at + size, S, mask=mask)
    weight = (2 * step * phi).to(tl.float32) * tl.where(js == knots - 1, 0.5, 1.0)
    tl.store(losses + pid, tl.sum(tl.where(mask, weight[:, None] * (D * D + S * S), 0.0)))


@Kernel
def _loss(losses, loss, size, scale, BLOCK: tl.constexpr):
    """scale times the sum of what programs left. Bytes: 4 a program."""
    tl.store(loss, (total(losses, size, BLOCK) * scale).to(tl.float32))


@Kernel
def _slopes(
    h, directions, sums, slopes, stride_n, stride_t, n, steps, d, count, pitch, knots, high, low, BN: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y' (BK, BN) of one time step, by Horner's rule in exp(i step x).

    Bytes: h once from memory, and K / BK times more from the cache, as the directions are for each BN samples; the
    sums from the cache; the slopes once. Operations: 2 N d K for the product, which forward made before, and 4 N K J.
    """
    panels, chunks = tl.cdiv(count, BK), tl.cdiv(n, BN)
    pid = tl.program_id(0)
    ks = pid % panels * BK + tl.arange(0, BK)
    at = pid // panels % chunks * BN + tl.arange(0, BN)
    t = (pid // (panels * chunks)).to(tl.int64)
    base = h + t * stride_t
    x = _projections(base, directions, at, n, ks, stride_n, d, count, BN, BK, BD, DTYPE, PRECISION)
    step_c, step_s = _turn(x, high, low)
    of = sums + t * 2 * knots * count + ks
    p = tl.zeros((BK, BN), tl.float32)
    q = tl.zeros((BK, BN), tl.float32)
    for i in range(knots):
        j = knots - 1 - i
        D = tl.load(of + j * count, mask=ks < count, other=0.0)
        S = tl.load(of + (knots + j) * count, mask=ks < count, other=0.0)
        # w_j t_j, with w_j = 2 step phi_j, and half of it at the last knot.
        step = high * 3.141592653589793
        factor = step * step * _place(j, HALF) * _phi(j, high, HALF) * tl.where(j == knots - 1, 1.0, 2.0)
        before = p
        p = p * step_c - q * step_s + (factor * S)[:, None]
        q = before * step_s + q * step_c + (factor * D)[:, None]
    if HALF:
        step_c, step_s = _turn(x, 0.5 * high, 0.5 * low)
    y = p * step_c - q * step_s
    to = slopes + (t * n + at)[None, :] * pitch + ks[:, None]
    tl.store(to, y.to(slopes.dtype.element_ty), mask=(at < n)[None, :] & (ks < pitch)[:, None])


@Kernel
def _product(
    slopes, directions, out, incoming, out_n, out_t, n, steps, d, count, pitch, factor, BN: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz for BN samples and BD features of one time step: factor * dL/dloss times the slopes and the directions.

    Bytes: the slopes d / BD times and the directions for each BN samples, mostly from the cache; the gradient once.
    Operations: 2 N d K.
    """
    blocks, chunks = tl.cdiv(d, BD), tl.cdiv(n, BN)
    pid = tl.program_id(0)
    cols = pid % blocks * BD + tl.arange(0, BD)
    at = pid // blocks % chunks * BN + tl.arange(0, BN)
    t = (pid // (blocks * chunks)).to(tl.int64)
    gradient = tl.zeros((BN, BD), tl.float32)
    for k in range(0, count, BK):
        ks = k + tl.arange(0, BK)
        from_slopes = slopes + (t * n + at)[:, None] * pitch + ks[None, :]
        y = tl.load(from_slopes, mask=(at < n)[:, None] & (ks < pitch)[None, :], other=0.0)
        from_directions = directions + cols.to(tl.int64)[:, None] * count + ks[None, :]
        a = tl.load(from_directions, mask=(cols < d)[:, None] & (ks < count)[None, :], other=0.0)
        y, a = _operand(y, DTYPE, PRECISION), _operand(a, DTYPE, PRECISION)
        gradient = tl.dot(y, tl.trans(a), gradient, input_precision=PRECISION)
    gradient *= tl.load(incoming).to(tl.float32) * factor
    to = out + t * out_t + at.to(tl.int64)[:, None] * out_n + cols[None, :]
    tl.store(to, gradient.to(out.dtype.element_ty), mask=(at < n)[:, None] & (cols < d)[None, :])


# -- Launchers ------------------------------------------------------------------------------------------------------

SUMS: dict[Mode, Config] = {
    "bf16": Config(4, 3, 2, {"BN": 64, "BK": 64, "BD": 32}),
    **{mode: Config(4, 4, 2, {"BN": 64, "BK": 64, "BD": 16}) for mode in ("tf32", "tf32x3")},
}
SLOPES: dict[Mode, Config] = {
    "bf16": Config(4, 3, 2, {"BN": 64, "BK": 64, "BD": 64}),
    **{mode: Config(4, 3, 2, {"BN": 64, "BK": 64, "BD": 32}) for mode in ("tf32", "tf32x3")},
}
PRODUCT: dict[Mode, Config] = {
    "bf16": Config(8, 3, 1, {"BN": 128, "BD": 128, "BK": 64}),
    "tf32": Config(8, 3, 1, {"BN": 128, "BD": 128, "BK": 32}),
    "tf32x3": Config(8, 3, 1, {"BN": 64, "BD": 128, "BK": 32}),
}
FINISH = Config(4, 1, 1, {"BJ": 16, "BK": 64})
LOSS = Config(4, 1, 1, {"BLOCK": 512})


def forward(hs: Sequence[Tensor], directions: Tensor, knots: Knots, scale: float) -> tuple[Tensor, list[Tensor]]:
    """The loss, a float32 scalar, and for each tensor its D and S, (T, 2, J, K) float32.

    hs: (N, T, d) each, features side by side in memory. directions: (d, K), float32.
    """
    mode, count, a = mode_of(hs[0]), directions.shape[1], directions.contiguous()
    blocks = ceil_div(count, FINISH.tiles["BK"]) * ceil_div(knots.count, FINISH.tiles["BJ"])
    programs = [blocks * h.shape[1] for h in hs]
    (losses,) = workspace(a.device, sum(programs))
    found = [torch.empty(h.shape[1], 2, knots.count, count, dtype=torch.float32, device=a.device) for h in hs]
    for h, sums, of_one in zip(hs, found, losses.split(programs), strict=True):
        part_sums, parts = _parts(h, a, mode, knots)
        _finish.launch(
            FINISH, of_one.numel(),
            part_sums=part_sums, sums=sums, losses=of_one, parts=parts, n=h.shape[0], steps=h.shape[1], count=count,
            **_numbers(knots),
        )  # fmt: skip
    loss = torch.empty((), dtype=torch.float32, device=a.device)
    _loss.launch(LOSS, 1, losses=losses, loss=loss, size=losses.numel(), scale=scale)
    return loss, found


def _parts(h: Tensor, a: Tensor, mode: Mode, knots: Knots) -> tuple[Tensor, int]:
    """D and S of parts of the samples, and how many parts."""
    n, steps, d = h.shape
    count, config = a.shape[1], SUMS[mode]
    programs = steps * ceil_div(count, config.tiles["BK"])
    # What a part costs is its sums in float32.
    cost = 8 * knots.count * count / (n * d * h.element_size())
    least = config.tiles["BN"]
    rows, parts = split(h.device, config.planned(d), programs, n, least, cost, unit=least)
    (part_sums,) = workspace(h.device, parts * steps * 2 * knots.count * count)
    _sums.launch(
        config, programs * parts,
        h=h, directions=a, part_sums=part_sums, **sizes(h), count=count, rows=rows, **_numbers(knots),
        **precision(mode),
    )  # fmt: skip
    return part_sums, parts


def backward(
    h: Tensor, directions: Tensor, sums: Tensor, incoming: Tensor, out: Tensor, knots: Knots, factor: float
) -> None:
    """dz into out, which has h's shape (N, T, d) and any strides with the features side by side.

    sums: of `forward`, or added up over processes. incoming: dL/dloss, a scalar on the device. factor: 2 scale.
    """
    mode, count, d = mode_of(h), directions.shape[1], h.shape[2]
    a, padded, dtype = directions.contiguous(), pitch(count), operand_dtype(mode)
    for samples, steps in _panels(h, padded * dtype.itemsize):
        z, to = h[samples, steps], out[samples, steps]
        slopes = torch.empty(z.shape[1], z.shape[0], padded, dtype=dtype, device=h.device)
        config = SLOPES[mode]
        _slopes.launch(
            config, z.shape[1] * ceil_div(z.shape[0], config.tiles["BN"]) * ceil_div(count, config.tiles["BK"]),
            h=z, directions=a, sums=sums[steps], slopes=slopes, **sizes(z), count=count, pitch=padded,
            **_numbers(knots), **precision(mode),
        )  # fmt: skip
        config = PRODUCT[mode]
        _product.launch(
            config, z.shape[1] * ceil_div(z.shape[0], config.tiles["BN"]) * ceil_div(d, config.tiles["BD"]),
            slopes=slopes, directions=a, out=to, incoming=incoming, out_n=to.stride(0), out_t=to.stride(1),
            n=z.shape[0], steps=z.shape[1], d=d, count=count, pitch=padded, factor=factor, **precision(mode),
        )  # fmt: skip


def _numbers(knots: Knots) -> dict[str, Any]:
    """A kernel's arguments for the knots. The step is given in half-turns, as the sum of two float32 numbers."""
    exact = knots.step / math.pi
    high = ctypes.c_float(exact).value
    return {"knots": knots.count, "high": high, "low": exact - high, "HALF": knots.half}


def _panels(h: Tensor, bytes_of_one: int) -> Iterator[tuple[slice, slice]]:
    """Samples and time steps of h (N, T, d) whose slopes are in memory together. bytes_of_one: of a sample's."""
    n, steps, _ = h.shape
    budget = max(PANEL, h.numel() * h.element_size() // 2) // bytes_of_one
    rows = max(1, min(n, budget))
    together = max(1, budget // rows) if rows == n else 1
    for t in range(0, steps, together):
        for start in range(0, n, rows):
            yield slice(start, start + rows), slice(t, t + together)
