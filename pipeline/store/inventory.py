"""What is in the store: who uses it, what is damaged, what nobody needs, what the extractions took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.runs import EXTRACTED_BY, RESULTS, STORE, Run
from pipeline.store.shards import Manifest, Shard, open_shard, read_record, sha256_of

KINDS = EXTRACTED_BY


@dataclass(frozen=True)
class Use:
    """One manifest of a profile: data/<profile>/<kind>/<data>/manifest.json."""

    profile: str
    data: str
    manifest: Manifest

    def __str__(self) -> str:
        return f"{self.profile}: {self.data}"


@dataclass(frozen=True)
class Fault:
    """A file of the store that is not what it has to be; `use` is the manifest that needs it, None: nobody does."""

    path: Path
    what: str
    use: Use | None


@dataclass(frozen=True)
class Folder:
    """The features of one kind and fingerprint; `unused` files are named by no manifest."""

    kind: str
    fingerprint: str
    files: int
    rows: int
    bytes: int
    unused: int
    uses: list[str]


def manifests(profile: str = "*") -> list[Use]:
    """The manifests of a profile, or of all; UserError when one is unreadable."""
    return [
        Use(path.parts[1], path.parts[3], Manifest.read(path))
        for kind in KINDS
        for path in sorted(RESULTS.glob(f"{profile}/{kind}/*/manifest.json"))
    ]


def verify(profile: str) -> list[Fault]:
    """Every fault in what the manifests of a profile name, and in the folders that hold it, by reading all of it.

    Raises UserError when the profile has no manifest.
    """
    uses = manifests(profile)
    if not uses:
        raise UserError("", f"{RESULTS / profile} has no feature manifest", "run `dvc repro`")
    names = {shard.sha256: shard.name for use in manifests() for shard in use.manifest.files}
    faults: dict[Path, Fault] = {}
    for use in uses:
        for shard in use.manifest.files:
            path = use.manifest.folder / shard.name
            what = _fault(path, shard, use.manifest.fingerprint, names)
            if what is not None:
                faults.setdefault(path, Fault(path, what, use))
    return list(faults.values()) + list(_strays(uses))


def _fault(path: Path, shard: Shard, print_: str, names: dict[str, str]) -> str | None:
    if not path.exists():
        return "missing"
    sha256 = sha256_of(path)
    if sha256 == shard.sha256:
        return None
    if sha256 in names:
        return f"foreign: holds the content of {names[sha256]}"
    try:
        open_shard(path, print_)
    except UserError as error:
        if path.stat().st_size < shard.bytes:
            return f"truncated: {path.stat().st_size} of {shard.bytes} bytes"
        return f"{'foreign' if 'another extraction' in error.what else 'damaged'}: {error.what}"
    return "damaged: its SHA-256 is not the manifest's (a flipped bit, or another file under this name)"


def _strays(uses: list[Use]) -> Iterator[Fault]:
    """Files beside the shards of some manifests that no manifest names and that no extraction left there whole."""
    named = used_files()
    for folder in sorted({use.manifest.folder for use in uses}):
        for path in sorted(folder.glob("*.arrow")):
            record = read_record(path)
            if path in named or (record is not None and record[0].sha256 == sha256_of(path)):
                continue
            yield Fault(path, "foreign: no manifest names it, and it is not what an extraction wrote", None)


def used_files() -> set[Path]:
    """The shards and embedding tables that the manifests of all profiles name."""
    return {use.manifest.folder / shard.name for use in manifests() for shard in use.manifest.files}


def folders() -> list[Folder]:
    """What the store holds, by kind and fingerprint."""
    uses, named, found = manifests(), used_files(), []
    for path in sorted(folder for kind in KINDS for folder in (STORE / kind).glob("*")):
        files = sorted(path.glob("*.arrow"))
        rows = [_rows(file) for file in files if not file.name.endswith(".embeddings.arrow")]
        found.append(
            Folder(
                path.parent.name, path.name, len(files), sum(rows),
                sum(file.stat().st_size for file in files),
                sum(file not in named for file in files),
                [str(use) for use in uses if use.manifest.folder == path],
            )
        )  # fmt: skip
    return found


def _rows(path: Path) -> int:
    record = read_record(path)
    if record is not None:
        return record[0].rows
    try:
        return open_shard(path).num_rows
    except UserError:
        return 0  # `verify` says what it is


def timings(kind: str, fingerprint: str) -> Counter[str]:
    """What the shards of a folder took to make: rows encoded and copied, and seconds by kind of work."""
    total: Counter[str] = Counter()
    for path in sorted((STORE / kind / fingerprint).glob("*.arrow")):
        record = read_record(path)
        if record is not None and "seconds" in record[1]:  # an embedding table and a pulled shard have no timings
            making = dict(record[1])
            total.update(making.pop("seconds"))
            total.update(making)
    return total


def unneeded() -> list[Path]:
    """What `prune` removes: shards that no manifest of any profile names, records without a shard, temporary files."""
    named = used_files()
    files = sorted(path for kind in KINDS for path in (STORE / kind).glob("*/*"))
    return [path for path in files if path.with_suffix(".arrow") not in named]


def unfinished() -> list[str]:
    """Extractions that have no manifest though their data set is prepared: what they did so far looks unneeded."""
    prepared = sorted(RESULTS.glob("*/prepare/*.parquet"))
    return [
        f"{kind} of {path.stem}, profile {path.parts[1]}"
        for path in prepared
        for kind in KINDS
        if not Run(path.parts[1]).features(kind, path.stem).exists()
    ]
