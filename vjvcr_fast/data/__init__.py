"""Data: real MNIST digits and MovingMNIST, rendered on the device while training."""

from vjvcr_fast.data.digits import Digits, DigitsError, load_digits, split_digits
from vjvcr_fast.data.moving_mnist import MovingMNIST, Videos

__all__ = ["Digits", "DigitsError", "MovingMNIST", "Videos", "load_digits", "split_digits"]
