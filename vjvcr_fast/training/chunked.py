"""Training on a batch whose activations do not fit in memory: chunk by chunk, with the loss and gradient of all of it.

VCR and SIGReg couple all samples of a batch, but only through their representations h, N T d numbers. These are small:
160 videos of 100 frames with d = 2048 are 131 MB in float32, while the activations of SimVP's first layer for 128x128
frames are 33.6 GB. So a step has three parts:

1. the encoder, chunk by chunk and without a graph, gives h of the whole batch;
2. VCR of h, or SIGReg, and its gradient dh;
3. for each chunk the encoder again, now with a graph, then predictor and decoder, and the gradient of the chunk's part
   of the other terms plus <h, dh>.

Compared with one pass over the whole batch this costs one more forward pass of the encoder. Layers that draw random
numbers draw the same ones both times. Layers that mix samples (batch norm) are refused, because they would not see the
whole batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vjvcr_fast.models.energy import Energy, EnergyModel

MIXING: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,)


def check_no_mixing(model: nn.Module) -> None:
    """Raises ValueError if the output of a layer for one sample depends on the others, and names such layers."""
    found = [f"{name} ({type(m).__name__})" for name, m in model.named_modules() if isinstance(m, MIXING)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"chunks need layers that do not mix samples; these do: {', '.join(found[:3])}{more}")


def backward_chunked(model: EnergyModel, x: Tensor, y: Tensor, z: Tensor | None = None, *, chunk: int) -> Energy:
    """The same as `model(x, y, z).loss.backward()`, with the activations of `chunk` videos at a time.

    Gradients are added to `grad` of every parameter. Autocast is used if the caller has switched it on. Never waits for
    the GPU.

    Args:
        x: (N, T_x, C, H, W). y: (N, T_y, C, H, W).
        z: (N, ...) without a gradient, or None.
        chunk: videos in a chunk, at least 1. The last chunk may be smaller.

    Returns the energy of the whole batch, detached.

    Random numbers: the encoder draws those that it would draw for one chunk after the other, x before y. Predictor and
    decoder draw those that follow.

    Raises ValueError if chunk < 1, if z requires a gradient, or if layers mix samples.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1")
    if z is not None and z.requires_grad:
        raise ValueError("z requires a gradient: chunks give none to it")
    check_no_mixing(model)
    terms, device = model.terms, x.device
    parts = [slice(at, at + chunk) for at in range(0, len(x), chunk)]
    states: list[tuple[Tensor, Any]] = []
    dh: list[list[Tensor]] = [[] for _ in parts]
    variance = covariance = sigreg = loss = x.new_zeros(())
    if terms.vcr:
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for part in parts:
                states.append(_random_state(device))
                kept.append((model.encoder(x[part]), model.encode_targets(y[part])))
        torch.clear_autocast_cache()  # weights that were cast without a graph would get no gradient
        h = [torch.cat(frames).requires_grad_() for frames in zip(*kept, strict=True)]
        added = model.regularise(h)
        gradients = torch.autograd.grad(added.loss, h)
        dh = [[gradient[part] for gradient in gradients] for part in parts]
        loss, variance, covariance, sigreg = (term.detach() for term in added)
    hidden, pixel, following = x.new_zeros(()), x.new_zeros(()), _random_state(device)
    for i, part in enumerate(parts):
        if states:
            _set_random_state(states[i], device)
        encoded = [model.encoder(x[part])]
        if terms.hidden or terms.vcr:
            encoded.append(model.encode_targets(y[part]))
        if states:
            _set_random_state(following, device)
        predicted = model.predictor(encoded[0]) if z is None else model.predictor(encoded[0], z[part])
        share, weight = x.new_zeros(()), len(x[part]) / len(x)
        if terms.hidden:
            of_chunk = weight * model.distance(predicted.to(x.dtype), encoded[1].to(x.dtype))
            hidden, share = hidden + of_chunk.detach(), share + of_chunk
        if model.decoder is not None:
            of_chunk = weight * model.distance(model.decoder(predicted).to(x.dtype), y[part])
            pixel, share = pixel + of_chunk.detach(), share + model.gamma * of_chunk
        following = _random_state(device)
        roots = [(share, None), *zip(encoded, dh[i], strict=False)]  # dh: of a regularised row
        wanted = [(tensor, gradient) for tensor, gradient in roots if tensor.requires_grad]
        if wanted:
            with torch.autocast(device.type, enabled=False):
                torch.autograd.backward([tensor for tensor, _ in wanted], [gradient for _, gradient in wanted])
        loss = loss + share.detach()
    return Energy(loss, hidden, pixel, variance, covariance, sigreg)


@torch.no_grad()
def energy_chunked(model: EnergyModel, x: Tensor, y: Tensor, z: Tensor | None = None, *, chunk: int) -> Energy:
    """The same as `model(x, y, z)` without a gradient, with the activations of `chunk` videos at a time, at least 1.

    x: (N, T_x, C, H, W). y: (N, T_y, C, H, W). z: (N, ...), or None.
    """
    check_no_mixing(model)

    def each(module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        parts = zip(*(tensor.split(chunk) for tensor in inputs), strict=True)
        return torch.cat([module(*part) for part in parts])

    h_x = each(model.encoder, x)
    h_y = each(model.encode_targets, y) if model.terms.hidden or model.terms.vcr else None
    predicted = each(model.predictor, h_x) if z is None else each(model.predictor, h_x, z)
    return model.terms_of(h_x, h_y, predicted, None if model.decoder is None else each(model.decoder, predicted), y)


def _random_state(device: torch.device) -> tuple[Tensor, Any]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Any], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
