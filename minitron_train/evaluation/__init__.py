"""Evaluation: lm-eval's tasks and perplexity on the tensor-parallel model, after and during training."""
