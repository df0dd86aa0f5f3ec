"""Options that several commands share, and what they say together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import usage_error

if TYPE_CHECKING:
    from .convert.parts import Part
    from .convert.prepare import Options

Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint: a .pt/.pth/.bin/.safetensors file or a folder.")]
Layout = Annotated[Path, typer.Argument(help="A folder that `mdl convert` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
BackendOption = Annotated[
    str | None, typer.Option("--attention-backend", help="vLLM's, by its name (default: vLLM chooses).")
]
ArchOption = Annotated[str | None, typer.Option("--arch", help="Family (see `mdl archs`), or a .py file with yours.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE that is not in the checkpoint.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="File of hyperparameters: params.json, config.json, yaml, dumped args.")
]
WeightsOption = Annotated[str | None, typer.Option("--weights", help="Which state dict, where a file holds several.")]
MergeOption = Annotated[
    Path | None, typer.Option("--merge-lora", help="Folder of a LoRA adapter of PEFT, to be merged into the weights.")
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="Round weights: float32, bfloat16 or float16.")]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="Tokenizer file or folder, or `none` (default: the one beside it).")
]
ShardOption = Annotated[str, typer.Option("--max-shard-size", help="Largest weight file, such as 5GB or 500MB.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what mdl wrote there before.")]
NonfiniteOption = Annotated[bool, typer.Option("--allow-nonfinite", help="Write NaN and Inf too, and list them.")]
FlushOption = Annotated[bool, typer.Option("--allow-flush", help="Write 0 for what is too small for the type.")]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, max=256, help="Threads that copy.", show_default="one per core, from 2 to 4"),
]
FsyncOption = Annotated[
    bool,
    typer.Option("--fsync/--no-fsync", help="Wait until the disk has it: no power cut takes it back."),
]
PartOption = Annotated[
    str | None, typer.Option("--part", help="I/N: copy the I-th of N shares; whoever comes last makes the layout.")
]
RayOption = Annotated[bool, typer.Option("--ray", help="Copy on a Ray cluster (RAY_ADDRESS) that shares these files.")]
BenchmarkOption = Annotated[bool, typer.Option("--benchmark", help="Also copy plainly first, and compare the speed.")]
ReferenceOption = Annotated[
    str | None,
    typer.Option("--reference", help="Your own forward, FILE.py:FUNCTION; its code runs. See docs/verify.md."),
]
PythonOption = Annotated[
    str | None, typer.Option("--reference-python", help="Python of another environment to run --reference in.")
]
TimeoutOption = Annotated[
    float | None,
    typer.Option("--reference-timeout", min=1, help="Seconds that --reference may take in its process (3600)."),
]
DecideOption = Annotated[
    list[str] | None,
    typer.Option(
        "--decide", help="NAME=A,B: which value does --reference compute with? Repeatable. See docs/verify.md."
    ),
]
PromptsOption = Annotated[list[str] | None, typer.Option("--prompt", help="Also compare on this text (repeatable).")]
NewPlace = Annotated[Path, typer.Argument(help="Folder to write; its name is that of the package and the family.")]
FromOption = Annotated[Path, typer.Option("--from", help="Checkpoint to draft from; only names and shapes are read.")]
TargetOption = Annotated[
    str | None, typer.Option("--target", help="llama, qwen2, qwen3, gpt2, decoder or own (default: what fits).")
]
DoctorName = Annotated[
    str | None, typer.Argument(help="A family of your own: does a new process find it, and its class? Starts vLLM.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the test inputs.")]


def said(
    arch: str | None,
    given: list[str] | None = None,
    weights: str | None = None,
    dtype: str | None = None,
    config: Path | None = None,
    merge_lora: Path | None = None,
) -> Options:
    """What the user said about a checkpoint. Raises MdlError (USAGE) for a --set that sets nothing, or a file that
    can't be read."""
    from .convert.config_file import read_config_file
    from .convert.prepare import Options

    pairs = [text.partition("=") for text in given or ()]
    wrong = [name for name, equals, _ in pairs if not equals or not name]
    if wrong:
        raise usage_error(f"--set {wrong[0]}: expected NAME=VALUE", do="for example --set n_head=12")
    if arch is not None and arch.endswith(".py"):
        arch = str(Path(arch).resolve())
    read = read_config_file(config) if config else None
    merged = str(merge_lora.absolute()) if merge_lora else None
    return Options(arch, {name: value for name, _, value in pairs}, weights, dtype, read, merged)


def part_of(text: str | None) -> Part | None:
    """What --part said. Raises MdlError (USAGE) for what is no part."""
    if text is None:
        return None
    from .convert.parts import parse_part

    return parse_part(text)
