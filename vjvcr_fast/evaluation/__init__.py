"""Probes, metrics, figures, and the tables of the paper."""


class SweepError(RuntimeError):
    """Some entries of a sweep failed; the message names them."""


class ReproduceError(RuntimeError):
    """Some parts of `reproduce all` failed; the message names them."""
