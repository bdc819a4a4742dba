"""Pruning criteria, one file each, found by file name. minitron_train/pruning/criterion.py says what a file defines."""
