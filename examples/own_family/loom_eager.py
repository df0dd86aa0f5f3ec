"""The forward that `mdl verify` takes by default. It is given the dims; mdl loads the weights itself."""

from model import Decoder


def build(dims):
    names = {"vocab": "vocab", "width": "hidden", "depth": "layers", "heads": "heads", "groups": "kv_heads"}
    names |= {"size": "head_dim", "inner": "ffn", "theta": "rope_theta", "eps": "norm_eps"}
    return Decoder({ours: dims[name] for ours, name in names.items()})
