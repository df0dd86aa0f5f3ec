"""Records what a model's own code computes, for `mdl verify --golden FILE` to compare vLLM with.

This file works alone: copy it to where the model runs. It needs torch, whatever the model's code needs, and Python 3.9
or later; no part of mdl::

    python record.py CKPT --reference model.py:build -o golden.safetensors --vocab 50257 --context 1024

The result holds token ids, float64 logits at every position, and how far the model's own runs in float32, bfloat16
and float16 are from those. mdl itself runs references through :class:`Forward`, so both ways understand the same code.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import inspect
import json
import math
import random
import sys
import traceback
from array import array
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

Json = dict[str, Any]
FORMAT = "mdl-golden/1"
LOGITS_BUDGET = 1 << 27
"""Tokens x vocabulary of the covering inputs: bounds time and disk where the vocabulary is large."""
_SHORT, _LONGER = [0, 1], [0, 1, 0]


class Unusable(Exception):  # noqa: N818 - it names what the reference is
    """A reference that can't be used, with what to do; ``machine`` if it is this machine that lacks something."""

    def __init__(self, what: str, where: str = "", do: str = "", *, machine: bool = False) -> None:
        super().__init__(what)
        self.what, self.where, self.do, self.machine = what, where, do, machine


def deal(vocab: int, context: int, seed: int) -> list[Json]:
    """The sequences that every verification uses: the whole vocabulary once, as far as the budget goes, and a long one.

    Random without replacement from ``seed``; up to 256 and 512 tokens long.
    """
    rng = random.Random(seed)  # noqa: S311 - reproducible inputs, not secrets
    order = list(range(vocab))
    rng.shuffle(order)
    order = order[: max(1024, LOGITS_BUDGET // vocab)]
    width = max(1, min(256, context - 1))
    dealt = [{"kind": "vocabulary", "ids": order[k : k + width]} for k in range(0, len(order), width)]
    length = max(1, min(512, context - 1))
    return [*dealt, {"kind": "long", "ids": [rng.randrange(vocab) for _ in range(length)]}]


@contextmanager
def blaming(what: str, where: str, do: str = "") -> Generator[None, None, None]:
    """Whatever the user's code raises, as :class:`Unusable` with the place; a lack of memory as the machine's."""
    try:
        yield
    except (Unusable, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit too: code that ends the program is code that can't be used
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or any(w in text for w in ("out of memory", "can't allocate memory")):
            raise Unusable(f"{what} ran out of memory: {text}", where, "use a larger machine", machine=True) from error
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not _ours(f.filename)]
        entries = traceback.format_list(frames[-3:])
        if isinstance(error, SyntaxError):
            entries += traceback.format_exception_only(type(error), error)[:-1]
        lines = [line.rstrip() for entry in entries for line in entry.splitlines()]
        raise Unusable("\n".join([f"{what} raised {text}", *lines]), where, do) from error


def _ours(filename: str) -> bool:
    """Frames of this file and of the import system say nothing about the user's code."""
    return filename == __file__ or filename.startswith("<frozen importlib")


def load_model(spec: str, checkpoint: Path) -> Any:
    """What ``FILE.py:FUNCTION`` returns for the checkpoint. The file's folder is on the module path from then on."""
    file, _, function = spec.rpartition(":")
    path = Path(file)
    found = importlib.util.spec_from_file_location("mdl_user_reference_" + path.stem, path)
    if not path.is_file() or found is None or found.loader is None:
        raise Unusable("is not FILE.py:FUNCTION with an existing file", spec, "write --reference model.py:build")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    with blaming("importing it", str(path), "it has to import in this Python"):
        found.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        raise Unusable(f"defines no function {function!r}", str(path), "def build(checkpoint: Path): return model")
    with blaming(f"build({checkpoint})", spec):
        return build(checkpoint)


class Forward:
    """A module or a callable, and how it wants to be called.

    :meth:`logits` maps ids [T] to logits [T, V]. ``module`` is the module behind it, if any: only that can change its
    precision. ``exact`` tells whether it runs in float64; ``notes`` say what :meth:`probe` found, ``vocab`` is V.
    """

    def __init__(self, model: Any, name: str) -> None:
        import torch

        owner = getattr(model, "__self__", None)  # of a bound method such as model.forward
        found = model if isinstance(model, torch.nn.Module) else owner
        self.module = found if isinstance(found, torch.nn.Module) else None
        if not callable(model):
            raise Unusable(f"build returned {type(model).__name__}", name, "return a torch.nn.Module or a callable")
        if self.module is not None:
            self.module.eval()
        self.name, self.exact, self.vocab, self._model = name, self.module is not None, 0, model
        self.notes: list[str] = []
        self._batched, self._extra, self._last = True, _target_parameter(model), False
        self._kept: dict[str, torch.Tensor] = {}
        self._dtype = ""
        self._probed = False

    def probe(self) -> Forward:
        """Find out how it is called and what it can do. Raises Unusable with what to write instead."""
        self._probed = True
        self._choose_form()
        self._need_steadiness()
        if self._last:
            self.notes.append("the reference answers for the last position only, so it ran once per position")
        if self.module is None:
            self.notes.append("the reference is a plain callable: no float64 run, so only the absolute ceiling applies")
        else:
            self._probe_exact()
        return self

    def can(self, dtype: str) -> bool:
        """Whether it runs in this precision; a reason why not becomes a note."""
        try:
            self.logits(_LONGER, dtype)
        except Unusable as error:
            if error.machine:
                raise
            self.notes.append(f"the reference does not run in {dtype}: {error.what.splitlines()[0]}")
            return False
        return True

    def _need_steadiness(self) -> None:
        if not _alike(self._call(_LONGER), self._call(_LONGER)):
            do = "call .eval() on every module in build, and draw no random numbers in forward"
            raise Unusable("two runs on the same tokens give different logits (dropout?)", self.name, do)

    def _probe_exact(self) -> None:
        single = self.logits(_LONGER, "float32")
        self.exact = self.can("float64")
        if self.exact and bool((self.logits(_LONGER, "float64") == single).all()):
            self.exact = False
            self.notes.append("the reference computes in float32 whatever its weights' precision")
        if not self.exact:
            self.notes.append("no float64 run of the reference: only the absolute ceiling applies")

    def round_weights(self, dtype: str) -> None:
        """Send the parameters through ``dtype`` once, as a conversion with --dtype does. Buffers are left alone."""
        import torch

        for parameter in self._needed(f"have its weights rounded to {dtype}").parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, dtype)).to(parameter.dtype)

    def _needed(self, what: str) -> torch.nn.Module:
        if self.module is None:
            raise Unusable(f"is a plain callable: it can't {what}", self.name, "return a torch.nn.Module")
        return self.module

    def logits(self, ids: Sequence[int], dtype: str) -> torch.Tensor:
        """Logits [T, V] of the ids [T], computed and returned in ``dtype``, on the CPU."""
        import torch

        self._cast(dtype)
        parts = [ids[: end + 1] for end in range(len(ids))] if self._last else [ids]
        return torch.cat([self._call(list(part)) for part in parts]).to(getattr(torch, dtype))

    def _cast(self, dtype: str) -> None:
        """Change the module's precision, always from the original values: what was rounded away comes back."""
        import torch

        if dtype == self._dtype or (self.module is None and dtype == "float32"):
            return
        module = self._needed(f"run in {dtype}")
        with torch.no_grad(), blaming(f"its conversion to {dtype}", self.name):
            for key, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_floating_point():
                    source = self._kept.pop(key, tensor.data)
                    tensor.data = source.to(getattr(torch, dtype))
                    if not torch.equal(tensor.data.to(source.dtype), source):
                        self._kept[key] = source
        self._dtype = dtype

    def _choose_form(self) -> None:
        """Ids as a batch or alone, with targets or without: the first form that gives logits at every position."""
        self._cast("float32")
        forms = [(batched, extra) for batched in (True, False) for extra in dict.fromkeys((self._extra, ""))]
        failures: list[Unusable] = []
        last: list[tuple[bool, str, int]] = []
        for form in forms:
            self._batched, self._extra = form
            try:
                if self._answers_everywhere():
                    return
                last.append((*form, self.vocab))
            except Unusable as error:
                failures.append(error)
        if not last:
            raise next((f for f in failures if f.machine), failures[0])
        self._batched, self._extra, self.vocab = last[0]
        self._last = True

    def _answers_everywhere(self) -> bool:
        """True for logits at every position, False for the last one only; Unusable for anything else."""
        self._last = False
        shapes = [list(self._raw(ids).shape) for ids in (_SHORT, _LONGER)]
        self.vocab = shapes[0][-1] if shapes[0] else 0
        if shapes in [[[*one, n, self.vocab] for n in (2, 3)] for one in ([], [1])]:
            if _alike(self._call(_SHORT), self._call(_LONGER)[:2]):
                return True
            self._need_steadiness()
            do = "the forward has to be causal; if it wants one sequence [T], not a batch, take ids[0] in a wrapper"
            raise Unusable("changes its logits at earlier positions when a token is appended", self.name, do)
        if shapes[0] == shapes[1] and shapes[0] in ([1, 1, self.vocab], [1, self.vocab], [self.vocab]):
            self._last = True
            return False
        do = "wrap the model so that it returns logits at every position, shaped [B, T, V]"
        raise Unusable(f"returns {shapes[0]} for 2 tokens and {shapes[1]} for 3", self.name, do)

    def _call(self, ids: list[int]) -> torch.Tensor:
        """[T, V], or [1, V] where only the last position is answered."""
        rows = 1 if self._last else len(ids)
        output = self._raw(ids)
        if output.numel() != rows * self.vocab or (output.dim() > 1 and output.shape[-1] != self.vocab):
            raise Unusable(f"returns {list(output.shape)} for {len(ids)} tokens", self.name, "return [B, T, V]")
        output = output.reshape(rows, self.vocab).cpu()
        if self._probed and self._dtype in ("", "float32", "float64") and bool(output.isnan().any()):
            row = len(ids) - rows + int(output.isnan().any(-1).nonzero()[0])
            what = f"gives NaN logits at position {row} of {len(ids)} tokens (the token there is {ids[row]})"
            raise Unusable(what, self.name, "mend the forward or its weights: `mdl convert` lists NaN in a checkpoint")
        return output

    def _raw(self, ids: list[int]) -> torch.Tensor:
        import torch

        first = next(iter(self.module.parameters()), None) if self.module is not None else None
        tokens = torch.tensor([ids] if self._batched else ids, device=None if first is None else first.device)
        more = {self._extra: tokens} if self._extra else {}
        with torch.inference_mode(), blaming(f"its forward on {len(ids)} tokens", self.name):
            return _tensor_of(self._model(tokens, **more), self.name)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a.double() - b.double()).abs().max() <= 1e-3 * a.double().abs().max())


def _target_parameter(model: Any) -> str:
    with suppress(TypeError, ValueError):  # a builtin has no signature
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
        return next((name for name in ("targets", "labels") if name in parameters), "")
    return ""


def _tensor_of(output: Any, name: str) -> torch.Tensor:
    """The logits in a tensor, a tuple or list, a mapping with ``logits``, or an object with ``.logits``."""
    import torch

    if isinstance(output, Mapping):
        output = cast("Mapping[str, Any]", output).get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)):
        tensors = (x for x in cast("list[Any]", output) if isinstance(x, torch.Tensor) and x.dim() >= 2)
        output = next(tensors, None)
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
        raise Unusable(f"returns {kind}, not logits", name, "return a tensor of logits shaped [B, T, V]")
    return output


def continuation(length: int) -> tuple[int, int]:
    """Tokens of the long sequence that are the prompt of the greedy continuation, and tokens generated after them."""
    prompt = min(16, length // 2)
    return prompt, min(32, length - prompt)


def _greedy(forward: Forward, long: Sequence[int]) -> list[int]:
    """The prompt and the tokens that the model itself finds likeliest after it, in its exact precision."""
    prompt, count = continuation(len(long))
    ids = list(long[:prompt])
    while ids and len(ids) < prompt + count:
        ids.append(int(forward.logits(ids, "float64" if forward.exact else "float32")[-1].argmax()))
    return ids


def record(forward: Forward, sequences: Sequence[Json], out: Path, dtypes: Sequence[str], about: Json) -> None:
    """Run every sequence in every precision and write ``out``, a safetensors file, whole or not at all.

    For sequence k: ``ids.k`` [T], ``logits.k`` [T, V] in float64 (float32 if that is all there is), ``scale.k`` [T],
    the sum of squared deviations of these logits from their mean, and ``error.DTYPE.k`` [T], the sum of squared
    differences of the run in DTYPE from them.
    """
    import torch

    others = [d for d in (["float32"] if forward.exact else []) + list(dtypes) if forward.can(d)]
    runs = {dtype: [_run(forward, one["ids"], dtype) for one in sequences] for dtype in others}
    size = 8 if forward.exact else 4
    kinds = {"ids": "I64", "scale": "F64", **{f"error.{d}": "F64" for d in others}}
    large = {f"logits.{k:04d}": (f"F{8 * size}", [len(s["ids"]), forward.vocab]) for k, s in enumerate(sequences)}
    small = {f"{n}.{k:04d}": (kind, [len(s["ids"])]) for k, s in enumerate(sequences) for n, kind in kinds.items()}
    about = {**about, "vocab": forward.vocab, "exact": forward.exact, "notes": forward.notes, "floors": others}
    told = json.dumps({**about, "kinds": [one["kind"] for one in sequences]})
    scratch = out.with_name(out.name + ".partial")
    try:
        with scratch.open("wb") as file:
            file.write(_header({**large, **small}, {"format": FORMAT, "record": told}))
            rest: list[bytes] = []
            for one in sequences:
                logits = _run(forward, one["ids"], "float64" if forward.exact else "float32")
                file.write((ctypes.c_char * (size * logits.numel())).from_address(logits.data_ptr()))
                means = logits.mean(-1, keepdim=True, dtype=torch.float64).expand(logits.shape)
                rows = [_squares(means, logits), *(_squares(runs[d].pop(0), logits) for d in others)]
                rest += [array("q", one["ids"]).tobytes(), *(array("d", row).tobytes() for row in rows)]
            file.write(b"".join(rest))
        scratch.replace(out)
    finally:
        if scratch.exists():
            scratch.unlink()


def _run(forward: Forward, ids: Sequence[int], dtype: str) -> torch.Tensor:
    sys.stderr.write(f"{dtype}: {len(ids)} tokens\n")
    return forward.logits(ids, dtype).contiguous()


def _squares(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Per row, the sum of squared differences in float64."""
    found: list[float] = []
    for k in range(0, len(a), 64):
        found += (a[k : k + 64].double() - b[k : k + 64].double()).square().sum(-1).tolist()
    return found


def _header(tensors: Mapping[str, tuple[str, list[int]]], metadata: dict[str, str]) -> bytes:
    header: Json = {"__metadata__": metadata}
    end = 0
    for name, (kind, shape) in tensors.items():
        start, end = end, end + int(kind[1:]) // 8 * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def fingerprints(checkpoint: Path) -> list[Json]:
    """Name, size and the sha256 of the first and last MiB of every file of the checkpoint."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file()) if checkpoint.is_dir() else [checkpoint]
    found: list[Json] = []
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
        found.append({"file": path.name, "size": size, "sha256_ends": digest.hexdigest()})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for the command line, 3 for a reference that can't be used, 4 for what the machine lacks."""
    parser = argparse.ArgumentParser(description="Record what a model's own code computes, for `mdl verify --golden`.")
    parser.add_argument("checkpoint", type=Path, help="what build() is called with")
    parser.add_argument("--reference", required=True, help="FILE.py:FUNCTION; build(checkpoint) -> module")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the golden file to write")
    parser.add_argument("--inputs", type=Path, help='JSON: {"seed": 0, "sequences": [{"kind": "prompt", "ids": []}]}')
    parser.add_argument("--vocab", type=int, help="rows of the embedding (without --inputs)")
    parser.add_argument("--context", type=int, help="the longest sequence that the model takes (without --inputs)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (without --inputs)")
    parser.add_argument("--dtypes", default="bfloat16,float16", help="precisions to measure beside float32")
    parser.add_argument("--round", help="type to round weights to first, as mdl convert --dtype does")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    given = parser.parse_args(arguments)
    if given.inputs is None and (given.vocab is None or given.context is None):
        parser.error("give --vocab and --context, or --inputs")
    if given.out.is_dir() or not given.out.absolute().parent.is_dir():
        parser.error(f"{given.out} can't be written: give a file name in a folder that exists")
    try:
        answer: Json = {"ok": True, **_record(given)}
    except Unusable as e:
        answer = {"ok": False, "machine": e.machine, "what": e.what, "where": e.where, "do": e.do}
        sys.stderr.write(f"error: {e.what}\n  where: {e.where}\n  do:    {e.do}\n")
    if given.json:
        sys.stdout.write("\n" + json.dumps(answer) + "\n")
    return 0 if answer["ok"] else 4 if answer["machine"] else 3


def _record(given: argparse.Namespace) -> Json:
    here = Path(__file__).resolve().parent
    if (here / "__init__.py").exists():  # run where it lies: its neighbours must not stand in for the standard library
        sys.path[:] = [p for p in sys.path if Path(p).resolve() != here]
    try:
        import torch
    except ImportError as error:
        raise Unusable(f"torch can't be imported: {error}", sys.executable, "install it", machine=True) from error
    inputs: Json = json.loads(given.inputs.read_text(encoding="utf-8")) if given.inputs else {}
    inputs = inputs or {"seed": given.seed, "sequences": deal(given.vocab, given.context, given.seed)}
    forward = Forward(load_model(given.reference, given.checkpoint), given.reference)
    if given.round:
        forward.round_weights(given.round)
    forward.probe()
    about = {
        "reference": given.reference,
        "seed": inputs["seed"],
        "torch": str(torch.__version__),
        "rounded": given.round or "",
        "checkpoint": fingerprints(given.checkpoint),
    }
    dtypes = [d for d in given.dtypes.split(",") if d] if forward.module is not None else []
    sequences = list(inputs["sequences"])
    if greedy := _greedy(forward, next((one["ids"] for one in sequences if one["kind"] == "long"), ())):
        sequences.append({"kind": "greedy", "ids": greedy})
    record(forward, sequences, given.out, dtypes=dtypes, about=about)
    positions = sum(len(one["ids"]) for one in sequences)
    return {"sequences": len(sequences), "positions": positions, "vocab": forward.vocab, "notes": forward.notes}


if __name__ == "__main__":
    sys.exit(main())
