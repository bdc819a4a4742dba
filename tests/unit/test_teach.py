"""A teacher on disk: its files, kills, and trainings that read it instead of running the teacher."""

import contextlib
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_train.config import LossKind, TeachKind
from minitron_train.distillation import bits, cache_files
from minitron_train.distillation.cache_files import CacheReader, PartName, read_format
from minitron_train.distillation.sample_codec import SampleLayout
from minitron_train.runtime.errors import UserError
from tests.support.helpers import start_ranks
from tests.support.training import Interrupted, Material, before_step, interrupt, rows, run, teach

SMALL_FILES = {"teach__file_mib": 1e-3}  # one global batch each
HIDDEN = SMALL_FILES | {"teach__kind": TeachKind.hidden}
SAMPLES = SMALL_FILES | {"teach__draws": 40}


@pytest.fixture(scope="module")
def caches(training: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of each kind."""
    root = tmp_path_factory.mktemp("caches")
    for name, settings in (("hidden", HIDDEN), ("samples", SAMPLES)):
        teach(training, root / name, **settings)
    return {name: root / name for name in ("hidden", "samples")}


@pytest.fixture(scope="module")
def live(training: Material, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a training logs whose teacher runs."""
    folder = tmp_path_factory.mktemp("live")
    run(training, folder)
    return rows(folder)


def test_numbers_in_few_bits() -> None:
    generator = np.random.default_rng(0)
    for width in (0, 1, 7, 8, 17, 32):
        values = generator.integers(0, 2**width, size=101)
        data = bits.pack(values, width)
        assert len(data) == bits.num_bytes(101, width) == -(-101 * width // 8)
        assert (bits.unpack(data, 101, width) == values).all()


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("draws", [1, 6])
def test_samples_survive_their_bytes(has_weights: bool, draws: int) -> None:
    """Repeated draws become one id whose weight is the sum; 300 ids take 9 bits."""
    generator = np.random.default_rng(0)
    layout = SampleLayout(vocab_size=300, draws=draws, has_weights=has_weights)
    ids_TK = np.minimum(generator.geometric(0.3, (50, draws)) * 60, 299)
    ratios_TK = np.ones((50, draws)) + has_weights * ids_TK / 100
    data = layout.encode(ids_TK, ratios_TK)
    found_TK, weights_TK = layout.decode(data, 50)
    for ids, ratios, found, weights in zip(ids_TK, ratios_TK, found_TK, weights_TK, strict=True):
        expected = {int(i): ratios[ids == i].sum() / draws for i in ids}
        assert {int(i): w for i, w in zip(found, weights, strict=True) if w} == pytest.approx(expected, rel=2**-11)
    num_ids = int((weights_TK > 0).sum())
    values = 2 * num_ids if has_weights else bits.num_bytes(num_ids, layout.count_bits)
    assert len(data) == bits.num_bytes(50, layout.count_bits) + bits.num_bytes(num_ids, 9) + values
    assert len(data) <= 50 * layout.most_bytes + 3
    for damaged in (data[:-1], data + b"\0", b"\xff" * len(data)):
        with pytest.raises(ValueError, match=r"bytes where|token id"):
            layout.decode(damaged, 50)


def test_hidden_states_train_bit_for_bit_like_the_live_teacher(
    training: Material, caches: dict[str, Path], live: list[dict[str, Any]], tmp_path: Path
) -> None:
    run(training, tmp_path, teacher__cache=str(caches["hidden"]))
    assert rows(tmp_path) == live


def test_hidden_states_serve_other_losses(training: Material, caches: dict[str, Path], tmp_path: Path) -> None:
    """A temperature, the reverse KL, labels: all that needs nothing but logits."""
    settings: dict[str, Any] = {
        "distill__loss": LossKind.reverse_kl,
        "distill__temperature": 2.0,
        "distill__ce_weight": 0.3,
    }
    settings["train__num_tokens"] = 2 * 256
    run(training, tmp_path / "live", **settings)
    run(training, tmp_path / "cached", **settings, teacher__cache=str(caches["hidden"]))
    assert rows(tmp_path / "cached") == rows(tmp_path / "live")


def test_samples_train_like_the_exact_loss(
    training: Material, caches: dict[str, Path], live: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The first loss is the exact KL to within its noise; the end is near the exact run's."""
    run(training, tmp_path, teacher__cache=str(caches["samples"]))
    found = rows(tmp_path)
    assert found[0]["kd_loss"] == pytest.approx(live[0]["kd_loss"], rel=0.05)
    assert found[0]["kd_loss"] != live[0]["kd_loss"]
    assert found[-1]["eval.validation.kl"] == pytest.approx(live[-1]["eval.validation.kl"], rel=0.03)


def killed_in_step_six(rank: int, world_size: int, runs: list[tuple[Material, Path, dict[str, Any]]]) -> None:
    """Trainings of which each breaks off in step 6, the last one by SIGKILL."""

    def kill(trainer: Any) -> None:
        trainer.checkpoints.poll(wait=True)
        os.kill(os.getpid(), signal.SIGKILL)

    for material, folder, settings in runs:
        action = kill if folder == runs[-1][1] else interrupt
        with before_step(6, action), contextlib.suppress(Interrupted):
            run(material, folder, **settings)


def test_a_killed_training_resumes_from_a_cache(training: Material, caches: dict[str, Path], tmp_path: Path) -> None:
    """From step 3 on, with what the cache holds at the stream's position."""
    settings: dict[str, dict[str, Any]] = {kind: {"teacher__cache": str(cache)} for kind, cache in caches.items()}
    runs = [(training, tmp_path / kind, settings[kind]) for kind in caches]
    workers, _ = start_ranks(killed_in_step_six, 1, 20000 + os.getpid() % 20000, (runs,))
    workers[0].join(timeout=120)
    assert workers[0].exitcode == -signal.SIGKILL
    for kind in caches:
        run(training, tmp_path / f"{kind}_whole", **settings[kind])
        assert run(training, tmp_path / kind, **settings[kind])["resumed_at_step"] == 3
        assert rows(tmp_path / kind) == rows(tmp_path / f"{kind}_whole")


def test_another_batch_size_reads_the_same_sequences(
    training: Material, caches: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"train__global_batch_size": 4, "train__num_tokens": 3 * 4 * 32}
    run(training, tmp_path / "live", **settings)
    run(training, tmp_path / "cached", **settings, teacher__cache=str(caches["hidden"]))
    assert rows(tmp_path / "cached") == rows(tmp_path / "live")


def killed(rank: int, world_size: int, material: Material, folder: Path, at: int) -> None:
    """The process dies by SIGKILL when it has written the data of file number `at`, before its rename."""
    counter = itertools.count(1)
    original = cache_files.save_file

    def save(*arguments: Any) -> None:
        original(*arguments)
        if next(counter) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    cache_files.save_file = save
    teach(material, folder, **SAMPLES)


@pytest.mark.parametrize("at", [1, 2, 6])
def test_a_killed_teach_resumes(training: Material, caches: dict[str, Path], tmp_path: Path, at: int) -> None:
    """File 1 holds the held-out tokens. The files are those of a run that was never killed, byte for byte."""
    workers, _ = start_ranks(killed, 1, 20000 + os.getpid() % 20000, (training, tmp_path, at))
    workers[0].join(timeout=120)
    assert workers[0].exitcode == -signal.SIGKILL
    assert len(files_of(tmp_path)) == at - 1
    facts = teach(training, tmp_path, **SAMPLES)
    assert facts["resumed_at_sequence"] == 8 * max(0, at - 2)
    assert files_of(tmp_path) == files_of(caches["samples"])
    assert not list(tmp_path.rglob("*partial*"))


def files_of(folder: Path) -> dict[str, bytes]:
    """The parts of a cache, by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*-of-*.safetensors")}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "samples",
            {"distill__temperature": 2.0},
            r"distill.temperature=2.0: the cache has samples at temperature 1.0",
        ),
        ("samples", {"distill__loss": LossKind.reverse_kl}, r"distill.loss=reverse_kl: the cache has samples"),
        ("hidden", {"distill__hidden_layers": ["1/2"]}, r"distill.hidden_layers: needs the teacher's inner layers"),
        ("hidden", {"train__seq_length": 16}, r"has another train.seq_length"),
        ("hidden", {"data__validation_fraction": 0.3}, r"was written for another text, tokenizer, blend or seed"),
        ("hidden", {"data__validation_tokens": 64}, r"was written with other held-out tokens"),
        ("samples", {"train__num_tokens": 9 * 256}, r"has 2,048 tokens, this run reads 2,304"),
        ("hidden", {"data__document_attention": True}, r"sequence 0 has other tokens there than in this run"),
    ],
)
def test_what_a_cache_cannot_give_is_refused(
    training: Material, caches: dict[str, Path], tmp_path: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        run(training, tmp_path, **settings, teacher__cache=str(caches[kind]))
    assert "\n" not in str(refused.value)


def test_damaged_files_are_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    """A missing file, a file that was cut off, one byte that changed, a damaged cache.json."""
    name = PartName(first=0, stop=8, rank=0, size=1)
    source = caches["samples"] / "training" / name.file
    target = tmp_path / "training" / name.file
    with pytest.raises(UserError, match="has 0 sequences of 8"):
        CacheReader.of(tmp_path, "training", 8)
    target.parent.mkdir()
    data = source.read_bytes()
    for damaged in (data[:-20], b"", data.replace(b"payload", b"paylaod")):
        target.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged \(.*restore it from a copy"):
            CacheReader.of(tmp_path, "training", 8).row(3)
    start = len(data) - 40
    target.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])
    with pytest.raises(UserError, match="another checksum"):
        for number in range(8):
            CacheReader.of(tmp_path, "training", 8).row(number)
    (tmp_path / cache_files.CACHE).write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        read_format(tmp_path)
