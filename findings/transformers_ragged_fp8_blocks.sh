#!/usr/bin/env bash
# A block-wise FP8 weight whose rows are no multiple of the block, read by transformers without a GPU.
#
# The format ("quant_method": "fp8", "weight_block_size": [128, 128]) gives each block of 128 x 128 a
# scale; DeepSeek-V3's own weights have a smaller last block where a size is no multiple of 128. So
# one would guess that 192 rows with 2 scales are 128 + 64 rows, on any machine, or an error.
#
# Without a GPU transformers 5.24.0 dequantizes while it loads, and takes the rows of a block to be
# rows / scales: 96 + 96. Rows 96 to 127 get the wrong scale, with no error and no warning.
#
# It matters wherever FP8 files are checked or converted on machines without a GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
cat > read.py <<'PYTHON'
import json

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

BLOCK = 128
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False,
)
state = {name: w.detach().clone() for name, w in LlamaForCausalLM(config).state_dict().items()}
up = "model.layers.0.mlp.up_proj"
state[up + ".weight"][BLOCK:] *= 16  # so that the two blocks' scales differ

stored, meant = {}, {}
for name, weight in state.items():
    if not name.endswith("_proj.weight"):
        stored[name] = weight.contiguous()
        continue
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    codes, values = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            box = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = weight[box].abs().max() / 448
            codes[box] = (weight[box] / scales[i, j]).to(torch.float8_e4m3fn)
            values[box] = codes[box].float() * scales[i, j]
    stored[name], stored[name + "_scale_inv"], meant[name] = codes, scales, values
save_file(stored, "model.safetensors", metadata={"format": "pt"})
written = config.to_dict() | {
    "architectures": ["LlamaForCausalLM"],
    "quantization_config": {
        "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    },
}
json.dump(written, open("config.json", "w"))

model = AutoModelForCausalLM.from_pretrained(".", dtype=torch.float32)
read = dict(model.named_parameters())[up + ".weight"].detach().float()
ratio = (read / meant[up + ".weight"]).nanmedian(dim=1).values
wrong = [row for row in range(192) if abs(ratio[row] - 1) > 0.01]
print(f"transformers {transformers.__version__}, torch {torch.__version__}, GPU: {torch.cuda.is_available()}")
print(f"rows of {up} with a wrong scale: {wrong[0]} to {wrong[-1]}" if wrong else "all rows right")
if wrong:
    print(f"they are {ratio[wrong[0]]:.2f} times what was stored")
assert not torch.cuda.is_available(), "this is about machines without a GPU"
assert wrong == list(range(96, 128)), wrong
PYTHON
env/bin/python read.py
