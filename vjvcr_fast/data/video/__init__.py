"""Video files: decoders behind one `open_video`, processes that decode, scans, the cache, clips for training."""
