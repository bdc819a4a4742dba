"""Credentials: masked in what is printed and in what is recorded, and nothing else is."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_train.fetch.common import record_facts
from minitron_train.runtime.errors import UserError, error_line
from minitron_train.runtime.masking import Output, mask_credentials
from minitron_train.stages import plain

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    "text",
    [
        "from http://me:PASSWORD@hub.example:8080/x: cannot be reached",
        "https://PASSWORD@host/simple and https://a:PASSWORD@other/",
        "http://me:PASS@PASSWORD@host",
        "http://me:PASS/PASSWORD#1?@host:80/x",
        "http://me@x.org:PASSWORD@host/",
        "ProxyError('socks5://u:PASSWORD@10.0.0.1:1080')",
        "HTTPS_PROXY=me:PASSWORD@proxy:3128",
        "https://cdn/x?a=1&X-Amz-Signature=PASSWORD&X-Amz-Credential=PASSWORD%2F&b=2",
        "https://host/x?token=PASSWORD",
        "https://host/x?Policy=PASSWORD&Key-Pair-Id=PASSWORD",
        "data.path=https://host/x?access_token=PASSWORD&b",
        "{'Authorization': 'Bearer PASSWORD-0123'}",
        "authorization: Basic PASSWORDPASSWORD==",
        "Authorization: token PASSWORD",
        "[(b'authorization', b'Bearer PASSWORD'), ('Authorization', 'Bearer PASSWORD')]",
        "HTTPS_PROXY=me:PASSWORD@[::1]:3128",
        r'{"url": "https:\/\/me:PASSWORD@host"}',
        "https://mirror/?to=https%3A%2F%2Fme%3APASSWORD%40host%2Fx%3Ftoken%3DPASSWORD",
        "https://host/x#access_token=PASSWORD",
        "env SOME_API_KEY=PASSWORD python -m x",
        f"no access for {TOKEN.replace('aB3aB3', 'PASSWORD')}",
    ],
)
def test_what_is_masked(text: str) -> None:
    masked = mask_credentials(text)
    assert "PASSWORD" not in masked and "***" in masked
    assert mask_credentials(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/nvidia/Minitron-4B-Base/resolve/main/model.safetensors?download=true",
        "teacher.path=/data/me@work/run:1@2/hf_model=x",
        "git@github.com:owner/name.git",
        "train.num_tokens=1000 token=5 tokens: 7",
        "document_end=<|endoftext|> data.text_key=text",
        "git_commit 3f786850e387550fdab836ed7e6dc881de23001b",
        "12:30:01 step 5@7 loss 2.5",
        "file:///home/me/a@b/c",
        "basic settings, bearer of news",
        "calibration.tokens_path=/a/tokens.safetensors data.text_key=text MAX_TOKENS=5",
    ],
)
def test_what_stays(text: str) -> None:
    assert mask_credentials(text) == text


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    monkeypatch.setenv("HF_TOKEN", "short")
    assert mask_credentials(f"api.wandb.ai refused {'0123456789abcdef' * 2}") == "api.wandb.ai refused ***"
    assert mask_credentials("short") == "short"


def test_records_hold_no_credentials(tmp_path: Path) -> None:
    url = "http://me:PASSWORD@host/x"
    assert "PASSWORD" not in json.dumps(plain({"data": [{"path": url}], url: Path(url), "command": (url,)}))
    record_facts(tmp_path, {"source": url, "files": {"a": url}})
    assert "PASSWORD" not in (tmp_path / "source.json").read_text()


def test_an_error_is_one_line_whatever_names_stand_in_it() -> None:
    line = error_line(UserError("a\nb\x1b[2J\udcff 模"), rank=1)
    assert line == "error: a\\nb\\x1b[2J\\udcff 模 (rank 1)"


def test_the_command_line_prints_no_password(tmp_path: Path) -> None:
    """The refused connection, an unknown key, and a traceback of a fault of ours."""
    hub = {"HF_ENDPOINT": "http://me:PASSWORD@127.0.0.1:9", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    fetch = ["fetch", "teacher.source=hub", "teacher.repo_id=a/b", "teacher.revision=main"]
    fault = (
        "from minitron_train import __main__\nfrom minitron_train.commands import cli\n"
        "def run(*_): raise RuntimeError('http://a:PASSWORD@h')\ncli.run = run\n"
    )
    for words, code in (
        (["-m", "minitron_train", *fetch], 2),
        (["-m", "minitron_train", "plan", "x=http://me:PASSWORD@host"], 2),
        (["-c", f"{fault}__main__.main()"], 1),
    ):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env={**os.environ, **hub}, capture_output=True, text=True
        )
        assert done.returncode == code and "PASSWORD" not in done.stdout + done.stderr
        assert done.stderr.count("\n") == 1 or done.stderr.endswith("RuntimeError: http://***@h\n")


def test_the_wrapped_stream_stays_open() -> None:
    below = io.TextIOWrapper(io.BytesIO(), "utf-8")
    output = Output(below)
    output.write("http://me:PASSWORD@host/x")
    output.close()
    del output
    assert below.buffer.getvalue() == b"http://***@host/x"  # type: ignore[attr-defined]


def test_a_job_logs_no_address_with_a_password() -> None:
    """Neither among its arguments nor its environment; the functions of slurm/common.sh, without a job."""
    source = (Path(__file__).parents[2] / "slurm" / "common.sh").read_text()
    functions = source[source.index("has_credentials()") : source.index("# Pass a signal on")]
    words = ["a=https://me:PASSWORD@h/x", "+data.sources={a: {path: https://h/x?sig=PASSWORD}}", "teacher.path=/a b"]
    script = f'{functions}\nprint_arguments "$@"; print_environment'
    env = {"PATH": os.environ["PATH"], "HF_ENDPOINT": "https://h?token=PASSWORD", "HF_HOME": "/cache"}
    done = subprocess.run(["bash", "-euc", script, "job", *words], env=env, capture_output=True, text=True, check=True)
    assert "PASSWORD" not in done.stdout and done.stdout.count("not") == 3
    assert r"argument teacher.path=/a\ b" in done.stdout and "HF_HOME=/cache" in done.stdout
