"""Model families: the settings, folders and shapes of each member, and what is refused."""

from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from minitron_train.api import functions as api
from minitron_train.commands import chain, configuration, slurm
from minitron_train.commands.members import family_shapes, member_config, settled
from minitron_train.commands.registry import COMMANDS
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config, MemberConfig, members
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from minitron_train.stages import layout

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = ("+recipe=tiny_family", "output_dir=out")
MEMBER = ["score", "prune", "distill", "export", "eval", "speed", "report"]


def compose(*words: str) -> Config:
    return configuration.compose([*TINY, *words])


def with_members(**found: MemberConfig) -> Config:
    """A configuration with these members in this order."""
    return Config(name="mine", output_dir="out", members=found)


def test_every_folder_of_a_run_is_reserved() -> None:
    used = {name.partition("/")[0] for name in (*layout.STAGE_FOLDERS, layout.STUDENT)}
    assert used <= {*members.RESERVED}


def test_each_member_has_its_own_settings_and_folder() -> None:
    small, smaller = (member_config(compose(), name) for name in ("small", "smaller"))
    assert (small.student.hidden_size, smaller.student.hidden_size) == (80, 64)
    assert (small.output_dir, smaller.output_dir) == ("out/small", "out/smaller")
    assert small.student.pruned_from is None and smaller.student.pruned_from == "out/small/student"
    assert small.teacher.path is None and smaller.teacher.path is None, "the teacher is the recipe's own"
    assert smaller.title == "tiny_family-smaller" and smaller.train == compose().train


def test_a_member_chooses_both_of_its_teachers() -> None:
    config = with_members(
        a=MemberConfig(), b=MemberConfig(taught_by="a"), c=MemberConfig(pruned_from="teacher", taught_by="b")
    )
    config.teacher.path, config.model.architecture = "/models/big", "llama"
    a, b, c = (member_config(config, name) for name in config.members)
    assert (a.teacher.path, a.student.pruned_from) == ("/models/big", None)
    assert (b.teacher.path, b.student.pruned_from) == ("out/a/student", None)
    assert (c.teacher.path, c.student.pruned_from) == ("out/b/student", "/models/big")
    assert a.model.architecture == "llama" and b.model.architecture is None, "the recipe's shape is the teacher's only"


def test_the_command_line_wins_over_a_member() -> None:
    config = compose("train.num_tokens=8192", "student={hidden_size:72}")
    for name in config.members:
        assert member_config(config, name).train.num_tokens == 8192
        assert member_config(config, name).student.hidden_size == 72
    settings = {"recipe": "tiny_family", "student.hidden_size": 72, "student.ffn_hidden_size": 200}
    assert str(api.plan(settings={**settings, "member": "small"})).count("72") >= 1


def test_a_shared_teacher_is_found_by_every_member() -> None:
    with ExitStack() as stack:
        for name in ("small", "smaller"):
            workspace = Workspace(member_config(compose(), name), [], World(), stack)
            assert workspace.teacher_folder == Path("out/teacher") and workspace.eval_data_folder == Path(
                "out/eval_data"
            )


def test_the_chain_of_a_family_and_of_one_member() -> None:
    every = [(config.output_dir, [command.name for command in found]) for config, found in chain.parts(compose())]
    assert every == [("out", ["pretrain"]), ("out/small", MEMBER), ("out/smaller", MEMBER), ("out", ["report"])]
    one = [config.output_dir for config, _ in chain.parts(compose("member=smaller"))]
    assert one == ["out", "out/smaller", "out"]


def test_jobs_of_a_family_wait_for_the_models_that_they_need() -> None:
    def waits(**members: MemberConfig) -> dict[str, list[str]]:
        """Job -> the jobs before it."""
        config = replace(compose(), members=members)
        lines = [line.split() for line in slurm.jobs(config)]
        names = ["-".join([command, *(word.removeprefix("member=") for word in rest)]) for _, command, *rest in lines]
        return {
            name: [] if numbers == "-" else [names[int(number)] for number in numbers.split(",")]
            for name, (numbers, *_) in zip(names, lines, strict=True)
        }

    found = waits(a=MemberConfig(), b=MemberConfig(), c=MemberConfig(pruned_from="teacher"))
    firsts = {f"{MEMBER[0]}-a": "pretrain", f"{MEMBER[0]}-b": "export-a", f"{MEMBER[0]}-c": "pretrain"}
    assert found.pop("pretrain") == [] and found.pop("report") == ["report-a", "report-b", "report-c"]
    assert {name: found.pop(name) for name in firsts} == {name: [before] for name, before in firsts.items()}
    assert found == {f"{now}-{m}": [f"{before}-{m}"] for m in "abc" for before, now in pairwise(MEMBER)}

    found = waits(
        a=MemberConfig(), b=MemberConfig(pruned_from="teacher"), c=MemberConfig(pruned_from="a", taught_by="b")
    )
    assert found[f"{MEMBER[0]}-c"] == ["export-a", "export-b"]


def test_jobs_of_one_member_wait_for_what_the_family_shares() -> None:
    lines = slurm.jobs(compose("member=smaller"))
    every = ["pretrain", *(f"{name} member=smaller" for name in MEMBER), "report"]
    assert lines == ["- pretrain", *(f"{number} {job}" for number, job in enumerate(every[1:]))]


def test_commands_of_one_member() -> None:
    assert settled(COMMANDS["distill"], compose("member=smaller")).output_dir == "out/smaller"
    assert settled(COMMANDS["pretrain"], compose("member=smaller")).output_dir == "out"
    for name in ("score", "prune", "search", "distill", "export", "eval"):
        with pytest.raises(
            UserError, match=f"member is not set: {name} works on one of small, smaller; add member=NAME"
        ):
            settled(COMMANDS[name], compose())


def test_marks_of_a_stopped_family() -> None:
    trainings = ["pretrain/train", "small/train", "smaller/train"]
    assert slurm.marks(COMMANDS["run"], compose(), World()) == [Path("out", run, "stopped.json") for run in trainings]
    assert slurm.marks(COMMANDS["distill"], compose("member=small"), World()) == [Path("out/small/train/stopped.json")]


@pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_shapes_of_every_recipe_hold(recipe: str) -> None:
    """Those of recipes whose teacher is described in the recipe; a published teacher's folder brings its shape."""
    slurm.refuse_shapes([COMMANDS["prune"]], configuration.compose([f"+recipe={recipe}", "output_dir=out"]))


def test_shapes_follow_from_the_model_that_is_pruned() -> None:
    with ExitStack() as stack:
        shapes = family_shapes(Workspace(compose(), [], World(), stack))
    assert [shapes[name].hidden_size for name in ("teacher", "small", "smaller")] == [96, 80, 64]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"small": {"hidden_size": 100}}, "member small, pruned from teacher: student.hidden_size=100: larger than"),
        ({"smaller": {"hidden_size": 96}}, "member smaller, pruned from small: student.hidden_size=96: larger than"),
    ],
)
def test_a_member_larger_than_its_source(changes: dict[str, dict[str, int]], message: str) -> None:
    config = compose()
    for name, sizes in changes.items():
        config.members[name].student.update(sizes)
    with ExitStack() as stack, pytest.raises(UserError, match=message):
        family_shapes(Workspace(config, [], World(), stack))


def test_a_member_larger_than_its_teacher() -> None:
    config = compose()
    config.members["large"] = MemberConfig(pruned_from="teacher", taught_by="smaller", student={"ffn_hidden_size": 320})
    with (
        ExitStack() as stack,
        pytest.raises(UserError, match=r"members.large.taught_by=smaller: the student is larger"),
    ):
        family_shapes(Workspace(config, [], World(), stack))


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (MemberConfig(taught_by="b"), "members.b.taught_by=b: must be one of teacher, a: the teacher or an earlier"),
        (MemberConfig(pruned_from="c"), "members.b.pruned_from=c: must be one of teacher, a: "),
        (
            MemberConfig(student={"hiden_size": 8}),
            r"unknown key 'members.b.student.hiden_size' \(did you mean 'hidden_size'",
        ),
        (MemberConfig(student={"hidden_size": -8}), "member b: student.hidden_size=-8: must be greater than 0"),
        (MemberConfig(student={"hidden_size": "wide"}), "members.b.student: Value 'wide' .* could not be converted"),
        (
            MemberConfig(student={"path": "x"}),
            "members.b.student.path=x: is the same for all members; set student.path",
        ),
        (MemberConfig(eval={"tasks": ["mmlu"]}), r"members.b.eval.tasks=\['mmlu'\]: is the same for all members"),
    ],
)
def test_mistakes_name_the_member(member: MemberConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_members(a=MemberConfig(), b=member, c=MemberConfig()).validate()


@pytest.mark.parametrize("name", ["teacher", "train", "a/b", "..", "", "report.html"])
def test_names_that_are_no_folder_of_their_own(name: str) -> None:
    with pytest.raises(UserError, match=f"members={name}: .*; rename the member"):
        with_members(**{name: MemberConfig()}).validate()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["member=large"], "member=large: the recipe has no such member; choose one of: small smaller"),
        (["export.path=x"], "export.path=x: several members cannot share it"),
        (["student.path=x"], "student.path=x: several members cannot share it"),
        (
            ["members.small.train.lr=1"],
            "argument 'members.small.train.lr=1': set this in the recipe, or give member=NAME",
        ),
    ],
)
def test_mistakes_of_the_command_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(*words)


def test_member_without_a_family() -> None:
    with pytest.raises(UserError, match="member=small: the recipe has no members; leave it out"):
        configuration.compose(["+recipe=micro", "member=small"])
