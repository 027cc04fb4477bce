"""Video files: one `open_video` for all decoders, worker processes, scans, the cache, and clips for training."""
