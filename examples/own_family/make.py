"""Writes ckpt.pt beside itself, small and random, as the training script would: python make.py

Weights have unit gain, so that attention is far from uniform; with small weights a rotary mistake would hardly show.
"""

from pathlib import Path

import torch
from model import Decoder

HP = {"vocab": 256, "width": 128, "depth": 2, "heads": 4, "groups": 2, "size": 32, "inner": 320, "context": 256}
HP |= {"theta": 10000.0, "eps": 1e-5}


def main() -> None:
    torch.manual_seed(0)
    model = Decoder(HP)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 1 if name.startswith("embed") else weight.shape[1] ** -0.5)
    torch.save({"weights": model.state_dict(), "hp": HP}, Path(__file__).with_name("ckpt.pt"))
    print(f"ckpt.pt: {len(model.state_dict())} tensors under 'weights', and their sizes under 'hp'")


if __name__ == "__main__":
    main()
