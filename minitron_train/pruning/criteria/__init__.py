"""Pruning criteria, one file each, found by file name. minitron_train/pruning/criterion.py describes what a file defines."""
