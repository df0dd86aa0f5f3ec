"""LoRA adapters that PEFT itself writes, on tiny models; and what PEFT itself makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs.guard import build_eager, load_weights
from mdl.convert.prepare import prepare

WHY = "runs PEFT's own code: pip install --no-deps peft accelerate (requirements/upstream.txt)"


def peft() -> Any:
    """PEFT, or a skip that says what is missing."""
    return pytest.importorskip("peft", reason=WHY)


def written(model: Any, folder: Path, *, seed: int = 7, **settings: Any) -> Any:
    """A PeftModel of ``model``, with matrices under which every mistake shows, saved to ``folder``."""
    library = peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = library.get_peft_model(model, library.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    noise = torch.randn(parameter.shape, generator=rng)
                    parameter.copy_(0.7 * noise / parameter.shape[-1] ** 0.5)
        made.save_pretrained(folder)
    return made.eval()


def merged(made: Any) -> dict[str, torch.Tensor]:
    """The weights of a PeftModel after PEFT's own merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: tensor.detach().clone() for name, tensor in made.merge_and_unload().state_dict().items()}


def nanogpt_module(checkpoint: Path) -> torch.nn.Module:
    """The module of a nanoGPT checkpoint, under its own names, as somebody would train it further."""
    from safetensors.torch import load_file  # noqa: F401 - imported where PEFT needs it

    prepared = prepare(checkpoint)
    module = build_eager(prepared.arch, prepared.dims)
    state = torch.load(checkpoint, weights_only=False)["model"]
    load_weights(prepared.arch, module, {name: tensor.clone() for name, tensor in state.items()})
    return module.eval()
