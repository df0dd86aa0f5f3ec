"""The other files of a drafted package: what installs it, tests it, and tells its user what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .choose import OWN
from .settings import quoted

if TYPE_CHECKING:
    from .arch_file import Subject

PYPROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "0.1.0"
description = "{title}: its checkpoints under vLLM, by mdl"
requires-python = ">=3.11"
dependencies = ["mdl"]

# mdl finds the family by this in every process, without --arch.
[project.entry-points."mdl.archs"]
{name} = "{name}.arch"
{plugin}
[tool.setuptools]
packages = ["{name}"]

[tool.setuptools.package-data]
{name} = ["*.yaml"]
"""

PLUGIN = """
# vLLM loads this in every one of its processes, so that a plain `vllm serve` knows the class.
[project.entry-points."vllm.general_plugins"]
{name} = "{name}.plugin:register"
"""

REGISTER = '''"""What every process of vLLM runs at its start: it names the class and does not import it."""


def register() -> None:
    """Tell vLLM of the class, and transformers of its model type. May be called twice in one process."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from .configuration import Config

    AutoConfig.register("{name}", Config, exist_ok=True)
    if "{own_class}" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("{own_class}", "{name}.model:{own_class}")
'''

CONFIG = '''"""What transformers makes of config.json; in a module, since vLLM's processes send it by name."""

from transformers import PretrainedConfig


class Config(PretrainedConfig):
    """Every field of config.json is an attribute."""

    model_type = "{name}"
'''

MODEL = '''"""The model under vLLM, in vLLM's own layers. Weights keep the checkpoint's names, as arch.py lists them."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import AutoWeightsLoader


class {own_class}(nn.Module):
    """{title}."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        # TODO: build the modules under the names of the files. Which of vLLM's layers stands for which of torch's:
        #   nn.Embedding -> VocabParallelEmbedding, the head -> ParallelLMHead, q, k, v -> QKVParallelLinear,
        #   nn.Linear into a half -> ColumnParallelLinear, out of it -> RowParallelLinear, RMSNorm -> RMSNorm,
        #   rotation -> get_rope(...), attention itself -> Attention(..., prefix=f"{{prefix}}.layers.{{i}}.attn")
        raise NotImplementedError(f"{{config.model_type}}: write the model")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] to embeddings [T, C]."""
        raise NotImplementedError

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None) -> torch.Tensor:
        """Token ids [T] at their positions [T] to hidden states [T, C]. vLLM keeps the KV cache: Attention finds it."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Hidden states [T, C] to logits [T, V]: ``self.logits_processor(self.head, hidden_states)``."""
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Names of files to names of modules; say here which of them are stacked into one (q, k, v; gate, up)."""
        return AutoWeightsLoader(self).load_weights(weights)
'''

EAGER = '''"""The original forward in plain PyTorch: the reference of `mdl verify` where no other is named."""

import torch
from mdl.archs.base import Dims


def build(dims: Dims) -> torch.nn.Module:
    """A module whose state_dict has the checkpoint's names, and whose forward maps ids [B, T] to logits [B, T, V].

    mdl builds it without memory and puts the weights in. Until it is written, name the original code:
    `mdl verify OUT --reference model.py:build`.
    """
    raise NotImplementedError("write the forward, or name your own code: mdl verify OUT --reference FILE.py:FUNCTION")
'''

TEST = '''"""{title} under vLLM against the original forward. Run it with pytest, where mdl and vLLM are installed."""

import os
from pathlib import Path

import pytest
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.validate import assert_parity

HERE = Path(__file__).resolve().parent.parent
CHECKPOINT = Path(os.environ.get("{upper}_CHECKPOINT", HERE / {quoted}))
REFERENCE = {reference}
OPTIONS = Options(arch=str(HERE / "{name}" / "arch.py"){weights})

needs_checkpoint = pytest.mark.skipif(not CHECKPOINT.exists(), reason="set {upper}_CHECKPOINT to a checkpoint")


@needs_checkpoint
def test_nothing_is_left_to_decide() -> None:
    prepare(CHECKPOINT, OPTIONS).plan.refuse()


@needs_checkpoint
def test_vllm_computes_what_the_original_computes(tmp_path: Path) -> None:
    convert(prepare(CHECKPOINT, OPTIONS), tmp_path / "out", tokenizer="none")
    assert_parity(tmp_path / "out", arch=OPTIONS.arch, reference=REFERENCE)
'''

README = """# {title}

Drafted by `mdl new` from the names and shapes in `{checkpoint}`.

Target: {target}, because {because}.

| file | holds |
|---|---|
| `{name}/{name}.yaml` | what becomes of every tensor, each line with its evidence |
| `{name}/arch.py` | how a checkpoint is recognised, its sizes and constants, config.json |
{more}| `tests/test_{name}.py` | the proof |

1. Work off what is left to decide: `mdl plan {checkpoint} --arch {name}/arch.py` lists it. Every open question is a
   line with `# TODO:`; answer it in the file, and take the TODO away. For a value, put
   `default=(VALUE, "where it is from")` in place of `ask=…`, or pass `--set NAME=VALUE`.
2. Values that your own forward knows, it can decide:
   `mdl verify {checkpoint} --arch {name}/arch.py --reference {reference} {decide}`
3. `mdl convert {checkpoint} OUT --arch {name}/arch.py`, then
   `mdl verify OUT --arch {name}/arch.py{named}`.
4. `pip install -e .` here is all that vLLM's processes need; `mdl doctor {name}` proves that a new process finds it.
   From then on `--arch` is not needed.
"""


def files(s: Subject, checkpoint: str, reference: str, decide: str) -> dict[str, str]:
    """Every file but the arch file and the mapping, by its path in the package's folder.

    ``checkpoint`` and ``reference`` are paths from that folder; ``decide`` the options that let a reference decide.
    """
    own = s.choice.name == OWN
    names = {"name": s.name, "title": s.title, "own_class": s.own_class}
    made = {
        "pyproject.toml": PYPROJECT.format(**names, plugin=PLUGIN.format(**names) if own else ""),
        f"{s.name}/__init__.py": f'"""{s.title}, for mdl and vLLM."""\n',
        f"tests/test_{s.name}.py": TEST.format(
            **names,
            upper=s.name.upper(),
            quoted=quoted(checkpoint),
            reference=_reference(reference),
            weights=f", weights={quoted(s.weights)}" if s.weights else "",
        ),
        "README.md": README.format(
            **names,
            checkpoint=checkpoint,
            target=s.target,
            because=s.choice.because[0],
            more=_more(s, own),
            reference=reference or "model.py:build",
            named="" if reference else " --reference model.py:build",
            decide=decide or "--decide NAME=A,B",
        ),
    }
    if not reference:
        made[f"{s.name}/eager.py"] = EAGER
    if own:
        texts = {"plugin": REGISTER, "configuration": CONFIG, "model": MODEL}
        made |= {f"{s.name}/{file}.py": text.format(**names) for file, text in texts.items()}
    return made


def _reference(reference: str) -> str:
    """Python for the spec, with its path from the package's folder."""
    if not reference:
        return "None"
    path, _, function = reference.rpartition(":")
    return f'str(HERE / {quoted(path)}) + ":{function}"'


def _more(s: Subject, own: bool) -> str:
    rows = [] if s.reference else [(f"{s.name}/eager.py", "the original forward, to be written")]
    rows += [(f"{s.name}/model.py", "the class for vLLM, to be written")] if own else []
    rows += [(f"{s.name}/plugin.py", "how vLLM's processes learn of it")] if own else []
    return "".join(f"| `{file}` | {what} |\n" for file, what in rows)
