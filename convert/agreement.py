"""What all runs that write one layout have to agree on before any of them writes: the plan, the source, the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .manifest import describe_step, digest_of, fingerprint, own_version, plan_digest
from .prepare import Prepared
from .receipts import write_at_once
from .shards import Shard

NAME = "agreement.json"


@dataclass(frozen=True)
class Agreement:
    """A plan, and how it is laid out in files. Equal ones give equal bytes, whoever writes them and wherever."""

    digest: str
    shards: tuple[Shard, ...]

    def stands_in(self, folder: Path) -> bool:
        """Whether what lies in a folder was written under this agreement."""
        try:
            return (folder / NAME).read_text(encoding="utf-8").strip() == self.digest
        except (OSError, ValueError):
            return False

    def write(self, folder: Path) -> None:
        """Say in a folder what is being written there."""
        write_at_once(folder / NAME, self.digest + "\n")


def agree(prepared: Prepared, shards: tuple[Shard, ...]) -> Agreement:
    """The agreement of a prepared checkpoint: mdl's version, every step, config.json, the source's files by name, size
    and fingerprint, and which tensor goes where."""
    content: dict[str, Any] = {
        "mdl": own_version(),
        "plan": plan_digest(describe_step(step) for step in prepared.plan.steps),
        "config": prepared.config,
        "source": [_named(fingerprint(Path(file))) for file in prepared.inventory.files],
        "files": [[shard.file, [[e.name, e.dtype, e.start, e.stop] for e in shard.entries]] for shard in shards],
    }
    return Agreement(digest_of(content), shards)


def _named(file: dict[str, Any]) -> dict[str, Any]:
    return {**file, "file": Path(file["file"]).name}
