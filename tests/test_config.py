"""Every layout of config.json results in the same kind of configuration, and none of its code runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tarsier_jax.config import ClipVisionConfig, ModelConfig, Qwen2VisionConfig, TextConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import family_of, family_of_json, load_config, parse_config
from tests.tarsier1 import TARSIER_7B

QWEN2_VL_2B = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "vocab_size": 151936,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}


def test_2b_in_the_old_flat_layout() -> None:
    config = parse_config(QWEN2_VL_2B)
    assert config.text == TextConfig(
        vocab_size=151936, hidden_size=1536, mlp_dim=8960, num_heads=12, num_kv_heads=2, tie_embeddings=True
    )
    assert config.vision == Qwen2VisionConfig(out_dim=1536)


def test_72b_in_the_new_nested_layout() -> None:
    text = {
        "model_type": "qwen2_vl_text",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [16, 24, 24]},
        "vocab_size": 152064,
    }
    config = parse_config({"model_type": "qwen2_vl", "text_config": text, "vision_config": {"hidden_size": 8192}})
    assert config.text == TextConfig(
        hidden_size=8192, mlp_dim=29568, num_layers=80, num_heads=64, num_kv_heads=8, rope_theta=500000.0
    )
    assert config.vision.out_dim == 8192


def test_what_transformers_writes_reads_like_the_old_layout() -> None:
    from transformers import Qwen2VLConfig

    config = Qwen2VLConfig(**QWEN2_VL_2B).to_dict()
    assert parse_config(config) == parse_config(QWEN2_VL_2B)


@pytest.mark.parametrize("nested", [False, True])
def test_tarsier2_wrapper_with_missing_fields_is_7b(nested: bool) -> None:
    half: dict[str, Any] = {"model_type": "qwen2_vl"}
    text, vision = {**half, "hidden_size": 3584}, {**half, "embed_dim": 1280}
    if nested:  # both halves are whole Qwen2-VL configurations
        text = {**half, "text_config": text, "vision_config": vision}
        vision = text
    raw = {"model_type": "llava", "image_token_index": 151655, "text_config": text, "vision_config": vision}
    assert parse_config(raw) == ModelConfig()


def test_auto_map_is_ignored() -> None:
    half = {"model_type": "qwen2_vl", "auto_map": {"AutoConfig": "someone/else--evil.Config"}}
    raw = {"model_type": "llava", "text_config": half, "vision_config": half, "auto_map": {"AutoModel": "evil.Model"}}
    assert parse_config(raw) == ModelConfig()


def test_token_ids_of_the_wrapper() -> None:
    half = {"model_type": "qwen2_vl", "vision_start_token_id": 7, "image_token_id": 3}
    raw = {"model_type": "llava", "image_token_index": 5, "text_config": half, "vision_config": half}
    config = parse_config(raw)
    assert (config.image_token_id, config.vision_start_token_id, config.vision_end_token_id) == (5, 7, 151_653)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', which is not supported. Supported are Qwen2-VL"),
        ({"vision_config": None}, "lacks vision_config"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type is 'yarn'"),
        ({"num_key_value_heads": 5}, "12 attention heads do not divide among 5"),
        ({"rope_scaling": {"mrope_section": [1, 2, 3]}}, "does not sum to half the head width 128"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config({**QWEN2_VL_2B, **change}, source="somewhere/config.json")


def test_tarsier2_of_another_kind_is_named() -> None:
    raw = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {"model_type": "qwen2_vl"}}
    with pytest.raises(CheckpointError, match=r"text_config.model_type is 'llama'"):
        parse_config(raw)


def test_the_error_lists_the_type_of_each_half() -> None:
    raw = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip"}}
    message = "model_type is 'llava', text_config.model_type is 'llama', vision_config.model_type is 'clip', which"
    with pytest.raises(CheckpointError, match=f"x.json: {message} is not supported. Supported are Qwen2-VL"):
        parse_config(raw, source="x.json")


def test_tarsier_7b_has_the_defaults_of_llama() -> None:
    config = parse_config(TARSIER_7B)
    assert config.text == TextConfig(
        vocab_size=32_064,
        hidden_size=4096,
        mlp_dim=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        rope_theta=10_000.0,
        mrope_section=(64, 0, 0),
        norm_eps=1e-5,
        qkv_bias=False,
    )
    assert config.vision == ClipVisionConfig()
    ids = config.image_token_id, config.video_token_id, config.image_newline_id, config.image_new_id
    assert ids == (32_000, 32_000, 32_002, 32_003)


def test_a_missing_half_of_the_first_tarsier() -> None:
    """Without a vision_config, the tower is ViT-L/14-336; with one, missing fields have CLIPVisionConfig's defaults."""
    raw = {"model_type": "llava", "tie_word_embeddings": True, "text_config": {"vocab_size": 32_064}}
    config = parse_config(raw)
    assert config.vision == ClipVisionConfig()
    assert config.text.norm_eps == 1e-6
    assert not config.text.tie_embeddings  # the field of text_config decides
    config = parse_config({**raw, "vision_config": {}})
    clip = {"depth": 12, "embed_dim": 768, "num_heads": 12, "intermediate_size": 3072}
    assert config.vision == ClipVisionConfig(**clip, patch_size=32, image_size=224)


def test_tarsier_34b() -> None:
    text = {
        "hidden_size": 7168,
        "intermediate_size": 20_480,
        "num_attention_heads": 56,
        "num_hidden_layers": 60,
        "num_key_value_heads": 8,
        "rope_theta": 5e6,
        "vocab_size": 64_064,
    }
    config = parse_config({**TARSIER_7B, "text_config": text})
    sizes = (64_064, 7168, 20_480, 60, 56, 8, 128, 5e6, (64, 0, 0))
    assert config.text == TextConfig(*sizes, norm_eps=1e-6, qkv_bias=False)
    assert config.vision == ClipVisionConfig(out_dim=7168)


def test_pixel_shuffle_and_qwen2() -> None:
    text = {"model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "num_attention_heads": 28}
    text["num_key_value_heads"] = 4
    config = parse_config({**TARSIER_7B, "projection_head": "Pixel_Shuffle", "text_config": text})
    assert config.text.qkv_bias
    assert (config.text.mlp_dim, config.text.num_kv_heads, config.text.head_dim) == (22_016, 4, 128)
    assert config.vision.num_tokens(576) == 144


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_head": None}, "projection_head is None, which is not supported. Supported are MLP and Pixel_Shu"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\] is not between -24 and -1"),
        ({"vision_feature_layer": -25}, "vision_feature_layer -25 is not between -24 and -1"),
        ({"text_config": {"model_type": "llama"}}, "image_newline_idx 32002 is not a row of the 32000 embeddings"),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}}, "rope type is 'linear'"),
        ({"text_config": {"attention_bias": True}}, "attention_bias is True"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        ({"vision_config": {"num_attention_heads": 7}}, "the vision width 768 is not a multiple of 7 heads"),
        ({"vision_config": {"image_size": 250}}, "image_size 250 is not a multiple of patch_size 32"),
        (
            {"projection_head": "Pixel_Shuffle", "vision_config": {"image_size": 96}},
            "3 patches per side cannot be join",
        ),
        (
            {"architectures": ["LlavaForConditionalGeneration"]},
            "model_type is 'llava', text_config.model_type is 'llam.*not the architecture LlavaForConditionalG",
        ),
    ],
)
def test_a_first_tarsier_that_is_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config({**TARSIER_7B, **change}, source="somewhere/config.json")


@pytest.mark.parametrize("raw", [QWEN2_VL_2B, TARSIER_7B], ids=["Qwen2-VL", "first Tarsier"])
def test_a_family_reads_the_config_json_that_it_writes(raw: dict[str, Any]) -> None:
    config = parse_config(raw)
    family = family_of_json(raw)
    assert family_of(config) is family
    for layout in family.layouts:
        raw = family.config_json(config, layout)
        assert family_of_json(raw) is family
        assert parse_config(raw) == config


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json does not exist. Pass the directory"):
        load_config(tmp_path)
    for text in ("{", "[1, 2]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="Download the file again"):
            load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_VL_2B))
    assert load_config(tmp_path) == parse_config(QWEN2_VL_2B)


def test_tokens_of_a_frame() -> None:
    """4 x 6 patches merge two by two into 2 x 3 tokens; 6 x 9 patches merge three by three into as many."""
    assert Qwen2VisionConfig().num_tokens(4 * 6) == 6
    assert Qwen2VisionConfig(spatial_merge_size=3).num_tokens(6 * 9) == 6
