"""distill: train the student on the teacher's logits."""

from minitron_train.commands.command import TRAINING, Command, Job
from minitron_train.commands.training import check_settings, distill_options, train_stage, training_text
from minitron_train.commands.workspace import Workspace
from minitron_train.planning.check import FEWER_CHECKPOINTS, MORE_GPUS, Needs
from minitron_train.runtime.errors import UserError
from minitron_train.stages import layout


def distill(ws: Workspace) -> None:
    """Train the student on the teacher's logits; an interrupted training resumes."""
    ws.check_teacher_is_there()
    student, teacher = ws.pruned_folder, ws.teacher_folder
    if not ws.is_there(student):
        raise UserError(f"no student in {student}; run prune first, or give student.path=FOLDER")
    folder = ws.folder / layout.TRAINING
    train_stage(ws, ws.config, COMMAND.name, NEEDS, folder=folder, student=student, teacher=teacher)


NEEDS = Needs(
    options=distill_options,
    remedy=MORE_GPUS,
    disk="checkpoints",
    replaces=layout.TRAINING,
    disk_remedy=FEWER_CHECKPOINTS,
)
COMMAND = Command(
    name="distill",
    summary="train the student on the teacher's logits",
    reads="teacher/, pruned/, text",
    writes="train/",
    run=distill,
    sections=("teacher", "student", "distill", "data", *TRAINING),
    in_chain=lambda config: True,
    check=check_settings,
    text=training_text,
    needs_teacher=True,
    trainings=(layout.TRAINING,),
    needs=NEEDS,
    job=Job(gpus=True, resumable=True),
)
