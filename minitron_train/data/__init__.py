"""From files to batches: sources, blend, tokenising, packing, calibration."""
