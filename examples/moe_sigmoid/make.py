"""Writes ckpt.pt beside itself, small and random, as the training script would: python make.py

Weights have unit gain, and the router's bias is as large as its scores, so that it decides which experts are taken.
"""

from pathlib import Path

import torch
from model import Flock

HP = {"vocab": 256, "width": 128, "depth": 3, "n_heads": 4, "kv_heads": 2, "head_dim": 32, "inner": 320}
HP |= {"n_experts": 6, "top_k": 2, "expert_inner": 96, "shared_inner": 160, "theta": 10000.0, "context": 256}


def main() -> None:
    torch.manual_seed(0)
    model = Flock(HP)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("balance"):
                weight.normal_(0, 0.3)
            elif weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 1 if name.startswith("tokens") else weight.shape[1] ** -0.5)
    torch.save({"weights": model.state_dict(), "hp": HP}, Path(__file__).with_name("ckpt.pt"))
    print(f"ckpt.pt: {len(model.state_dict())} tensors under 'weights', and their sizes under 'hp'")


if __name__ == "__main__":
    main()
