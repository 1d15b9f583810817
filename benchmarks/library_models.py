"""Small models of transformers and timm, as these libraries make them, each with an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, BATCH, LENGTH, WIDTH, LAYERS = 50, 2, 12, 16, 4


@dataclass(frozen=True)
class Built:
    """A model, what it is called with, and which of its outputs the loss is of."""

    model: nn.Module
    inputs: dict[str, Tensor]
    output: Callable[[Any], Tensor]


def tokens() -> Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH))


def images(size: int) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


def transformers(name: str, inputs: Callable[[], dict[str, Tensor]], **settings: Any) -> Callable[[], Built]:
    """``name`` is that of the model's class; its configuration is the one that the library pairs with it."""

    def build() -> Built:
        import transformers

        kind = getattr(transformers, name)
        config = kind.config_class(**settings)
        config._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"
        return Built(kind(config), inputs(), _first_output)

    return build


def _first_output(output: Any) -> Tensor:
    return output.logits if "logits" in output else output[0]


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "intermediate_size": 2 * WIDTH, "max_position_embeddings": 32, "pad_token_id": 0, "use_cache": False,
}  # fmt: skip


def decoder(name: str, **settings: Any) -> Callable[[], Built]:
    return transformers(name, lambda: {"input_ids": tokens()}, **(COMMON | settings))


def masked(name: str, **settings: Any) -> Callable[[], Built]:
    return decoder(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings)


def both(name: str, inputs: Callable[[], Tensor] = tokens, key: str = "input_ids", **settings: Any) -> Any:
    return transformers(
        name, lambda: {key: inputs(), "decoder_input_ids": tokens()},
        **({"vocab_size": VOCABULARY, "d_model": WIDTH, "use_cache": False} | settings),
    )  # fmt: skip


ENCODER_DECODER: dict[str, Any] = {
    "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": 2, "dropout": 0.0,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 2 * WIDTH, "decoder_ffn_dim": 2 * WIDTH,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "conv_dim": (16, 16), "conv_stride": (10, 8), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0,
    "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


def timm(name: str, size: int = 64, **settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        from timm import create_model

        model = create_model(name, num_classes=5, **settings)
        return Built(model, {"x": images(size)}, lambda output: output)

    return build


MODELS: dict[str, Callable[[], Built]] = {
    "GPT-2": decoder("GPT2LMHeadModel", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "Llama": decoder("LlamaForCausalLM", num_key_value_heads=1),
    "Mistral": decoder("MistralForCausalLM", num_key_value_heads=1),
    "Qwen 3": decoder("Qwen3ForCausalLM", num_key_value_heads=1, head_dim=8),
    "Gemma 3": decoder("Gemma3ForCausalLM", num_key_value_heads=1, head_dim=8),
    "OLMo 2": decoder("Olmo2ForCausalLM", num_key_value_heads=1),
    "GPT-NeoX": decoder("GPTNeoXForCausalLM"),
    "Phi": decoder("PhiForCausalLM"),
    "OPT": decoder("OPTForCausalLM", ffn_dim=2 * WIDTH, dropout=0.0, word_embed_proj_dim=WIDTH),
    "BLOOM": decoder("BloomForCausalLM", n_layer=LAYERS, n_head=2),
    "Falcon": decoder("FalconForCausalLM", alibi=False),
    "Mamba": decoder("MambaForCausalLM", state_size=4),
    "RWKV": decoder("RwkvForCausalLM", context_length=32, attention_hidden_size=WIDTH),
    "xLSTM": decoder("xLSTMForCausalLM", num_heads=2, num_blocks=LAYERS, embedding_dim=WIDTH, chunk_size=4),
    "BERT": masked("BertForMaskedLM"),
    "RoBERTa": masked("RobertaForMaskedLM"),
    "ALBERT": masked("AlbertForMaskedLM", embedding_size=WIDTH),
    "DeBERTa v2": masked("DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "ModernBERT": masked(
        "ModernBertForMaskedLM", bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    "FNet": masked("FNetForMaskedLM"),
    "T5": both(
        "T5ForConditionalGeneration", d_kv=8, d_ff=32, num_layers=LAYERS, num_heads=2, dropout_rate=0.0
    ),
    "BART": both("BartForConditionalGeneration", max_position_embeddings=32, **ENCODER_DECODER),
    "Whisper": both(
        "WhisperForConditionalGeneration", lambda: torch.randn(BATCH, 8, 20), "input_features",
        num_mel_bins=8, max_source_positions=10, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, **ENCODER_DECODER,
    ),
    "ViT": transformers(
        "ViTModel", lambda: {"pixel_values": images(16)}, intermediate_size=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **VISION,
    ),
    "DINOv2": transformers("Dinov2Model", lambda: {"pixel_values": images(16)}, mlp_ratio=2, **VISION),
    "Swin": transformers(
        "SwinModel", lambda: {"pixel_values": images(32)}, embed_dim=8, depths=[4, 4], num_heads=[2, 2],
        window_size=4, image_size=32, patch_size=2, drop_path_rate=0.0,
    ),
    "wav2vec 2": transformers(
        "Wav2Vec2Model", lambda: {"input_values": torch.randn(BATCH, 2000)}, **(COMMON | SPEECH)
    ),
    "ResNet-50": timm("resnet50"),
    "ResNet-50 v2": timm("resnetv2_50"),
    "RegNet": timm("regnetx_002"),
    "EfficientNet": timm("efficientnet_b0"),
    "ConvNeXt": timm("convnext_atto"),
    "ConvMixer": timm("convmixer_768_32", 32),
    "MLP-Mixer": timm("mixer_s16_224", img_size=64),
    "ResMLP": timm("resmlp_12_224", img_size=64),
    "DeiT III": timm("deit3_small_patch16_224", img_size=64, depth=LAYERS),
    "CaiT": timm("cait_xxs24_224", img_size=64, depth=LAYERS),
    "XCiT": timm("xcit_nano_12_p16_224", img_size=64),
    "PoolFormer": timm("poolformer_s12"),
    "MobileViT v2": timm("mobilevitv2_050"),
    "HRNet": timm("hrnet_w18_small"),
    "DenseNet": timm("densenet121"),
}  # fmt: skip
