"""Processes, groups, and what megatron-core needs on a machine without CUDA."""
