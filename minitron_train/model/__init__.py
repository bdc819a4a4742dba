"""megatron-core's GPTModel: build, load weights, embed, compute logits, generate. Every stage uses this one model."""
