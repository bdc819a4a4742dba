"""A run that cannot fit is refused in one line that names a layout which does."""

from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_train.arch import Shape
from minitron_train.commands import cli
from minitron_train.commands.registry import COMMANDS
from minitron_train.config import Config, Precision, PruneConfig, Recompute, Refit
from minitron_train.planning import check
from minitron_train.planning.counts import parameters
from minitron_train.planning.hardware import GIB, control_group_left
from minitron_train.planning.precision import with_choice
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from tests.support.pruning import PLAIN

TEACHER = Shape(
    architecture="nemotron",
    num_layers=8,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=32000,
)
STUDENT = TEACHER.smaller(hidden_size=1024, ffn_hidden_size=4096)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what this machine has, in GiB."""

    def set_gib(gib: float) -> None:
        monkeypatch.setattr(check, "cuda_here", lambda: False)
        monkeypatch.setattr(check, "memory_here", lambda cuda: int(gib * GIB))

    return set_gib


def config() -> Config:
    made = with_choice(Config(prune=PruneConfig(**PLAIN)), Precision.fp32)
    made.train.micro_batch_size, made.train.global_batch_size, made.train.seq_length = 8, 64, 1024
    return made


def needs_of(name: str) -> check.Needs:
    """What a command needs; each of these commands has something to check."""
    needs = COMMANDS[name].needs
    assert needs is not None
    return needs


def check_fits(made: Config, name: str, teacher: Shape, student: Shape, world: World, folder: Path) -> None:
    """The check of one command."""
    check.check_fits(made, name, needs_of(name), teacher, student, world, folder)


def option_settings(stage: str, made: Config, world: World, settings: tuple[str, ...]) -> float:
    """GiB of the option with these settings."""
    found = needs_of(stage).options(made, TEACHER, STUDENT, world, False)
    return next(option.needed_bytes / GIB for option in found if option.settings == settings)


def test_a_run_that_fits_passes(memory: Callable[[float], None], tmp_path: Path) -> None:
    memory(1000)
    for stage in ("score", "prune", "distill", "export"):
        check_fits(config(), stage, TEACHER, STUDENT, World(), tmp_path / "new" / "folder")


def test_the_nearest_layout_is_named_and_fits(memory: Callable[[float], None], tmp_path: Path) -> None:
    full = option_settings("distill", config(), World(), ())
    half = option_settings("distill", config(), World(), ("train.micro_batch_size=4",))
    recompute = option_settings("distill", config(), World(), ("train.recompute=full",))
    assert half < full and recompute < full
    memory(max(half, recompute) + 0.01)
    with pytest.raises(
        UserError, match=r"^distill: needs .* GiB of memory per process, .*train\.\w+=\w+ needs"
    ) as error:
        check_fits(config(), "distill", TEACHER, STUDENT, World(), tmp_path)
    assert "\n" not in str(error.value) and "plan.check=false" in str(error.value)
    memory(1)
    with pytest.raises(UserError, match="no layout on these processes"):
        check_fits(config(), "distill", TEACHER, STUDENT, World(), tmp_path)


def test_pretraining_needs_less_than_distilling_and_evaluation_least(
    memory: Callable[[float], None], tmp_path: Path
) -> None:
    stages = ("distill", "pretrain", "eval")
    distilling, pretraining, evaluating = (option_settings(stage, config(), World(), ()) for stage in stages)
    assert evaluating < pretraining < distilling - parameters(TEACHER)["parameters"] * 4 / GIB
    narrow = config()
    narrow.eval.precision = Precision.bf16
    assert option_settings("eval", narrow, World(), ()) < evaluating - parameters(STUDENT)["parameters"] * 2 / GIB
    memory(pretraining + 0.01)
    check_fits(config(), "pretrain", STUDENT, STUDENT, World(), tmp_path)
    memory(pretraining - 0.01)
    with pytest.raises(UserError, match=r"^pretrain: needs .*train\.\w+=\w+ needs"):
        check_fits(config(), "pretrain", STUDENT, STUDENT, World(), tmp_path)
    memory(evaluating - 0.01)
    with pytest.raises(UserError, match=r"^eval: needs .*eval\.validation_batch_size=1 needs"):
        check_fits(config(), "eval", STUDENT, STUDENT, World(), tmp_path)
    memory(0.5)
    with pytest.raises(UserError, match=r"^eval: needs .*no layout.*use more GPUs"):
        check_fits(config(), "eval", TEACHER, TEACHER, World(), tmp_path)


def resident() -> Config:
    """Scoring that is told to keep all layers in memory."""
    made = config()
    made.calibration.streamed = False
    return made


def test_scoring_that_does_not_fit_is_told_to_stream(memory: Callable[[float], None], tmp_path: Path) -> None:
    memory(option_settings("score", resident(), World(), ("calibration.streamed=true",)) + 0.01)
    with pytest.raises(UserError, match=r"calibration\.streamed=true needs"):
        check_fits(resident(), "score", TEACHER, STUDENT, World(), tmp_path)
    check_fits(config(), "score", TEACHER, STUDENT, World(), tmp_path)  # by default it streams by itself


def test_a_repair_that_does_not_fit_is_told_to_take_fewer_tokens(
    memory: Callable[[float], None], tmp_path: Path
) -> None:
    made = config()
    made.prune.rotate, made.prune.refit, made.prune.repair_tokens = True, Refit.all, 131072
    full, fewer = (
        option_settings("prune", made, World(), settings) for settings in ((), ("prune.repair_tokens=65536",))
    )
    memory(full + 0.01)
    check_fits(made, "prune", TEACHER, STUDENT, World(), tmp_path)
    memory(fewer + 0.01)
    with pytest.raises(UserError, match=r"^prune: needs .*; prune\.repair_tokens=65536 needs"):
        check_fits(made, "prune", TEACHER, STUDENT, World(), tmp_path)
    memory(1)
    with pytest.raises(UserError, match=r"^prune: needs .*prune\.refit=none .* needs"):
        check_fits(made, "prune", TEACHER, STUDENT, World(), tmp_path)
    made.prune.rotate, made.prune.refit = False, Refit.none
    check_fits(made, "prune", TEACHER, STUDENT, World(), tmp_path)


def test_processes_of_one_machine_share_its_memory(memory: Callable[[float], None], tmp_path: Path) -> None:
    alone = option_settings("distill", config(), World(), ())
    memory(1.5 * alone)
    check_fits(config(), "distill", TEACHER, STUDENT, World(), tmp_path)
    with pytest.raises(UserError, match="distill: needs"):
        check_fits(config(), "distill", TEACHER, STUDENT, World(size=2, local_size=2), tmp_path)


def test_a_full_disk_is_refused_and_old_checkpoints_count_as_free(
    memory: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory(1000)
    usage = check.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage._replace(free=GIB))
    with pytest.raises(UserError, match=r"^distill: needs .* GiB of disk in .*checkpoint\.keep"):
        check_fits(config(), "distill", TEACHER, STUDENT, World(), tmp_path)
    (tmp_path / "train").mkdir()
    with (tmp_path / "train" / "old").open("wb") as file:
        file.truncate(100 * GIB)  # sparse
    check_fits(config(), "distill", TEACHER, STUDENT, World(), tmp_path)


def test_a_teacher_cache_needs_its_bytes_on_its_own_disk(
    memory: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """50 draws of a vocabulary of 32,000 take (6 + 50 (15 + 6)) / 8 bytes; what an unfinished cache holds counts as free."""
    memory(1000)
    made = config()
    made.data.validation_tokens = 1000
    needed = made.train.num_steps * made.train.step_tokens * 132 + 1000 * TEACHER.hidden_size * 4
    usage = check.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    check_fits(made, "teach", TEACHER, TEACHER, World(), tmp_path)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage._replace(free=needed - 4096))
    with pytest.raises(
        UserError, match=r"^teach: needs .* GiB of disk in .*; free space, set teacher\.cache to a folder"
    ):
        check_fits(made, "teach", TEACHER, TEACHER, World(), tmp_path)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "part").write_bytes(bytes(4096))
    check_fits(made, "teach", TEACHER, TEACHER, World(), tmp_path)


def test_an_export_needs_a_shard_of_memory_and_its_folder_on_disk(
    memory: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, gib = config(), parameters(STUDENT)["parameters"] * 4 / GIB
    memory(1 + gib)
    check_fits(made, "export", STUDENT, STUDENT, World(), tmp_path)
    memory(gib)
    with pytest.raises(
        UserError, match=r"^export: needs .* GiB of memory.*run it alone, on a machine with more memory"
    ):
        check_fits(made, "export", STUDENT, STUDENT, World(), tmp_path)
    memory(1 + gib)
    usage = check.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage._replace(free=int(0.75 * gib * GIB)))
    with pytest.raises(UserError, match=r"^export: needs .* GiB of disk"):
        check_fits(made, "export", STUDENT, STUDENT, World(), tmp_path)
    made.export.dtype = "bfloat16"
    check_fits(made, "export", STUDENT, STUDENT, World(), tmp_path)


def test_the_check_can_be_overridden(memory: Callable[[float], None], tmp_path: Path) -> None:
    memory(0.1)
    made = config()
    made.plan.check = False
    check_fits(made, "distill", TEACHER, STUDENT, World(), tmp_path)


def test_a_missing_path_comes_first_and_plan_never_refuses(
    memory: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory(0.001)
    monkeypatch.setattr("sys.argv", ["minitron_train"])

    def run(command: str, *words: str) -> None:
        cli.run(["minitron_train", command, "+recipe=4b", f"output_dir={tmp_path}/out", *words], World())

    for command in ("score", "prune", "distill"):
        with pytest.raises(UserError, match=r"^teacher\.path=/none: no such folder"):
            run(command, "teacher.path=/none")
    run("plan")
    assert (tmp_path / "out" / "plan.json").exists()


def test_recompute_and_tensor_parallelism_save_memory() -> None:
    two = World(size=2, local_size=2)
    base = option_settings("distill", config(), two, ())
    assert option_settings("distill", config(), two, ("parallel.tensor_model_parallel_size=2",)) < 0.7 * base
    made = config()
    made.train.recompute = Recompute.full
    assert option_settings("distill", made, World(), ()) < base


def test_control_group(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 60\nactive_file 40\n")
    assert control_group_left(str(tmp_path / "memory.max")) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert control_group_left(str(tmp_path / "memory.max")) is None
