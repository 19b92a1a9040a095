"""What published FastInst weights call each parameter, as data.

Source: state dicts of junjiehe96/FastInst.
"""

from __future__ import annotations

from sparseinst_jax.models.weight_names import Ignored, Leaf, Rename, WeightNames

_DECODER = "sem_seg_head.pixel_decoder"
_PREDICTOR = "sem_seg_head.predictor"
MAX_LAYERS = 64

_COUNTED = "levels count from 1, the finest first"
_BY_KIND = "layers of one kind lie in one list"
_BESIDE = "the norm lies beside the attention"


def _attention(ours: str, kind: str, name: str) -> tuple[Rename, ...]:
    theirs = f"{_PREDICTOR}.transformer_{kind}_attention_layers.{{i}}"
    path = f"decoder/layers/{{i}}/{ours}"
    return (
        Rename(path, f"{theirs}.{name}", _BY_KIND),
        Rename(f"{path}/out_proj", f"{theirs}.{name}.out_proj", _BY_KIND),
        Rename(f"{path}/norm", f"{theirs}.norm", _BESIDE),
    )


def _same_inside(ours: str, theirs: str, inside: tuple[str, ...], why: str) -> tuple[Rename, ...]:
    return tuple(
        Rename(f"{ours}/{name}", f"{theirs}.{name.replace('/', '.')}", why) for name in inside
    )


NAMES = WeightNames(
    title="FastInst",
    parts=("sem_seg_head",),
    class_layers=(
        f"{_PREDICTOR}.query_proposal.conv_proposal_cls_logits.2",
        *(f"{_PREDICTOR}.class_embed_layers.{i}.layers.2" for i in range(MAX_LAYERS + 1)),
    ),
    has_no_object=True,
    options="num_layers",
    renames=(
        Rename("pixel_decoder/laterals/{i}", f"{_DECODER}.adapter_{{i+1}}", _COUNTED),
        Rename("pixel_decoder/laterals/{i}/norm", f"{_DECODER}.adapter_{{i+1}}.norm", _COUNTED),
        Rename("pixel_decoder/outputs/{i}", f"{_DECODER}.layer_{{i+1}}", _COUNTED),
        Rename("pixel_decoder/outputs/{i}/norm", f"{_DECODER}.layer_{{i+1}}.norm", _COUNTED),
        Rename(
            "pixel_decoder/ppm/stages/{i}",
            f"{_DECODER}.ppm.stages.{{i}}.1",
            "a stage is nn.Sequential(pooling, convolution)",
        ),
        Rename("pixel_decoder/ppm/bottleneck", f"{_DECODER}.ppm.bottleneck", "part of the head"),
        Rename("decoder", _PREDICTOR, "part of the head"),
        Rename(
            "decoder/proposal/conv",
            f"{_PREDICTOR}.query_proposal.conv_proposal_cls_logits.0",
            "one nn.Sequential",
        ),
        Rename(
            "decoder/proposal/classify",
            f"{_PREDICTOR}.query_proposal.conv_proposal_cls_logits.2",
            "one nn.Sequential",
        ),
        *_attention("pixel_cross", "mask_cross", "multihead_attn"),
        *_attention("query_cross", "query_cross", "multihead_attn"),
        *_attention("query_self", "query_self", "self_attn"),
        *_same_inside(
            "decoder/layers/{i}/pixel_ffn",
            f"{_PREDICTOR}.transformer_mask_ffn_layers.{{i}}",
            ("linear1", "linear2", "norm"),
            _BY_KIND,
        ),
        *_same_inside(
            "decoder/layers/{i}/query_ffn",
            f"{_PREDICTOR}.transformer_query_ffn_layers.{{i}}",
            ("linear1", "linear2", "norm"),
            _BY_KIND,
        ),
        Rename("decoder/heads/{i}/norm", f"{_PREDICTOR}.decoder_query_norm_layers.{{i}}", _BY_KIND),
        Rename(
            "decoder/heads/{i}/classes/{j}",
            f"{_PREDICTOR}.class_embed_layers.{{i}}.layers.{{j}}",
            _BY_KIND,
        ),
        Rename(
            "decoder/heads/{i}/masks/{j}",
            f"{_PREDICTOR}.mask_embed_layers.{{i}}.layers.{{j}}",
            _BY_KIND,
        ),
        Rename("decoder/heads/{i}/features", f"{_PREDICTOR}.mask_features_layers.{{i}}", _BY_KIND),
    ),
    leaves=(
        Leaf("positions", "meta_pos_embed", 4, (0, 3, 1, 2), "map of positions"),
        Leaf("auxiliary_features", "empty_query_features.weight", 2, (0, 1), "an embedding"),
        Leaf("auxiliary_positions", "empty_query_pos_embed.weight", 2, (0, 1), "an embedding"),
        Leaf("in_proj_kernel", "in_proj_weight", 2, (1, 0), "query, key, value in one"),
        Leaf("in_proj_bias", "in_proj_bias", 1, (0,), "query, key, value in one"),
    ),
    ignored=(Ignored(r"(.*\.)?criterion\..*", "buffers of the loss"),),
)
