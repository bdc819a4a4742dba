"""What provenance.json and started.json hold: the types that `stages` writes and that every reader relies on.

Only keys that some reader uses are listed. Readers keep the other keys, and show them as they are.
"""

from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

from msgspec import Meta

from minitron_train.runtime.records import Count, Seconds, read_whole_record

PathText = Annotated[str, Meta(pattern="^[^\\0]*$")]  # no file system takes a NUL byte


class ModelSection(TypedDict, total=False):
    """Of the configuration: `teacher`, `student` or `export`."""

    path: PathText | None
    repo_id: str | None
    wheel: str | None


class PruneSection(TypedDict, total=False):
    """`prune`, as the model card names it."""

    rotate: bool
    norm_scale: bool
    refit: str


class CalibrationSection(TypedDict, total=False):
    """`calibration`, as the model card names it."""

    num_samples: Count
    seq_length: Count


class TrainSection(TypedDict, total=False):
    """`train`, as the model card names it."""

    seq_length: Count


class DistillSection(TypedDict, total=False):
    """`distill`, as the model card names it."""

    loss: Required[str]
    temperature: Required[float]
    top_k: Count | None
    kd_weight: float
    ce_weight: float
    hidden_loss: str
    hidden_layers: list[str]


class SourceSection(TypedDict):
    """One part of `data.sources`."""

    weight: Annotated[float, Meta(ge=0)]


class DataSection(TypedDict, total=False):
    """`data`, as the model card names it."""

    path: PathText | None
    sources: dict[str, SourceSection]


class Settings(TypedDict, total=False):
    """The resolved configuration of a command."""

    name: str
    teacher: ModelSection
    student: ModelSection
    export: ModelSection
    prune: PruneSection
    calibration: CalibrationSection
    distill: DistillSection
    train: TrainSection
    data: DataSection


class Facts(TypedDict, total=False):
    """What a stage found out."""

    tokens: Count
    steps: Count
    resumed_at_step: Count
    gguf: str
    not_run: dict[str, str]  # eval: task -> reason


class Started(TypedDict, total=False):
    """started.json: with which inputs and settings a training began."""

    inputs: Required[dict[str, str]]
    settings: Required[dict[str, Any]]
    command: str
    slurm_job: str | None


class Provenance(TypedDict, total=False):
    """provenance.json of a finished stage."""

    stage: Required[str]
    inputs: Required[dict[str, str]]
    settings: Required[dict[str, Any]]
    config: Required[Settings]
    command: Required[str]
    slurm_job: str | None
    wall_seconds: Required[Seconds]
    parent: str | None
    packages: dict[str, str]
    python: str
    git_commit: str | None
    started_at: str
    peak_rss_bytes: Count
    facts: Facts


class StageRecord(Provenance):
    """A provenance.json with the folder that it lies in, relative to the output folder."""

    folder: str


def read(file: Path) -> Provenance:
    """One provenance.json.

    Raises:
        FileNotFoundError: there is none: the stage is not finished.
        UserError: it is damaged.
    """
    remedy = "restore it from a copy, or run the stage again with force=true"
    return read_whole_record(file, Provenance, remedy)


def read_started(file: Path) -> Started:
    """One started.json.

    Raises:
        FileNotFoundError: there is none: no training began in this folder.
        UserError: it is damaged.
    """
    remedy = "restore it from a copy, remove it to resume with today's settings, or start again with force=true"
    return read_whole_record(file, Started, remedy)
