"""A small Llama in NumPy, and its parameters as a tree for `llama_names`."""

import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "float32",
}
TOKENS = np.arange(24, dtype=np.int64).reshape(2, 12) * 7 % 48


def sizes(width=64, hidden=96):
    """By module of a layer, inputs and outputs."""
    return {
        "self_attn/q_proj": (width, 64),
        "self_attn/k_proj": (width, 32),
        "self_attn/v_proj": (width, 32),
        "self_attn/o_proj": (64, width),
        "mlp/gate_proj": (width, hidden),
        "mlp/up_proj": (width, hidden),
        "mlp/down_proj": (hidden, width),
    }


def init(width=64, hidden=96, seed=0):
    """Parameters, float32."""
    rng = np.random.default_rng(seed)

    def matrix(ins, outs):
        # Rows of very different sizes: scales matter.
        spread = np.exp2(rng.integers(-3, 4, outs))
        return (rng.normal(size=(ins, outs)) * spread / 3 / np.sqrt(ins)).astype(np.float32)

    def norm():
        return {"scale": rng.uniform(0.5, 2, width).astype(np.float32)}

    layers = {}
    for number in range(CONFIG["num_hidden_layers"]):
        layer = {"input_layernorm": norm(), "post_attention_layernorm": norm()}
        for path, shape in sizes(width, hidden).items():
            group, name = path.split("/")
            layer.setdefault(group, {})[name] = {"kernel": matrix(*shape)}
        layers[str(number)] = layer
    embedding = rng.normal(size=(CONFIG["vocab_size"], width)).astype(np.float32)
    return {
        "model": {"embed_tokens": {"embedding": embedding}, "layers": layers, "norm": norm()},
        "lm_head": {"kernel": matrix(width, CONFIG["vocab_size"])},
    }


def logits(params, tokens=TOKENS, cast=lambda path, x: x):
    """Logits in float64.

    Args:
      params: as of `init`, dense.
      tokens: integers, [batch, length].
      cast: `(path of a kernel, what is multiplied by it)` to what is in its place.
    """

    def dense(path, x):
        node = params
        for part in path.split("/"):
            node = node[part]
        return cast(f"{path}/kernel", x) @ np.asarray(node["kernel"], np.float64)

    def normed(x, node):
        mean = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(mean + CONFIG["rms_norm_eps"]) * np.asarray(node["scale"], np.float64)

    def rotated(x):
        half = x.shape[-1] // 2
        angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))
        return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin

    model = params["model"]
    x = np.asarray(model["embed_tokens"]["embedding"], np.float64)[tokens]
    for number, layer in model["layers"].items():
        here = f"model/layers/{number}"
        h = normed(x, layer["input_layernorm"])
        q, k, v = (dense(f"{here}/self_attn/{n}_proj", h) for n in "qkv")
        q, k, v = (t.reshape(*t.shape[:2], -1, CONFIG["head_dim"]) for t in (q, k, v))
        q, k = rotated(q), rotated(k)
        k, v = (np.repeat(t, q.shape[2] // t.shape[2], axis=2) for t in (k, v))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(CONFIG["head_dim"])
        scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + dense(f"{here}/self_attn/o_proj", mixed.reshape(*mixed.shape[:2], -1))
        h = normed(x, layer["post_attention_layernorm"])
        gate, up = (dense(f"{here}/mlp/{n}_proj", h) for n in ("gate", "up"))
        x = x + dense(f"{here}/mlp/down_proj", gate / (1 + np.exp(-gate)) * up)
    return dense("lm_head", normed(x, model["norm"]))
