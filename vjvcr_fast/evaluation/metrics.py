"""Image quality."""

from torch import Tensor


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """PSNR of every frame in dB: 10 log10(1 / MSE), the prediction clipped to [0, 1] first.

    target: (..., C, H, W) in [0, 1]; prediction: the same shape, or one that broadcasts to it. Returns (...). Reported
    numbers are its mean over frames and videos. An MSE under 1e-10 counts as 1e-10, so that a perfect frame is 100 dB.
    """
    mse = (target - prediction.clamp(0, 1)).square().flatten(-3).mean(dim=-1)
    return -10 * mse.clamp_min(1e-10).log10()
