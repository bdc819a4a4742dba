"""What a case is, and the steps that prepare its folder."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron_train.train.checkpoint_files import MANIFEST, describe

MICRO = (
    "+recipe=micro output_dir=out tracking.wandb.mode=disabled pretrain.num_tokens=4096 train.num_tokens=4096 "
    "train.warmup_steps=1 train.global_batch_size=8"
)
TEACHER = "out/teacher"
WEIGHTS = f"{TEACHER}/model.safetensors"


@dataclass(slots=True)
class Scene:
    """The folder that a case runs in, and the finished stages that it may copy from.

    Attributes:
        mounts: file systems to unmount afterwards.
    """

    folder: Path
    material: Path
    mounts: list[Path] = field(default_factory=list)

    def close(self) -> None:
        """Unmount."""
        for mount in self.mounts:
            subprocess.run(["umount", str(mount)], check=True)


Step = Callable[[Scene], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One mistake.

    Attributes:
        command: what follows `python -m minitron_train`.
        says: a regular expression that the error's line must hold.
        finishes: folders of stages that the command finishes before it meets the mistake.
        keeps: folders of a run that can be resumed.
        environ: environment variables of the process.
        quick: runs without `--whole`, because it needs no material.
        needs_root: mounts a file system.
        words: more arguments, which may contain blanks.
    """

    name: str
    command: str
    says: str
    prepare: tuple[Step, ...] = ()
    finishes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    quick: bool = False
    needs_root: bool = False
    words: tuple[str, ...] = ()


# What a case prepares


def have(*stages: str) -> Step:
    """Finished stages of the material under out/."""

    def step(scene: Scene) -> None:
        for stage in stages:
            shutil.copytree(scene.material / stage, scene.folder / "out" / stage)

    return step


def write(path: str, content: str | bytes) -> Step:
    """A file."""

    def step(scene: Scene) -> None:
        target = scene.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    return step


def copy(path: str, target: str) -> Step:
    """A file once more, under another name."""

    def step(scene: Scene) -> None:
        shutil.copyfile(scene.folder / path, scene.folder / target)

    return step


def copy_folder(path: str, target: str) -> Step:
    """A folder once more, under another name."""

    def step(scene: Scene) -> None:
        shutil.copytree(scene.folder / path, scene.folder / target)

    return step


def fifo(path: str) -> Step:
    """A named pipe, at which a reader would wait for ever."""
    return lambda scene: os.mkfifo(scene.folder / path)


def folder(path: str) -> Step:
    """An empty folder."""
    return lambda scene: (scene.folder / path).mkdir(parents=True)


def loop(path: str) -> Step:
    """A link to itself."""
    return lambda scene: (scene.folder / path).symlink_to(scene.folder / path)


def remove(*paths: str) -> Step:
    """Without these files."""

    def step(scene: Scene) -> None:
        for path in paths:
            (scene.folder / path).unlink()

    return step


def cut_off(path: str, share: float = 0.5) -> Step:
    """The file's first part alone."""

    def step(scene: Scene) -> None:
        file = next(iter(sorted(scene.folder.glob(path))))
        os.truncate(file, int(file.stat().st_size * share))

    return step


def flip(path: str, offset: int) -> Step:
    """Eight bytes of the file inverted, its size as before."""

    def step(scene: Scene) -> None:
        file = next(iter(sorted(scene.folder.glob(path))))
        content = bytearray(file.read_bytes())
        content[offset : offset + 8] = bytes(255 - byte for byte in content[offset : offset + 8])
        file.write_bytes(content)

    return step


def edit(path: str, **changes: Any) -> Step:
    """A JSON file with keys changed; None removes the key."""

    def step(scene: Scene) -> None:
        file = scene.folder / path
        merged = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))

    return step


def tensors(path: str, **changes: torch.Tensor) -> Step:
    """A safetensors file with these tensors."""

    def step(scene: Scene) -> None:
        save_file(changes, scene.folder / path, metadata={"format": "pt"})

    return step


def change_tensors(path: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Step:
    """A safetensors file with what `change` makes of its tensors."""

    def step(scene: Scene) -> None:
        file = scene.folder / path
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return step


def without_tensor(name: str) -> Step:
    """The teacher's weights without one tensor."""
    return change_tensors(WEIGHTS, lambda held: {key: value for key, value in held.items() if key != name})


def shard(scene: Scene) -> None:
    """The teacher in two shards with an index."""
    file = scene.folder / WEIGHTS
    whole = list(load_file(file).items())
    file.unlink()
    weight_map = {}
    for k, part in enumerate((dict(whole[::2]), dict(whole[1::2])), start=1):
        name = f"model-{k:05d}-of-00002.safetensors"
        save_file(part, file.with_name(name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def reorder_index(scene: Scene) -> None:
    """An index in which two shards' names are exchanged."""
    file = scene.folder / TEACHER / "model.safetensors.index.json"
    held = json.loads(file.read_text())["weight_map"]
    other = dict(zip(sorted(set(held.values())), sorted(set(held.values()), reverse=True), strict=True))
    file.write_text(json.dumps({"metadata": {}, "weight_map": {name: other[shard] for name, shard in held.items()}}))


def exchange_tokens(path: str) -> Step:
    """A tokenizer.json in which two tokens have each other's id."""

    def step(scene: Scene) -> None:
        file = scene.folder / path
        held = json.loads(file.read_text())
        vocabulary = held["model"]["vocab"]
        one, other = list(vocabulary)[500:502]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        file.write_text(json.dumps(held))

    return step


def sign(path: str) -> Step:
    """A checkpoint's manifest that fits its files as they are now, as an attacker would write it."""

    def step(scene: Scene) -> None:
        folder = scene.folder / path
        files = [file for file in folder.iterdir() if file.name != MANIFEST]
        edit(f"{path}/{MANIFEST}", files={file.name: describe(file) for file in files})(scene)

    return step


def narrow_vocabulary(scene: Scene) -> None:
    """small/: the teacher with half of its vocabulary's rows, and the whole tokenizer."""
    small = scene.folder / "small"
    shutil.copytree(scene.folder / TEACHER, small)
    whole = load_file(small / "model.safetensors")
    cut = {name: tensor[:512].clone() if tensor.shape[0] == 1024 else tensor for name, tensor in whole.items()}
    save_file(cut, small / "model.safetensors", metadata={"format": "pt"})
    edit("small/config.json", vocab_size=512)(scene)


def other_scores(scene: Scene) -> None:
    """The scores of a model with one layer more, put in the place of the right ones."""
    file = scene.folder / "out" / "scores" / "scores.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    save_file(load_file(file), file, metadata=metadata | {"num_layers": "4"})


def mount(path: str, options: str) -> Step:
    """A small file system; what the folder held is there too, as long as it fits."""

    def step(scene: Scene) -> None:
        target = scene.folder / path
        held = target.with_name(target.name + ".held")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(target, held)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)], check=True)
        scene.mounts.append(target)
        shutil.copytree(held, target, dirs_exist_ok=True)
        shutil.rmtree(held)

    return step


def read_only(path: str) -> Step:
    """A file system that refuses writing."""

    def step(scene: Scene) -> None:
        mount(path, "size=16m")(scene)
        subprocess.run(["mount", "-o", "remount,ro", str(scene.folder / path)], check=True)

    return step


TRAINED = (have("teacher", "pruned", "train"),)
PRUNED = (have("teacher", "pruned"),)
TAUGHT = (have("teacher"),)
EVALUATED = (have("teacher", "pruned", "train", "student", "eval"),)
SCORED = (have("teacher", "scores"),)
