"""Where the results of a profile are, and which stage of dvc.yaml makes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config import Params
from pipeline.errors import UserError

RESULTS = Path("data")
STORE, RAW, MODELS = RESULTS / "store", RESULTS / "raw", RESULTS / "models"  # shared by all profiles
SCRATCH = "-scratch"  # ends what was fine-tuned without pre-training; beside the others, for there may be none
Kind = Literal["images", "text"]
EXTRACTED_BY: dict[Kind, str] = {"images": "extract_images", "text": "extract_captions"}


@dataclass(frozen=True)
class Run:
    """The paths and stage names of a profile.

    A stage's results lie in data/<profile>/<stage>/<item>, where DVC calls it <stage>@<item>, but for those of
    `prepare` (a file for each data set) and of the extractions (named by what they hold).
    """

    profile: str

    @classmethod
    def of(cls, params: Params) -> Run:
        return cls(params.profile)

    @property
    def base(self) -> Path:
        return RESULTS / self.profile

    def manifest(self, data: str) -> Path:
        """The table of a data set's pictures."""
        return self.base / "prepare" / f"{data}.parquet"

    def quarantine(self, data: str) -> Path:
        """Where `prepare` lists the pictures it left out, also when they are too many; not an output that DVC knows."""
        return self.base / "quarantine" / f"{data}.csv"

    def series(self, data: str) -> Path:
        """Which pictures are of one series, as `terraalign series` found; not an output that DVC knows."""
        return self.base / "series" / f"{data}.csv"

    def features(self, kind: Kind, data: str) -> Path:
        """The manifest that names the shards of a data set's features."""
        return self.base / kind / data / "manifest.json"

    def near(self, data: str) -> Path:
        """How many pictures for validation and test are almost the same as one for training."""
        return self.base / "images" / data / "near.json"

    def sample(self, data: str) -> Path:
        """Mean tokens of some pictures, which others are set beside."""
        return self.base / "images" / data / "sample.safetensors"

    def tars(self, data: str) -> Path:
        """Where `terraalign store export` is expected to have put a data set's tars."""
        return self.base / "webdataset" / data

    def inputs(self, name: str) -> Path:
        """What a recipe, or pre-training, reads: digests of its data sets' manifests."""
        return self.base / "inputs" / f"{name}.json"

    def pretrained(self, adapter: str) -> Path:
        return self.base / "pretrain" / adapter

    def named(self, adapter: str) -> Path:
        """Names of pictures without the LLM, a folder for each data set of classes."""
        return self.base / "name" / adapter

    def finetuned(self, adapter: str, recipe: str, scratch: bool = False) -> Path:
        return self.base / "finetune" / f"{adapter}-{recipe}{SCRATCH if scratch else ''}"

    def evaluated(self, adapter: str, recipe: str) -> Path:
        return self.base / "evaluate" / f"{adapter}-{recipe}"

    def pca(self, adapter: str) -> Path:
        return self.base / "pca" / adapter

    @property
    def report(self) -> Path:
        return self.base / "report"

    @property
    def metrics(self) -> Path:
        return self.base / "metrics.json"

    def seconds(self, stage: str) -> Path:
        """How long a stage took when it last ran here; not an output, since a timing differs on every run."""
        return self.base / "seconds" / f"{stage}.json"

    def speeds(self, stage: str) -> Path:
        """How many pictures a second each way of naming took on in a stage; not an output either."""
        return self.base / "seconds" / "speeds" / f"{stage}.json"

    def checkpoint(self, name: str) -> Path:
        """What an interrupted stage goes on from; outside DVC's outputs, which a rerun deletes."""
        return self.base / "checkpoints" / f"{name}.pt"


def stages(params: Params) -> list[str]:
    """The stages of dvc.yaml before the report, in their order, as DVC names them."""
    run = params.run
    names = [f"{stage}@{data}" for stage in ("prepare", "extract_images", "extract_captions") for data in run.data]
    names += ["inputs", *(f"pretrain@{adapter}" for adapter in run.adapters)]
    names += [f"name@{adapter}" for adapter in run.adapters]
    names += [f"finetune@{adapter}-{recipe}" for adapter in run.adapters for recipe in run.recipes]
    names += [f"finetune_scratch@{adapter}-{recipe}" for adapter in run.scratch for recipe in run.scratch_recipes]
    names += [f"evaluate@{adapter}-{recipe}" for adapter in run.adapters for recipe in run.recipes]
    return names + [f"pca@{adapter}" for adapter in run.adapters]


def stage_of(path: Path) -> str:
    """The stage of dvc.yaml that makes a path below data/<profile>."""
    parts = path.relative_to(RESULTS).parts[1:] if path.is_relative_to(RESULTS) else path.parts[-2:]
    made_by: dict[str, str] = {str(kind): stage for kind, stage in EXTRACTED_BY.items()}
    stage, item = made_by.get(parts[0], parts[0]), Path(parts[1]).stem if len(parts) > 1 else ""
    if stage == "finetune" and item.endswith(SCRATCH):
        return f"finetune_scratch@{item.removesuffix(SCRATCH)}"
    return "report" if stage in ("report", "metrics.json") else "inputs" if stage == "inputs" else f"{stage}@{item}"


def remedy(path: Path, force: bool = False) -> str:
    """The command that makes a result anew, with all that it needs; `force`: although DVC takes it for up to date."""
    return f"run `dvc repro {'--force ' if force else ''}{stage_of(path)}`"


def no_results(folder: Path) -> UserError:
    """That a folder is not the results of a run, data/<profile> in a project's folder, and which are."""
    there = [f"{RESULTS}/{path.parent.name}" for path in sorted(RESULTS.glob("*/prepare"))]
    return UserError(folder, "not the results of a run", f"give {' or '.join(there) or f'{RESULTS}/<profile>'}")


def require(path: Path) -> Path:
    """`path`, or a UserError that names the stage which writes it."""
    if not path.exists():
        raise UserError(path, "no such file", remedy(path))
    return path
