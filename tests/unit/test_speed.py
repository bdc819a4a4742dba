"""Size, memory and tokens per second of models: what is timed, in which order, and where the figures are shown."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.commands.command import execute
from minitron_train.commands.registry import COMMANDS
from minitron_train.config import Config, Precision, SpeedConfig
from minitron_train.evaluation import speed, timing
from minitron_train.hf import folder_shape, read_json, student_config
from minitron_train.reporting import summary_table, write_report
from minitron_train.reporting.card import write_card
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from tests.support.models import save_tiny

CPU = torch.device("cpu")
PROMPT, NEW = 6, 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher and a narrower student of two layers."""
    root = tmp_path_factory.mktemp("speed")
    smaller: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2}
    return {
        "teacher": save_tiny("llama", root / "teacher"),
        "student": save_tiny("llama", root / "student", seed=1, **smaller),
    }


def settings(**changes: Any) -> SpeedConfig:
    return SpeedConfig(**{"prompt_tokens": PROMPT, "new_tokens": NEW, "turns": 3, "batch_sizes": [1, 4], **changes})


def measure(folders: dict[str, Path], **changes: Any) -> speed.Speed:
    return speed.measure(folders, settings(**changes), torch.float32, CPU, seed=1)


def test_bytes_are_those_of_files_weights_and_cache(folders):
    found = measure(folders)
    for label, folder in folders.items():
        shape, model = folder_shape(folder), found["models"][label]
        assert model["file_bytes"] == (folder / "model.safetensors").stat().st_size
        parameters = timing.open_model(folder, torch.float32, CPU).num_parameters()  # type: ignore[operator]
        assert 0 <= model["weight_bytes"] - 4 * parameters < 200, "weights, and the frequencies of the rotary embedding"
        for size in (1, 4):
            tokens = size * (PROMPT + NEW)
            keys_and_values = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels
            assert model["batches"][str(size)]["cache_bytes"] == 4 * tokens * keys_and_values


def test_rates_are_tokens_per_second_and_their_spread(folders, monkeypatch):
    warm_up = timing.Pass(100.0, 100.0, 1)
    seconds = iter([warm_up, *(timing.Pass(prefill, decode, 1) for prefill, decode in ((2, 6), (1, 3), (4, 1)))])
    monkeypatch.setattr(timing, "time_generation", lambda *_: next(seconds))
    (model,) = measure({"student": folders["student"]}, batch_sizes=[4])["models"].values()
    expected = {"median": 4 * PROMPT / 2, "lowest": 4 * PROMPT / 4, "highest": 4 * PROMPT / 1}
    assert model["batches"]["4"]["prefill"] == expected
    assert model["batches"]["4"]["decode"] == {"median": 4 * NEW / 3, "lowest": 4 * NEW / 6, "highest": 4 * NEW / 1}


def test_models_take_turns_and_each_is_the_first_one_equally_often(folders, monkeypatch):
    order: list[tuple[int, int]] = []

    def note(model: Any, prompt_BP: torch.Tensor, new_tokens: int) -> timing.Pass:
        if new_tokens == NEW:
            order.append((model.config.hidden_size, len(prompt_BP)))
        return timing.Pass(1.0, 1.0, 1)

    monkeypatch.setattr(timing, "time_generation", note)
    measure(folders, turns=2, new_tokens=NEW)
    assert order == [(64, 1), (32, 1), (64, 4), (32, 4), (32, 1), (64, 1), (32, 4), (64, 4)]


def test_the_timed_tokens_are_those_of_generate(folders):
    model = timing.open_model(folders["teacher"], torch.float32, CPU)
    prompt_BP = torch.randint(128, (2, PROMPT), generator=torch.Generator().manual_seed(3))
    cache, tokens, found = timing.empty_cache(model), prompt_BP, []
    with torch.inference_mode():
        for _ in range(NEW):
            tokens = timing.next_token(model, tokens, cache)
            found.append(tokens)
        wanted = model.generate(prompt_BP, max_new_tokens=NEW, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    assert torch.equal(torch.cat(found, dim=1), wanted[:, PROMPT:])


def test_a_random_model_of_a_shape_decodes_after_a_context_without_a_prefill(folders):
    config = read_json(folders["teacher"] / "config.json")
    shape = folder_shape(folders["teacher"]).smaller(hidden_size=48, num_layers=2)
    model = timing.random_model(student_config(config, shape), torch.float32, CPU)
    cache = timing.filled_cache(model, shape, batch_size=1, context=20)
    assert timing.time_decoding(model, torch.zeros(1, 1, dtype=torch.int64), cache, new_tokens=2) > 0
    assert cache.get_seq_length() == 22
    assert timing.cache_bytes(cache) == 4 * 22 * 2 * 2 * shape.num_query_groups * shape.kv_channels


def test_a_prompt_is_cut_to_the_context_and_the_record_says_so(folders):
    assert measure(folders, prompt_tokens=500, turns=1, batch_sizes=[1])["prompt_tokens"] == 128 - NEW
    with pytest.raises(UserError, match=r"speed\.new_tokens \+ 1=129: the teacher was made for 128 positions"):
        measure(folders, new_tokens=128)


def test_the_command_writes_what_report_card_and_summary_show(folders, tmp_path, capsys):
    config = Config(output_dir=str(tmp_path), speed=settings(precision=Precision.fp32))
    config.teacher.path, config.export.path = str(folders["teacher"]), str(folders["student"])
    execute(COMMANDS["speed"], config, ["speed"], World())
    assert "## Speed" in (folders["student"] / "README.md").read_text()
    found = speed.read_speed(tmp_path / "speed" / "speed.json")
    assert found is not None and list(found["models"]) == ["teacher", "student"]
    assert found["machine"]["threads"] == torch.get_num_threads() and found["machine"]["dtype"] == "float32"

    for label, median in (("teacher", 80.0), ("student", 1234.5)):
        found["models"][label]["batches"]["4"]["decode"] = {"median": median, "lowest": 7.25, "highest": 2000.0}
    (tmp_path / "speed" / "speed.json").write_text(json.dumps(found))
    (row,) = [line for line in summary_table(tmp_path).splitlines() if line.startswith("decode tokens/s, 4 sequences")]
    assert row.split("  ")[-1].strip() == "15.43" and "80 (7.25–2,000)" in row and "1,234 (7.25–2,000)" in row
    page = write_report(tmp_path).read_text()
    assert '<td class="num">1,234 (7.25–2,000)</td><td class="num">15.43</td>' in page
    text = write_card(folders["student"], tmp_path).read_text()
    assert "| decode tokens/s, 4 sequences | 80 (7.25–2,000) | 1,234 (7.25–2,000) | 15.43 |" in text
    assert "median of 3 turns" in text

    capsys.readouterr()
    execute(COMMANDS["speed"], config, ["speed"], World())
    assert "speed: already finished" in capsys.readouterr().out


def test_what_cannot_be_measured_is_one_line(folders, tmp_path):
    with pytest.raises(UserError, match=r"nothing to measure in .*; run the earlier stages, or give teacher\.path"):
        execute(COMMANDS["speed"], Config(output_dir=str(tmp_path)), ["speed"], World())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folders["teacher"] / "config.json").read_text())
    with pytest.raises(UserError, match=r"broken: transformers does not open it \(.*\); set speed\.in_run=false"):
        timing.open_model(broken, torch.float32, CPU)


@pytest.mark.parametrize("change", ["models", "batches", "rate"])
def test_a_damaged_record_is_one_line(folders, tmp_path, change):
    file = tmp_path / "speed.json"
    found: Any = measure(folders, turns=1)
    if change == "models":
        found["models"] = {}
    elif change == "batches":
        del found["models"]["teacher"]["batches"]["4"]
    else:
        found["models"]["teacher"]["batches"]["4"]["decode"]["median"] = 0
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"speed\.json: damaged \(.*\); run `speed` again with force=true"):
        speed.read_speed(file)
    assert speed.read_speed(tmp_path / "none.json") is None
