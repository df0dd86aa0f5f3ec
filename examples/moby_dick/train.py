"""Train a small character-level GPT on the text beside this file and save it as nanoGPT does.

    python examples/moby_dick/train.py            # about 20 minutes on one CPU core

Writes ckpt.pt ({"model", "model_args", "iter_num", "best_val_loss", "config"}) and meta.pkl (the character
table) into --out. It stands for the checkpoint that somebody's own training code wrote: nothing here knows mdl.
"""

import argparse
import math
import pickle
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for t in self.attn["c_attn"](self.ln_1(x)).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.attn["c_proj"](y)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int, **_: object):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.apply(self._init)
        for name, p in self.named_parameters():  # residual projections start smaller (GPT-2)
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer))
        self.transformer["wte"].weight = self.lm_head.weight  # tied

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def build(checkpoint: Path) -> GPT:
    """The saved model again: what `mdl verify --reference examples/moby_dick/train.py:build` asks for."""
    saved = torch.load(checkpoint, weights_only=True)
    model = GPT(**saved["model_args"])
    model.load_state_dict(saved["model"])
    return model


def batch(data: torch.Tensor, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(data) - length - 1, (size,)).tolist()
    rows = torch.stack([data[s : s + length + 1] for s in starts])
    return rows[:, :-1], rows[:, 1:]


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--text", type=Path, default=HERE / "moby_dick.txt")
    cli.add_argument("--out", type=Path, default=HERE)
    cli.add_argument("--iters", type=int, default=2600)
    cli.add_argument("--batch", type=int, default=24)
    cli.add_argument("--lr", type=float, default=2e-3)
    args = cli.parse_args()
    torch.manual_seed(1851)

    text = args.text.read_text()
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    data = torch.tensor([stoi[c] for c in text])
    train, val = data[: int(0.95 * len(data))], data[int(0.95 * len(data)) :]
    model_args = {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 256}
    model_args |= {"bias": True, "vocab_size": len(chars), "dropout": 0.0}
    model = GPT(**model_args)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99))
    best = float("inf")
    for step in range(args.iters + 1):
        warm, rest = min(1.0, step / 100), step / args.iters
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * rest)))
        if step % 250 == 0:
            with torch.no_grad():
                pairs = [batch(val, 32, 256) for _ in range(4)]
                losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in pairs]
            print(f"step {step} val loss {sum(losses) / 4:.3f}", flush=True)
            if sum(losses) / 4 < best:
                best = sum(losses) / 4
                config = {"dataset": args.text.stem, "dtype": "float32", "compile": False}
                checkpoint = {"model": model.state_dict(), "model_args": model_args, "iter_num": step}
                torch.save(checkpoint | {"best_val_loss": best, "config": config}, args.out / "ckpt.pt")
        x, y = batch(train, args.batch, 256)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    (args.out / "meta.pkl").write_bytes(pickle.dumps(meta))


if __name__ == "__main__":
    main()
