"""The whole chain of `tiny_family`: two members, killed in the second one, resumed, and every page."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

SMALLER = (
    *("model.vocab_size=512", "pretrain.num_tokens=4096", "train.num_tokens=8192", "train.warmup_steps=1"),
    *("train.global_batch_size=8", "checkpoint.interval_steps=2", "tracking.wandb.mode=disabled"),
)


def command(folder: Path, name: str = "run", *words: str) -> list[str]:
    start = [sys.executable, "-m", "minitron_train", name, "+recipe=tiny_family", f"output_dir={folder}"]
    return [*start, *SMALLER, *words]


def test_a_family_is_killed_and_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    killed = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    saved = folder / "smaller" / "train" / "checkpoints" / "latest"
    end_s = time.monotonic() + 600
    while not saved.exists() and killed.poll() is None and time.monotonic() < end_s:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert saved.exists() and not (folder / "smaller" / "student").exists()
    first = (folder / "small" / "train" / "provenance.json").read_bytes()

    done = subprocess.run(command(folder), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (folder / "small" / "train" / "provenance.json").read_bytes() == first, "a finished member is skipped"
    assert "resumed at step" in done.stdout + done.stderr

    for name, width in (("small", 80), ("smaller", 64)):
        assert json.loads((folder / name / "student" / "config.json").read_text())["hidden_size"] == width
        assert (folder / name / "report.html").exists()
    records = {
        (name, stage): json.loads((folder / name / stage / "provenance.json").read_text())["inputs"]
        for name in ("small", "smaller")
        for stage in ("pruned", "train")
    }
    assert records["small", "train"]["teacher"] == records["smaller", "train"]["teacher"], "the recipe's own teacher"
    assert records["small", "pruned"]["teacher"] != records["smaller", "pruned"]["teacher"], (
        "but other models are pruned"
    )
    card = (folder / "smaller" / "student" / "README.md").read_text()
    assert (
        "# tiny_family-smaller" in card and "pruned from small" in card and "taught by a teacher that was pretr" in card
    )
    index = (folder / "report.html").read_text()
    assert 'href="small/report.html"' in index and 'href="smaller/student/README.md"' in index
    assert done.stdout.splitlines()[-1].startswith("smaller")
