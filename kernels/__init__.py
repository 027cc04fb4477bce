"""The losses as Triton kernels for GPUs, installed as `vjvcr_fast.kernels`. losses/ops.py makes them differentiable."""
