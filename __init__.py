"""mdl: raw PyTorch checkpoints into vLLM, with proof that vLLM computes what the original code computed."""

__version__ = "0.1.0"
