"""Prune a large language model and distil it back: Minitron (arXiv 2407.14679, 2408.11796) on megatron-core."""

__version__ = "0.1.0"
