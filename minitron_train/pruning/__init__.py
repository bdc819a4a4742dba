"""Importance, selection, slicing: from a teacher and a target shape to a smaller checkpoint (arXiv 2407.14679 §2)."""
