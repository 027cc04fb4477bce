"""GPU kernels in Triton, installed as `vjvcr_fast.kernels`. They know no autograd: losses/ops.py adds it."""
