"""Patch a HuggingFace model layer by layer, see what each layer costs, and take it all back."""

import torch
import transformers

from tritonattn.huggingface import patch

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
model = transformers.LlamaForCausalLM(config).eval()  # or AutoModelForCausalLM.from_pretrained(...)
tokens = torch.randint(64, (1, 60))


@torch.no_grad()
def loss() -> float:
    return float(model(tokens, labels=tokens).loss)


before = loss()
print(f"as it is: {before:.4f}")
for layer in range(config.num_hidden_layers):
    with patch(model, scaling="key_norm_mean", layers=[layer]):
        print(f"key_norm_mean in layer {layer}: {loss() - before:+.4f}")

# Different scalings in different layers; a learned scaling is a module of each layer, and starts where the model was.
patched = patch(model, layers={0: "qwen_logn", "model.layers.[23].*": "ssmax"})
print(patched.report())
print("new parameters:", [name for name, _ in model.named_parameters() if "tritonattn" in name])
print(f"all of them: {loss() - before:+.4f}")

patched.undo()
assert loss() == before  # to the bit
