"""Writes ckpt.pt beside itself, small and random, as the training script would: python make.py

Weights have unit gain, and leaks lie around 1/4, so that what was read a dozen tokens ago still counts.
"""

from pathlib import Path

import torch
from model import Decoder

HP = {"vocab": 256, "width": 128, "depth": 6, "every": 3, "channels": 160, "taps": 4, "heads": 4, "inner": 320}
HP |= {"context": 256, "eps": 1e-5}


def main() -> None:
    torch.manual_seed(0)
    model = Decoder(HP)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("tilt"):
                weight.normal_(-1.1, 0.5)
            elif weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 1 if name.startswith("embed") else weight.shape[1] ** -0.5)
    torch.save({"weights": model.state_dict(), "hp": HP}, Path(__file__).with_name("ckpt.pt"))
    print(f"ckpt.pt: {len(model.state_dict())} tensors under 'weights', and their sizes under 'hp'")


if __name__ == "__main__":
    main()
