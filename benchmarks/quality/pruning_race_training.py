"""How benchmarks/quality/pruning_race.py makes a row: the program's own `prune` and training, measured on several texts."""

import contextlib
import functools
import glob
import hashlib
import json
import platform
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from miniature import short_hash
from pruning_race_models import Model
from pruning_race_plan import Start
from pruning_race_rows import TEXTS, Row, Run, make_row
from torch import Tensor

import minitron_train as mt
from minitron_train import hf
from minitron_train.api.functions import configure
from minitron_train.config import Config, DataConfig
from minitron_train.data import tokenizers
from minitron_train.data.stream import validation_tokens
from minitron_train.parallel.groups import start as start_groups
from minitron_train.planning.precision import concrete
from minitron_train.runtime.files import atomic_write_text
from minitron_train.runtime.launch import World
from minitron_train.stages import plain
from minitron_train.stages.environment import git_commit
from minitron_train.train.assemble import assemble
from minitron_train.train.hooks import Hook
from minitron_train.train.loop import Trainer
from minitron_train.train.metrics import Metrics, finite, read_rows
from minitron_train.train.run import train
from minitron_train.train.settings import deciding_settings
from minitron_train.train.validation import Validation

MEASURED = {"ce": "loss", "kl": "kl"}  # measure of a row -> its name in the metrics
TEXT_TOKENS = 8_192  # held-out tokens of each text
TEXT_SEED = 1234  # of the held-out tokens, for every seed of the training
LOWEST_LR = 0.1  # final learning rate as a share of the peak
CALCULATOR = re.compile(r"<<.*?>>")  # GSM8K's annotations inside answers

Losses = dict[str, dict[str, float | None]]  # text -> measure -> nats


@dataclass
class HeldOut(Hook):
    """Measures every text at each evaluation, and stops the training at a time of time.monotonic()."""

    tokens: Mapping[str, Tensor]  # text -> [N, S + 1]
    deadline_s: float = float("inf")

    def after_step(self, training: Trainer, row: Metrics) -> Metrics:
        """Send SIGTERM, on which the training saves this step and ends."""
        if time.monotonic() > self.deadline_s:
            signal.raise_signal(signal.SIGTERM)
        return {}

    def evaluate(self, training: Trainer) -> Metrics:
        found: Metrics = {}
        size = training.config.train.micro_batch_size
        for name, tokens in self.tokens.items():
            values = Validation(tokens, training.objective, size, training.groups)(training.is_stopped)
            found |= {f"eval.{name}.{key}": values[f"eval.validation.{key}"] for key in MEASURED.values()}
        return found


def losses(values: Mapping[str, Any], prefix: str = "") -> Losses:
    """The losses by text among metrics such as own.kl."""
    return {
        text: {measure: finite(values[f"{prefix}{text}.{key}"]) for measure, key in MEASURED.items()} for text in TEXTS
    }


@dataclass(frozen=True, kw_only=True)
class Race:
    """What all runs share. `settings` are keys of the command line; they hold the student's sizes and the batch."""

    folder: Path
    teacher: Path
    text: str  # training text, a glob; a part of its documents is held out
    texts: Mapping[str, Mapping[str, Any]]  # held-out text -> keys of section data that select it
    settings: Mapping[str, Any]
    curve_tokens: int = 100_000  # tokens between the evaluations of a long run
    text_tokens: int = TEXT_TOKENS
    deadline_s: float = float("inf")
    starts: dict[str, Start] = field(default_factory=dict)

    @functools.cached_property
    def tokens(self) -> dict[str, Tensor]:
        """Held-out tokens [N, S + 1] of each text, the same for every run."""
        config, tokenizer = self.config(), tokenizers.load(self.teacher)
        found = {}
        for name in TEXTS:
            data: DataConfig = replace(config.data, validation_tokens=self.text_tokens, **self.texts[name])
            found[name] = validation_tokens(data, tokenizer, config.train.seq_length, TEXT_SEED)
        return found

    @functools.cached_property
    def text_hashes(self) -> dict[str, str]:
        """A hash of each text's tokens, so that rows of other texts are noticed."""
        return {name: hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12] for name, tokens in self.tokens.items()}

    def config(self, run: Run | None = None) -> Config:
        """The program's configuration of one run, with the precision of this machine in place of `auto`."""
        values = {"teacher.path": str(self.teacher), "data.path": self.text, **self.settings}
        if run and run.budget:
            values |= {"seed": run.seed, "train.num_tokens": run.budget, "train.lr": run.lr}
            values |= {"train.min_lr": LOWEST_LR * run.lr, "eval.every_tokens": self.curve_tokens}
        if run and run.start in self.starts:
            values |= self.starts[run.start].settings
        config = concrete(configure(values))
        if run and run.budget:
            config.train.warmup_steps = round(run.warmup * config.train.num_steps)
        return config

    def cut(self, start: Start) -> Path:
        """The pruned folder of a start. `prune` skips a finished cut, and starts with equal settings share one."""
        output = self.folder / "cuts" / short_hash({"prune": "default"} | start.cut)
        return mt.prune(self.teacher, output, text=self.text, settings={**self.settings, **start.cut}).folder

    def run(self, run: Run) -> Row:
        """Measure a cut, or train and measure.

        Raises:
            SystemExit: the training was stopped; the same call resumes it.
        """
        start_s = time.perf_counter()
        student = self.cut(self.starts[run.start]) if run.start in self.starts else self.teacher
        return self.trained(run, student, start_s) if run.budget else self.measured(run, student, start_s)

    def measured(self, run: Run, student: Path, start_s: float) -> Row:
        """The row of a student that is not trained."""
        config = self.config(run)
        with (
            start_groups(config.parallel, World(), config.seed) as groups,
            contextlib.ExitStack() as stack,
            tempfile.TemporaryDirectory() as scratch,
        ):
            teacher, files = hf.HFFolder(self.teacher), hf.HFFolder(student)
            found = HeldOut(self.tokens).evaluate(assemble(config, groups, files, teacher, Path(scratch), stack))
        return self.row(run, config, start_s, tokens=0, steps=0, losses=losses(found, "eval."), curve=[])

    def trained(self, run: Run, student: Path, start_s: float) -> Row:
        """The row of a trained student."""
        config, folder = self.config(run), self.training_folder(run, student)
        hook = HeldOut(self.tokens, self.deadline_s)
        folder.mkdir(parents=True, exist_ok=True)
        with start_groups(config.parallel, World(), config.seed) as groups:
            facts = train(config, groups, student=student, teacher=self.teacher, folder=folder, hooks=[hook])
        rows = read_rows(folder / "metrics.jsonl").values
        curve = [
            {"tokens": row["tokens"], "losses": losses(row, "eval.")} for row in rows if f"eval.{TEXTS[0]}.kl" in row
        ]
        same = {key: facts[key] for key in ("tokens", "steps", "resumed_at_step", "num_skipped")}
        found = losses(facts["evaluation"])
        return self.row(run, config, start_s, **same, warmup_steps=config.train.warmup_steps, losses=found, curve=curve)

    def training_folder(self, run: Run, student: Path) -> Path:
        """A run's folder. It changes with the weights of the cut, since a checkpoint of another cut must not be resumed."""
        return self.folder / "runs" / f"{slug(run)}-{hf.fingerprint(student)[:8]}"

    def forget(self, run: Run) -> None:
        """Delete the checkpoints of a run that has a row: gigabytes. Its metrics stay."""
        for folder in (self.folder / "runs").glob(f"{glob.escape(slug(run))}-*"):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def row(self, run: Run, config: Config, start_s: float, **facts: Any) -> Row:
        """A row with what decides its figures. It names no path of this machine."""
        sections = {name: plain(asdict(getattr(config, name))) for name in ("prune", "calibration")}
        sections["calibration"] = {k: v for k, v in sections["calibration"].items() if not k.endswith("path")}
        target = {key.removeprefix("student."): value for key, value in self.settings.items() if "student." in key}
        train_config = config.train
        return make_row(
            run,
            **facts,
            seconds=round(time.perf_counter() - start_s, 1),
            precision=train_config.precision.value,
            machine=machine(),
            commit=git_commit(),
            target=target,
            texts=self.text_hashes,
            batch=[train_config.global_batch_size, train_config.seq_length],
            settings=sections | deciding_settings(config, distilled=True),
        )


def slug(run: Run) -> str:
    """The run's name in file names."""
    return run.name.replace(" ", "-")


def machine() -> str:
    """The GPU's name, or the processor's and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def race_of(model: Model, folder: Path, teacher: Path, data: Path, precision: str, **options: Any) -> Race:
    """One model to its target, on the corpora of MINITRON_DATA."""
    corpus, conversations = data / "corpus", folder / "conversations.jsonl"
    write_conversations(data / "eval" / "gsm8k" / "test.jsonl", conversations, model.turn)
    settings = {
        "recipe": "smollm2",  # batch, lengths and optimizer
        "tracking": "off",
        **{f"student.{size}": value for size, value in model.target.items()},
        "calibration.num_samples": 128,
        "calibration.seq_length": 512,
        "calibration.precision": precision,
        "data.num_workers": 0,
        "data.validation_tokens": 1_024,  # the training's own evaluation; the figures are those of `texts`
        "train.precision": precision,
        "train.on_non_finite": "skip",
        "checkpoint.interval_steps": 50,
        "checkpoint.keep": 1,
        "checkpoint.keep_best": 0,
        **model.settings,
    }
    texts = {
        "own": {},
        "wikitext2": {"validation_path": str(corpus / "valid_wikitext2.jsonl.gz")},
        "documentation": {"path": str(corpus / "*_doc*.jsonl.gz")},
        "conversations": {"validation_path": str(conversations)},
    }
    text = str(corpus / "[!v]*.jsonl.gz")  # all but valid_wikitext2
    return Race(folder=folder, teacher=teacher, text=text, texts=texts, settings=settings, **options)


def write_conversations(gsm8k: Path, file: Path, turn: str) -> None:
    """Write GSM8K's questions and worked answers in the chat format `turn`, one document each."""
    if file.exists():
        return
    atomic_write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in conversations(gsm8k, turn)))


def conversations(gsm8k: Path, turn: str) -> Iterator[str]:
    """Each question with its answer, without the annotations and the number of the last line."""
    for line in gsm8k.read_text().splitlines():
        row = json.loads(line)
        answer = CALCULATOR.sub("", row["answer"]).partition("\n####")[0]
        yield turn.format(question=row["question"], answer=answer)
