"""Section members: a model family's students, each pruned from the teacher or from an earlier member (arXiv 2407.14679)."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minitron_train.config.base import opt, require
from minitron_train.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from minitron_train.config import Config

ORIGINAL = "teacher"  # in pruned_from and taught_by: the recipe's own teacher
SECTIONS = ("student", "calibration", "prune", "search", "distill", "train", "checkpoint", "eval")
ALIKE = {  # keys that would make members incomparable, or give two of them one folder
    "student": ("path", "pruned_from"),
    "eval": (
        *("model", "label", "compare", "tasks", "training_tasks", "limit", "limits", "num_fewshot", "shots", "seed"),
        *("data_dir", "wheel", "sha256", "download_bytes", "disk_bytes", "allow_code_execution"),
    ),
}
RESERVED = (  # other folders and files of a run, see stages/layout.py
    *(
        "teacher",
        "eval_data",
        "pretrain",
        "scores",
        "pruned",
        "teacher_cache",
        "train",
        "student",
        "eval",
        "speed",
        "search",
    ),
    *("report.html", "plan.json", "search.json", "exported.json"),
)
NAME = re.compile(r"(?!\.)[\w.-]{1,100}", re.ASCII)


@dataclass(kw_only=True, slots=True)
class MemberConfig:
    """One student: where it comes from, and the keys in which it differs from the rest of the recipe."""

    pruned_from: str | None = opt(
        None, "model that is pruned: teacher, or the name of an earlier member; default: the member before this one"
    )
    taught_by: str = opt(ORIGINAL, "model that teaches: teacher, or the name of an earlier member")
    student: dict[str, Any] = opt(dict, "keys of student.* for this member")
    calibration: dict[str, Any] = opt(dict, "keys of calibration.* for this member")
    prune: dict[str, Any] = opt(dict, "keys of prune.* for this member")
    search: dict[str, Any] = opt(dict, "keys of search.* for this member")
    distill: dict[str, Any] = opt(dict, "keys of distill.* for this member")
    train: dict[str, Any] = opt(dict, "keys of train.* for this member")
    checkpoint: dict[str, Any] = opt(dict, "keys of checkpoint.* for this member")
    eval: dict[str, Any] = opt(dict, "keys of eval.* for this member, except those that make members incomparable")


def is_family(config: "Config") -> bool:
    """Whether the configuration describes several students; `with_member` makes that of one of them."""
    return bool(config.members)


def origins(config: "Config") -> dict[str, tuple[str, str]]:
    """Member -> (the model that is pruned, the model that teaches), each `teacher` or an earlier member."""
    found, before = {}, ORIGINAL
    for name, member in config.members.items():
        found[name] = (member.pruned_from or before, member.taught_by)
        before = name
    return found


def with_member(config: "Config", name: str) -> "Config":
    """The recipe with the settings of one member; folders and teachers stay the recipe's (see commands/members.py).

    Raises:
        UserError: a setting that the section does not have, or of another type.
    """
    member = config.members[name]
    sections = {section: with_keys(config, name, section, getattr(member, section)) for section in SECTIONS}
    return replace(config, **sections, member=name, members={})


def with_keys(config: "Config", name: str, section: str, keys: Mapping[str, Any]) -> Any:
    """One section with some keys changed, typed as Hydra types them.

    Raises:
        UserError: an unknown key, or a value of another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    base, where = getattr(config, section), f"members.{name}.{section}"
    known = [f.name for f in dataclasses.fields(base)]
    for key, value in keys.items():
        if key not in known:
            raise UserError(f"unknown key '{where}.{key}'{did_you_mean(key, known)}; {section} has: {' '.join(known)}")
        alike = key in ALIKE.get(section, ())
        require(not alike, f"{where}.{key}", value, "is the same for all members", f"set {section}.{key} instead")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(type(base)), dict(keys)))
    except OmegaConfBaseException as error:
        gist = str(error).splitlines()[0]
        raise UserError(f"{where}: {gist} ({', '.join(map(str, keys))}); correct the value") from error
    return replace(base, **{key: getattr(typed, key) for key in keys})


def without_typed(config: "Config", keys: Iterable[str]) -> None:
    """Let the command line win over the members: remove from them the dotted `keys` that were typed."""
    for key in keys:
        section, _, rest = key.partition(".")
        if section in SECTIONS:
            for member in config.members.values():
                getattr(member, section).pop(rest, None)


def validate_members(config: "Config") -> None:
    """Check names and origins of the members, and the settings of each.

    Raises:
        UserError: the first mistake, with the member's name.
    """
    if config.member is not None:
        remedy = f"choose one of: {' '.join(config.members)}" if config.members else "leave it out"
        rule = "the recipe has no such member" if config.members else "the recipe has no members"
        require(config.member in config.members, "member", config.member, rule, remedy)
    earlier = [ORIGINAL]
    for name, (source, teacher) in origins(config).items():
        check_name(name)
        for key, value in (("pruned_from", source), ("taught_by", teacher)):
            rule = f"must be one of {', '.join(earlier)}: the teacher or an earlier member"
            require(value in earlier, f"members.{name}.{key}", value, rule, "correct it, or change the order")
        earlier.append(name)
        try:
            member = with_member(config, name)
            for section in SECTIONS:
                check = getattr(getattr(member, section), "validate", None)
                if check:
                    check()
        except UserError as error:
            prefix = "" if f"members.{name}." in str(error) else f"member {name}: "
            raise UserError(f"{prefix}{error}") from error
    for section, key in (("student", "path"), ("student", "pruned_from"), ("export", "path"), ("eval", "label")):
        value = getattr(getattr(config, section), key)
        alone = not config.members or value is None
        require(alone, f"{section}.{key}", value, "several members cannot share it", "leave it out")


def check_name(name: str) -> None:
    """Refuse a name that is no folder, or the folder of something else."""
    rule = "must be letters, digits, _, - and dots, not beginning with a dot"
    require(NAME.fullmatch(name) is not None, "members", name, rule, "rename the member")
    require(name not in RESERVED, "members", name, "is the name of another folder of the run", "rename the member")
