"""Every record that is read back, damaged in every way: one line with a remedy, or set aside; never a traceback or a wait."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from minitron_train.commands import configuration, recipes
from minitron_train.commands.recipes import read_recipe
from minitron_train.evaluation.compare import read_items
from minitron_train.evaluation.journal import Journal
from minitron_train.evaluation.results import read_evaluation
from minitron_train.evaluation.run import end_tokens
from minitron_train.reporting.load import read_axes, read_metrics
from minitron_train.runtime.errors import UserError
from minitron_train.stages import STARTED, provenance
from minitron_train.train import checkpoint_files
from minitron_train.train.metrics import MetricsFile

STARTED_RECORD = {"inputs": {"teacher": "ab"}, "settings": {"seed": 1}}
PROVENANCE_RECORD = STARTED_RECORD | {
    "stage": "prune",
    "command": "prune",
    "config": {"teacher": {"path": None}, "data": {"sources": {"a": {"weight": 1.0}}}},
    "wall_seconds": 1.0,
    "facts": {"tokens": 3},
}
MANIFEST_RECORD = {"step": 2, "belongs_to": {}, "evaluation": {"kl": None}, "files": {"a": {"bytes": 1, "sha256": "c"}}}
EVALUATION_RECORD = {"perplexity": 2.0, "results": {"mmlu": {"acc": 0.5, "rows": 3, "parts": {"x": {"rows": 1}}}}}
ITEM = {"task": "a", "filter": "none", "doc_id": 1, "prompt_hash": "h", "metrics": {"acc": 1}}
ENTRY = {"fingerprint": "f", "answers": {"k": [-1.0, True]}}
METRICS_ROW = {"step": 1, "tokens": 8, "loss": 2.0}


@dataclass(frozen=True)
class Kind:
    """One kind of record: what a good one holds, and its reader, which gives back something true.

    `lines`: one object per line; what it is then, `wrong` has values of other types for it. `sets_aside`: the reader goes
    on without a damaged one, and keeps it under another name.
    """

    name: str
    good: Any
    read: Callable[[Path], Any]
    wrong: tuple[Any, ...] = ()
    lines: bool = False
    sets_aside: bool = False

    def text(self, value: Any) -> bytes:
        """The file that holds `value`."""
        return value if isinstance(value, bytes) else (json.dumps(value) + "\n").encode()


def journal(path: Path) -> Any:
    """The journal of which `path` is a file."""
    groups = SimpleNamespace(tp_rank=0, dp_rank=0, is_first=True, world_size=1)
    found = Journal(path.parent, "f", groups)  # type: ignore[arg-type]
    found.add({"new": "text"})
    again = Journal(path.parent, "f", groups)  # type: ignore[arg-type]
    assert again.answers == found.answers, "what is added to a mended file can be read"
    return found.num_found


def metrics(path: Path) -> Any:
    """The training's own reader, then the report's."""
    file = MetricsFile(path, 1)
    file.write({"step": 2, "loss": 1.0})
    file.close()
    return len(read_metrics(path)["loss"]) == 2


def sums(path: Path) -> Any:
    """A checkpoint that is published with the sums that one of its writers left."""
    (path.parent / "a").write_text("x")
    checkpoint_files.publish(path.parent, path.parent.with_name("step_00000002"), {"step": 2, "belongs_to": {}})
    return True


def manifest(path: Path) -> Any:
    """As resuming reads it: a damaged one is said by `damage`."""
    wrong = checkpoint_files.find_damage(path.parent)
    if wrong and "unreadable" in wrong:
        raise UserError(wrong)
    assert checkpoint_files.evaluation_of(path.parent) == {"kl": None}
    return checkpoint_files.read_manifest(path.parent)


KINDS = {
    "provenance.json": Kind(
        "provenance.json",
        PROVENANCE_RECORD,
        provenance.read,
        (
            PROVENANCE_RECORD | {"config": 3},
            PROVENANCE_RECORD | {"config": {"teacher": {"path": 3}}},
            PROVENANCE_RECORD | {"config": {"teacher": {"path": "a\0b"}}},
            PROVENANCE_RECORD | {"config": {"data": {"sources": {"a": {}}}}},
            PROVENANCE_RECORD | {"inputs": [1]},
            PROVENANCE_RECORD | {"wall_seconds": -1},
            PROVENANCE_RECORD | {"facts": {"tokens": 10**400}},
            PROVENANCE_RECORD | {"facts": {"not_run": ["mmlu"]}},
            PROVENANCE_RECORD | {"peak_rss_bytes": -5},
        ),
    ),
    STARTED: Kind(STARTED, STARTED_RECORD, provenance.read_started, (STARTED_RECORD | {"settings": []},)),
    "manifest.json": Kind(
        "manifest.json",
        MANIFEST_RECORD,
        manifest,
        (
            MANIFEST_RECORD | {"files": {"../../secret": {"bytes": 1, "sha256": "c"}}},
            MANIFEST_RECORD | {"files": {"a": {"bytes": -1, "sha256": "c"}}},
            MANIFEST_RECORD | {"files": {"a": 3}},
            MANIFEST_RECORD | {"belongs_to": [1]},
            MANIFEST_RECORD | {"step": "2"},
        ),
    ),
    "sums-0.json": Kind(
        "sums-0.json", {"a": {"bytes": 1, "sha256": "c"}}, sums, ({"a": 3}, {"a": {"bytes": -1, "sha256": "c"}})
    ),
    "latest": Kind(
        "latest",
        b"step_00000002\n",
        checkpoint_files.read_pointer,
        (b"step_2", b"../../etc", b"step_00000002\nstep_00000003\n", b"x" * 10_000),
    ),
    "student.json": Kind(
        "student.json",
        EVALUATION_RECORD,
        read_evaluation,
        (
            EVALUATION_RECORD | {"perplexity": -1.0},
            EVALUATION_RECORD | {"perplexity": "2"},
            EVALUATION_RECORD | {"results": {"mmlu": 3}},
            EVALUATION_RECORD | {"results": {"mmlu": {"rows": -1}}},
            EVALUATION_RECORD | {"results": {"mmlu": {"parts": [1]}}},
            EVALUATION_RECORD | {"not_run": [1]},
            EVALUATION_RECORD | {"data": {"mmlu": {"splits": 3}}},
        ),
    ),
    "student.items.jsonl": Kind(
        "student.items.jsonl",
        ITEM,
        lambda path: read_items(path.parent, "student"),
        (ITEM | {"metrics": 3}, ITEM | {"doc_id": "1"}, ITEM | {"metrics": {"acc": 1e300}}),
        lines=True,
    ),
    "rank0.jsonl": Kind(
        "rank0.jsonl",
        ENTRY,
        journal,
        (ENTRY | {"answers": {"k": 3}}, ENTRY | {"answers": {"k": [1.0]}}, ENTRY | {"fingerprint": 3}),
        lines=True,
        sets_aside=True,
    ),
    "metrics.jsonl": Kind(
        "metrics.jsonl",
        METRICS_ROW,
        metrics,
        (
            METRICS_ROW | {"step": -1},
            METRICS_ROW | {"step": "1"},
            METRICS_ROW | {"loss": [1]},
            METRICS_ROW | {"tokens": 10**400},
        ),
        lines=True,
        sets_aside=True,
    ),
    "generation_config.json": Kind(
        "generation_config.json",
        {"eos_token_id": [2]},
        lambda path: end_tokens(path.parent),
        ({"eos_token_id": "2"}, {"eos_token_id": [-1]}, {"eos_token_id": {}}),
    ),
}


BY_HAND = re.compile(r"\bjson\.loads?\(|\byaml\.(safe_)?load\(|\bpickle\.loads?\(|\bnp\.load\(")
OWN = {  # what these decode is no record that is read back
    "evaluation/wire.py": 1,  # a generated program's answers, checked there
    "reporting/card.py": 1,  # published.yaml, a part of the package
    "parallel/groups.py": 1,  # of the first rank, through torch's own store
    "train/trackers/mlflow_tracker.py": 1,  # metrics.jsonl while this process writes it
}


def test_nothing_is_decoded_by_hand() -> None:
    """A new record is decoded by `records`, with a row in KINDS."""
    package = Path(provenance.__file__).parents[1]
    files = [*package.glob("*.py"), *(file for part in OURS for file in (package / part).rglob("*.py"))]
    found = {str(file.relative_to(package)): len(BY_HAND.findall(file.read_text())) for file in files}
    assert {file: count for file, count in found.items() if count and file != "runtime/records.py"} == OWN


OURS = (
    *("runtime", "stages", "commands", "model", "train", "evaluation"),
    *("reporting", "pruning", "parallel", "planning", "config", "distillation"),
)


def damages(kind: Kind) -> Iterator[tuple[str, bytes]]:
    """What may stand in a file of this kind."""
    good = kind.text(kind.good)
    yield from {
        "a number": b"3\n",
        "null": b"null\n",
        "a list": b"[]\n",
        "a word": b'"x"\n',
        "deep lists": b"[" * 100_000 + b"]" * 100_000 + b"\n",
        "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n",
        "NUL bytes": b"\0" * len(good) + b"\n",
        "not UTF-8": good.replace(b"e", b"\xff") + b"\n",
        "NaN": good.replace(b"1", b"NaN").replace(b"2", b"NaN") + b"\n",
        "a huge number": b"1" * 5_000 + b"\n",
        "another program's": b"# a page\n\n<html>\n",
        "UTF-16": good.decode().encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + good,
        "JSON and more": good.rstrip() + b" x\n",
    }.items()
    if not kind.lines:
        yield "empty", b""
        yield "cut off", good[: len(good) // 2]
    if isinstance(kind.good, dict) and kind.name not in ("generation_config.json", "sums-0.json"):
        yield "an empty object", b"{}\n"
    for number, value in enumerate(kind.wrong):
        yield f"wrong {number}", kind.text(value)


CASES = [(kind, label, data) for kind in KINDS.values() for label, data in damages(kind)]


def in_place_of(path: Path, what: str) -> None:
    """Something else than a file."""
    match what:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)


def check(kind: Kind, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Set aside with a line, or refused in one line that names the file and what to do."""
    if kind.sets_aside:
        assert kind.read(path) is not None
        (line,) = capsys.readouterr().out.splitlines()[:1]
        assert kind.name in line and f"kept as {kind.name}.damaged-1" in line
        assert os.path.lexists(path.with_name(f"{kind.name}.damaged-1"))
    else:
        with pytest.raises(UserError, match=f"{kind.name}.*;") as caught:
            kind.read(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def place(tmp_path: Path, name: str) -> Path:
    """Where a record of this name lies."""
    (tmp_path / "step_00000001").mkdir()
    return tmp_path / "step_00000001" / name


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_good_one_is_read(tmp_path: Path, kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    path = place(tmp_path, kind.name)
    path.write_bytes(kind.text(kind.good))
    assert kind.read(path)
    assert not capsys.readouterr().out, "nothing to say"
    if isinstance(kind.good, dict) and not kind.lines:
        path = path if path.parent.exists() else place(tmp_path, kind.name)
        path.write_bytes(kind.text(kind.good | {"zzz": {"bytes": 1, "sha256": "later"}}))
        assert kind.read(path), "a key of a later version"


@pytest.mark.parametrize(("kind", "label", "data"), CASES, ids=[f"{kind.name}: {label}" for kind, label, _ in CASES])
def test_a_damaged_one(tmp_path: Path, kind: Kind, label: str, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = place(tmp_path, kind.name)
    path.write_bytes(data)
    check(kind, path, capsys)


@pytest.mark.parametrize("what", ["folder", "pipe", "loop"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_something_else_in_its_place(tmp_path: Path, kind: Kind, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = place(tmp_path, kind.name)
    in_place_of(path, what)
    check(kind, path, capsys)


RECIPES = {
    "broken": b"train: {lr: 1",
    "a number": b"3",
    "a list": b"- a",
    "a key twice": b"train: {lr: 1}\ntrain: {lr: 2}",
    "a tag": b"x: !!python/object/apply:os.system [ls]",
    "not UTF-8": b"# \xff\nname: x",
    "NUL": b"name: \0",
    "deep": b"a: " + b"[" * 5_000,
    "itself": b"x: &a [*a]",
    "no date": b"seed: !!timestamp 2026-99-99",
    "a list as a key": b"? [a]\n: 1",
    "defaults 1": b"defaults: 3",
    "defaults 2": b"defaults: [{}]",
    "defaults 3": b"defaults: [{a: {b: 1}}]",
    "interpolation": b'train: {lr: "${"}',
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_damaged_recipes(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"mine.yaml: damaged \(.+\); correct the file") as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("what", ["folder", "pipe", "loop"])
def test_no_file_in_the_place_of_a_recipe(tmp_path: Path, what: str) -> None:
    in_place_of(tmp_path / "mine.yaml", what)
    with pytest.raises(UserError, match=r"mine.yaml: "):
        read_recipe(tmp_path / "mine.yaml")


def test_other_programs_recipes_are_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are listed, and refused when they are asked for."""
    (tmp_path / "recipes").mkdir()
    for name, text in RECIPES.items():
        (tmp_path / "recipes" / f"{name.replace(' ', '_')}.yaml").write_bytes(text)
    for what in ("folder", "pipe", "loop"):
        in_place_of(tmp_path / "recipes" / f"{what}.yaml", what)
    monkeypatch.chdir(tmp_path)
    assert configuration.compose(["+recipe=micro"]).name == "micro"
    listed = "\n".join(recipes.recipe_lines())
    assert all(f"  {name} " in listed for name in ("broken", "folder", "pipe", "loop", "micro"))
    with pytest.raises(UserError, match=r"broken.yaml: damaged"):
        configuration.compose(["+recipe=broken"])


SCORES = {"embedding": np.ones(8, np.float32)} | {
    f"layers.{i}.{name}": np.ones(size, np.float32)
    for i in range(2)
    for name, size in (("heads", 4), ("ffn", 6), ("block", 1))
}
KEPT = {"embedding": np.arange(4), "layers.0.heads": np.arange(2)}
TENSORS: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {
    "a layer too much": (SCORES | {"layers.999999.block": np.ones(1, np.float32)}, KEPT),
    "a number for a row": (SCORES | {"layers.0.heads": np.array(1, np.float32)}, KEPT),
    "nothing in a row": (SCORES | {"embedding": np.ones(0, np.float32)}, KEPT),
    "NaN": (SCORES | {"embedding": np.full(8, np.nan, np.float32)}, KEPT),
    "two dimensions": (SCORES | {"layers.1.ffn": np.ones((2, 3), np.float32)}, KEPT),
    "an index beyond": (SCORES, KEPT | {"embedding": np.array([99])}),
    "indices that are fractions": (SCORES, KEPT | {"embedding": np.ones(2, np.float32)}),
    "a basis of one dimension": (SCORES, KEPT | {"embedding.variance": np.ones(8), "embedding.basis": np.ones(8)}),
    "a variance without a basis": (SCORES, KEPT | {"embedding.variance": np.ones(8)}),
}


@pytest.mark.parametrize(("scores", "kept"), TENSORS.values(), ids=TENSORS)
def test_damaged_tensors(tmp_path: Path, scores: dict[str, np.ndarray], kept: dict[str, np.ndarray]) -> None:
    save_file(SCORES, tmp_path / "s.safetensors")
    save_file(KEPT, tmp_path / "k.safetensors")
    assert set(read_axes(tmp_path / "s.safetensors", tmp_path / "k.safetensors")) == {
        "embedding",
        "heads",
        "ffn",
        "block",
    }
    save_file(scores, tmp_path / "s.safetensors")
    save_file(kept, tmp_path / "k.safetensors")
    with pytest.raises(UserError, match=r"s.safetensors and .*k.safetensors: damaged .*; run score and prune again"):
        read_axes(tmp_path / "s.safetensors", tmp_path / "k.safetensors")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("scores/provenance.json", "score"),
        ("pruned/provenance.json", "report"),
        ("eval/student.json", "report"),
        ("train/started.json", "distill"),
        ("eval/student.items.jsonl", "eval"),
    ],
)
def test_commands_say_it_in_one_line(
    tmp_path: Path, name: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minitron_train.__main__ import answer
    from tests.support.models import save_tiny

    for model in ("teacher", "pruned"):
        save_tiny("nemotron", tmp_path / model)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"[" * 100_000)
    words = [command, "+recipe=micro", f"output_dir={tmp_path}", "data.num_workers=0", "plan.check=false"]
    words += [f"teacher.path={tmp_path / 'teacher'}", f"student.path={tmp_path / 'pruned'}"]
    words += ["eval.compare=[student,teacher]"] if command == "eval" else []
    monkeypatch.setattr("sys.argv", ["minitron_train", *words])
    assert answer() == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert (name in line and "damaged" in line) or "is not an evaluated row" in line
    assert "Traceback" not in error
