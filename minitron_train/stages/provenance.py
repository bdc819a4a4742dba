"""provenance.json and started.json: the types of their contents, and how they are read.

The types list only keys that some reader uses. Readers keep the other keys and show them unchanged.
"""

from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

from msgspec import Meta

from minitron_train.runtime.files import readable_folder
from minitron_train.runtime.records import Count, Seconds, read_whole_record

PROVENANCE = "provenance.json"
STARTED = "started.json"  # the inputs and settings that a resumable stage was started with
POSITION = "position.json"  # how far a teacher cache is written
STOPPED = "stopped.json"  # {"signal", "step", "num_steps"} of a training that a signal stopped

PathText = Annotated[str, Meta(pattern="^[^\\0]*$")]  # no file system takes a NUL byte


class ModelSection(TypedDict, total=False):
    """`teacher`, `student` or `export` of the configuration."""

    path: PathText | None
    repo_id: str | None
    wheel: str | None


class PruneSection(TypedDict, total=False):
    """The keys of `prune` that the model card shows."""

    rotate: bool
    norm_scale: bool
    refit: str


class CalibrationSection(TypedDict, total=False):
    """The keys of `calibration` that the model card shows."""

    num_samples: Count
    seq_length: Count


class TrainSection(TypedDict, total=False):
    """The keys of `train` that the model card shows."""

    seq_length: Count


class DistillSection(TypedDict, total=False):
    """The keys of `distill` that the model card shows."""

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
    """The keys of `data` that the model card shows."""

    path: PathText | None
    sources: dict[str, SourceSection]


class Settings(TypedDict, total=False):
    """The resolved configuration of a command."""

    name: str
    member: str | None
    teacher: ModelSection
    student: ModelSection
    export: ModelSection
    prune: PruneSection
    calibration: CalibrationSection
    distill: DistillSection
    train: TrainSection
    data: DataSection


class Facts(TypedDict, total=False):
    """`facts` of a provenance: what a stage found out while it ran."""

    tokens: Count
    steps: Count
    resumed_at_step: Count
    gguf: str
    not_run: dict[str, str]  # eval: task -> reason


class Started(TypedDict, total=False):
    """started.json: the inputs and settings that a training began with."""

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
    """Read one provenance.json.

    Raises:
        FileNotFoundError: the stage is not finished.
        UserError: it is damaged.
    """
    remedy = "restore it from a copy, or run the stage again with force=true"
    return read_whole_record(file, Provenance, remedy)


def read_started(file: Path) -> Started:
    """Read one started.json.

    Raises:
        FileNotFoundError: no training began in this folder.
        UserError: it is damaged.
    """
    remedy = "restore it from a copy, or start again with force=true"
    return read_whole_record(file, Started, remedy)


def read_provenance(folder: Path, record: str = PROVENANCE) -> Provenance | None:
    """The provenance of a finished stage; None while it is unfinished. Changes nothing: other processes may be at work.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read(readable_folder(folder) / record)
    except FileNotFoundError:
        return None


def read_started_record(folder: Path) -> Started | None:
    """started.json of a resumable stage; None when the stage has not begun.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read_started(readable_folder(folder) / STARTED)
    except FileNotFoundError:
        return None
