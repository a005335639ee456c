"""Networks of other packages: architectures of timm, and small transformers wrapped by peft."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from hostile_nets.build import Built, randomise
from hostile_nets.masking import NOT_BY_ZEROS

Examine = Callable[..., dict[str, Any]]

VIT = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
FOUR = {"depths": (1, 1, 1, 1)}
SIZES = {"embed_dims": (24, 48, 96), "num_heads": (2, 2, 4)}
LIGHT = {"embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4)}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", VIT),
    "byoanet botnet": ("botnet26t_256", {"img_size": 64}),
    "byobnet gernet": ("gernet_s", {}),
    "byobnet mobileone": ("mobileone_s1", {}),
    "byobnet test": ("test_byobnet", {}),
    "cait": ("cait_xxs24_224", VIT | {"depth_token_only": 1}),
    "coat lite": ("coat_lite_tiny", {"img_size": 64}),
    "convit": ("convit_tiny", VIT | {"local_up_to_layer": 1}),
    "convmixer": ("convmixer.ConvMixer", {"dim": 40, "depth": 3}),
    "convnext": ("convnext_atto", FOUR),
    "convnext v2": ("convnextv2_atto", FOUR),
    "cpubone": ("cpubone_nano", {}),
    "crossvit": ("crossvit_tiny_240", {"img_size": 240, "side": 240, "depth": ((1, 1, 0), (1, 1, 0), (1, 1, 0))}),
    "csatv2": ("csatv2", {}),
    "cspnet": ("cs3darknet_focus_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "davit": ("davit_tiny", FOUR | {"embed_dims": (24, 48, 96, 192), "num_heads": (3, 3, 6, 6)}),
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "deit 3": ("deit3_small_patch16_224", VIT),
    "densenet": ("densenet121", {"block_config": (2, 2, 2, 2)}),
    "dla": ("dla46_c", {}),
    "dpn": ("dpn48b", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientnet": ("efficientnet_lite0", {}),
    "efficientnet v2": ("test_efficientnet", {}),
    "efficientnet mixnet": ("mixnet_s", {}),
    "efficientnet mnasnet": ("mnasnet_small", {}),
    "efficientnet tinynet": ("tinynet_e", {}),
    "efficientnet mobilenet v2": ("mobilenetv2_035", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "efficientvit of mit": ("efficientvit_b0", {}),
    "eva 02": ("eva02_tiny_patch14_224", VIT | {"img_size": 56, "side": 56}),
    "fasternet": ("fasternet_t0", {}),
    "fastvit": ("fastvit_t8", {"layers": (1, 1, 1, 1)}),
    "focalnet": ("focalnet.FocalNet", FOUR | {"embed_dim": 24}),
    "gcvit": ("gcvit.GlobalContextVit", {"side": 224, "embed_dim": 24, "num_heads": (1, 2, 3, 6), **FOUR}),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_a", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", {"img_size": (64, 64), "stages": (1, 1, 1, 1), "embed_dim": 24}),
    "hrnet": ("hrnet_w18_small", {}),
    "iformer": ("iformer_t", {}),
    "inception next": ("inception_next_atto", FOUR),
    "lcnet v2": ("lcnetv2_small", {}),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("maxvit_rmlp_pico_rw_256", {"img_size": 64}),
    "maxxvit coatnet": ("coatnet_pico_rw_224", {"img_size": 64}),
    "metaformer poolformer": ("metaformer.MetaFormer", FOUR | {"dims": (16, 24, 32, 48)}),
    "metaformer caformer": ("caformer_s18", {}),
    "mixer": ("mlp_mixer.MlpMixer", {"img_size": 64, "num_blocks": 2, "embed_dim": 48}),
    "mixer gmlp": ("gmlp_ti16_224", {"img_size": 64}),
    "mixer resmlp": ("resmlp_12_224", {"img_size": 64}),
    "mobilenet v3": ("mobilenetv3_small_050", {}),
    "mobilenet v4": ("mobilenetv4_conv_small_035", {}),
    "mobilenet v3 lcnet": ("lcnet_050", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mobilevit v2": ("mobilevitv2_050", {}),
    "naflexvit": ("naflexvit_base_patch16_gap", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "nest": ("nest.Nest", SIZES | {"img_size": 128, "side": 128, "depths": (1, 1, 1)}),
    "nextvit": ("nextvit.NextViT", {"in_chans": 3, "depths": (1, 1, 5, 1)}),
    "nfnet": ("test_nfnet", {}),
    "nfnet resnet": ("nf_regnet_b0", {}),
    "pit": ("pit_ti_224", {"img_size": 64}),
    "pvt v2": ("pvt_v2_b0", FOUR),
    "regnet x": ("regnetx_002", {}),
    "regnet y": ("regnety_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m0_9", {}),
    "res2net": ("res2net50_14w_8s", {"layers": (1, 1, 1, 1)}),
    "resnest": ("resnest14d", {}),
    "resnet": ("resnet18", {}),
    "resnet se": ("seresnet18", {}),
    "resnext": ("resnext50_32x4d", {"layers": (1, 1, 1, 1)}),
    "resnet v2": ("resnetv2_18", {}),
    "rexnet": ("rexnet_100", {}),
    "senet": ("legacy_seresnet18", {}),
    "sequencer": ("sequencer2d_s", {"img_size": 64, "layers": (1, 1, 1, 1)}),
    "shvit": ("shvit_s1", {}),
    "sknet": ("skresnet18", {}),
    "starnet": ("starnet_s050", {}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "side": 56, "depths": (2, 2), "num_heads": (3, 6)}),
    "swin v2": ("swinv2_tiny_window8_256", {"img_size": 64, "depths": (2, 2), "num_heads": (3, 6)}),
    "tnt": ("tnt_s_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 48}),
    "tresnet": ("tresnet_m", {"layers": (1, 1, 1, 1)}),
    "twins": ("twins_svt_small", {"img_size": 64, "depths": (1, 1, 2, 1)}),
    "visformer": ("visformer_tiny", {"img_size": 64, "depth": (1, 1, 1)}),
    "vit": ("test_vit", {"img_size": 64}),
    "vit 3": ("test_vit3", {"img_size": 64}),
    "vit hybrid": ("vit_tiny_r_s16_p8_224", VIT),
    "vit relpos": ("test_vit_relpos", {"img_size": 64}),
    "vit sam": ("samvit_base_patch16_224", VIT | {"global_attn_indexes": (1,)}),
    "volo": ("volo.VOLO", LIGHT | {"img_size": 64, "layers": (1, 1, 1, 1)}),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xcit": ("xcit_nano_12_p16_224", VIT),
}
"""Family → one of its models, and what it is made with: small sizes, so that hundreds of cuts take seconds."""

RANK = 3


def networks(kinds: list[str], examine: Examine) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and examination of each."""
    if "timm" in kinds:
        for name in ARCHITECTURES:
            yield f"timm/{name}", partial(examine, f"timm/{name}", partial(of_timm, name), NOT_BY_ZEROS)
    if "peft" in kinds:
        for name in WRAPPED:
            yield f"peft/{name}", partial(examine, f"peft/{name}", partial(of_peft, name), NOT_BY_ZEROS)


def of_timm(name: str) -> Built:
    """An architecture of timm with random weights, for pictures of a small size."""
    import timm

    model, given = ARCHITECTURES[name]
    side, given = given.get("side", 64), {key: value for key, value in given.items() if key != "side"}
    file, _, kind = model.rpartition(".")
    torch.manual_seed(0)
    if file:
        made = getattr(import_module(f"timm.models.{file}"), kind)(num_classes=7, **given)
    else:
        made = timm.create_model(model, num_classes=7, **given)
    torch.manual_seed(1)
    return Built(spread(made).double().eval(), (torch.randn(1, 3, side, side),))


def spread(model: nn.Module) -> nn.Module:
    """Random numbers in place of ones and zeros; weights keep the scale that they start with."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            if tensor.dim() <= 1 or bool((tensor == tensor.flatten()[0]).all()):
                small = torch.rand(tensor.shape) * 0.5
                keep = name.endswith(("weight", "running_var", "gamma", "scale"))
                tensor.copy_(small + (0.75 if keep else -0.25))
    return model


SMALL = {"hidden_size": 16, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 4}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SMALL | {"vocab_size": 31, "num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 31}),
    "bert": ("BertForSequenceClassification", SMALL | {"vocab_size": 31, "num_labels": 5}),
    "vit": ("ViTForImageClassification", SMALL | {"image_size": 16, "patch_size": 8}),
    "t5": ("T5EncoderModel", {"d_model": 16, "d_kv": 4, "d_ff": 22, "num_layers": 2, "num_heads": 4, "vocab_size": 31}),
}


WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama lora": ("LoraConfig", {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}),
    "llama dora": ("LoraConfig", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "llama ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "llama vera": ("VeraConfig", {"target_modules": ["q_proj", "o_proj"]}),
    "llama prompt": ("PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
    "gpt2 lora": ("LoraConfig", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bert loha": ("LoHaConfig", {"target_modules": ["key", "intermediate.dense"]}),
    "bert lora": ("LoraConfig", {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
    "bert lokr": ("LoKrConfig", {"target_modules": ["query", "intermediate.dense"]}),
    "vit lora": ("LoraConfig", {"target_modules": ["query", "fc1"], "modules_to_save": ["classifier"]}),
    "vit oft": ("OFTConfig", {"target_modules": ["fc1"], "oft_block_size": 4}),
    "t5 lora": ("LoraConfig", {"target_modules": ["q", "wi", "wo"]}),
    "t5 adalora": ("AdaLoraConfig", {"target_modules": ["q", "wi"], "init_r": 3, "target_r": 2, "total_step": 9}),
}
"""Name, which begins with the network, → the kind of wrapper, and what it is made with."""


def of_peft(name: str) -> Built:
    """A small transformer with random weights, wrapped by peft."""
    import peft
    import transformers

    family, settings = TRANSFORMERS[name.partition(" ")[0]]
    kind, given = WRAPPED[name]
    torch.manual_seed(0)
    made = getattr(transformers, family)
    model = made(made.config_class(**settings))
    args = (torch.randn(1, 3, 16, 16) if name.startswith("vit") else torch.randint(1, 31, (2, 6)),)
    ranked = kind in ("LoraConfig", "VeraConfig", "LoHaConfig", "LoKrConfig")
    wrapped = peft.get_peft_model(model, getattr(peft, kind)(**({"r": RANK} if ranked else {}), **given))
    torch.manual_seed(1)
    return Built(randomise(wrapped).double().eval(), args)
