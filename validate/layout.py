"""The cheapest tier: is the layout whole? No model runs, but the target class itself is asked what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

from ..convert.check import check_layout
from ..convert.config import BESIDE_THE_PLAN, read_config
from ..convert.expected import expected_tensors
from ..convert.manifest import Manifest
from ..convert.prepare import Prepared
from ..convert.stored import Files
from ..convert.tokenizer import Checked, examine_tokenizer, is_named
from ..convert.write import BLOCK, lazy_targets
from ..errors import MdlError, Problem


def layout_problems(
    layout: Path, manifest: Manifest, prepared: Prepared, progress: Callable[[int], None] = lambda _: None
) -> list[Problem]:
    """Everything wrong with the folder but for its tokenizer: files and hashes, values against the checkpoint, names
    and shapes against the class."""
    problems = [*check_layout(layout, manifest, progress), *source_problems(manifest, prepared)]
    config_path = str(layout / "config.json")
    try:
        config = read_config(layout)
        want = expected_tensors(config, prepared.arch, prepared.dims)
    except MdlError as error:
        return [*problems, *error.problems]
    except Exception as error:  # transformers raises whatever its config classes raise
        return [*problems, Problem(f"transformers cannot build the class: {error}", config_path, "convert again")]
    problems += [
        Problem(f"{key} is {config.get(key)!r}, the checkpoint makes it {value!r}", config_path, "convert again")
        for key, value in prepared.config.items()
        if config.get(key) != value
    ]
    problems += [  # vLLM reads fields that no plan wrote (a window, a scaling) as gladly as the others
        Problem(f"{key} is {config[key]!r}, the checkpoint makes no such field", config_path, "convert again")
        for key in config.keys() - prepared.config.keys() - set(BESIDE_THE_PLAN)
    ]
    have = {name: tuple(fact["shape"]) for name, fact in manifest.tensors.items()}
    problems += [
        Problem(f"{name} {list(want[name])} is not in the files", config_path, "convert again")
        for name in want.keys() - have.keys()
    ]
    problems += [
        Problem(f"{name} is in the files, but {config['architectures'][0]} has no such parameter", config_path)
        for name in have.keys() - want.keys()
    ]
    return problems + [
        Problem(f"{name} is {list(have[name])}, {config['architectures'][0]} has {list(want[name])}", config_path)
        for name in want.keys() & have.keys()
        if want[name] != have[name]
    ]


def source_problems(manifest: Manifest, prepared: Prepared) -> list[Problem]:
    """Tensors whose recorded bytes are not what the plan makes of the checkpoint now, made again and hashed."""
    problems: list[Problem] = []
    with Files() as files:
        for step in prepared.plan.writes:
            for name, value in zip(step.targets, lazy_targets(files, step), strict=True):
                digest = xxhash.xxh3_128()
                for block in value.blocks(BLOCK):
                    digest.update(block.reshape(-1).view("uint8").data)
                recorded = manifest.tensors.get(name, {}).get("xxh3")
                if recorded != digest.hexdigest():
                    what = f"{name} is not what the mapping makes of the checkpoint"
                    problems.append(Problem(what, step.rule, "convert again"))
    return problems


def tokenizer_checked(layout: Path, manifest: Manifest) -> Checked:
    """The layout's tokenizer against its source, on random texts; nothing where there is none."""
    kind, source = manifest.tokenizer.get("kind"), str(manifest.tokenizer.get("source"))
    if kind in (None, "none"):
        return Checked()
    return examine_tokenizer(layout, source if is_named(source) or Path(source).exists() else None)
