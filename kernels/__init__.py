"""GPU kernels, installed as `vjvcr_fast.kernels`. Launchers only; autograd lives above them."""
