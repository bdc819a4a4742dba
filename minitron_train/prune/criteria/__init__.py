"""Pruning criteria, one file each, found by file name. minitron_train/prune/criterion.py says what a file defines."""
