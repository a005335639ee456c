"""The networks that benchmarks run over: what torchvision lists, and small ones of transformers' families.

Weights are random and nothing is fetched. Torchvision's are the full architectures, called with images as small as each
takes; a family of transformers is built from a small configuration whose sizes all differ (hidden, heads, head size,
key-value heads, neurons, vocabulary, sequence), so that no two dimensions match by luck.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

KINDS = ("classification", "segmentation", "detection", "video", "transformers")


@dataclass(frozen=True)
class Net:
    """A network and how to call it.

    Args:
        name: ``"resnet18"``; of a family of transformers, the name of the family.
        kind: One of :data:`KINDS`.
        build: Makes the network, in eval mode.
        example: Makes its inputs: positional ones and those by name.
        arguments: What torchvision's builder was given.
        group: For tables: torchvision's module, or the kind of transformer.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    example: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    arguments: dict[str, Any]
    group: str


def nets(only: str = "", match: str = "") -> Iterator[Net]:
    """All networks, or those of a kind, or those whose name contains a text."""
    for net in (*torchvision(), *transformers()):
        if (not only or net.kind == only) and match in net.name:
            yield net


def lively(model: nn.Module) -> nn.Module:
    """Draw what initialisation leaves at 0 or 1, or next to it, so that a fault there would show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or not tensor.numel() or "inv_freq" in name:
                continue
            if tensor.squeeze().dim() <= 1 and ("running" in name or isinstance(tensor, nn.Parameter)):
                spread = bool("var" in name or name.endswith("weight") or "scale" in name or "gamma" in name)
                low, high = (0.3, 1.0) if spread else (-0.3, 0.3)
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
            elif isinstance(tensor, nn.Parameter) and float(tensor.std()) < 0.05:
                fan_in = max(tensor[0].numel(), 1)
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.5 / fan_in) ** 0.5)
    return model


def floats(answer: Any) -> list[Tensor]:
    """The floating-point tensors of an answer."""
    return [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference between two answers, as a part of the largest number of the second."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    scale = max((float(b.abs().max()) for _, b in pairs), default=0.0) or 1.0
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0) / scale


# --- torchvision ----------------------------------------------------------------------------------------------------

SIDES = {"inception": 96, "swin": 224, "maxvit": 224, "mvit": 224, "swin3d": 64}
"""Part of a name → the side of its images; 64 unless said."""


def torchvision() -> Iterator[Net]:
    """Every classification, segmentation, detection and video network of the installed torchvision."""
    from torchvision import models

    for kind in KINDS[:-1]:
        for name in models.list_models(module=models if kind == "classification" else getattr(models, kind)):
            yield _torchvision(name, kind)


def _torchvision(name: str, kind: str) -> Net:
    from torchvision.models import get_model, get_model_builder

    side = next((size for part, size in SIDES.items() if name.startswith(part)), 64)
    arguments: dict[str, Any] = {}
    if name.startswith("vit_"):
        side = arguments["image_size"] = 2 * int(name.rsplit("_", 1)[1])
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    if kind in ("segmentation", "detection"):
        arguments["weights_backbone"] = None
    if kind == "detection" and not name.startswith("ssd"):
        # the coarsest map of these has group norms over it, which refuse a single value per group
        side = 192 if name.startswith(("fcos", "retinanet")) else 96
        arguments |= {"min_size": side, "max_size": 4 * side // 3}
    if "rcnn" in name:  # random weights are sure of nothing; without boxes there would be nothing to compare
        arguments |= {"box_score_thresh": 0.0, "box_detections_per_img": 9}

    def build() -> nn.Module:
        torch.manual_seed(0)
        return lively(get_model(name, weights=None, **arguments)).eval()

    def example() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(5)
        if kind == "detection":
            return ([torch.rand(3, 96, 112, generator=generator)],), {}
        if kind == "video":
            frames, size = (16, 224) if name.startswith(("s3d", "mvit")) else (8, side)
            return (torch.randn((1, 3, frames, size, size), generator=generator),), {}
        shape = (1, 3, side, side)
        return (torch.randn(shape, generator=generator),), {}

    return Net(name, kind, build, example, arguments, get_model_builder(name).__module__.rsplit(".", 1)[-1])


# --- transformers ---------------------------------------------------------------------------------------------------

WIDTH, HEADS, KV, HEAD, NEURONS, VOCABULARY, LENGTH, PICTURE = 120, 10, 5, 12, 176, 101, 7, 48

TOKENS = {"vocab_size": VOCABULARY, "max_position_embeddings": 40}
TOKENS |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWERS = {"hidden_size": WIDTH, "intermediate_size": NEURONS, "num_hidden_layers": 2, "num_attention_heads": HEADS}
PLAIN = TOWERS | TOKENS
GROUPED = PLAIN | {"num_key_value_heads": KV, "head_dim": HEAD}
EXPERTS = GROUPED | {"num_local_experts": 6, "num_experts": 6, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 28, "kv_lora_rank": 22, "qk_rope_head_dim": 8, "qk_nope_head_dim": 14, "v_head_dim": 12}
IMAGES = PLAIN | {"image_size": PICTURE, "patch_size": 16, "num_channels": 3, "num_labels": 9}
SOUNDS = {"conv_dim": (20, 24), "conv_kernel": (10, 8), "conv_stride": (8, 6), "num_feat_extract_layers": 2}
SOUNDS |= PLAIN | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False}
BART = TOKENS | {"d_model": WIDTH, "decoder_start_token_id": 2, "encoder_ffn_dim": NEURONS}
BART |= {"decoder_ffn_dim": NEURONS + 8, "encoder_layers": 2, "decoder_layers": 2}
BART |= {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": HEAD, "num_heads": HEADS - 1, "d_ff": NEURONS}
T5 |= {"num_layers": 2, "num_decoder_layers": 2, "relative_attention_num_buckets": 8}
STATES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 14, "conv_kernel": 4}
CLIP = {
    "text_config": TOWERS | {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "projection_dim": 34},
    "vision_config": TOWERS | {"image_size": PICTURE, "patch_size": 16, "hidden_size": 130, "projection_dim": 34},
    "projection_dim": 34,
}
SIGLIP = {name: part | {"projection_size": 130} for name, part in CLIP.items() if isinstance(part, dict)}
SEGFORMER = {"depths": [1, 1, 1, 1], "hidden_sizes": [20, 30, 40, 60], "num_attention_heads": [1, 2, 4, 5]}
SEGFORMER |= {"decoder_hidden_size": 44, "num_labels": 9}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

ROUTED = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 44, "n_shared_experts": 1}
ROUTED |= PLAIN | LATENT | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
PLACED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SWIN = {"image_size": 56, "embed_dim": 20, "depths": [2, 2], "num_heads": [2, 4], "window_size": 7, "num_labels": 9}
CONVNEXT = {"hidden_sizes": [20, 30, 40, 60], "depths": [1, 1, 2, 1], "num_labels": 9}
SPEECH = BART | {"num_mel_bins": 16, "max_source_positions": 15, "max_target_positions": 40}
GPT_NEO = PLAIN | {"num_layers": 2, "num_heads": HEADS, "attention_types": [[["global", "local"], 1]]}
SPECTRA = PLAIN | {"max_length": 48, "num_mel_bins": 32, "num_labels": 9}
SHARED = EXPERTS | {"moe_intermediate_size": 44, "shared_expert_intermediate_size": 56}
MAMBA2 = {"num_heads": 12, "head_dim": 20, "n_groups": 3, "chunk_size": 4}

FAMILIES: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("decoder", "llama", "LlamaForCausalLM", "text", GROUPED),
    ("decoder", "mistral", "MistralForCausalLM", "text", GROUPED | {"sliding_window": 4}),
    ("decoder", "qwen2", "Qwen2ForCausalLM", "text", GROUPED),
    ("decoder", "qwen3", "Qwen3ForCausalLM", "text", GROUPED),
    ("decoder", "gemma", "GemmaForCausalLM", "text", GROUPED),
    ("decoder", "gemma2", "Gemma2ForCausalLM", "text", GROUPED | ALTERNATING | {"query_pre_attn_scalar": 11}),
    ("decoder", "gemma3", "Gemma3ForCausalLM", "text", GROUPED | ALTERNATING | {"query_pre_attn_scalar": 11}),
    ("decoder", "phi", "PhiForCausalLM", "text", PLAIN),
    ("decoder", "phi3", "Phi3ForCausalLM", "text", GROUPED),
    ("decoder", "olmo", "OlmoForCausalLM", "text", GROUPED),
    ("decoder", "olmo2", "Olmo2ForCausalLM", "text", GROUPED),
    ("decoder", "gpt2", "GPT2LMHeadModel", "text", PLAIN | {"n_inner": NEURONS}),
    ("decoder", "gpt_neo", "GPTNeoForCausalLM", "text", GPT_NEO),
    ("decoder", "gpt_neox", "GPTNeoXForCausalLM", "text", PLAIN),
    ("decoder", "gptj", "GPTJForCausalLM", "text", PLAIN | {"rotary_dim": 8, "n_inner": NEURONS}),
    ("decoder", "opt", "OPTForCausalLM", "text", PLAIN | {"ffn_dim": NEURONS, "word_embed_proj_dim": WIDTH}),
    ("decoder", "bloom", "BloomForCausalLM", "text", PLAIN | {"n_head": HEADS, "n_layer": 2}),
    ("decoder", "falcon", "FalconForCausalLM", "text", PLAIN | {"new_decoder_architecture": True, "num_kv_heads": KV}),
    ("decoder", "stablelm", "StableLmForCausalLM", "text", GROUPED | {"partial_rotary_factor": 0.5}),
    ("decoder", "starcoder2", "Starcoder2ForCausalLM", "text", GROUPED),
    ("decoder", "cohere", "CohereForCausalLM", "text", GROUPED),
    ("decoder", "granite", "GraniteForCausalLM", "text", GROUPED),
    ("decoder", "smollm3", "SmolLM3ForCausalLM", "text", GROUPED),
    ("decoder", "glm4", "Glm4ForCausalLM", "text", GROUPED),
    ("decoder", "exaone4", "Exaone4ForCausalLM", "text", GROUPED | ALTERNATING),
    ("encoder", "bert", "BertForMaskedLM", "text", PLAIN),
    ("encoder", "roberta", "RobertaForMaskedLM", "text", PLAIN),
    ("encoder", "distilbert", "DistilBertForMaskedLM", "text", PLAIN | {"n_layers": 2, "hidden_dim": NEURONS}),
    ("encoder", "albert", "AlbertForMaskedLM", "text", PLAIN | {"embedding_size": 26}),
    ("encoder", "electra", "ElectraForMaskedLM", "text", PLAIN | {"embedding_size": 26}),
    ("encoder", "deberta_v2", "DebertaV2ForMaskedLM", "text", PLAIN | PLACED),
    ("encoder", "mpnet", "MPNetForMaskedLM", "text", PLAIN),
    ("encoder", "modernbert", "ModernBertForMaskedLM", "text", PLAIN | ALTERNATING),
    ("encoder-decoder", "t5", "T5ForConditionalGeneration", "pair", T5),
    ("encoder-decoder", "t5_gated", "T5ForConditionalGeneration", "pair", T5 | {"feed_forward_proj": "gated-gelu"}),
    ("encoder-decoder", "bart", "BartForConditionalGeneration", "pair", BART),
    ("encoder-decoder", "marian", "MarianMTModel", "pair", BART),
    ("encoder-decoder", "pegasus", "PegasusForConditionalGeneration", "pair", BART),
    ("encoder-decoder", "whisper", "WhisperForConditionalGeneration", "speech", SPEECH),
    ("vision", "vit", "ViTForImageClassification", "image", IMAGES),
    ("vision", "deit", "DeiTForImageClassification", "image", IMAGES),
    ("vision", "beit", "BeitForImageClassification", "image", IMAGES | {"use_relative_position_bias": True}),
    ("vision", "swin", "SwinForImageClassification", "image", SWIN),
    ("vision", "convnext", "ConvNextForImageClassification", "image", CONVNEXT),
    ("vision", "dinov2", "Dinov2ForImageClassification", "image", IMAGES),
    ("vision", "segformer", "SegformerForSemanticSegmentation", "image", SEGFORMER),
    ("vision", "clip", "CLIPModel", "both", CLIP),
    ("vision", "siglip", "SiglipModel", "both", SIGLIP),
    ("audio", "wav2vec2", "Wav2Vec2ForCTC", "sound", SOUNDS),
    ("audio", "hubert", "HubertForCTC", "sound", SOUNDS),
    ("audio", "ast", "ASTForAudioClassification", "spectrum", SPECTRA),
    ("state space", "mamba", "MambaForCausalLM", "text", STATES | {"time_step_rank": 9}),
    ("state space", "mamba2", "Mamba2ForCausalLM", "text", STATES | MAMBA2),
    ("state space", "falcon_mamba", "FalconMambaForCausalLM", "text", STATES | {"time_step_rank": 9}),
    ("experts", "mixtral", "MixtralForCausalLM", "text", EXPERTS),
    ("experts", "qwen2_moe", "Qwen2MoeForCausalLM", "text", SHARED),
    ("experts", "qwen3_moe", "Qwen3MoeForCausalLM", "text", EXPERTS | {"moe_intermediate_size": 44}),
    ("experts", "olmoe", "OlmoeForCausalLM", "text", EXPERTS),
    ("experts", "deepseek_v2", "DeepseekV2ForCausalLM", "text", ROUTED),
    ("experts", "deepseek_v3", "DeepseekV3ForCausalLM", "text", ROUTED | {"num_key_value_heads": HEADS}),
)  # fmt: skip
"""Group, name, class, what it takes, and its settings."""


def transformers() -> Iterator[Net]:
    """A small network of each family."""
    for group, name, kind, takes, settings in FAMILIES:
        yield Net(
            name,
            "transformers",
            lambda kind=kind, settings=settings: small(kind, settings),
            lambda takes=takes, settings=settings: inputs(takes, settings),
            {},
            group,
        )


def small(kind: str, settings: dict[str, Any]) -> nn.Module:
    """A network of a class of transformers from settings of its configuration."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, kind)
    model = made(made.config_class(**settings))
    return lively(model).eval()


def inputs(takes: str, settings: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a network takes: text, a pair of texts, an image, sound, ..."""
    generator = torch.Generator().manual_seed(5)
    side = settings.get("image_size", 64)

    def words(length: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (2, length), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return (), {
        "text": lambda: {"input_ids": words(LENGTH)},
        "pair": lambda: {"input_ids": words(LENGTH), "decoder_input_ids": words(LENGTH - 2)},
        "speech": lambda: {"input_features": noise(2, 16, 30), "decoder_input_ids": words(LENGTH)},
        "image": lambda: {"pixel_values": noise(2, 3, side, side)},
        "both": lambda: {"input_ids": words(LENGTH), "pixel_values": noise(2, 3, PICTURE, PICTURE)},
        "sound": lambda: {"input_values": noise(2, 700)},
        "spectrum": lambda: {"input_values": noise(2, 48, 32)},
    }[takes]()
