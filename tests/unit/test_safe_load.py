"""Hostile checkpoints: nothing in them runs, and only a training of the output folder itself is taken for one."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from minitron_train.commands import configuration
from minitron_train.commands.command import execute
from minitron_train.commands.registry import COMMANDS
from minitron_train.evaluation.source import is_training, locate, open_origin
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import sha256_file
from minitron_train.runtime.launch import World
from minitron_train.stages import STARTED
from minitron_train.train import checkpoint_files as files
from minitron_train.train import safe_load
from minitron_train.train.export import SavedTensors, VerifiedCheckpoint, find_checkpoint
from tests.support.models import save_tiny
from tests.support.training import Material, make_material, run


class Evil:
    """Pickles as a call of os.system."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def sign(path: Path) -> None:
    """A manifest that fits the checkpoint's files, as an attacker would write it."""
    manifest: dict[str, Any] = {"step": 1, "belongs_to": {}}
    if (path / files.MANIFEST).exists():
        manifest = json.loads((path / files.MANIFEST).read_text())
    present = [file for file in path.iterdir() if file.name != files.MANIFEST]
    manifest["files"] = {file.name: files.describe(file) for file in present}
    (path / files.MANIFEST).write_text(json.dumps(manifest))


def add_checkpoint(folder: Path, mark: Path) -> Path:
    """A checkpoint below `folder` whose .metadata would run code."""
    path = files.checkpoint_path(folder / "checkpoints", 1)
    path.mkdir(parents=True)
    (path / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    sign(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Material, Path]:
    """A run with one checkpoint, of step 8."""
    material = make_material(tmp_path_factory.mktemp("material"))
    folder = tmp_path_factory.mktemp("run")
    run(material, folder, checkpoint__interval_steps=8)
    return material, folder


def replace_common(path: Path, evil: Evil) -> None:
    torch.save({"run": evil}, path / "common.pt")


def replace_metadata(path: Path, evil: Evil) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(evil))


def replace_pieces(path: Path, evil: Evil) -> None:
    """Objects such as `_extra_state` are torch.save'd into *.distcp, where torch's own planner unpickles any class."""
    metadata = safe_load.read_metadata(path)
    assert metadata.storage_data
    torch.save([evil], path / "evil.distcp")
    index = next(index for index in metadata.storage_data if "_extra_state" in index.fqn)
    place = metadata.storage_data[index]
    place.relative_path, place.offset, place.length = "evil.distcp", 0, (path / "evil.distcp").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_common_object(path: Path, evil: Evil) -> None:
    """megatron-core 0.19 stores the state that is not sharded as an object of a chunk, which it unpickles itself."""
    torch.save([evil], path / "evil.distcp")
    place_common(path, "evil.distcp")


def place_common(path: Path, name: str) -> None:
    """Make the file `name` the place of the state that is not sharded, as megatron-core 0.19 does."""
    metadata = safe_load.read_metadata(path)
    assert metadata.storage_data is not None
    place = _StorageInfo(name, 0, (path / name).stat().st_size)
    metadata.storage_data[MetadataIndex(safe_load.COMMON_OBJECT)] = place
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / safe_load.COMMON_FILE).unlink(missing_ok=True)


def test_the_state_of_either_release_of_megatron_core_is_read(trained: tuple[Material, Path], tmp_path: Path) -> None:
    path = files.checkpoint_path(trained[1] / "checkpoints", 8)
    state = safe_load.read_common(path)
    other = tmp_path / path.name
    shutil.copytree(path, other)
    torch.save([state], other / "state.distcp")
    place_common(other, "state.distcp")
    assert safe_load.read_common(other).keys() == state.keys()
    torch.save(state | {"whole": True}, other / safe_load.COMMON_FILE)
    assert safe_load.read_common(other)["whole"]


@pytest.mark.parametrize("replace", [replace_common, replace_common_object, replace_metadata, replace_pieces])
def test_resume_refuses_a_class_that_is_not_allowed(
    trained: tuple[Material, Path], tmp_path: Path, replace: Callable[[Path, Evil], None]
) -> None:
    material, folder = trained
    shutil.copytree(folder, tmp_path / "run")
    path = files.checkpoint_path(tmp_path / "run" / "checkpoints", 8)
    replace(path, Evil(tmp_path / "mark"))
    sign(path)
    with pytest.raises(UserError, match=r"uses posix\.system, which no checkpoint of this program contains") as refusal:
        run(material, tmp_path / "run", checkpoint__interval_steps=8)
    assert path.name in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "mark").exists()


def test_what_we_write_names_every_allowed_class_but_dtypes(
    trained: tuple[Material, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = set()

    def note(self: Any, module: str, name: str) -> Any:
        named.add(f"{module}.{name}")
        return pickle.Unpickler.find_class(self, module, name)

    monkeypatch.setattr(safe_load.MetadataUnpickler, "find_class", note)
    safe_load.read_metadata(files.checkpoint_path(trained[1] / "checkpoints", 8))
    dtypes = {f"torch.{dtype}" for dtype in safe_load.DTYPES}
    assert named - dtypes == safe_load.ALLOWED - dtypes


METADATA = {
    "a class": (Evil(Path("mark")), r"uses posix\.system"),
    "a plain object": ({"state_dict_metadata": {}}, "contains no checkpoint metadata"),
    "a method of an allowed class": (b"\x80\x04ctorch\nSize.__subclasses__\n.", r"uses torch\.Size\.__subclasses__"),
    "half a pickle": (pickle.dumps(list(range(100)))[:50], "damaged"),
    "no pickle": (b"hello", "damaged"),
    "nothing": (b"", "damaged"),
}


@pytest.mark.parametrize("what", METADATA)
def test_export_and_eval_refuse_metadata(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = METADATA[what]
    (tmp_path / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(UserError, match=said) as refusal:
        SavedTensors(VerifiedCheckpoint(tmp_path))
    assert ".metadata: " in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", ".."])
def test_tensors_outside_the_checkpoint_are_refused(trained: tuple[Material, Path], tmp_path: Path, name: str) -> None:
    metadata = safe_load.read_metadata(files.checkpoint_path(trained[1] / "checkpoints", 8))
    assert metadata.storage_data
    next(iter(metadata.storage_data.values())).relative_path = name
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="refers to a file outside the checkpoint"):
        safe_load.read_metadata(tmp_path)


EMBEDDING = "embedding.word_embeddings.weight"


def place_all(**values: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            vars(place).update(values)

    return change


def change_entry(**values: Any) -> Callable[[Any], None]:
    return lambda metadata: vars(metadata.state_dict_metadata[EMBEDDING]).update(values)


def chunk(start: int, rows: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([rows, 48]))


WRONG_PIECES: dict[str, tuple[Callable[[Any], None], str]] = {
    "no such tensor": (
        lambda metadata: metadata.state_dict_metadata.pop(EMBEDDING),
        "tensor embedding.* is missing or incomplete",
    ),
    "no pieces": (change_entry(chunks=[]), "the chunks do not cover"),
    "too large": (change_entry(size=torch.Size([2**40, 2**10])), "the chunks do not cover"),
    "outside": (change_entry(chunks=[chunk(10**9, 320)]), "lies outside of"),
    "overlapping": (change_entry(chunks=[chunk(0, 160), chunk(0, 160)]), "overlap"),
    "no size": (change_entry(size="abc"), "is missing or incomplete"),
    "no such place": (lambda metadata: metadata.storage_data.clear(), "is missing or incomplete"),
    "before the file": (place_all(offset=-5), "has an impossible byte range"),
    "a word": (place_all(offset="x"), "has an impossible byte range"),
    "behind the file": (place_all(length=2**62), "too short for its chunk"),
    "no such file": (place_all(relative_path="nope"), "nope"),
    "a pipe": (place_all(relative_path="pipe"), "is not a regular file"),
    "another file": (place_all(relative_path="manifest.json", offset=0, length=9), "manifest.json: embedding"),
}


@pytest.mark.parametrize("what", WRONG_PIECES)
def test_pieces_that_are_not_the_tensor_are_refused(trained: tuple[Material, Path], tmp_path: Path, what: str) -> None:
    """Above all a missing one: the exported weights would be what the memory happened to hold."""
    source = files.checkpoint_path(trained[1] / "checkpoints", 8)
    path = shutil.copytree(source, tmp_path / source.name)
    change, said = WRONG_PIECES[what]
    metadata = safe_load.read_metadata(path)
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    os.mkfifo(path / "pipe")
    with pytest.raises(UserError, match=said) as refusal:
        SavedTensors(VerifiedCheckpoint(path)).read(EMBEDDING)
    assert "\n" not in str(refusal.value)


def test_a_manifest_that_names_a_file_elsewhere_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    path = tmp_path / "step_00000001"
    path.mkdir()
    noted = {"bytes": 1, "sha256": sha256_file(tmp_path / "secret")}
    (path / files.MANIFEST).write_text(json.dumps({"step": 1, "belongs_to": {}, "files": {"../secret": noted}}))
    assert "is unreadable" in str(files.find_damage(path)) and "`key` in `$.files`" in str(files.find_damage(path))


@pytest.mark.parametrize(
    "word", ["teacher.path={}", "student.path={}", "eval.model={}", "teacher.path={} eval.model=teacher"]
)
def test_a_model_folder_is_never_a_training(tmp_path: Path, word: str) -> None:
    """Its checkpoints/ and manifest.json are ignored; where it lacks its config.json, that is what is said."""
    model = save_tiny("nemotron", tmp_path / "model")
    add_checkpoint(model, tmp_path / "mark")
    (model / files.MANIFEST).write_text('{"step": 1, "files": {}, "belongs_to": {}}')
    assert not is_training(model) and locate(model, tmp_path, trust_external=False) == model
    config = configuration.compose([*word.format(model).split(), f"output_dir={tmp_path / 'out'}", "dry_run=true"])
    execute(COMMANDS["eval"], config, [], World())
    assert not (tmp_path / "mark").exists()
    (model / "config.json").unlink()
    message = "does not belong to a training in output_dir" if word == "eval.model={}" else "config.json: no such file"
    with pytest.raises(UserError, match=message):
        execute(COMMANDS["eval"], config, [], World())
    assert not (tmp_path / "mark").exists()


def test_only_the_output_folders_own_trainings_are_loaded(tmp_path: Path) -> None:
    """Own: below train/ or pretrain/train/ with this program's record beside; others need checkpoint.trust_external."""
    out = tmp_path / "out"
    paths = {
        name: add_checkpoint(out / name, tmp_path / "mark")
        for name in ("train", "pretrain/train", "teacher", "x/train")
    }
    for name, path in paths.items():
        with pytest.raises(UserError, match=r"checkpoint\.trust_external=true"):
            find_checkpoint(path, out, trust_external=False)
        (out / name / STARTED).write_text('{"inputs": {"student": "1"}, "settings": {}}')
        named = (path, out / name, path.parent / "latest")
        (path.parent / "latest").write_text(path.name + "\n")
        for source in named:
            if name in ("train", "pretrain/train"):
                assert find_checkpoint(source, out, trust_external=False).path == path
            else:
                with pytest.raises(UserError, match=r"checkpoint\.trust_external=true"):
                    find_checkpoint(source, out, trust_external=False)
                assert find_checkpoint(source, out, trust_external=True).path == path
    with pytest.raises(UserError, match=r"checkpoint\.trust_external=true"):
        find_checkpoint(out / "train" / ".." / "teacher", out, trust_external=False)
    (tmp_path / "alias").symlink_to(out)
    assert find_checkpoint(tmp_path / "alias" / "train", out, trust_external=False)
    with pytest.raises(UserError, match=r"uses posix\.system"):
        open_origin(find_checkpoint_with_model(paths["teacher"], out))


def find_checkpoint_with_model(path: Path, out: Path) -> VerifiedCheckpoint:
    """The checkpoint, vouched for by the user, with a model's config.json beside."""
    save_tiny("nemotron", path.parent / "model")
    return find_checkpoint(path, out, trust_external=True)


@pytest.mark.parametrize("content", ["../../evil/step_00000001", "", "step_1", "x" * 1000, "\xff"])
def test_a_pointer_names_a_checkpoint_beside_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "best").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="best: "):
        find_checkpoint(tmp_path / "best", tmp_path, trust_external=True)
