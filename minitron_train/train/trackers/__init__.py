"""Trackers, one file each: where a run's metrics go besides metrics.jsonl."""
