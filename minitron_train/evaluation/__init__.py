"""Evaluation: lm-eval's tasks and perplexity on the tensor-parallel model, after training and inside it."""
