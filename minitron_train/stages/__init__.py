"""Stages: one folder each, atomic or resumable, with a provenance.json that records its inputs and settings.

run.py          run a stage: its state, its lock, the work, its provenance
stage.py        the Stage value: what decides its result, whether it is finished or stale, who owns its folder
layout.py       the output folder: which stage writes where
folders.py      the folder that the work writes into, and recovery after killed runs
provenance.py   provenance.json and started.json: their types, and how they are read
environment.py  what provenance.json records about the process: time, memory, package versions, commit
exported.py     exported.json: where the last export wrote the student
"""

from minitron_train.stages.exported import exported, note_export
from minitron_train.stages.folders import resumed_folder
from minitron_train.stages.provenance import (
    POSITION,
    PROVENANCE,
    STARTED,
    STOPPED,
    Provenance,
    StageRecord,
    Started,
    read_provenance,
    read_started_record,
)
from minitron_train.stages.run import Invocation, OnFirst, Work, begun_before_requeue, refuse_damaged, run_stage
from minitron_train.stages.stage import Stage, State, differences, plain

__all__ = [
    "POSITION",
    "PROVENANCE",
    "STARTED",
    "STOPPED",
    "Invocation",
    "OnFirst",
    "Provenance",
    "Stage",
    "StageRecord",
    "Started",
    "State",
    "Work",
    "begun_before_requeue",
    "differences",
    "exported",
    "note_export",
    "plain",
    "read_provenance",
    "read_started_record",
    "refuse_damaged",
    "resumed_folder",
    "run_stage",
]
