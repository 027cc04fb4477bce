"""What the paper is compared with: its tables and figures, and sweeps of settings."""


class SweepError(RuntimeError):
    """Some entries of a sweep failed; the message names them."""


class ReproduceError(RuntimeError):
    """Some parts of `reproduce all` failed; the message names them."""
