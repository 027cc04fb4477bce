"""Measures the loss on this machine: `vjvcr-fast bench`. benchmarks/, which is not installed, measures with it, too.

timing.py has devices, turns and memory; loss.py what VCR is compared with, and how results are checked.
"""
