"""The forward that `mdl verify` takes by default. It is given the dims; mdl loads the weights itself."""

from model import Decoder


def build(dims):
    names = {"vocab": "vocab", "width": "hidden", "depth": "layers", "every": "every", "channels": "channels"}
    names |= {"taps": "taps", "heads": "heads", "inner": "ffn", "eps": "norm_eps"}
    return Decoder({ours: dims[name] for ours, name in names.items()})
