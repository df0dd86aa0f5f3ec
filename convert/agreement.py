"""What all runs that write one layout have to agree on before any of them writes: the plan, the source, the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from .. import __version__
from ..errors import MdlError
from .manifest import NAME as MANIFEST
from .manifest import describe_step, digest_of, fingerprint, plan_digest, read_manifest
from .prepare import Prepared
from .receipts import write_at_once
from .shards import Shard

NAME = "agreement.json"


class Agreement(Struct, frozen=True):
    """A plan, and how it is laid out in files. Equal digests give equal weights, whoever writes them and wherever;
    ``beside`` is the digest of what lies beside them: the tokenizer's files."""

    digest: str
    shards: tuple[Shard, ...]
    beside: str = ""

    @property
    def whole(self) -> str:
        """The digest of the layout with all that lies beside its weights."""
        return digest_of({"weights": self.digest, "beside": self.beside})

    def stands_in(self, folder: Path, *, whole: bool = False) -> bool:
        """Whether the weights in a folder were written under this agreement; ``whole``: and all the rest is to be."""
        try:
            digest, _, beside = (folder / NAME).read_text(encoding="utf-8").strip().partition(" ")
        except (OSError, ValueError):
            return False
        return digest == self.digest and (beside == self.beside or not whole)

    def write(self, folder: Path) -> None:
        """Say in a folder what is being written there."""
        write_at_once(folder / NAME, f"{self.digest} {self.beside}\n")

    def is_made(self, out: Path) -> bool:
        """Whether the layout is there already, made under this very agreement."""
        if not (out / MANIFEST).is_file():
            return False
        try:
            return read_manifest(out).agreement == self.whole
        except (MdlError, OSError):
            return False


def agree(prepared: Prepared, shards: tuple[Shard, ...], beside: str = "") -> Agreement:
    """The agreement of a prepared checkpoint: mdl's version, every step, config.json, the source's files by name, size,
    time of change and fingerprint, and which tensor goes where."""
    content: dict[str, Any] = {
        "mdl": __version__,
        "plan": plan_digest(describe_step(step) for step in prepared.plan.steps),
        "config": prepared.config,
        "source": [_named(fingerprint(Path(file))) for file in prepared.inventory.files],
        "files": [[shard.file, [[e.name, e.dtype, e.start, e.stop] for e in shard.entries]] for shard in shards],
    }
    return Agreement(digest_of(content), shards, beside)


def _named(file: dict[str, Any]) -> dict[str, Any]:
    path = Path(file["file"])
    return {**file, "file": path.name, "changed": path.stat().st_mtime_ns}
