"""The one model that is scored, distilled and evaluated: megatron-core's GPTModel, built, run and sampled from here."""
