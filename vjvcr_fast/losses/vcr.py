"""The drop-in losses: variance hinge, covariance penalty, their sum (VCR) and VICReg.

Equations are those of `vjvcr_fast.reference`; the gradient is analytic (`vjvcr_fast.losses.analytic`). `h` is (N, d),
(N, T, d) or (N, ..., d), N videos first, d features last, everything between taken as time steps; or a sequence of
such tensors that share N and d, as [h_x, h_y], whose time steps count together and are never concatenated.

float64 is computed in float64. float32 and narrower are computed in float32, also under autocast; terms come back
in float32, gradients in the input's dtype. NaN or Inf in gives NaN out. Nothing here synchronises with the host.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from vjvcr_fast import reference
from vjvcr_fast.losses import analytic, backends, distributed, ops
from vjvcr_fast.losses.backends import Backend
from vjvcr_fast.losses.distributed import Route

Form = Literal["auto", "gram", "covariance"]
Made = Literal["auto", "forward", "backward"]
Representations: TypeAlias = Tensor | Sequence[Tensor]

Samples: TypeAlias = Sequence[int] | Literal["equal"] | None


class VCRTerms(NamedTuple):
    """Scalars: loss = alpha * variance + beta * covariance; the two terms unweighted. All differentiable."""

    loss: Tensor
    variance: Tensor
    covariance: Tensor


def variance_hinge(
    h: Representations, *, threshold: float = 1.0, eps: float = 1e-4, backend: Backend = "auto"
) -> Tensor:
    """Equation (1): mean over time steps and features of max(0, threshold - sqrt(Var + eps)), Var over N, unbiased.

    Args, errors: as `vcr_loss`. Returns a scalar.
    """
    hs = as_slices(h)
    return _evaluate(hs, analytic.Settings(1.0, 0.0, threshold, eps, gram=False, covariance=False), backend).loss


def covariance_penalty(h: Representations, *, backend: Backend = "auto") -> Tensor:
    """Equation (2): 1/(T d) sum over time steps of the squared off-diagonal covariances, divisor N - 1.

    Args, errors: as `vcr_loss`. Returns a scalar.
    """
    hs = as_slices(h)
    settings = analytic.Settings(0.0, 1.0, 1.0, 0.0, gram=_use_gram("auto", hs[0].shape), variance=False)
    return _evaluate(hs, settings, backend).loss


def vcr_loss(
    h: Representations,
    *,
    alpha: float,
    beta: float,
    threshold: float = 1.0,
    eps: float = 1e-4,
    backend: Backend = "auto",
    form: Form = "auto",
    gradient: Made = "auto",
    group: Any = None,
    samples: Samples = None,
    route: Route = "auto",
) -> VCRTerms:
    """Equation (4), l_vcr = alpha * variance_hinge + beta * covariance_penalty, in one pass.

    Args:
        h: (N, d), (N, ..., d), or a sequence of such tensors with the same N and d; N >= 2; float16, bfloat16,
            float32 or float64; any strides. The Triton kernels copy it first where features, the last
            dimension, are not side by side in memory.
        alpha, beta: weights of the two terms.
        threshold: the paper's tau. eps: added to the variance before the root, >= 0.
        backend: "triton" (fused kernels, CUDA), "torch" (analytic gradient in plain operations), "reference" (autograd
            through reference.py, for comparison) or "auto": triton where it can serve h, else torch.
        form: "gram" (N x N products), "covariance" (d x d products) or "auto", which takes the smaller of the two.
            Both are exact; see docs/math.md for their rounding.
        gradient: make that of the loss in the "forward" pass, while h is in the cache, or in the "backward" pass; a
            wish that only changes speed and memory. Where none is wanted none is made. "auto": forward on a CPU.
        group: the processes of torch.distributed whose samples are one batch, as torch.distributed.group.WORLD; N is
            then of all of them, this one holds at least one, and every one calls this, forward and backward. All report
            the loss of the whole batch, and the mean of their gradients, as DDP takes it, is its gradient. None: the
            samples that are here. Not traced by torch.compile: a graph breaks.
        samples: of a group, the number on each process, by rank, or "equal": as many as here. None asks them, at the
            cost of a small message and of waiting for the device.
        route: of a group, how samples meet (`vjvcr_fast.losses.distributed`): "time", "features", "covariance" or
            "gather"; "auto" takes the first three's that moves the fewest bytes.

    Returns: VCRTerms(loss, variance, covariance).

    Raises:
        ValueError: N < 2, fewer than two dimensions, an empty tensor, an empty sequence, tensors of a sequence that
            disagree in N, d or device, an unknown backend, form, gradient or route, a backend that cannot serve h, eps
            < 0; a group that this process is not in or whose processes disagree in T, d or dtype; samples that do not
            fit; a route that form or backend rule out.
        TypeError: not a tensor, a dtype that is not one of the four, tensors of a sequence that disagree in dtype.
    """
    hs = as_slices(h, least=2 if group is None else 1)
    if group is not None:
        settings = analytic.Settings(alpha, beta, threshold, eps, gram=False)
        return _over_processes(hs, settings, backend, gradient, form, group, samples, route)
    settings = analytic.Settings(alpha, beta, threshold, eps, gram=_use_gram(form, hs[0].shape))
    return _evaluate(hs, settings, backend, gradient)


class VCRLoss(nn.Module):
    """`vcr_loss` as a module: VCRLoss(alpha, beta)(h) -> VCRTerms."""

    def __init__(
        self,
        alpha: float,
        beta: float,
        threshold: float = 1.0,
        eps: float = 1e-4,
        backend: Backend = "auto",
        form: Form = "auto",
        gradient: Made = "auto",
        group: Any = None,
        samples: Samples = None,
        route: Route = "auto",
    ) -> None:
        super().__init__()
        self.group, self.samples = group, samples
        self.route: Route = route
        self.alpha, self.beta, self.threshold, self.eps = alpha, beta, threshold, eps
        self.backend: Backend = backend
        self.form: Form = form
        self.gradient: Made = gradient

    def forward(self, h: Representations) -> VCRTerms:
        return vcr_loss(
            h,
            alpha=self.alpha,
            beta=self.beta,
            threshold=self.threshold,
            eps=self.eps,
            backend=self.backend,
            form=self.form,
            gradient=self.gradient,
            group=self.group,
            samples=self.samples,
            route=self.route,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, threshold={self.threshold}, eps={self.eps}"


@torch._disable_dynamo  # as torch.compiler.disable, without importing the compiler at once
def _over_processes(
    hs: list[Tensor],
    settings: analytic.Settings,
    backend: str,
    gradient: str,
    form: str,
    group: Any,
    samples: Samples,
    route: str,
) -> VCRTerms:
    """The terms of the batch of a whole group; `settings.gram` is set here, where N is known."""
    found = distributed.shards(hs, group, samples)
    _check(settings, gradient)
    resolved = backends.resolve(backend, hs[0])
    settings = settings._replace(gram=_use_gram(form, (found.total, hs[0].shape[2])))
    chosen = distributed.choose(route, form, backend, hs, found)

    def alone(whole: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return _evaluate(whole, settings, resolved, gradient)

    return VCRTerms(*distributed.vcr(hs, settings, found, chosen, alone))


def _check(settings: analytic.Settings, gradient: str) -> None:
    if settings.eps < 0:
        raise ValueError(f"eps={settings.eps}: must be >= 0, it is added to the variance before the square root")
    if gradient not in get_args(Made):
        raise ValueError(f"gradient={gradient!r}: choose one of {', '.join(get_args(Made))}")


def _evaluate(hs: list[Tensor], settings: analytic.Settings, backend: str = "auto", gradient: str = "auto") -> VCRTerms:
    _check(settings, gradient)
    chosen = backends.resolve(backend, hs[0])
    if chosen == "reference":
        h = torch.cat(hs, dim=1).to(analytic.compute_dtype(hs[0]))
        with analytic.full_precision(h):
            return VCRTerms(*reference.vcr(h, settings.alpha, settings.beta, settings.threshold, settings.eps))
    wanted = torch.is_grad_enabled() and any(h.requires_grad for h in hs)
    if chosen == "triton":
        # The compiler's graphs keep what forward makes alive for long, and may not change it in place; a float16
        # gradient that waits for its loss scale underflows.
        early = gradient == "forward" and hs[0].dtype != torch.float16 and not torch.compiler.is_compiling()
        made = [wanted and early and h.requires_grad for h in hs]
        # Features that are not side by side are copied once: read in place, they would cost several times their bytes.
        return VCRTerms(*ops.vcr([h if h.stride(-1) == 1 else h.contiguous() for h in hs], *settings[:-1], made)[:3])
    if torch.compiler.is_compiling() and not wanted:
        # Where nothing needs a gradient the compiler inlines forward, and counts *hs as one argument to tell whether
        # it takes a context: it breaks on a sequence. There is nothing to differentiate: no Function is needed.
        return VCRTerms(*analytic.VCR.forward(settings, *hs)[:3])
    terms = analytic.VCR.apply(settings._replace(gradient=wanted and gradient != "backward"), *hs)[:3]
    if torch.compiler.is_compiling():
        # A compiled graph cannot be differentiated twice. torch says so only where an input itself is kept for
        # backward, and is silently wrong elsewhere: this keeps one, and changes no number.
        # Zero first: squares of large half-precision values overflow, and 0 * inf is NaN.
        guard = sum((0 * h * h).sum(dtype=terms[0].dtype) for h in hs)
        terms = [term + guard for term in terms]
    return VCRTerms(*terms)


def _use_gram(form: str, shape: Sequence[int]) -> bool:
    """Of (N, ..., d). Chosen from shapes alone: a choice from values would stop for the host."""
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: choose one of {', '.join(get_args(Form))}")
    return shape[0] < shape[-1] if form == "auto" else form == "gram"


def as_slices(h: Representations, least: int = 2) -> list[Tensor]:
    """h as a list of (N, T, d) tensors, checked; N at least `least`. Raises as `vcr_loss` says."""
    if not isinstance(h, Tensor | Sequence):
        raise TypeError(f"h is {type(h).__name__}: a torch.Tensor or a sequence of them is needed")
    tensors = [h] if isinstance(h, Tensor) else list(h)
    if not tensors:
        raise ValueError("h is an empty sequence: at least one tensor (N, ..., d) is needed")
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        name = "h" if isinstance(h, Tensor) else f"h[{i}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}: a torch.Tensor is needed")
        shape, dtype = tensor.shape, tensor.dtype
        if dtype not in analytic.DTYPES:
            raise TypeError(f"{_described(name, tensor)}: float16, bfloat16, float32 or float64 is needed")
        if tensor.layout != torch.strided:
            raise TypeError(f"{_described(name, tensor)}, {tensor.layout}: a dense tensor is needed")
        if tensor.ndim < 2:
            raise ValueError(f"{_described(name, tensor)}: (N, d) or (N, ..., d) is needed")
        if shape[0] < least:
            raise ValueError(f"{_described(name, tensor)}: N >= {least} is needed, the variance is over the batch")
        if 0 in shape:
            raise ValueError(f"{_described(name, tensor)}: it is empty")
        if (shape[0], shape[-1]) != (first.shape[0], first.shape[-1]):
            what = f"{_described(name, tensor)}, {_described('h[0]', first)}"
            raise ValueError(f"{what}: tensors of a sequence must share N and d")
        if dtype != first.dtype:
            what = f"{_described(name, tensor)}, {_described('h[0]', first)}"
            raise TypeError(f"{what}: tensors of a sequence must share their dtype")
        if tensor.device != first.device:
            what = f"{_described(name, tensor)} on {tensor.device}, h[0] on {first.device}"
            raise ValueError(f"{what}: they must share a device")
    return [t.unsqueeze(1) if t.ndim == 2 else t if t.ndim == 3 else t.flatten(1, -2) for t in tensors]


def _described(name: str, tensor: Tensor) -> str:
    return f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
