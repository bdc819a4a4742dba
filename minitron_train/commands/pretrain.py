"""pretrain: train a teacher from scratch, with its tokenizer."""

import dataclasses

from minitron_train.commands.command import TRAINING, Command, Job
from minitron_train.commands.export import export_stage
from minitron_train.commands.fetch import on_rank0
from minitron_train.commands.inputs import data_inputs
from minitron_train.commands.training import pretrain_options, train_stage, training_text
from minitron_train.commands.workspace import Workspace, shape_of_recipe
from minitron_train.planning.check import FEWER_CHECKPOINTS, MORE_GPUS, Needs
from minitron_train.runtime.errors import UserError
from minitron_train.stages import Stage
from minitron_train.stages.layout import INITIAL, PRETRAINING


def pretrain(ws: Workspace) -> None:
    """A tokenizer and random weights, then the training loop with cross-entropy, then the teacher's folder."""
    from minitron_train.train.pretrain import pretrain_config, write_initial

    shape = shape_of_recipe(ws.config)
    if shape is None:
        raise UserError(
            "model.architecture is not set: pretrain needs the shape to make; pick model=NAME or set model.*"
        )
    shape.check_parallel(ws.config.parallel.tensor_model_parallel_size, "teacher")
    shape.check_experts(ws.config.parallel.expert_model_parallel_size, "teacher")
    shape.check_stages(ws.config.parallel.pipeline_model_parallel_size, "teacher")
    initial, training = ws.folder / INITIAL, ws.folder / PRETRAINING
    settings = {"model": dataclasses.asdict(ws.config.model), "seed": ws.config.seed}
    stage = Stage(name="initialise", folder=initial, inputs=data_inputs(ws), settings=settings)
    ws.run(stage, on_rank0(ws, lambda folder: write_initial(ws.config, shape, folder)))
    config = pretrain_config(ws.config)
    train_stage(ws, config, COMMAND.name, NEEDS, folder=training, student=initial, teacher=None)
    export_stage(ws, "export teacher", source=training, target=ws.teacher_folder, dtype="float32")


NEEDS = Needs(
    options=pretrain_options, remedy=MORE_GPUS, disk="checkpoints", replaces=PRETRAINING, disk_remedy=FEWER_CHECKPOINTS
)
COMMAND = Command(
    name="pretrain",
    summary="train a teacher from scratch, with its tokenizer",
    reads="text",
    writes="pretrain/, teacher/",
    run=pretrain,
    per_member=False,
    sections=("model", "pretrain", "data", *TRAINING),
    in_chain=lambda config: config.teacher.is_pretrained,
    text=training_text,
    trainings=(PRETRAINING,),
    needs=NEEDS,
    job=Job(gpus=True, resumable=True),
)
