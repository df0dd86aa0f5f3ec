"""Writes ckpt.pt and its table of characters beside itself, small and random, as training would: python make.py

Weights have unit gain, so that attention is far from uniform; the head's is four, so that logits reach the cap.
"""

import pickle
import string
from pathlib import Path

import torch
from model import Kiln

CHARACTERS = "\n" + string.printable[:95]
CFG = {"vocab": len(CHARACTERS), "width": 128, "depth": 3, "n_head": 4, "kv_groups": 2, "head_size": 32, "rotated": 16}
CFG |= {"base": 5000.0, "inner": 320, "context": 256}


def main() -> None:
    torch.manual_seed(0)
    model = Kiln(CFG)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                gain = 4 if name.startswith("head") else 1
                weight.normal_(0, 1 if name.startswith("embed") else gain * weight.shape[1] ** -0.5)
    here = Path(__file__).parent
    torch.save({"model": model.state_dict(), "cfg": CFG}, here / "ckpt.pt")
    table = {"stoi": {c: i for i, c in enumerate(CHARACTERS)}, "itos": dict(enumerate(CHARACTERS))}
    (here / "meta.pkl").write_bytes(pickle.dumps(table))
    print(f"ckpt.pt: {len(model.state_dict())} tensors under 'model', and their sizes under 'cfg'")
    print(f"meta.pkl: a table of {len(CHARACTERS)} characters")


if __name__ == "__main__":
    main()
