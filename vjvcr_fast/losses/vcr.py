"""The public losses: variance hinge, covariance penalty, and their weighted sum (VCR).

The equations are those of `vjvcr_fast.reference`. This file checks the arguments and picks the code that computes them:
`cpu` (a compiled operator), `ops` (Triton kernels), `analytic` (plain PyTorch) or `reference` itself.

`h` is (N, d), (N, T, d) or (N, ..., d): N videos first, d features last, and everything between counts as time steps.
It may also be a sequence of such tensors with the same N and d, for example [h_x, h_y]. Their time steps count
together, as if concatenated, but nothing is concatenated.

float64 is computed in float64, all narrower types in float32, also under autocast. The terms have the dtype of the
computation, gradients that of h. NaN or Inf in h gives NaN. Nothing here waits for the GPU, except a group whose
`samples` are not given, and alpha, beta, threshold or eps if it is a tensor there.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from vjvcr_fast import reference
from vjvcr_fast.losses import analytic, cpu, distributed, ops
from vjvcr_fast.losses.analytic import Settings
from vjvcr_fast.losses.backends import Backend, check_choice, check_number, resolve, transformed
from vjvcr_fast.losses.distributed import Route

Form = Literal["auto", "gram", "covariance"]
Made = Literal["auto", "forward", "backward"]
Over = Literal["samples", "time", "both"]
Divisor = Literal["d", "d(d-1)"]
FORMS, MADE, ROUTES, OVERS, DIVISORS = map(get_args, (Form, Made, Route, Over, Divisor))

Representations: TypeAlias = Tensor | Sequence[Tensor]
Samples: TypeAlias = Sequence[int] | Literal["equal"] | None


class VCRTerms(NamedTuple):
    """Three differentiable scalars: loss = alpha * variance + beta * covariance, and the two terms without weights."""

    loss: Tensor
    variance: Tensor
    covariance: Tensor


def variance_hinge(
    h: Representations, *, threshold: float = 1.0, eps: float = 1e-4, backend: Backend = "auto"
) -> Tensor:
    """Equation (1): the mean over time steps and features of max(0, threshold - sqrt(Var + eps)).

    Var is the unbiased variance over N; h.transpose(0, 1) gives it over T. Arguments and errors: see `vcr_loss`.
    Returns a scalar.
    """
    hs = as_slices(h)
    threshold, eps = check_number("threshold", threshold), check_eps(eps)
    settings = Settings(1.0, 0.0, threshold, eps, gram=False, covariance=False)
    return _evaluate(hs, settings, resolve(backend, hs[0])).loss


def covariance_penalty(h: Representations, *, backend: Backend = "auto") -> Tensor:
    """Equation (2): 1/(T d) times the sum over time steps of the squared off-diagonal covariances, divisor N - 1.

    Arguments and errors: see `vcr_loss`. Returns a scalar.
    """
    hs = as_slices(h)
    settings = Settings(0.0, 1.0, 1.0, 0.0, _use_gram("auto", hs), variance=False)
    return _evaluate(hs, settings, resolve(backend, hs[0])).loss


def vcr_loss(
    h: Representations,
    *,
    alpha: float,
    beta: float,
    threshold: float = 1.0,
    eps: float = 1e-4,
    over: Over = "samples",
    covariance_divisor: Divisor = "d",
    backend: Backend = "auto",
    form: Form = "auto",
    gradient: Made = "auto",
    group: Any = None,
    samples: Samples = None,
    route: Route = "auto",
) -> VCRTerms:
    """Equation (4): alpha * variance_hinge + beta * covariance_penalty, computed together.

    Args:
        h: (N, d), (N, ..., d), or a sequence of such tensors with the same N and d. N >= 2. float16, bfloat16, float32
            or float64, any strides. (For the Triton kernels h is copied if its features are not adjacent in memory.)
        alpha, beta: weights of the two terms, numbers. To learn them, weigh the terms: they are differentiable.
        threshold: the paper's tau.
        eps: added to the variance before the square root, >= 0.
        over: what variance and covariance are over. "samples": the N samples at each time step, as in the paper.
            "time": the T time steps of each sample; T >= 2, and N = 1 will do. "both": all N T rows, as samples of one
            time step; N T >= 2 will do. A tensor is not copied for that, unless "both" meets strides that allow no
            view; a sequence is concatenated along T. Fewer rows raise ValueError, as does a value that is unknown.
        covariance_divisor: "d" of equation (2), or "d(d-1)": the penalty is then the mean over off-diagonal entries.
        backend: "native" (a compiled CPU operator), "triton" (fused CUDA kernels), "torch" (plain operations with an
            analytic gradient), "reference" (reference.py and autograd, for comparison) or "auto": native on a CPU and
            triton on a GPU if they support h, else torch.
        form: "gram" (N x N products), "covariance" (d x d products) or "auto", the smaller of the two. Both are exact;
            docs/math.md tells how they round.
        gradient: when to compute dloss/dh. "forward" computes it while h is still in the cache, "backward" waits. The
            result is the same, but "backward" takes one product more and less memory. "auto" is "forward". Only backend
            "native" has the choice, in float32 and float64 and outside compiled graphs. All else waits, as do the
            routes "features" and "covariance" of a group. Nothing is computed if h needs no gradient.
        group: processes of torch.distributed whose samples form one batch, for example torch.distributed.group.WORLD.
            N is then the number of samples of all processes together; each has at least one. Every process must call
            this function, and backward too. All of them get the loss of the whole batch; the mean of their gradients,
            which DDP takes, is the gradient of that loss. torch.compile does not trace this: the graph breaks. With
            over="time" each process computes the terms of its own samples; only these are exchanged, by no `route`.
            None: the batch is h.
        samples: how many samples each process of `group` holds, as a list by rank, or "equal" if all hold the same
            number. None asks the processes, which costs a small message and waits for the GPU.
        route: how the processes of `group` exchange data: "time", "features", "covariance" or "gather" (see
            `vjvcr_fast.losses.distributed`). "auto" takes the one of the first three that moves the fewest bytes.

    Returns: VCRTerms(loss, variance, covariance). The covariance has the divisor that was chosen.

    Raises:
        ValueError: if N < 2, h has fewer than two dimensions, or a tensor or the sequence is empty; if the tensors
            differ in N, d or device; if alpha, beta, threshold or eps is not finite, or eps < 0 (tensors are not read
            for that); if backend, form, gradient or route is unknown; if the backend does not support h. With a group:
            if this process is not in it, if the processes differ in T, d or dtype, if `samples` does not fit, or if
            form or backend rule out the route.
        TypeError: if h is not a tensor or a sequence of tensors, if a dtype is not one of the four, if the tensors
            differ in dtype, or if alpha, beta, threshold or eps is no number, or a tensor that requires a gradient.
        RuntimeError: if a Triton kernel is not loaded yet while a CUDA graph is captured, here or in backward. Make the
            same call once before, backward included, with the same dtype, sizes and strides.
    """
    check_choice("over", over, OVERS)
    check_choice("covariance_divisor", covariance_divisor, DIVISORS)
    hs = _regrouped(h, over, alone=group is None)
    check_choice("form", form, FORMS)
    check_choice("gradient", gradient, MADE)
    check_choice("route", route, ROUTES)
    alpha, beta = (_weight(name, of, hs[0]) for name, of in (("alpha", alpha), ("beta", beta)))
    threshold, eps = check_number("threshold", threshold), check_eps(eps)
    chosen = resolve(backend, hs[0])
    if covariance_divisor == "d(d-1)":  # what computes the terms divides by d
        factor = 1 / max(hs[0].shape[-1] - 1, 1)
        beta = beta * factor

    def alone(hs: list[Tensor]) -> VCRTerms:
        return _evaluate(hs, Settings(alpha, beta, threshold, eps, _use_gram(form, hs)), chosen, gradient)

    if group is None:
        terms = alone(hs)
    elif over == "time":
        if route != "auto":
            raise ValueError(f"route={route!r}: with over='time' processes exchange the terms alone, leave route out")
        terms = VCRTerms(*distributed.mean_over_samples(hs[0], alone, group, samples))
    else:
        if over == "both" and samples is not None and samples != "equal":
            rows = len(hs[0]) // len(h if isinstance(h, Tensor) else h[0])  # of one sample
            samples = [n * rows for n in distributed.checked(samples, len(hs[0]) // rows, group)]
        settings = Settings(alpha, beta, threshold, eps, gram=False)
        terms = VCRTerms(*distributed.vcr(hs, settings, alone, backend, form, group, samples, route))
    if covariance_divisor == "d":
        return terms
    return VCRTerms(terms.loss, terms.variance, terms.covariance * factor)


def _weight(name: str, value: Any, h: Tensor) -> Any:
    """As `check_number`. A tensor gets the dtype of the terms: products of a half-precision one would be rounded."""
    value = check_number(name, value)
    return value.to(analytic.compute_dtype(h)) if isinstance(value, Tensor) else value


class VCRLoss(nn.Module):
    """`vcr_loss` as a module: VCRLoss(alpha, beta)(h) returns VCRTerms. See `vcr_loss` for the arguments."""

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
        over: Over = "samples",
        covariance_divisor: Divisor = "d",
    ) -> None:
        super().__init__()
        self.alpha, self.beta = check_number("alpha", alpha), check_number("beta", beta)
        self.threshold, self.eps = check_number("threshold", threshold), check_eps(eps)
        self.backend: Backend = backend
        self.form: Form = form
        self.gradient: Made = gradient
        self.group, self.samples = group, samples
        self.route: Route = route
        self.over: Over = over
        self.covariance_divisor: Divisor = covariance_divisor

    def forward(self, h: Representations) -> VCRTerms:
        """h: as for `vcr_loss`. Returns its three terms and raises its errors."""
        return vcr_loss(
            h,
            alpha=self.alpha,
            beta=self.beta,
            threshold=self.threshold,
            eps=self.eps,
            over=self.over,
            covariance_divisor=self.covariance_divisor,
            backend=self.backend,
            form=self.form,
            gradient=self.gradient,
            group=self.group,
            samples=self.samples,
            route=self.route,
        )

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"alpha={self.alpha}, beta={self.beta}, threshold={self.threshold}, eps={self.eps}"


def as_slices(h: Representations, least: int = 2) -> list[Tensor]:
    """h as a list of (N, T, d) tensors, N >= `least`. Raises the errors that `vcr_loss` documents."""
    return _as_slices(_checked(h, least))


def _as_slices(tensors: list[Tensor]) -> list[Tensor]:
    return [t.unsqueeze(1) if t.ndim == 2 else t if t.ndim == 3 else t.flatten(1, -2) for t in tensors]


def _regrouped(h: Representations, over: str, alone: bool) -> list[Tensor]:
    """h as (N', T', d) tensors, of which the statistics over N' are those that `over` asks for.

    alone: there are no samples but these. Raises the errors that `vcr_loss` documents.
    """
    if over == "samples":
        return as_slices(h, least=2 if alone else 1)
    tensors = _checked(h, least=1)
    if over == "time":
        found = [t.transpose(0, 1) for t in _as_slices(tensors)]
    else:
        if not torch.compiler.is_compiling():  # which cannot sort sizes that it leaves open
            # Which row is which does not matter: in the order in which they lie in memory they need no copy.
            tensors = [t.permute(*sorted(range(t.ndim - 1), key=t.stride, reverse=True), -1) for t in tensors]
        found = [t.flatten(0, -2).unsqueeze(1) for t in tensors]
    whole = torch.cat(found) if len(found) > 1 else found[0]
    if len(whole) < 2 and (alone or over == "time"):
        count, what = ("T", "time") if over == "time" else ("N T", "all rows")
        raise ValueError(f"over={over!r}: h has {count} = 1, {count} >= 2 is needed, the variance is over {what}")
    return [whole]


def _checked(h: Representations, least: int) -> list[Tensor]:
    """The tensors of h, at least one, each (N, ..., d) with N >= `least`. Raises the errors of `vcr_loss`."""
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
        shape = tensor.shape
        if tensor.dtype not in analytic.DTYPES:
            raise TypeError(f"{_described(name, tensor)}: float16, bfloat16, float32 or float64 is needed")
        if tensor.layout != torch.strided:
            raise TypeError(f"{_described(name, tensor)}, {tensor.layout}: a dense tensor is needed")
        if tensor.ndim < 2:
            raise ValueError(f"{_described(name, tensor)}: (N, d) or (N, ..., d) is needed")
        if shape[0] < least:
            why = ", the variance is over the batch" if least > 1 else ""
            raise ValueError(f"{_described(name, tensor)}: N >= {least} is needed{why}")
        if 0 in shape:
            raise ValueError(f"{_described(name, tensor)}: it is empty")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{_described(name, tensor)}, {_described('h[0]', first)}: they must share their dtype")
        if (shape[0], shape[-1], tensor.device) != (first.shape[0], first.shape[-1], first.device):
            both = f"{_described(name, tensor)}, {_described('h[0]', first)}"
            raise ValueError(f"{both}: they must share N, d and device")
    return tensors


def _described(name: str, tensor: Tensor) -> str:
    return f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype} on {tensor.device}"


def check_eps(eps: float) -> float:
    """eps, if it is a finite number >= 0; a tensor of one element as it is. Raises TypeError or ValueError if not."""
    number: float = check_number("eps", eps)
    if not isinstance(number, Tensor) and number < 0:
        raise ValueError(f"eps={eps}: must be >= 0, it is added to the variance before the square root")
    return number


def _use_gram(form: str, hs: Sequence[Tensor]) -> bool:
    """Decided by the shape alone: looking at values would wait for the GPU."""
    return hs[0].shape[0] < hs[0].shape[2] if form == "auto" else form == "gram"


def _evaluate(hs: list[Tensor], settings: Settings, backend: str, gradient: str = "auto") -> VCRTerms:
    """The terms of tensors (N, T, d) that hold the whole batch. backend: any but "auto"."""
    if backend == "reference":
        h = torch.cat(hs, dim=1).to(analytic.compute_dtype(hs[0]))
        with analytic.full_precision(h):
            return VCRTerms(*reference.vcr(h, *settings[:4]))
    if transformed():
        return VCRTerms(*analytic.plain(hs, settings)[0])
    if backend == "triton":
        # If features are not adjacent, one copy is cheaper than reading h in place, at several times its bytes.
        hs = [h if h.stride(-1) == 1 else h.contiguous() for h in hs]
    if torch.compiler.is_compiling():
        return VCRTerms(*_compiled(hs, settings, backend))
    if backend == "triton":
        return VCRTerms(*ops.terms(hs, settings))
    if backend == "native":
        return VCRTerms(*cpu.terms(hs, settings, early=gradient != "backward"))
    return VCRTerms(*analytic.VCR.apply(settings, *hs)[:3])


def _compiled(hs: list[Tensor], settings: Settings, backend: str) -> Sequence[Tensor]:
    """The terms in a graph of torch.compile."""
    alpha, beta, threshold, eps, *_ = settings
    if backend != "torch" and not isinstance(threshold, Tensor) and not isinstance(eps, Tensor):
        # An operator takes no tensors for numbers, and each new number makes a new graph. The weights, which may change
        # from step to step, stay outside.
        operator = ops.operator if backend == "triton" else cpu.operator
        _, variance, covariance = operator(hs, Settings(0.0, 0.0, *settings[2:]))
        return (alpha * variance + beta * covariance).to(variance.dtype), variance, covariance
    if torch.is_grad_enabled() and any(h.requires_grad for h in hs):
        return guarded(analytic.VCR.apply(settings, *hs)[:3], hs)
    # Without gradients the compiler would inline the Function and fail to match its variable number of tensors.
    return analytic.plain(hs, settings)[0]


def guarded(terms: Sequence[Tensor], hs: list[Tensor]) -> Sequence[Tensor]:
    """The terms, so that an attempt to differentiate a compiled graph twice, which cannot be done, raises an error.

    PyTorch raises it only if an input itself is kept for backward, and is silently wrong otherwise. This keeps each
    input and changes no number. Zero comes first: the square of a large float16 value overflows, and 0 * inf is NaN.
    """
    if not torch.compiler.is_compiling():
        return terms
    guard = sum((0 * h * h).sum(dtype=terms[0].dtype) for h in hs)
    return [term + guard for term in terms]
