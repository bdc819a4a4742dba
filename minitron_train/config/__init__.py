"""Every setting of the program: one typed dataclass per section, with its default, its unit and its meaning.

Hydra fills these from conf/, recipes/ and the command line; `validate` of each section that has one is called once, before
anything is allocated. Nothing here imports torch, so that `--help` and `--cfg job` are quick.
"""

from dataclasses import dataclass, fields

from minitron_train.config.base import Precision, opt
from minitron_train.config.cluster import ClusterConfig, PlanConfig
from minitron_train.config.data import ChatLoss, DataConfig, SourceConfig, SourceKind, TooLong
from minitron_train.config.distill import DistillConfig, HiddenLossKind, LossKind
from minitron_train.config.evaluation import EvalConfig
from minitron_train.config.members import MemberConfig, is_family, origins, validate_members, with_member, without_typed
from minitron_train.config.model import (
    ExportConfig,
    ExportDtype,
    ModelConfig,
    StudentConfig,
    TeacherConfig,
    TeacherSource,
)
from minitron_train.config.prune import (
    Aggregation,
    Budget,
    CalibrationConfig,
    ExpertImportance,
    HeadNorm,
    Merge,
    NeuronActivation,
    PruneConfig,
    Refit,
    Scope,
    SearchConfig,
)
from minitron_train.config.speed import SpeedConfig
from minitron_train.config.teach import TeachConfig, TeachKind
from minitron_train.config.tracking import MlflowConfig, TrackerKind, TrackingConfig, WandbConfig, WandbMode
from minitron_train.config.train import (
    CheckpointConfig,
    OnNonFinite,
    ParallelConfig,
    PretrainConfig,
    Recompute,
    Schedule,
    TrainConfig,
)


@dataclass(kw_only=True, slots=True)
class Config:
    """The whole configuration of one invocation."""

    name: str = opt("custom", "name of the recipe")
    output_dir: str = opt("outputs/${name}", "folder for everything that the commands write", path=True)
    seed: int = opt(1234, "seed of data order, initialisation and sampling")
    force: bool = opt(False, "run finished stages again; overwrite trainings that were started with different settings")
    dry_run: bool = opt(False, "print what each stage would read, write and keep; run nothing")
    member: str | None = opt(
        None, "member of the model family that the command works on; default: all of them, in run, plan and report"
    )
    members: dict[str, MemberConfig] = opt(
        dict,
        "students of a model family by name, in the order in which they are made; set in a recipe (see recipes/family.yaml)",
    )
    model: ModelConfig = opt(ModelConfig, "")
    teacher: TeacherConfig = opt(TeacherConfig, "")
    student: StudentConfig = opt(StudentConfig, "")
    calibration: CalibrationConfig = opt(CalibrationConfig, "")
    data: DataConfig = opt(DataConfig, "")
    prune: PruneConfig = opt(PruneConfig, "")
    search: SearchConfig = opt(SearchConfig, "")
    teach: TeachConfig = opt(TeachConfig, "")
    distill: DistillConfig = opt(DistillConfig, "")
    pretrain: PretrainConfig = opt(PretrainConfig, "")
    train: TrainConfig = opt(TrainConfig, "")
    checkpoint: CheckpointConfig = opt(CheckpointConfig, "")
    parallel: ParallelConfig = opt(ParallelConfig, "")
    eval: EvalConfig = opt(EvalConfig, "")
    speed: SpeedConfig = opt(SpeedConfig, "")
    export: ExportConfig = opt(ExportConfig, "")
    tracking: TrackingConfig = opt(TrackingConfig, "")
    cluster: ClusterConfig = opt(ClusterConfig, "")
    plan: PlanConfig = opt(PlanConfig, "")

    def validate(self) -> None:
        """Validate every section once, before anything is allocated."""
        for f in fields(self):
            section = getattr(self, f.name)
            if hasattr(section, "validate"):
                section.validate()
        validate_members(self)

    @property
    def title(self) -> str:
        """The recipe's name, with the member's."""
        return self.name if self.member is None else f"{self.name}-{self.member}"


__all__ = [
    "Aggregation",
    "Budget",
    "CalibrationConfig",
    "ChatLoss",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EvalConfig",
    "ExpertImportance",
    "ExportConfig",
    "ExportDtype",
    "HeadNorm",
    "HiddenLossKind",
    "LossKind",
    "MemberConfig",
    "Merge",
    "MlflowConfig",
    "ModelConfig",
    "NeuronActivation",
    "OnNonFinite",
    "ParallelConfig",
    "PlanConfig",
    "Precision",
    "PretrainConfig",
    "PruneConfig",
    "Recompute",
    "Refit",
    "Schedule",
    "Scope",
    "SearchConfig",
    "SourceConfig",
    "SourceKind",
    "SpeedConfig",
    "StudentConfig",
    "TeachConfig",
    "TeachKind",
    "TeacherConfig",
    "TeacherSource",
    "TooLong",
    "TrackerKind",
    "TrackingConfig",
    "TrainConfig",
    "WandbConfig",
    "WandbMode",
    "is_family",
    "origins",
    "with_member",
    "without_typed",
]
