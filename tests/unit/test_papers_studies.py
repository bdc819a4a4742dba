"""papers_in_miniature.py: its table of studies fits today's settings, and its figures are taken seed by seed."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from minitron_train import hf
from minitron_train.arch import architecture
from minitron_train.commands import configuration, recipes
from minitron_train.commands.workspace import shape_of_recipe
from minitron_train.pruning.target import check_target

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "quality"))

from miniature import Miniature  # noqa: E402 # pyright: ignore[reportMissingImports]
from papers_in_miniature import Papers, shuffle, summary  # noqa: E402 # pyright: ignore[reportMissingImports]
from papers_studies import STUDIES, Study, Variant  # noqa: E402 # pyright: ignore[reportMissingImports]


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_row_can_be_run(study: Study) -> None:
    """Its overrides are settings, its student can be cut out of the teacher, it is evaluated after whole steps."""
    recipes.register_recipes()
    labels = [variant.label for variant in study.variants]
    assert study.reference in labels and len(set(labels)) == len(labels)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for variant in study.variants:
            sizes = [f"student.{key}={value}" for key, value in variant.sizes.items()]
            words = [
                "+recipe=miniature",
                *study.data,
                f"prune={variant.preset}",
                *variant.prune,
                *variant.train,
                *sizes,
            ]
            config = configuration.to_config(compose("config", overrides=words))
            teacher = shape_of_recipe(config)
            assert teacher is not None
            check_target(teacher, teacher.smaller(**variant.sizes), config.prune)
            steps = study.tokens * variant.share / config.train.step_tokens / study.evaluations
            assert steps.is_integer() and steps * study.evaluations > config.train.warmup_steps


def test_axes_have_equal_sizes() -> None:
    """Within one percent, so that only the axes differ."""
    recipes.register_recipes()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        teacher = shape_of_recipe(configuration.to_config(compose("config", overrides=["+recipe=miniature"])))
    assert teacher is not None
    (axes,) = [study for study in STUDIES if study.name == "axes"]
    shapes = [teacher.smaller(**variant.sizes) for variant in axes.variants]
    counts = [sum(architecture(shape.architecture).parameters(shape).values()) for shape in shapes]
    assert max(counts) < 1.01 * min(counts)


def test_differences_are_taken_seed_by_seed() -> None:
    """A row that is 0.1 above the reference for every seed is 0.100 ± 0.000 above it, however far the seeds are apart."""
    first, second = Variant(label="a", sizes={}), Variant(label="b", sizes={}, published="worse")
    study = Study(name="s", question="", published="", variants=(first, second), reference="a")
    rows = [
        {
            "variant": label,
            "seed": seed,
            "teacher_loss": 1.0,
            "cut_loss": None if label == "a" else 5.0,
            "parameters": 7,
            "evaluations": [{"tokens": 10, "loss": seed + above, "kl": None}],
        }
        for label, above in (("a", 0.0), ("b", 0.1))
        for seed in (3, 1, 2)
    ]
    a, b = summary(study, rows)["cases"]
    assert a["difference"] is None and a["losses"] == {"10": {"mean": 2.0, "std": 1.0}}
    assert b["losses"]["cut"] == {"mean": 5.0, "std": 0.0} and b["published"] == "worse"
    assert b["difference"]["mean"] == pytest.approx(0.1) and b["difference"]["std"] == pytest.approx(0.0)


def test_what_is_recorded_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by what decides it: a new label finds the old row, a new seed, setting or teacher does not."""
    variant, measured = Variant(label="a", sizes={}), []

    def row(self: Papers, variant: Variant) -> dict[str, Any]:
        measured.append(variant.label)
        (self.recipe.folder / "runs" / self.key(variant)).mkdir(parents=True)
        return {"key": self.key(variant), "variant": variant.label, "evaluations": [{"tokens": 1, "loss": 2.0}]}

    monkeypatch.setattr(Papers, "row", row)
    monkeypatch.setattr(hf, "fingerprint", lambda folder: str(sorted(folder.glob("*"))))
    study = Study(name="s", question="", published="", variants=(variant,), reference="a")
    papers = Papers(Miniature(tmp_path, True), tmp_path / "teacher", study, 1)
    for changed in (variant, replace(variant, label="b"), replace(variant, share=0.5), replace(variant, train=("c",))):
        assert papers.record(changed)["variant"] == changed.label
    assert measured == ["a", "a", "a"]
    replace(papers, seed=2).record(variant)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    papers.record(variant)
    assert len(measured) == 5 and not list((tmp_path / "runs").iterdir())


def test_shuffled_scores_are_the_same_numbers_in_another_order(tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    moments, spans = torch.arange(60.0).view(2, 3, 10), torch.arange(49.0).view(7, 7)
    save_file({"raw.layers.0.neurons_post": moments, "raw.spans": spans}, file, metadata={"teacher": "x"})
    shuffle(file, seed=1)
    found = load_file(file)
    assert torch.equal(found["raw.spans"], spans)
    assert not torch.equal(found["raw.layers.0.neurons_post"], moments)
    assert torch.equal(found["raw.layers.0.neurons_post"].sort().values, moments)
