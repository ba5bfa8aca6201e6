"""Attention of other libraries on tritonattn, in one file each, which is imported on demand.

sdpa             any model or code that calls F.scaled_dot_product_attention
torch_modules    torch.nn.MultiheadAttention, and with it TransformerEncoder, TransformerDecoder and Transformer
timm             timm's `attn_layer`
x_transformers   the `Attend` modules of x-transformers
diffusers        diffusers' `set_attention_backend`
torchtitan       an override of torchtitan's "varlen" attention
vllm             an attention backend for vLLM, which loads it as a plugin
sglang           likewise for SGLang
serving          parts that plugins for servers share
hub_kernel       the package as a kernel of the HuggingFace hub, for the library `kernels`

transformers has `tritonattn.huggingface`.

A library's scale stays a factor with the mode: logit = scale * sqrt(D) * factor * (q . k), which for "sqrt_dim"
is the library's logit. Cosine modes replace it. A bias on the logits is `attention`'s bias.

torch.nn.attention.register_flash_attention_impl is not used: it exchanges the CUDA kernels under every
F.scaled_dot_product_attention of the process, which has no scaling but a number.
"""

_FILES = {"diffusers", "hub_kernel", "sdpa", "sglang", "timm", "torch_modules", "torchtitan", "vllm", "x_transformers"}


def __dir__() -> list[str]:
    return sorted(_FILES & set(globals()))
