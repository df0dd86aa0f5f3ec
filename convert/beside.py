"""Finds what lies beside the weights: settings, parsed, and files that look like a tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import Kind, MdlError, Problem
from .plain import TooLargeError, plain
from .strict_json import read_json

_ADAPTER = "adapter_config.json"
_SETTINGS = (
    "params.json",
    "config.json",
    "meta.json",
    "model_args.json",
    "generation_config.json",
    _ADAPTER,
)
_SETTINGS_YAML = ("model_config.yaml", "hparams.yaml", "config.yaml")
_FROM_TRANSFORMERS = ("config.json", "generation_config.json")
MAX_JSON = 16 << 20
MAX_YAML = 256 << 10  # PyYAML reads about 100 KB a second
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_STATE = "mp_rank_00_model_states.pt"
_MODEL = re.compile(r"model_(\d+)\.pt")
_STEP = re.compile(r".*?(\d+)")
_TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer.pkl", "tekken.json", "meta.pkl")
_TOKENIZER_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def find_sidecars(folder: Path, weights: str) -> dict[str, Any]:
    """Parsed settings by file stem; by full name where a stem is taken. ``weights`` is the stem of the weight file.

    ``meta_000123.json`` belongs to ``model_000123.pt`` and is found as ``meta``. Raises MdlError (INPUT) with every
    file that can't be parsed.
    """
    found, problems, _ = _parsed(folder, weights)
    if problems:
        raise MdlError(Kind.INPUT, problems)
    return found


def find_above(folder: Path, remarks: list[str]) -> dict[str, Any]:
    """Settings in the folder above one that holds weights alone, where trainers put them; ``remarks`` says which files
    were read, and which could not be.

    That folder may hold other things as well: no file in it stops anything, and an adapter's is of another.
    """
    found, problems, files = _parsed(folder, "", without=_ADAPTER)
    if files:
        remarks.append(f"settings are from the folder above: {', '.join(files)} in {folder.name}")
    remarks += [f"not read, in the folder above ({folder.name}): {problem.what}" for problem in problems]
    return found


def _parsed(folder: Path, weights: str, without: str = "") -> tuple[dict[str, Any], list[Problem], list[str]]:
    """The settings in a folder, what is wrong with those that can't be read, and the names of those that were."""
    files = [folder / name for name in _SETTINGS if name != without and (folder / name).is_file()]
    step = _STEP.fullmatch(weights)
    if step and (folder / f"meta_{step[1]}.json").is_file():
        files.insert(0, folder / f"meta_{step[1]}.json")
    files += [folder / name for name in _SETTINGS_YAML if (folder / name).is_file()]
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    read: list[str] = []
    for file in files:
        stem = "meta" if file.name.startswith("meta_") else file.stem
        try:
            found[file.name if stem in found else stem] = parse_settings(file)
            read.append(file.name)
        except (ValueError, OSError) as error:
            problems.append(Problem(f"{file.name} can't be parsed ({error})", str(file), "mend or remove it"))
    return found, problems, read


def find_configs(folder: Path) -> dict[str, Any]:
    """What GPT-NeoX puts into configs/ beside its weights: one table of all files, its keys with underscores.

    Raises MdlError (INPUT) with every file that can't be parsed, and where two say different things.
    """
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for file in sorted((folder / "configs").glob("*.yml")):
        try:
            table = {str(key).replace("-", "_"): _number(value) for key, value in _yaml_table(file).items()}
        except (ValueError, OSError) as error:
            problems.append(Problem(f"{file.name} can't be parsed ({error})", str(file), "mend or remove it"))
            continue
        if differing := [key for key in table if key in found and found[key] != table[key]]:
            what = f"it says something else of {', '.join(differing[:5])} than the files before it in configs/"
            problems.append(Problem(what, str(file), "keep the one that the run had"))
        found |= table
    if problems:
        raise MdlError(Kind.INPUT, problems)
    return {"configs": found} if found else {}


def find_arguments(folder: Path, read: Callable[[Path], Any], notes: list[str]) -> dict[str, Any]:
    """The arguments of a run, which DeepSpeed keeps with its own state: weights on a pipeline lie in other files.

    ``read`` gives a file's tree. Where that can't be had, a note says why: the layer files are whole without it.
    """
    file = folder / _STATE
    if not file.is_file():
        return {}
    try:
        tree = read(file)
        said = plain(tree["args"]) if isinstance(tree, dict) and "args" in tree else None
    except (MdlError, TooLargeError) as error:
        notes.append(f"{_STATE}: the arguments of the run were not read ({str(error).splitlines()[0]})")
        return {}
    return {"args": said} if isinstance(said, dict) else {}


def _number(value: Any) -> Any:
    """A value of YAML; 1e-5 is a number to whoever writes it, but a word to YAML 1.1."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _yaml_table(file: Path) -> dict[Any, Any]:
    content = _yaml(file)
    if not isinstance(content, dict):
        raise ValueError("it holds no table of settings")
    return content


def parse_settings(file: Path) -> Any:
    """The table of settings in a .json or .yaml file. Raises ValueError or OSError."""
    if file.suffix == ".json":
        # transformers itself writes Infinity into config.json, for example as the end of Mamba's time_step_limit.
        content = read_json(file, limit=MAX_JSON, infinite=file.name in _FROM_TRANSFORMERS)
    else:
        content = _yaml(file)
    if not isinstance(content, dict):
        raise ValueError("it holds no table of settings")
    return content


def _yaml(file: Path) -> Any:
    import yaml

    if file.stat().st_size > MAX_YAML:
        raise ValueError(f"it has more than {MAX_YAML:,} bytes")
    try:
        return plain(yaml.safe_load(file.read_text("utf-8")))
    except TooLargeError:
        raise ValueError("it holds more values, or deeper ones, than settings have") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def last_step(files: Sequence[Path]) -> Path | None:
    """The last of several model_NNNNNN.pt, each with the meta of its step, as nanochat's own loader takes it; None
    where one of the files is anything else."""
    steps = {file: int(found[1]) for file in files if (found := _MODEL.fullmatch(file.name)) and _meta(file).is_file()}
    return max(steps, key=lambda file: steps[file]) if len(files) > 1 and len(steps) == len(files) else None


def _meta(weights: Path) -> Path:
    return weights.with_name(weights.name.replace("model_", "meta_")).with_suffix(".json")


def find_tokenizers(folder: Path, weights: Path | None = None) -> tuple[str, ...]:
    """Absolute paths of tokenizer-like files in ``folder``, both files of a pair or none.

    All models of a nanochat have one, in tokenizer/ where base_checkpoints/d20/model_NNNNNN.pt (``weights``) is.
    """
    names = [name for name in _TOKENIZERS if (folder / name).is_file()]
    names += [name for pair in _TOKENIZER_PAIRS if all((folder / n).is_file() for n in pair) for name in pair]
    found = (file for pattern in ("tok*.model", "tokenizer.model.*", "*.tiktoken") for file in folder.glob(pattern))
    names += sorted(file.name for file in found if file.is_file())
    root = os.path.abspath(folder)  # noqa: PTH100 - Path.resolve would follow symlinks and lose the folder's name
    if not names and weights is not None and _MODEL.fullmatch(weights.name) and _meta(weights).is_file():
        above = Path(root).parents
        return find_tokenizers(above[1] / "tokenizer") if len(above) > 1 else ()
    return tuple(str(Path(root) / name) for name in dict.fromkeys(names))
