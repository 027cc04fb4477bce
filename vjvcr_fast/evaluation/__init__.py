"""What one run is measured with: probes, metrics, representations."""
