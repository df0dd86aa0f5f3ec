"""The composable decoder: what its config.json may say, and which tensors follow from that. No torch, no vllm."""
