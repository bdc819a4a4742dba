"""The text model of vision-language folders: logits, pruning with the vision model untouched, and what is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from minitron_train import hf
from minitron_train.config import Refit
from minitron_train.hf.around import text_name
from minitron_train.runtime.errors import UserError
from tests.support.models import opened
from tests.support.pruning import configuration, random_tokens, run_cut
from tests.support.wrapped import CONFIGS, save_wrapped, wrapped_logits

TOKENS = random_tokens(vocab=120)  # no token stands for an image
INNER = {"ffn_hidden_size": 56, "num_attention_heads": 4, "num_layers": 2}
QWEN2_5 = {"ffn_hidden_size": 56, "num_layers": 2}  # its heads fill the hidden size
SIZES = {name: QWEN2_5 if name == "qwen2_5_vl" else INNER for name in CONFIGS}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrapped")
    return {name: save_wrapped(name, root / name) for name in CONFIGS}


def logits_of(folder):
    checkpoint, model = opened(folder)
    assert not checkpoint.unexpected
    with torch.no_grad():
        return model.logits(model(TOKENS[0])).transpose(0, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_text_are_transformers(models, groups, name):
    """Three equal positions for each token make the multimodal rotary embedding the plain one."""
    torch.testing.assert_close(logits_of(models[name]), wrapped_logits(models[name], TOKENS[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_cut_gives_back_every_bit(tmp_path, models, groups, name):
    folder = run_cut(tmp_path, models[name], configuration(), TOKENS, groups)
    before, after = (load_file(path / "model.safetensors") for path in (models[name], folder))
    assert set(after) == set(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert {**json.loads((folder / "config.json").read_text())} == json.loads(
        (models[name] / "config.json").read_text()
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("preset", [None, "default"])
def test_a_cut_folder_opens_with_its_vision_model_untouched(tmp_path, models, groups, name, preset):
    settings = {"drop_layers": [2]} if name == "qwen3_vl" else {}
    folder = run_cut(tmp_path, models[name], configuration(preset, **settings), TOKENS, groups, **SIZES[name])
    torch.testing.assert_close(logits_of(folder), wrapped_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)
    before, after = (load_file(path / "model.safetensors") for path in (models[name], folder))
    rest = [key for key in before if text_name(key) is None]
    assert len(rest) >= 15 and rest == [key for key in after if text_name(key) is None]
    assert all(torch.equal(after[key], before[key]) for key in rest)


def test_repair_of_nothing_changes_nothing(tmp_path, models, groups):
    for name in CONFIGS:
        folder = run_cut(tmp_path / name, models[name], configuration("default", refit=Refit.all), TOKENS, groups)
        difference = wrapped_logits(folder, TOKENS[0]) - wrapped_logits(models[name], TOKENS[0])
        assert difference.abs().max() <= 5e-4, name


@pytest.mark.parametrize("name", ["llava", "mistral3"])
def test_the_hidden_size_cannot_be_cut(tmp_path, models, groups, name):
    with pytest.raises(UserError, match=f"student.hidden_size=48: cannot be cut inside {name}, because .*; keep 64"):
        run_cut(tmp_path, models[name], configuration(), TOKENS, groups, hidden_size=48)


NARROW = {
    "qwen2_5_vl": {"hidden_size": 32, "num_attention_heads": 4},  # its heads fill the hidden size
    "qwen3_vl": {"hidden_size": 48},
}
IMAGE = {  # four patches of two frames, merged to one token
    "pixel_values": torch.randn(4, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(5)),
    "image_grid_thw": torch.tensor([[1, 2, 2]]),
}
WITH_IMAGE = torch.tensor([[7, 122, 120, 123, 5, 9]])  # one token stands for the image


def pictured(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def image_logits(model):
    with torch.no_grad():
        return model(WITH_IMAGE, mm_token_type_ids=(WITH_IMAGE == 120).int(), **IMAGE).logits


def image_features(model):
    """What is written to the residual stream: at its start, and to the first layers' outputs."""
    with torch.no_grad():
        found = model.model.get_image_features(**IMAGE)
    return [torch.cat(part) for part in (found.pooler_output, *getattr(found, "deepstack_features", ()))]


@pytest.mark.parametrize("name", NARROW)
def test_the_projector_is_cut_with_the_hidden_size(tmp_path, models, groups, name):
    """A text and an image, against transformers' teacher without the dropped channels and heads."""
    folder = run_cut(tmp_path, models[name], configuration(), TOKENS, groups, **NARROW[name])
    kept, size = load_file(folder / "kept.safetensors"), hf.HFFolder(folder).shape.kv_channels
    channels, masked, student = kept["embedding"], pictured(models[name]), pictured(folder)
    assert json.loads((folder / "config.json").read_text())["vision_config"]["out_hidden_size"] == len(channels)
    features = image_features(masked)
    for found, wanted in zip(image_features(student), features, strict=True):
        torch.testing.assert_close(found, wanted[:, channels], rtol=0, atol=1e-5)
    keep_channels(masked, channels)
    for i, layer in enumerate(masked.model.language_model.layers):
        rows = (kept[f"layers.{i}.heads"][:, None] * size + torch.arange(size)).flatten()
        layer.self_attn.o_proj.weight.data *= torch.zeros(layer.self_attn.o_proj.weight.shape[1]).index_fill_(
            0, rows, 1.0
        )
    torch.testing.assert_close(image_logits(student), image_logits(masked), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits_of(folder), wrapped_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)
    assert len(features) == (2 if name == "qwen3_vl" else 1)
    assert not torch.allclose(image_logits(student), student(WITH_IMAGE.masked_fill(WITH_IMAGE == 120, 3)).logits)


def keep_channels(model, channels):
    """Zero the other channels of all that a stream is made from; norms average over the kept ones alone."""
    text, visual = model.model.language_model, model.model.visual
    size = text.embed_tokens.weight.shape[1]
    is_kept = torch.zeros(size).index_fill_(0, channels, 1.0)
    share = len(channels) / size
    for layer in text.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data *= is_kept[:, None]
    text.embed_tokens.weight.data *= is_kept
    last = (
        [m.linear_fc2 for m in (visual.merger, *visual.deepstack_merger_list)]
        if hasattr(visual, "deepstack_merger_list")
        else [visual.merger.mlp[2]]
    )
    for linear in last:
        linear.weight.data *= is_kept[:, None]
        linear.bias.data *= is_kept
    for norm in (text.norm, *(n for x in text.layers for n in (x.input_layernorm, x.post_attention_layernorm))):
        norm.weight.data *= share**0.5
        norm.variance_epsilon *= share


@pytest.mark.parametrize("name", NARROW)
def test_image_features_are_rotated_with_the_stream(tmp_path, models, groups, name):
    """They enter the student's stream as the teacher's features in the student's basis, as embeddings do."""
    folder = run_cut(tmp_path, models[name], configuration("default"), TOKENS, groups, **NARROW[name])
    down_DH = load_file(folder / "kept.safetensors")["embedding.basis"]
    before, after = pictured(models[name]), pictured(folder)
    for found, wanted in zip(image_features(after), image_features(before), strict=True):
        torch.testing.assert_close(found, wanted @ down_DH, rtol=1e-4, atol=1e-4)
    rows = [model.model.language_model.embed_tokens.weight.detach() for model in (after, before)]
    torch.testing.assert_close(rows[0], rows[1] @ down_DH, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(folder), wrapped_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)
    assert image_logits(after).isfinite().all()


OUTPUTS = {
    "llava": "multi_modal_projector.linear_2.bias",
    "mistral3": "multi_modal_projector.linear_2.weight",
    "qwen2_5_vl": "visual.merger.mlp.2.weight",
    "qwen3_vl": "visual.deepstack_merger_list.0.linear_fc2.weight",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_projector_of_another_width_is_refused_when_the_folder_is_opened(tmp_path, models, name):
    (tmp_path / "config.json").write_text((models[name] / "config.json").read_text())
    tensors = load_file(models[name] / "model.safetensors")
    full = next(full for full in tensors if full.endswith(OUTPUTS[name]))
    save_file(tensors | {full: tensors[full][:40].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=f"{re.escape(full)} has 40 rows, but {name} adds its output to a stream of"
    ) as error:
        hf.HFFolder(tmp_path)
    assert "\n" not in str(error.value)


def test_layers_that_image_features_are_added_to_must_stay(tmp_path, models, groups):
    with pytest.raises(
        UserError, match="layer 0 would be dropped, but qwen3_vl adds image features to the first 1 layers"
    ):
        run_cut(tmp_path, models["qwen3_vl"], configuration(drop_layers=[0]), TOKENS, groups, num_layers=2)


def in_new_order(folder, target):
    """The folder with the names of the model's attributes in transformers 5."""
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        name = text_name(key)
        bare = key.removeprefix("model.")
        if name is None:
            tensors[f"model.{bare}"] = tensor
        else:
            tensors[name.replace("model.", "model.language_model.", 1)] = tensor
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("name", CONFIGS)
def test_both_orders_of_names_are_read_and_kept(tmp_path, models, groups, name):
    folder = in_new_order(models[name], tmp_path / "new")
    torch.testing.assert_close(logits_of(folder), wrapped_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)
    pruned = run_cut(tmp_path, folder, configuration(), TOKENS, groups)
    assert set(load_file(pruned / "model.safetensors")) == set(load_file(folder / "model.safetensors"))


def test_a_flat_config_is_read_and_written_flat(tmp_path, models, groups):
    """As the published folders of Qwen2.5-VL are, with the older name of the rotary embedding."""
    folder = in_new_order(models["qwen2_5_vl"], tmp_path / "flat")
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = (
        text | config | {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    )
    (folder / "config.json").write_text(json.dumps(flat))
    torch.testing.assert_close(logits_of(folder), wrapped_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)
    pruned = run_cut(tmp_path, folder, configuration(), TOKENS, groups, **QWEN2_5)
    written = json.loads((pruned / "config.json").read_text())
    assert set(written) == set(flat) and written["rope_scaling"] == flat["rope_scaling"]
    torch.testing.assert_close(logits_of(pruned), wrapped_logits(pruned, TOKENS[0]), rtol=0, atol=1e-4)


def test_a_students_config_says_what_is_true_of_it():
    text = CONFIGS["llava"]["text_config"] | {"eos_token_id": [1, 2, 3], "per_layer": [5, 6, 7], "_name_or_path": "/x"}
    config = {
        **CONFIGS["llava"],
        "model_type": "llava",
        "text_config": text,
        "quantization_config": {"quant_method": "x"},
    }
    shape = hf.shape_from_config(config, "config.json").smaller(num_layers=2)
    student = hf.student_config(config, shape, layers=[0, 2])
    assert "quantization_config" not in student and "_name_or_path" not in student["text_config"]
    assert student["text_config"]["eos_token_id"] == [1, 2, 3] and student["text_config"]["per_layer"] == [5, 7]
    assert student["vision_config"] == config["vision_config"]


REFUSED = [
    (
        {"model_type": "llava", "text_config": {"model_type": "gpt2"}},
        "text_config has model_type 'gpt2'; inside llava only",
    ),
    ({"model_type": "mistral3"}, "text_config=None is not an object"),
    ({"model_type": "qwen2_5_vl_text"}, "model_type 'qwen2_5_vl_text' is not supported"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        hf.shape_from_config(config, "config.json")


def test_llava_relies_on_llamas_defaults():
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}}
    shape = hf.shape_from_config(config, "config.json")
    assert (shape.hidden_size, shape.ffn_hidden_size, shape.num_layers, shape.vocab_size) == (4096, 11008, 32, 32064)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_default_rotary_base_is_transformers(name):
    text = {**CONFIGS[name]["text_config"]}
    del text["rope_parameters"]
    config = {"model_type": name, "text_config": text}
    wanted = CONFIG_MAPPING[name].from_dict(json.loads(json.dumps(config))).text_config.rope_parameters["rope_theta"]
    assert hf.shape_from_config(config, "config.json").ropes[0].theta == wanted


def test_the_card_and_the_serving_rules_know_the_folder(models):
    from minitron_train.evaluation.serving import serving_problems

    assert hf.auto_class(hf.read_json(models["mistral3"] / "config.json")) == "AutoModelForImageTextToText"
    assert not [problem for problem in serving_problems(models["mistral3"]) if "tokenizer" not in problem]
