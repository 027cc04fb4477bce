"""A batch larger than its activations allow: chunk after chunk, with the loss and gradient of the whole batch.

VCR couples all samples of a batch through their representations alone, N T d numbers, which are small: 160 videos of
100 frames with d = 2048 are 131 MB in float32, where the activations of SimVP's first layer for 128x128 frames are
33.6 GB. So the representations come first, without a graph; then VCR and its gradient by them, dh; then, chunk by
chunk, the encoder again, predictor and decoder with a graph, and the gradient of the chunk's share plus <h, dh>. What
that adds to one pass is one more forward pass of the encoder.

Layers that draw random numbers draw the same ones both times. Layers that mix samples would not see the whole batch,
so they are refused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vjvcr_fast.models.energy import Energy, EnergyModel

MIXING: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,)


def check_no_mixing(model: nn.Module) -> None:
    """Raises ValueError naming the layers whose output for a sample depends on the others, as BatchNorm's does."""
    found = [f"{name} ({type(m).__name__})" for name, m in model.named_modules() if isinstance(m, MIXING)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"chunks need layers that do not mix samples; these do: {', '.join(found[:3])}{more}")


def backward_chunked(model: EnergyModel, x: Tensor, y: Tensor, z: Tensor | None = None, *, chunk: int) -> Energy:
    """The Energy of the whole batch, detached, and its gradient, added to `grad` of every parameter, as by
    `model(x, y, z).loss.backward()`, with the activations of `chunk` videos at a time.

    x: (N, T_x, C, H, W). y: (N, T_y, C, H, W). z: (N, ...), without a gradient of its own. chunk: at least 1; the last
    may be smaller. Under autocast, as the caller has it. Random numbers: of the encoder, those that it would draw for
    the chunks one after the other, x before y; of predictor and decoder, those that follow. Never waits for the device.

    Raises ValueError for chunk < 1, a z that requires a gradient, layers that mix samples.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1")
    if z is not None and z.requires_grad:
        raise ValueError("z requires a gradient: chunks give none to it")
    check_no_mixing(model)
    terms, device = model.terms, x.device
    both = terms.hidden or terms.vcr
    parts = [slice(at, at + chunk) for at in range(0, len(x), chunk)]
    states: list[tuple[Tensor, Any]] = []
    dh: list[list[Tensor | None]] = [[None, None] for _ in parts]
    variance = covariance = loss = x.new_zeros(())
    if terms.vcr:
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad(), _uncached_autocast(device):
            for part in parts:
                states.append(_random_state(device))
                kept.append((model.encoder(x[part]), model.encode_targets(y[part])))
        h = [torch.cat(frames).requires_grad_() for frames in zip(*kept, strict=True)]
        vcr = model.vcr(h)
        gradients = torch.autograd.grad(vcr.loss, h)
        dh = [[gradient[part] for gradient in gradients] for part in parts]
        loss, variance, covariance = (term.detach() for term in vcr)
    hidden, pixel, following = x.new_zeros(()), x.new_zeros(()), _random_state(device)
    for i, part in enumerate(parts):
        if states:
            _set_random_state(states[i], device)
        h_x = model.encoder(x[part])
        h_y = model.encode_targets(y[part]) if both else None
        if states:
            _set_random_state(following, device)
        predicted = model.predictor(h_x) if z is None else model.predictor(h_x, z[part])
        share, weight = x.new_zeros(()), len(x[part]) / len(x)
        if terms.hidden and h_y is not None:
            of_chunk = weight * model.distance(predicted.to(x.dtype), h_y.to(x.dtype))
            hidden, share = hidden + of_chunk.detach(), share + of_chunk
        if model.decoder is not None:
            of_chunk = weight * model.distance(model.decoder(predicted).to(x.dtype), y[part])
            pixel, share = pixel + of_chunk.detach(), share + model.gamma * of_chunk
        following = _random_state(device)
        _backward([share, h_x, h_y], [None, *dh[i]], device)
        loss = loss + share.detach()
    return Energy(loss, hidden, pixel, variance, covariance)


def _backward(tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None], device: torch.device) -> None:
    """Of a scalar, and of representations where they have a gradient from VCR."""
    both = [(t, g) for t, g in zip(tensors, gradients, strict=True) if t is not None and t.requires_grad]
    wanted = [(t, g) for t, g in both if t.ndim == 0 or g is not None]
    if wanted:
        with torch.autocast(device.type, enabled=False):
            torch.autograd.backward([t for t, _ in wanted], [g for _, g in wanted])


def _uncached_autocast(device: torch.device) -> torch.autocast:
    """As the caller's, but weights that are cast here, where nothing has a gradient, are not kept for later."""
    kind = device.type
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False)


def _random_state(device: torch.device) -> tuple[Tensor, Any]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Any], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
