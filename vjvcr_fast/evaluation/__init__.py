"""Probes, metrics, figures, and the tables of the paper."""
