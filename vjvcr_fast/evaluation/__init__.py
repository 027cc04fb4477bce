"""Measurements of one run: probes, image quality, and representations of any videos."""
