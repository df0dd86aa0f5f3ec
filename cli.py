"""The command line: parse, call one function, render. No logic lives here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from . import __version__, program, render
from .options import (
    ArchOption,
    BackendOption,
    BenchmarkOption,
    Checkpoint,
    ConfigOption,
    DecideOption,
    DoctorName,
    DtypeOption,
    FlushOption,
    ForceOption,
    FromOption,
    FsyncOption,
    Json,
    Layout,
    MergeOption,
    NewPlace,
    NonfiniteOption,
    PartOption,
    PromptsOption,
    PythonOption,
    RayOption,
    ReferenceOption,
    SeedOption,
    SetOption,
    ShardOption,
    TargetOption,
    TimeoutOption,
    TokenizerOption,
    WeightsOption,
    WorkersOption,
    part_of,
    said,
)
from .watched import watched

app = typer.Typer(
    name="mdl",
    help="Raw PyTorch checkpoints into vLLM, with proof that vLLM computes what the original code computed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help comes in half the time
    context_settings={"help_option_names": ["-h", "--help"]},
)


state = program.State()


@app.callback(invoke_without_command=True)
def _root(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print mdl's version.")] = False,
) -> None:
    state.quiet, state.debug = quiet, debug
    if version:
        render.line(f"mdl {__version__}")
        raise typer.Exit


@app.command()
def inspect(
    checkpoint: Checkpoint,
    arch: ArchOption = None,
    set_: SetOption = None,
    config: ConfigOption = None,
    weights: WeightsOption = None,
    merge_lora: MergeOption = None,
    json: Json = False,
) -> None:
    """Say what is in a checkpoint, which architecture it is, and why we think so. Reads metadata only."""
    state.json = json
    program.numpy_alone_if_at_all()
    from .inspecting import inspect as run

    run(checkpoint, said(arch, set_, weights, None, config, merge_lora), json=json)


@app.command()
def plan(
    checkpoint: Checkpoint,
    arch: ArchOption = None,
    set_: SetOption = None,
    config: ConfigOption = None,
    weights: WeightsOption = None,
    dtype: DtypeOption = None,
    merge_lora: MergeOption = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Show the plan backwards, as `mdl export` runs it.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what becomes of every tensor: from where, by which operation, to where. Writes nothing."""
    state.json = json
    program.numpy_alone_if_at_all()
    from . import views
    from .convert.prepare import prepare

    prepared = prepare(checkpoint, said(arch, set_, weights, dtype, config, merge_lora))
    render.answer(json, lambda: views.planned(prepared), lambda: views.show_plan(prepared, reverse=reverse))
    if json:
        _exit(3 if prepared.plan.problems or prepared.plan.open else 0)  # the document lists them
    prepared.plan.refuse()


@app.command()
def convert(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    arch: ArchOption = None,
    set_: SetOption = None,
    config: ConfigOption = None,
    weights: WeightsOption = None,
    dtype: DtypeOption = None,
    merge_lora: MergeOption = None,
    tokenizer: TokenizerOption = None,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    allow_nonfinite: NonfiniteOption = False,
    allow_flush: FlushOption = False,
    workers: WorkersOption = None,
    fsync: FsyncOption = True,
    part: PartOption = None,
    ray: RayOption = False,
    benchmark: BenchmarkOption = False,
    json: Json = False,
) -> None:
    """Write a folder that vLLM serves: safetensors, config.json, tokenizer and manifest."""
    state.json = json
    program.numpy_alone()
    from . import views
    from .convert.modes import Mode, convert_in
    from .convert.prepare import prepare
    from .convert.shards import parse_size
    from .convert.values_judged import Allow

    limit = parse_size(max_shard_size)
    mode = Mode(workers, fsync, part_of(part), ray, benchmark)
    options = said(arch, set_, weights, dtype, config, merge_lora)
    prepared = prepare(checkpoint, options)
    with render.byte_progress("converting", prepared.plan.nbytes, quiet=state.quiet, as_json=json) as progress:
        done = convert_in(
            mode,
            prepared,
            out,
            tokenizer=tokenizer,
            max_shard_size=limit,
            force=force,
            allow=Allow(nonfinite=allow_nonfinite, flush=allow_flush),
            progress=progress,
            say=render.say,
        )
    render.answer(json, lambda: done, lambda: views.show_converted(done))


@app.command()
def verify(
    layout: Annotated[Path, typer.Argument(help="A folder that `mdl convert` wrote; a raw checkpoint to --decide.")],
    against: Annotated[Path | None, typer.Option("--against", help="The raw checkpoint, if it was moved.")] = None,
    arch: Annotated[str | None, typer.Option("--arch", help="Your .py file with the family, if it was moved.")] = None,
    config: ConfigOption = None,
    merge_lora: MergeOption = None,
    reference: ReferenceOption = None,
    reference_python: PythonOption = None,
    reference_timeout: TimeoutOption = None,
    golden: Annotated[Path | None, typer.Option("--golden", help="What `mdl record` wrote, in place of code.")] = None,
    decide: DecideOption = None,
    set_: SetOption = None,
    weights: WeightsOption = None,
    prompt: PromptsOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the inputs (0, or the golden file's).")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Serving type to check too (default: its own).")] = None,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", help="Workers per layer.")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option("--pipeline-parallel-size", help="Stages of layers.")] = 1,
    attention_backend: BackendOption = None,
    mutate: Annotated[bool, typer.Option("--mutate", help="Test the verifier: ~40 mistakes, 4 to 10 s each.")] = False,
    locate: Annotated[bool, typer.Option("--locate/--no-locate", help="On failure, name the module at fault.")] = True,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write a JUnit XML file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with pictures.")] = None,
    json: Json = False,
) -> None:
    """Run the layout under vLLM and the original forward on the same tokens; exit 1 if they differ."""
    state.json = json
    from . import verifying, views
    from .validate.candidates import parse_decide
    from .validate.choose import check_settings
    from .validate.verify import Settings

    views.check_reports(junit, html)
    options = said(arch, set_, weights, None, config, merge_lora)
    settings = Settings(
        against=against,
        arch=options.arch,
        config=options.config,
        merge_lora=options.merge_lora,
        reference=reference,
        reference_python=reference_python,
        reference_timeout=reference_timeout,
        golden=golden,
        decide=parse_decide(decide or ()),
        prompts=tuple(prompt or ()),
        seed=seed,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        attention_backend=attention_backend,
        locate=locate,
        command=shlex.join(["mdl", *sys.argv[1:]]),
    )
    check_settings(settings)
    other = verifying.other(layout, settings, options, state, mutate=mutate, files=bool(junit or html))
    _exit(verifying.verified(layout, settings, state, junit, html) if other is None else other)


@app.command()
def record(
    checkpoint: Checkpoint,
    reference: Annotated[str, typer.Option("--reference", help="Your own forward, FILE.py:FUNCTION; its code runs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    reference_python: PythonOption = None,
    reference_timeout: TimeoutOption = None,
    arch: ArchOption = None,
    set_: SetOption = None,
    config: ConfigOption = None,
    weights: WeightsOption = None,
    dtype: DtypeOption = None,
    merge_lora: MergeOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    json: Json = False,
) -> None:
    """Run your own forward where it runs, and keep its answers for `mdl verify --golden`."""
    state.json = json
    from . import views
    from .validate.golden import TIMEOUT, record_checkpoint

    options = said(arch, set_, weights, dtype, config, merge_lora)
    seconds = reference_timeout or TIMEOUT
    with render.steps(quiet=state.quiet or json) as say:
        say("running the reference")
        done = record_checkpoint(
            checkpoint, reference, out, options, python=reference_python, seed=seed, force=force, timeout=seconds
        )
    render.answer(json, lambda: done, lambda: views.show_recorded(out, done))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def serve(
    context: typer.Context,
    layout: Annotated[Path, typer.Argument(help="A layout, or a raw checkpoint (converted and verified first).")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on.")] = 8000,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this once, then exit.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Length of the answer to --prompt.")] = 64,
    unverified: Annotated[bool, typer.Option("--unverified", help="Serve although no verification passed.")] = False,
    arch: ArchOption = None,
    set_: SetOption = None,
    config: ConfigOption = None,
    weights: WeightsOption = None,
    dtype: DtypeOption = None,
    merge_lora: MergeOption = None,
    tokenizer: TokenizerOption = None,
    json: Json = False,
) -> None:
    """Start vLLM's OpenAI-compatible server on a verified layout. What follows `--` goes to vLLM.

    A raw checkpoint is converted first, with --arch, --set, --config, --weights, --dtype, --merge-lora and --tokenizer
    as in `mdl convert`.
    """
    state.json = json
    from .serve import serve as run
    from .validate.ready import ready_layout

    options = said(arch, set_, weights, dtype, config, merge_lora)
    with render.steps(quiet=state.quiet or json) as say:
        ready = ready_layout(layout, unverified=unverified, say=say, options=options, tokenizer=tokenizer)
    _exit(
        run(
            ready,
            host=host,
            port=port,
            prompt=prompt,
            max_tokens=max_tokens,
            extra=tuple(context.args),
            served_name=layout.resolve().stem,
            quiet=state.quiet,
            as_json=json,
            arch=options.arch,
        )
    )


@app.command()
def export(
    layout: Layout,
    out: Annotated[Path, typer.Argument(help="File to write; a folder where there were several rank files.")],
    force: ForceOption = False,
    json: Json = False,
) -> None:
    """Run the plan backwards: the original names and bytes again, from a layout alone."""
    state.json = json
    from . import views
    from .convert.export import export as run

    with render.steps(quiet=state.quiet or json) as say:
        say("exporting")
        done = run(layout, out, force=force)
    render.answer(json, lambda: done, lambda: views.show_exported(done))


@app.command()
def check(layout: Layout, json: Json = False) -> None:
    """Compare a layout with its manifest: every file, header, index entry and byte. Needs nothing else."""
    state.json = json
    from .verifying import checked

    _exit(checked(layout, state))


@app.command()
def new(
    name: NewPlace,
    from_: FromOption,
    reference: ReferenceOption = None,
    target: TargetOption = None,
    weights: WeightsOption = None,
    force: ForceOption = False,
    json: Json = False,
) -> None:
    """Draft the package of a family of your own from a checkpoint, with every open question marked."""
    state.json = json
    from .new import new as run

    run(name, from_, reference=reference, target=target, weights=weights, force=force, json=json)


@app.command()
def archs(json: Json = False) -> None:
    """List the checkpoint families that mdl knows."""
    state.json = json
    from . import views
    from .archs.registry import all_archs

    known = list(all_archs().values())
    facts = [{"name": a.name, "title": a.title, "source": a.source, "target": a.target} for a in known]
    render.answer(json, lambda: facts, lambda: views.show_archs(known))


@app.command()
def doctor(name: DoctorName = None, json: Json = False) -> None:
    """Say what this machine can do, and how to mend what it can't."""
    state.json = json
    from . import views
    from .validate.doctor_own import examined

    findings = examined(name)
    render.answer(json, lambda: findings, lambda: views.show_findings(findings))
    _exit(4 if any(finding.state == "fail" for finding in findings) else 0)


def _exit(code: int) -> None:
    if code:
        raise typer.Exit(code)


def main() -> NoReturn:
    """The program, in this very process."""
    program.run(lambda: typer.main.get_command(app).main(standalone_mode=False), state)


def script() -> NoReturn:
    """The console script."""
    program.open_streams()
    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") == "verify":
        state.death = watched()
        main()
    else:
        program.and_leave(main)
