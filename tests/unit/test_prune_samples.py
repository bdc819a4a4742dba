"""Calibration text that the teacher writes: draws from its own distribution, among the text's sequences."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_train import hf
from minitron_train.config import CalibrationConfig, Config, DataConfig
from minitron_train.data.calibration import calibration_batches, read_tokens
from minitron_train.pruning import samples
from minitron_train.pruning.samples import generate_samples, tokens_with_samples
from minitron_train.runtime.errors import UserError

LENGTH = 12


@pytest.fixture(scope="module", params=["nemotron", "llama"])
def outspoken(request, tiny_models, tmp_path_factory):
    """A random model whose predictions are far from uniform, so that a wrong draw would be an unlikely one."""
    folder = tmp_path_factory.mktemp("outspoken") / request.param
    shutil.copytree(tiny_models[request.param], folder)
    weights = load_file(folder / "model.safetensors")
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    weights[name] *= 4 / (weights[name].std() * weights[name].shape[1] ** 0.5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_draws_follow_the_model(outspoken, groups):
    """The log-probability that transformers gives to the drawn tokens is what it expects of its own distribution."""
    prompt, num = [3, 7], 600
    calibration = CalibrationConfig(seq_length=LENGTH)
    texts_NS = generate_samples(calibration, groups, hf.HFFolder(outspoken), prompt, num, seed=1)
    assert texts_NS.shape == (num, LENGTH) and texts_NS.dtype == torch.int64
    model = AutoModelForCausalLM.from_pretrained(outspoken, dtype=torch.float32).eval()
    whole = torch.cat([torch.tensor([prompt] * num), texts_NS], dim=1)
    with torch.no_grad():
        logprobs = model(whole).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    drawn_NS = logprobs.gather(-1, texts_NS[..., None])[..., 0]
    expected_NS = (logprobs.exp() * logprobs).sum(-1)  # the negative entropy
    uniform = -torch.tensor(float(logprobs.shape[-1])).log()
    assert expected_NS.mean() > uniform / 2, "the model is too undecided for this test"
    apart_S = (drawn_NS - expected_NS).mean(0) / ((drawn_NS - expected_NS).std(0) / num**0.5)
    assert apart_S.abs().max() < 4.5, apart_S
    assert len(texts_NS.unique(dim=0)) > num / 2


def test_batches_are_drawn_apart(outspoken, groups, monkeypatch):
    calibration, teacher = CalibrationConfig(seq_length=LENGTH), hf.HFFolder(outspoken)
    monkeypatch.setattr(samples, "MOST_AT_ONCE", 8)
    texts = generate_samples(calibration, groups, teacher, [3], 20, seed=1)
    assert torch.equal(texts, generate_samples(calibration, groups, teacher, [3], 20, seed=1))
    assert not torch.equal(texts, generate_samples(calibration, groups, teacher, [3], 20, seed=2))
    assert not torch.equal(texts[:8], texts[8:16])
    assert not (texts == 0).all(dim=1).any()


def test_a_share_in_the_place_of_text(numbered_words, outspoken, groups, tmp_path, monkeypatch):
    data, tokenizer = numbered_words
    calibration = CalibrationConfig(num_samples=24, seq_length=LENGTH, micro_batch_size=4, self_generated_fraction=0.4)
    config = Config(calibration=calibration, data=data)
    prompts = []

    def written(calibration, groups, teacher, prompt, num, seed):
        prompts.append(prompt)
        return torch.arange(num * LENGTH).view(num, LENGTH) + 1000

    monkeypatch.setattr(samples, "generate_samples", written)
    tokens = tokens_with_samples(config, groups, hf.HFFolder(outspoken), tokenizer, tmp_path)
    assert prompts == [[tokenizer.eos_token_id]]  # what ends a document; this tokenizer begins none with BOS
    assert tokens.shape == (6, 4, LENGTH) and torch.equal(read_tokens(tmp_path / samples.FILE), tokens)
    by_teacher_N = (tokens >= 1000).all(-1).flatten()
    assert by_teacher_N.sum() == 10  # 0.4 of 24
    assert 0 < by_teacher_N[:12].sum() < 10, "a repair that uses the first sequences alone must see both kinds"
    text = calibration_batches(
        replace(calibration, num_samples=14, micro_batch_size=1), data, tokenizer, config.seed
    ).flatten(0, 1)
    assert {tuple(row.tolist()) for row in tokens.flatten(0, 1)[~by_teacher_N]} == {tuple(row.tolist()) for row in text}


def test_all_of_it(numbered_words, outspoken, groups, tmp_path):
    """No text is opened."""
    calibration = CalibrationConfig(num_samples=8, seq_length=LENGTH, micro_batch_size=4, self_generated_fraction=1.0)
    config = Config(calibration=calibration, data=DataConfig(path="nowhere.txt"))
    tokens = tokens_with_samples(config, groups, hf.HFFolder(outspoken), numbered_words[1], tmp_path)
    assert tokens.shape == (2, 4, LENGTH)


def test_mistakes(numbered_words, outspoken, groups, tmp_path):
    data, tokenizer = numbered_words
    config = Config(
        data=data,
        calibration=CalibrationConfig(self_generated_fraction=0.5, streamed=True, num_samples=8, seq_length=16),
    )
    with pytest.raises(UserError, match=r"calibration\.self_generated_fraction=0\.5: .* streamed"):
        tokens_with_samples(config, groups, hf.HFFolder(outspoken), tokenizer, tmp_path)
    config.calibration = CalibrationConfig(self_generated_fraction=0.5, num_samples=9)
    with pytest.raises(UserError, match=r"multiple of calibration\.micro_batch_size"):
        tokens_with_samples(config, groups, hf.HFFolder(outspoken), tokenizer, tmp_path)
    config.calibration = CalibrationConfig(self_generated_fraction=0.5, num_samples=8, seq_length=100_000)
    with pytest.raises(UserError, match=r"calibration\.seq_length"):
        tokens_with_samples(config, groups, hf.HFFolder(outspoken), tokenizer, tmp_path)
    for share, tokens in ((1.5, None), (-0.1, None), (0.5, "tokens.safetensors")):
        with pytest.raises(UserError, match=r"calibration\.self_generated_fraction"):
            CalibrationConfig(self_generated_fraction=share, tokens_path=tokens).validate()
