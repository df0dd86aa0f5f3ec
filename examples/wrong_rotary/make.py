"""Writes a small random llama2.c checkpoint, and a copy of mdl's mapping from which the rotary reordering is gone.

    python examples/wrong_rotary/make.py OUT

Weights have unit gain, so that attention is far from uniform; with small weights a rotary mistake would hardly show.
"""

import sys
from pathlib import Path

import torch

import mdl.archs.llama2c

OUT = Path(sys.argv[1])
SIZES = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 256, "max_seq_len": 256}
HEAD, FFN = 32, 352


def linear(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) / columns**0.5


def main() -> None:
    torch.manual_seed(0)
    dim, vocab = SIZES["dim"], SIZES["vocab_size"]
    state = {"tok_embeddings.weight": torch.randn(vocab, dim), "output.weight": linear(vocab, dim)}
    state["norm.weight"] = 1 + 0.1 * torch.randn(dim)
    for i in range(SIZES["n_layers"]):
        rows = {"wq": dim, "wk": SIZES["n_kv_heads"] * HEAD, "wv": SIZES["n_kv_heads"] * HEAD, "wo": dim}
        state |= {f"layers.{i}.attention.{name}.weight": linear(n, dim) for name, n in rows.items()}
        state |= {f"layers.{i}.feed_forward.{name}.weight": linear(FFN, dim) for name in ("w1", "w3")}
        state[f"layers.{i}.feed_forward.w2.weight"] = linear(dim, FFN)
        state |= {f"layers.{i}.{name}.weight": 1 + 0.1 * torch.randn(dim) for name in ("attention_norm", "ffn_norm")}
    OUT.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "model_args": SIZES, "iter_num": 0}, OUT / "ckpt.pt")
    right = Path(mdl.archs.llama2c.__file__).parent.parent / "mappings" / "llama2c.yaml"
    wrong = "\n".join(line for line in right.read_text().splitlines() if "permute_rope" not in line)
    (OUT / "forgetful.yaml").write_text(wrong)
    (OUT / "forgetful.py").write_text("from mdl.archs.llama2c import ARCH\n")


if __name__ == "__main__":
    main()
