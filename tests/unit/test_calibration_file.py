"""calibration.save_path and calibration.tokens_path: a calibration set as a file that can be shared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron_train.commands.command import execute
from minitron_train.commands.registry import COMMANDS
from minitron_train.config import CalibrationConfig, Config
from minitron_train.data import tokenizers
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from tests.support.training import Material, make_config


def score(material: Material, folder: Path, **calibration: Any) -> Config:
    config = make_config(material, teacher__path=str(material.teacher))
    config.output_dir = str(folder)
    config.calibration = CalibrationConfig(num_samples=8, seq_length=32, micro_batch_size=4, **calibration)
    config.validate()
    execute(COMMANDS["score"], config, ["score"], World())
    return config


@pytest.fixture(scope="module")
def saved(training: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    score(training, folder / "text", save_path=str(folder / "set.safetensors"))
    return folder


def test_scores_from_the_file_are_those_from_the_text(training, saved):
    score(training, saved / "file", tokens_path=str(saved / "set.safetensors"))
    text, file = (load_file(saved / name / "scores" / "scores.safetensors") for name in ("text", "file"))
    assert text.keys() == file.keys() and all(torch.equal(text[key], file[key]) for key in text)


def test_the_metadata_say_how_it_was_made(training, saved):
    with safe_open(saved / "set.safetensors", framework="pt") as file:
        made = json.loads(file.metadata()["minitron_train"])
        assert file.get_tensor("tokens").shape == (2, 4, 32)
    provenance = json.loads((saved / "text" / "scores" / "provenance.json").read_text())
    assert made["inputs"] == {key: value for key, value in provenance["inputs"].items() if key.startswith("data ")}
    assert made["inputs"] and made["seed"] == Config().seed
    assert made["settings"] == {"num_samples": 8, "seq_length": 32, "self_generated_fraction": 0.0}
    assert made["tokenizer"] == tokenizers.digest(tokenizers.load(training.student)), "the same one in both folders"


def test_it_is_written_from_finished_scores_too(training, saved, tmp_path, capsys):
    score(training, saved / "text", save_path=str(tmp_path / "again.safetensors"))
    assert "score: already finished" in capsys.readouterr().out
    assert (tmp_path / "again.safetensors").read_bytes() == (saved / "set.safetensors").read_bytes()


def test_tokens_of_another_tokenizer_are_refused(training, saved, tmp_path):
    other = tokenizers.train_bpe(iter([training.corpus.read_text()[:2000]]), 300)
    tokenizers.save(other, tmp_path / "teacher")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "teacher" / name).write_bytes((training.teacher / name).read_bytes())
    elsewhere = Material(training.student, tmp_path / "teacher", training.corpus)
    with pytest.raises(UserError, match=r"set\.safetensors: its tokens are of another tokenizer than the teacher's"):
        score(elsewhere, tmp_path / "out", tokens_path=str(saved / "set.safetensors"))
    assert not (tmp_path / "out" / "scores").exists()
    save_file(load_file(saved / "set.safetensors"), tmp_path / "plain.safetensors")
    score(elsewhere, tmp_path / "out", tokens_path=str(tmp_path / "plain.safetensors"))


def test_damaged_metadata_and_a_copy_are_one_line(training, saved, tmp_path):
    file = tmp_path / "damaged.safetensors"
    save_file(load_file(saved / "set.safetensors"), file, metadata={"minitron_train": "{}"})
    with pytest.raises(UserError, match=r"damaged\.safetensors: damaged \(.*tokenizer.*\); write the file again"):
        score(training, tmp_path / "out", tokens_path=str(file))
    with pytest.raises(UserError, match=r"calibration\.save_path=b: saves tokens that are read from text"):
        CalibrationConfig(tokens_path="a", save_path="b").validate()
