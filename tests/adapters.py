"""LoRA adapters on tiny models: as PEFT itself writes and merges them, and files in PEFT's layout for where it is not
installed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mdl.archs.guard import build_eager, load_weights
from mdl.convert.prepare import prepare

WHY = "runs PEFT's own code: pip install --no-deps peft accelerate (requirements/upstream.txt)"
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none"}
PREFIX = "base_model.model."


def peft() -> Any:
    """PEFT, or a skip that says what is missing."""
    return pytest.importorskip("peft", reason=WHY)


def trained(model: Any, folder: Path, *, seed: int = 7, **settings: Any) -> Any:
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
    prepared = prepare(checkpoint)
    module = build_eager(prepared.arch, prepared.dims)
    state = torch.load(checkpoint, weights_only=False)["model"]
    load_weights(prepared.arch, module, {name: tensor.clone() for name, tensor in state.items()})
    return module.eval()


def pair(weight: torch.Tensor, *, rank: int = 4, seed: int = 11, turned: bool = False) -> dict[str, torch.Tensor]:
    """A and B for a weight [out, in], or [in, out] if ``turned``."""
    rng = torch.Generator().manual_seed(seed)
    out, into = weight.shape[::-1] if turned else weight.shape
    a, b = torch.randn(rank, into, generator=rng), torch.randn(out, rank, generator=rng)
    return {"lora_A.weight": a / into**0.5, "lora_B.weight": b / 2}


def tensors(state: Mapping[str, torch.Tensor], modules: tuple[str, ...], **how: Any) -> dict[str, torch.Tensor]:
    """An adapter's tensors for some modules of a state dict, under PEFT's names."""
    made: dict[str, torch.Tensor] = {}
    for k, module in enumerate(modules):
        for end, tensor in pair(state[f"{module}.weight"], seed=11 + k, **how).items():
            made[f"{PREFIX}{module}.{end}"] = tensor
    return made


def saved(folder: Path, held: Mapping[str, torch.Tensor], **settings: Any) -> Path:
    """A folder as ``save_pretrained`` of a PeftModel leaves it; a setting of ``...`` is left out."""
    folder.mkdir(parents=True)
    save_file(dict(held), folder / "adapter_model.safetensors")
    said = {key: value for key, value in {**SETTINGS, **settings}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder
