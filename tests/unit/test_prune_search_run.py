"""A search that cuts, measures and retrains its candidates: broken off in the middle, gone on with, ranked."""

import contextlib
import json

import pytest

from minitron_train.commands.command import execute
from minitron_train.commands.registry import COMMANDS
from minitron_train.config import TeachKind
from minitron_train.model.build import LanguageModel
from minitron_train.runtime.launch import World
from tests.support.pruning import PLAIN
from tests.support.training import Interrupted, Material, before_step, interrupt, make_config

SEQUENCES, LENGTH, STEPS = 8, 32, 4


def search_config(material: Material, folder, **search):
    """Three candidates, each retrained for four steps."""
    config = make_config(
        material,
        teacher__path=str(material.teacher),
        calibration__num_samples=SEQUENCES,
        calibration__seq_length=LENGTH,
        checkpoint__interval_steps=2,
        **{f"prune__{key}": value for key, value in PLAIN.items()},
        train__warmup_steps=1,
        eval__tasks=["hellaswag"],
        eval__training_tasks=["hellaswag"],
        checkpoint__best_metric="hellaswag.acc_norm",  # not of the candidates, which are trained without tasks
    )
    config.output_dir = str(folder)
    settings = {"target": 60_000.0, "tolerance": 0.35, "hidden_size": [32, 64], "num_layers": [2, 3]}
    settings |= {"ffn_expansion": [1.0], "evaluate": True, "retrain_tokens": STEPS * SEQUENCES * LENGTH}
    for key, value in (settings | search).items():
        setattr(config.search, key, value)
    config.validate()
    return config


def search(material: Material, folder, **settings) -> None:
    execute(COMMANDS["search"], search_config(material, folder, **settings), ["search"], World())


def ranked(folder) -> list[dict]:
    return json.loads((folder / "search.json").read_text())["candidates"]


def steps(folder) -> list[int]:
    lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def undisturbed(training, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    search(training, folder)
    return folder


def test_candidates_are_ranked_by_their_loss_after_retraining(undisturbed):
    found = ranked(undisturbed)
    assert len(found) >= 2
    assert [row["retrained_loss"] for row in found] == sorted(row["retrained_loss"] for row in found)
    for row in found:
        folder = undisturbed / "search" / row["name"]
        assert row["zero_shot_loss"] != row["retrained_loss"]
        assert steps(folder) == list(range(1, STEPS + 1))
        shape = json.loads((folder / "student" / "config.json").read_text())
        assert (shape["hidden_size"], shape["num_hidden_layers"]) == (row["hidden_size"], row["num_layers"])


def test_a_broken_off_search_goes_on_where_it_was(training, undisturbed, tmp_path, capsys):
    with contextlib.suppress(Interrupted), before_step(STEPS, interrupt):
        search(training, tmp_path)
    assert not (tmp_path / "search.json").exists()
    begun = [folder for folder in (tmp_path / "search").iterdir() if (folder / "train").exists()]
    assert len(begun) == 1 and len(steps(begun[0])) < STEPS

    capsys.readouterr()
    search(training, tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("prune: already finished") == 1
    assert steps(begun[0]) == list(range(1, STEPS + 1))
    assert ranked(tmp_path) == ranked(undisturbed), "the same losses, to the last bit"


def test_one_candidate_alone_is_not_ranked_and_is_not_done_again(training, undisturbed, tmp_path, capsys):
    search(training, tmp_path, only=2)
    assert not (tmp_path / "search.json").exists()
    (name,) = (folder.name for folder in (tmp_path / "search").iterdir())
    capsys.readouterr()
    search(training, tmp_path)
    printed = capsys.readouterr().out
    stages = ("prune", "eval pruned", "distill", "export", "eval student")
    assert [printed.count(f"{stage}: already finished") for stage in stages] == [1] * len(stages)
    assert ranked(tmp_path) == ranked(undisturbed)
    assert name in {row["name"] for row in ranked(tmp_path)}


def test_all_candidates_read_one_teacher_cache(training, undisturbed, tmp_path, monkeypatch):
    """The teacher runs over the tokens of one retraining only, and hidden states give the same losses to the last bit."""
    num_tokens = [0]
    original = LanguageModel.forward

    def counted(self, tokens_BS, *arguments):
        if not self.training and not any(parameter.requires_grad for parameter in self.parameters()):
            num_tokens[0] += tokens_BS.numel()
        return original(self, tokens_BS, *arguments)

    monkeypatch.setattr(LanguageModel, "forward", counted)
    config = search_config(training, tmp_path / "runs")
    config.teacher.cache, config.teach.kind = str(tmp_path / "cache"), TeachKind.hidden
    execute(COMMANDS["search"], config, ["search"], World())
    assert ranked(tmp_path / "runs") == ranked(undisturbed)
    held_out = config.data.validation_tokens
    assert num_tokens[0] == STEPS * SEQUENCES * LENGTH + held_out
