"""Records that are damaged or foreign when they are read back, and hostile checkpoints."""

import json
import os
import pickle
from pathlib import Path

from tests.bad_input.scene import (
    EVALUATED,
    MICRO,
    PRUNED,
    SCORED,
    TAUGHT,
    TRAINED,
    Case,
    Step,
    copy_folder,
    edit,
    exchange_tokens,
    have,
    remove,
    sign,
    write,
)

DEEP = "[" * 100_000 + "]" * 100_000
STEP = "out/train/checkpoints/step_00000008"
EXPORT = f"export {MICRO}"
UNFINISHED = (*TRAINED, remove("out/train/provenance.json"))
DAMAGES = [  # of a record that should hold an object
    ("cut off", '{"stage": "'),
    ("a list", "[1]"),
    ("null", "null"),
    ("not UTF-8", b'{"a": "\xff"}'),
    ("nested too deeply", DEEP),
]


class Hostile:
    """Pickles as a call of os.system."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch run-by-a-pickle",)


RECORDS_READ: list[tuple[str, str, str, tuple[Step, ...]]] = [  # record, command, file, what the folder holds
    ("record of scores", f"prune {MICRO}", "out/scores/provenance.json", SCORED),
    ("record of a begun training", f"distill {MICRO}", "out/train/started.json", UNFINISHED),
    ("result of an evaluation", f"report {MICRO}", "out/eval/student.json", EVALUATED),
]
DAMAGED = [
    Case(f"{what}: {damage}", command, f"{Path(file).name}: damaged", (*prepare, write(file, content)))
    for what, command, file, prepare in RECORDS_READ
    for damage, content in DAMAGES
]
ROW = {"task": "a", "filter": "none", "doc_id": 1, "prompt_hash": "h", "metrics": {"acc": 1}}
COMPARE = f"eval {MICRO} eval.compare=[teacher,student]"
SINGLE = [
    Case(
        "evaluated rows that are none",
        COMPARE,
        "is not an evaluated row",
        (*EVALUATED, write("out/eval/student.items.jsonl", '{"x": 1}\n')),
    ),
    Case(
        "evaluated row with a word for a number",
        COMPARE,
        "is not an evaluated row",
        (*EVALUATED, write("out/eval/student.items.jsonl", json.dumps(ROW | {"metrics": 3}) + "\n")),
    ),
    Case(
        "negative perplexity in a result",
        f"report {MICRO}",
        "student.json: damaged",
        (*EVALUATED, edit("out/eval/student.json", perplexity=-1.0)),
    ),
    Case(
        "record with negative seconds",
        f"report {MICRO}",
        "provenance.json: damaged",
        (*TRAINED, edit("out/train/provenance.json", wall_seconds=-1)),
    ),
    Case(
        "checkpoint that is a file of weights",
        f"{EXPORT} export.checkpoint=out/pruned/model.safetensors",
        "model.safetensors",
        TRAINED,
    ),
    Case(
        "pointer to a checkpoint elsewhere",
        f"{EXPORT} export.checkpoint=out/train/checkpoints/best",
        "best",
        (*TRAINED, write("out/train/checkpoints/best", "../../evil/step_00000001")),
    ),
    Case(
        "manifest that is a list",
        EXPORT,
        "contains no training checkpoint|manifest",
        (*TRAINED, write(f"{STEP}/manifest.json", "[1]")),
    ),
    Case(
        "manifest that names a file elsewhere",
        EXPORT,
        "contains no training checkpoint|manifest",
        (*TRAINED, edit(f"{STEP}/manifest.json", files={"../secret": {"bytes": 1, "sha256": "c"}})),
    ),
    Case(
        "metadata of a checkpoint that would run code",
        EXPORT,
        r"uses posix\.system, which no checkpoint of this program contains",
        (*TRAINED, write(f"{STEP}/.metadata", pickle.dumps(Hostile())), sign(STEP)),
    ),
    Case(
        "metadata that are no pickle",
        EXPORT,
        r"\.metadata: .*damaged",
        (*TRAINED, write(f"{STEP}/.metadata", "hello"), sign(STEP)),
    ),
    Case(
        "metadata of another thing",
        EXPORT,
        "contains no checkpoint metadata",
        (*TRAINED, write(f"{STEP}/.metadata", pickle.dumps({"a": 1})), sign(STEP)),
    ),
    Case(
        "hostile checkpoint resumed",
        f"distill {MICRO} train.num_tokens=4096",
        r"uses posix\.system",
        (*UNFINISHED, write(f"{STEP}/.metadata", pickle.dumps(Hostile())), sign(STEP)),
    ),
    Case(
        "checkpoint of another output folder",
        f"{EXPORT} output_dir=other export.checkpoint=out/train",
        "does not belong to a training in output_dir=.*checkpoint.trust_external=true",
        TRAINED,
    ),
    Case(
        "training of another output folder evaluated",
        f"eval {MICRO} output_dir=other eval.model=out/train",
        "does not belong to a training in output_dir=.*checkpoint.trust_external=true",
        TRAINED,
    ),
    Case(
        "checkpoints in a model's folder",
        f"{EXPORT} export.checkpoint=out/teacher/checkpoints/step_00000008",
        "does not belong to a training in output_dir=",
        (*TRAINED, copy_folder("out/train/checkpoints", "out/teacher/checkpoints")),
    ),
    Case(
        "export into the training's folder",
        f"{EXPORT} export.path=out/train",
        "which holds something else of this run; choose another folder",
        TRAINED,
    ),
    Case(
        "export into another run's pruned model",
        f"{EXPORT} export.path=other/pruned",
        "holds the result of another stage",
        (*TRAINED, copy_folder("out/pruned", "other/pruned")),
    ),
    Case(
        "isolation of no kind",
        f"eval {MICRO} eval.model=teacher eval.allow_code_execution=yes",
        "must be false, true or unsafe",
        TAUGHT,
    ),
    Case(
        "student with another tokenizer",
        f"distill {MICRO} student.path=other",
        "have different tokenizers: id",
        (*PRUNED, copy_folder("out/pruned", "other"), exchange_tokens("other/tokenizer.json")),
    ),
    Case(
        "scores that are a list of rows",
        f"prune {MICRO}",
        "scores.safetensors",
        (*SCORED, write("out/scores/scores.safetensors", "")),
    ),
    Case(
        "kept channels beyond the teacher's",
        f"report {MICRO}",
        "kept.safetensors",
        (have("teacher", "scores", "pruned"), write("out/pruned/kept.safetensors", "x")),
    ),
]
RECORDS = [*DAMAGED, *SINGLE]
