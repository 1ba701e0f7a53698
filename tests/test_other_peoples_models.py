"""Networks that were not made here: Hugging Face's, Keras 3's, silero-vad's, against an oracle at the dispatcher.

    .venv/bin/pip install -e '.[models]' -c scripts/constraints.txt && .venv/bin/pytest -m models

They are built from small configurations, with random weights; nothing is downloaded but silero-vad's wheel, whose test
is marked ``network`` as well. Each case plants silent units, and units that fire on one input, through the parameter
that is added last before the rectifier; the oracle finds them again on its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import relu_doctor
from relu_doctor.errors import UnsupportedModelError
from tests.planting import Case, Site, channels, clone, features, tokens
from tests.reference import assert_columns_equal, pre_activations
from tests.test_scan import dead_units

pytestmark = [
    pytest.mark.models,
    # What their own code warns of is not ours to mend.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
CASES: dict[str, Case] = {}
WORDS = 200
# Modules that the model's own forward passes by.
UNUSED = {"mamba": ["layers.0.mixer.act", "layers.1.mixer.act"]}


def hugging_face(
    config: str, model: str, batches: Callable[[], list[Any]], *sites: Site, columns: Sequence[str] = (), **about: Any
):
    """Register a model of the transformers library; layers of ``columns`` have no bias to plant units with."""

    def register(settings: Callable[[], Mapping[str, Any]]):
        def make() -> nn.Module:
            transformers = pytest.importorskip("transformers")
            settled = {key: _config(value) for key, value in settings().items()}
            made = getattr(transformers, model)(getattr(transformers, config)(**settled)).eval()
            settle(made, lambda: made(**clone(batches()[0])))
            for layer in columns:
                plant_rows_of(made.get_submodule(layer), lambda: made(**clone(batches()[0])))
            return made

        about.setdefault("call", lambda built, batch: built(**batch))
        about.setdefault("count", lambda batch: len(next(iter(batch.values()))))
        CASES[settings.__name__] = Case(settings.__name__, make, batches, sites, **about)
        return settings

    return register


def _config(value: Any) -> Any:
    """A configuration inside another."""
    if isinstance(value, tuple) and isinstance(value[0], str) and value[0].endswith("Config"):
        return getattr(pytest.importorskip("transformers"), value[0])(**value[1])
    return value


@torch.no_grad()
def settle(model: nn.Module, run: Callable[[], object]) -> None:
    """Let BatchNorms have seen some data, so that units differ from each other in deep layers as well."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.train().momentum = None  # the average over all that it sees
    if norms:
        run()
    model.eval()


@torch.no_grad()
def plant_rows_of(layer: nn.Module, run: Callable[[], object]) -> None:
    """Give a linear layer without a bias a unit 1 that is silent, and a unit 2 that fires on a token of input 3 alone.

    The layer must read no more tokens than it has features: then some weights give each token any value.
    """
    read: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: read.append(args[0].detach().clone()))
    run()
    handle.remove()
    wanted = -torch.ones(read[0].shape[:2], dtype=torch.float64)
    wanted[3, 0] = 1
    given = read[0].double().flatten(0, 1)
    assert len(given) <= given.shape[1]
    layer.weight[1] = 0
    layer.weight[2] = torch.linalg.lstsq(given, wanted.flatten()).solution


def images(size: int, *, name: str = "pixel_values", sizes: tuple[int, ...] = (10, 6)) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        return [{name: torch.randn(count, 3, size, size, generator=generator)} for count in sizes]

    return make


def text(
    length: int, *, padded: bool = False, decoder: int = 0, sizes: tuple[int, ...] = (10, 6)
) -> Callable[[], list[Any]]:
    """Token ids, all of them different, so that no two inputs are alike at any place."""

    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        drawn = 3 + torch.randperm(WORDS - 3, generator=generator)
        batches = []
        for count in sizes:
            batch = {}
            batch["input_ids"], drawn = drawn[: count * length].view(count, length), drawn[count * length :]
            if padded:
                real = torch.randint(2, length + 1, (count, 1), generator=generator)
                batch["attention_mask"] = (torch.arange(length) < real).long()
            if decoder:
                batch["decoder_input_ids"] = drawn[: count * decoder].view(count, decoder)
                drawn = drawn[count * decoder :]
            batches.append(batch)
        return batches

    return make


def waves(shape: tuple[int, ...], *, name: str, decoder: int = 0, sizes: tuple[int, ...] = (10, 6)):
    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        batches = []
        for count in sizes:
            batch = {name: torch.randn(count, *shape, generator=generator)}
            if decoder:
                batch["decoder_input_ids"] = torch.randint(3, WORDS, (count, decoder), generator=generator)
            batches.append(batch)
        return batches

    return make


def feed_forward(name: str, width: int, bias: str, **about: Any) -> Site:
    return Site(name, width, {1, 5}, {2}, bias, **about)


def gelu(z: Any) -> Any:
    """By the error function, on float64 arrays."""
    from scipy.special import erf

    return z * 0.5 * (1 + erf(z / np.sqrt(2)))


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BOTH_SIDES = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "activation_function": "relu",
    "d_model": 16,
}
SIDES = ("encoder", "decoder")
ATTENDED = {"mask": lambda batch: batch["attention_mask"].bool()}


def relu6(z: Any) -> Any:
    return np.clip(z, 0, 6)


def norm(path: str, units: int, **about: Any) -> Site:
    """A ReLU behind a BatchNorm."""
    return Site(f"{path}.activation", units, {1}, {0}, f"{path}.normalization.bias", arrange=channels, **about)


def last_norm(path: str, number: int, units: int) -> Site:
    """The ReLU of a residual block, behind the addition."""
    return Site(f"{path}.activation", units, {1}, {0}, f"{path}.layer.{number}.normalization.bias", arrange=channels)


@hugging_face(
    "ResNetConfig", "ResNetModel", images(16),
    norm("embedder.embedder", 8),
    norm("encoder.stages.0.layers.0.layer.0", 2), norm("encoder.stages.0.layers.0.layer.1", 2),
    last_norm("encoder.stages.0.layers.0", 2, 8),
    norm("encoder.stages.1.layers.0.layer.0", 4), norm("encoder.stages.1.layers.0.layer.1", 4),
    last_norm("encoder.stages.1.layers.0", 2, 16),
    norm("encoder.stages.1.layers.1.layer.0", 4), norm("encoder.stages.1.layers.1.layer.1", 4),
    last_norm("encoder.stages.1.layers.1", 2, 16),
)  # fmt: skip
def resnet():
    return {
        "num_channels": 3,
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 2],
        "layer_type": "bottleneck",
    }


@hugging_face(
    "OPTConfig", "OPTModel", text(7, padded=True),
    feed_forward("decoder.layers.0.activation_fn", 32, "decoder.layers.0.fc1.bias", arrange=tokens),
    feed_forward("decoder.layers.1.activation_fn", 32, "decoder.layers.1.fc1.bias", arrange=tokens), **ATTENDED,
)  # fmt: skip
def opt():
    return {"vocab_size": WORDS, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 64, "word_embed_proj_dim": 16}  # fmt: skip


@hugging_face(
    "BertConfig", "BertModel", text(7, padded=True),
    *(feed_forward(f"encoder.layer.{k}.intermediate.intermediate_act_fn", 32,
                   f"encoder.layer.{k}.intermediate.dense.bias") for k in (0, 1)), **ATTENDED,
)  # fmt: skip
def bert():
    return {"vocab_size": WORDS, "max_position_embeddings": 64, "hidden_act": "relu", **SMALL}


T5_LAYERS = [f"encoder.block.{k}.layer.1.DenseReluDense" for k in (0, 1)]
T5_LAYERS += [f"decoder.block.{k}.layer.2.DenseReluDense" for k in (0, 1)]


@hugging_face(
    "T5Config", "T5Model", text(3, decoder=5, sizes=(10,)),
    *(Site(f"{layer}.act", 32, {1}, {2}) for layer in T5_LAYERS), columns=[f"{layer}.wi" for layer in T5_LAYERS],
)  # fmt: skip
def t5():
    return {"vocab_size": WORDS, "d_model": 64, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}


@hugging_face(
    "DetrConfig", "DetrForObjectDetection", images(16),
    norm("model.backbone.model.embedder.embedder", 8),
    norm("model.backbone.model.encoder.stages.0.layers.0.layer.0", 8),
    last_norm("model.backbone.model.encoder.stages.0.layers.0", 1, 8),
    feed_forward("model.encoder.layers.0.mlp.activation_fn", 24, "model.encoder.layers.0.mlp.fc1.bias"),
    feed_forward("model.decoder.layers.0.mlp.activation_fn", 24, "model.decoder.layers.0.mlp.fc1.bias"),
    feed_forward("bbox_predictor.relu()#1", 16, "bbox_predictor.layers.0.bias"),
    feed_forward("bbox_predictor.relu()#2", 16, "bbox_predictor.layers.1.bias"),
)  # fmt: skip
def detr():
    backbone = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    return {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "num_queries": 5,
            "backbone_config": ("ResNetConfig", {**backbone, "out_features": ["stage1"]}), "num_labels": 3,
            **BOTH_SIDES}  # fmt: skip


@hugging_face(
    "GPT2Config", "GPT2Model", text(7),
    *(feed_forward(f"h.{k}.mlp.act", 64, f"h.{k}.mlp.c_fc.bias") for k in (0, 1)),
)  # fmt: skip
def gpt2():
    return {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1,
            "eos_token_id": 2, "activation_function": "relu"}  # fmt: skip


@hugging_face(
    "BartConfig", "BartModel", text(7),
    *(feed_forward(f"{side}.layers.0.activation_fn", 24, f"{side}.layers.0.fc1.bias") for side in SIDES),
)  # fmt: skip
def bart():
    return {
        "vocab_size": WORDS,
        "max_position_embeddings": 32,
        "pad_token_id": 1,
        "forced_eos_token_id": 2,
        **BOTH_SIDES,
    }


@hugging_face(
    "WhisperConfig", "WhisperModel", waves((8, 40), name="input_features", decoder=5),
    Site("encoder.gelu()#1", 16, arrange=channels, post=gelu, low=-np.inf, immortal=True),
    Site("encoder.gelu()#2", 16, arrange=channels, post=gelu, low=-np.inf, immortal=True),
    *(feed_forward(f"{side}.layers.0.activation_fn", 24, f"{side}.layers.0.fc1.bias") for side in SIDES),
)  # fmt: skip
def whisper():
    return {"vocab_size": WORDS, "max_source_positions": 20, "max_target_positions": 16, "num_mel_bins": 8,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
            **BOTH_SIDES}  # fmt: skip


@hugging_face(
    "Wav2Vec2Config", "Wav2Vec2Model", waves((400,), name="input_values"),
    Site("feature_extractor.conv_layers.0.activation", 8, {1}, {0}, "feature_extractor.conv_layers.0.layer_norm.bias",
         arrange=channels),
    Site("feature_extractor.conv_layers.1.activation", 8, {1}, {0}, "feature_extractor.conv_layers.1.conv.bias",
         arrange=channels),
    Site("encoder.pos_conv_embed.activation", 16, {1}, {0}, "encoder.pos_conv_embed.conv.bias", arrange=channels),
    feed_forward("encoder.layers.0.feed_forward.intermediate_act_fn", 24,
                 "encoder.layers.0.feed_forward.intermediate_dense.bias"),
)  # fmt: skip
def wav2vec2():
    return {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "conv_bias": True, "hidden_act": "relu",
            "feat_extract_activation": "relu", "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2}  # fmt: skip


@hugging_face(
    "MobileNetV1Config", "MobileNetV1Model", images(32),
    *(Site(f"{path}.activation", units, {1}, {0}, f"{path}.normalization.bias", arrange=channels, high=6.0, post=relu6)
      for path, units in (("conv_stem", 8), *((f"layer.{k}", units) for k, units in enumerate(
          [8, 16, 16, 32, 32, 32, 32, 64, 64, 64, 64, *[128] * 12, 256, 256, 256]
      )))),
    seed=30,
)  # fmt: skip
def mobilenet_v1():
    return {"num_channels": 3, "image_size": 32, "depth_multiplier": 0.25}


@hugging_face(
    "AlbertConfig", "AlbertModel", text(7),
    feed_forward("encoder.albert_layer_groups.0.albert_layers.0.activation", 32,
                 "encoder.albert_layer_groups.0.albert_layers.0.ffn.bias", calls=2),
)  # fmt: skip
def albert_whose_layers_are_one():
    return {"vocab_size": WORDS, "embedding_size": 8, "max_position_embeddings": 64, "hidden_act": "relu", **SMALL}


@hugging_face(
    "ConvNextConfig", "ConvNextModel", images(16),
    feed_forward("encoder.stages.0.layers.0.act", 32, "encoder.stages.0.layers.0.pwconv1.bias"),
    feed_forward("encoder.stages.1.layers.0.act", 64, "encoder.stages.1.layers.0.pwconv1.bias"),
)  # fmt: skip
def convnext():
    return {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "hidden_act": "relu", "drop_path_rate": 0.0}


@hugging_face(
    "PersimmonConfig", "PersimmonModel", text(7),
    *(feed_forward(f"layers.{k}.mlp.act.relu()", 32, f"layers.{k}.mlp.dense_h_to_4h.bias") for k in (0, 1)),
)  # fmt: skip
def squared_relu():
    return {"vocab_size": WORDS, "hidden_act": "relu2", "max_position_embeddings": 32, **SMALL}


def softplus(z: Any) -> Any:
    return np.logaddexp(0, z)


def silu(z: Any) -> Any:
    return z / (1 + np.exp(-z))


@hugging_face(
    "MambaConfig", "MambaModel", text(7),
    *(site for k in (0, 1) for site in (
        Site(f"layers.{k}.mixer.relu()", 32, {1, 5}, {2}, f"layers.{k}.mixer.conv1d.bias", arrange=channels),
        Site(f"layers.{k}.mixer.softplus()", 32, arrange=channels, low=-np.inf, post=softplus, immortal=True),
        Site(f"layers.{k}.mixer.silu()", 32, arrange=channels, low=-np.inf, post=silu, immortal=True),
    )),
)  # fmt: skip
def mamba():
    return {"vocab_size": WORDS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "hidden_act": "relu"}


def assert_as_the_oracle_says(case: Case, diagnosis: relu_doctor.Diagnosis, seen: Mapping[str, Any]) -> None:
    assert {row.site: row.num_units for row in diagnosis.sites.itertuples()} == {
        s.name: s.num_units for s in case.sites
    }
    assert dead_units(diagnosis) == {site.name: set(site.dead) for site in case.sites}
    masks = [case.mask(batch).numpy() for batch in case.batches()] if case.mask else None
    for site in case.sites:
        expected = seen[site.name].columns(site.fires, site.post, masks)
        if not site.immortal:
            fired = expected["inputs_fired"]
            assert {unit for unit, count in enumerate(fired) if count == 0} == set(site.dead)
            assert {unit for unit, count in enumerate(fired) if count == 1} == set(site.once)
        found = diagnosis.units[diagnosis.units["site"] == site.name]
        found = found.assign(**{name: found[name].fillna(-1).astype(int) for name in ("first_fired", "last_fired")})
        assert_columns_equal(found, expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hugging_face_models_are_seen_as_the_oracle_sees_them(case):
    """Sites, sizes, dead units and every column are those of all stored pre-activations; units that fired once live."""
    model, batches = case.build()
    seen = case.seen(model, batches)
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert diagnosis.summary["unobserved_sites"] == UNUSED.get(case.name, [])
    assert_as_the_oracle_says(case, diagnosis, seen)


def assert_routed(diagnosis: relu_doctor.Diagnosis, calls: list[Tensor], site: str) -> None:
    """What the rows of routed tokens tell without their inputs: extremes, positions, and who never fired."""
    rows = torch.cat(calls).double()
    units = diagnosis.units[diagnosis.units["site"] == site]
    assert units["pre_max"].tolist() == rows.amax(0).tolist()
    assert units["pre_min"].tolist() == rows.amin(0).tolist()
    assert units["positions"].tolist() == [len(rows)] * rows.shape[1]
    assert units["positions_fired"].tolist() == (rows > 0).sum(0).tolist()
    assert (units["inputs_fired"] == 0).tolist() == (~(rows > 0).any(0)).tolist()


@torch.no_grad()
def test_experts_of_switch_transformers_are_sites_of_their_own():
    """Each expert sees the tokens that are routed to it, and its silent units are its own."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=WORDS, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, dropout_rate=0.0,
    )  # fmt: skip
    model = transformers.SwitchTransformersModel(config).eval()
    experts = {
        f"{side}.block.1.layer.{place}.mlp.experts.expert_{k}": k
        for side, place in (("encoder", 1), ("decoder", 2))
        for k in range(4)
    }
    for path, k in experts.items():
        model.get_submodule(f"{path}.wi").weight[k + 3] = 0
    batches = text(7, decoder=4)()
    called: dict[str, list[Tensor]] = {}
    for path in experts:
        act = model.get_submodule(f"{path}.act")
        act.register_forward_pre_hook(
            lambda module, args, path=path: called.setdefault(path, []).append(args[0].clone())
        )
    for batch in batches:
        model(**batch)
    for path in experts:
        model.get_submodule(f"{path}.act")._forward_pre_hooks.clear()
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    for path, k in experts.items():
        assert_routed(diagnosis, called[path], f"{path}.act")
        assert k + 3 in dead_units(diagnosis)[f"{path}.act"]


@torch.no_grad()
def test_experts_that_no_token_is_routed_to_are_unobserved():
    """NLLB's mixture of experts: the oracle's calls are the sites; the other experts are listed."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.NllbMoeConfig(
        vocab_size=WORDS, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, num_experts=4, encoder_sparse_step=2,
        decoder_sparse_step=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.NllbMoeModel(config).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.out_features == 24:
            layer.bias[5] = -1e3
    batches = text(7, decoder=4)()
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    seen = [pre_activations(lambda batch=batch: model(**batch)) for batch in batches]
    routed = [name for name in diagnosis.sites["site"] if "expert" in name]
    assert len(diagnosis.sites) == len({id(call) for calls in seen[:1] for call in calls})
    assert all(5 in dead for dead in dead_units(diagnosis).values())
    assert routed
    listed = {name for name in diagnosis.summary["unobserved_sites"] if "expert" in name}
    assert len(listed) + len(routed) == 8


def keras_models() -> Any:
    """Keras on the torch backend, which it reads from the environment when it is imported."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.config.backend() != "torch":
        pytest.skip("Keras runs on another backend here")
    return keras


def keras_case(make: Callable[[Any], nn.Module], shape: tuple[int, ...], *sites: Site) -> Case:
    def batches() -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(count, *shape, generator=generator) for count in (10, 6)]

    def build() -> nn.Module:
        keras = keras_models()
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        return make(keras).eval()

    return Case("keras", build, batches, sites)


def convolutional(keras: Any) -> nn.Module:
    layers = keras.layers
    image = keras.Input((9, 9, 3))
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="first")(image)
    x = layers.Conv2D(5, 3, use_bias=False, name="second")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(8, activation="relu6", name="wide")(x)
    x = layers.Activation("relu", name="again")(layers.Dense(7, name="plain")(x))
    return keras.Model(image, layers.Dense(3, name="head")(x))


def sequential(keras: Any) -> nn.Module:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((7, 6)),
            layers.Conv1D(8, 3, activation="relu", padding="causal", name="conv"),
            layers.Dense(5, activation="relu", name="dense"),
            layers.Flatten(),
            layers.Dense(4, activation="hard_silu", name="last"),
        ],
        name="stack",
    )


def hardswish(z: Any) -> Any:
    return z * np.clip(z + 3, 0, 6) / 6


KERAS = {
    "functional": keras_case(
        convolutional, (9, 9, 3),
        Site("first.relu()", 6, {1, 5}, {2}, "_torch_params.first/bias", arrange=features),
        Site("relu.relu()", 5, {1}, {2}, "_torch_params.norm/beta", arrange=features),
        Site("depthwise.relu()", 5, {1}, {2}, "_torch_params.depthwise/bias", arrange=features),
        Site("wide.relu6()", 8, {1, 5}, {2}, "_torch_params.wide/bias", high=6.0, post=relu6),
        Site("again.relu()", 7, {1, 5}, {2}, "_torch_params.plain/bias"),
    ),
    "sequential": keras_case(
        sequential, (7, 6),
        Site("stack.conv.relu()", 8, {1, 5}, {2}, "_functional._torch_params.stack/conv/bias"),
        Site("stack.dense.relu()", 5, {1}, {2}, "_functional._torch_params.stack/dense/bias"),
        Site("stack.last.hardswish()", 4, {1}, {2}, "_functional._torch_params.stack/last/bias", low=-3.0,
             post=hardswish),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KERAS)
def test_keras_models_are_seen_as_the_oracle_sees_them(name):
    """Layers are named as Keras names them; units, their numbers and their parameters are the right ones."""
    keras_models()
    case = KERAS[name]
    model, batches = case.build()
    seen = case.seen(model, batches)
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert_as_the_oracle_says(case, diagnosis, seen)
    parameters = dict(model.named_parameters())
    for site in case.sites:
        units = diagnosis.units[diagnosis.units["site"] == site.name]
        np.testing.assert_allclose(units["bias"], parameters[site.by].detach().flatten().double(), rtol=1e-6)
    first = diagnosis.units[diagnosis.units["site"] == case.sites[0].name]
    kernel = parameters[case.sites[0].by.replace("bias", "kernel")].detach().double()
    np.testing.assert_allclose(first["weight_l2"], kernel.flatten(0, -2).norm(dim=0), rtol=1e-6)


def test_a_keras_model_without_parameters_yet_is_refused_in_a_sentence():
    """A subclassed model makes its parameters when it is first called."""
    keras = keras_models()

    class Late(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(3, activation="relu")

        def call(self, x):
            return self.dense(x)

    model = Late()
    with pytest.raises(UnsupportedModelError, match="makes its parameters in its first call"):
        relu_doctor.scan(model, torch.randn(8, 4))
    model(torch.randn(8, 4))
    assert relu_doctor.scan(model, torch.randn(8, 4)).sites["site"].tolist() == ["dense.relu()"]


SILERO = "6.2.3"
RATE = 16_000  # Hz
CHUNK = 512  # samples


def speech_like(count: int, chunks: int) -> Tensor:
    """Voiced and silent stretches under noise: float32 (count, chunks x 512) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(CHUNK * chunks) / RATE
    pitch = 80 + 200 * torch.rand(count, 1, 1, generator=generator)
    harmonic = torch.arange(1, 20).view(1, -1, 1)
    voice = (torch.sin(2 * torch.pi * pitch * harmonic * time) / harmonic).sum(1)
    voiced = (torch.rand(count, chunks, generator=generator) > 0.4).float().repeat_interleave(CHUNK, 1)
    noise = torch.randn(count, CHUNK * chunks, generator=generator) * torch.rand(count, 1, generator=generator)
    return (0.1 * voice * voiced + 0.02 * noise).clamp(-1, 1)


@pytest.mark.network
@torch.no_grad()
def test_sileros_voice_detector_is_seen_in_its_own_file(tmp_path):
    """A TorchScript file that keeps state from chunk to chunk: five sites, each unit's counts and extremes exact."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(tmp_path)]
    subprocess.run([*command, f"silero-vad=={SILERO}"], check=True)
    with zipfile.ZipFile(next(Path(tmp_path).glob("silero_vad-*.whl"))) as wheel:
        file = wheel.extract("silero_vad/data/silero_vad.jit", tmp_path)
    chunks = speech_like(8, 12).split(CHUNK, 1)

    def load() -> nn.Module:
        model = torch.jit.load(file).eval()
        parameters = dict(model.named_parameters())
        parameters["_model.encoder.0.reparam_conv.bias"][5] = -1e3
        return model

    by_itself = load()
    seen = [pre_activations(lambda chunk=chunk: by_itself(chunk, RATE)) for chunk in chunks]
    model = load()
    diagnosis = relu_doctor.scan(model, [(chunk, RATE) for chunk in chunks], exhaustive=True)
    names = [f"_model.encoder.{k}.activation" for k in range(4)] + ["_model.decoder.decoder.1"]
    assert diagnosis.sites[["site", "num_units"]].to_numpy().tolist() == [
        [name, units] for name, units in zip(names, (128, 64, 64, 128, 128), strict=True)
    ]
    assert diagnosis.summary["unobserved_sites"] == [name.replace("_model", "_model_8k") for name in names]
    assert 5 in dead_units(diagnosis)[names[0]]
    for place, name in enumerate(names):
        pre = torch.cat([calls[place].flatten(2) for calls in seen])
        units = diagnosis.units[diagnosis.units["site"] == name]
        assert units["inputs"].tolist() == [len(pre)] * pre.shape[1]
        assert units["inputs_fired"].tolist() == (pre > 0).any(2).sum(0).tolist()
        assert units["pre_max"].tolist() == pre.amax((0, 2)).double().tolist()
    assert not model._state.numel()  # it has heard nothing
