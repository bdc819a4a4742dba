"""Distillation: losses on logits and hidden states, the frozen teacher, the training step."""
