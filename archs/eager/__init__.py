"""The original forward passes in plain PyTorch, on the raw checkpoints' own tensor names."""
