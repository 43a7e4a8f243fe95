"""A MoLoRA layer in a Hugging Face model: attach, one optimizer step, and which experts the tokens took.

Runs anywhere in a few seconds: the model is tiny and random, nothing is downloaded.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from moe_medical.adapters.model import attach_adapters, trainable_parameters
from moe_medical.adapters.routing import BatchInputs
from moe_medical.config import MoloraConfig

torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=100, **shape))

# Four LoRA experts in each gate_proj, of which each token takes two; the base is frozen.
config = MoloraConfig(num_experts=4, top_k=2, rank=4, molora=(r".*\.gate_proj",), lora=())
context = attach_adapters(model, config, seed=0)
optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)

input_ids = torch.randint(0, 100, (2, 8))
with context.bind(BatchInputs(token_mask_BS=torch.ones(2, 8, dtype=torch.bool))):
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    for layer, routing in context.record.routings.items():
        print(layer, routing.expert_ids_TK.flatten().bincount(minlength=4).tolist())
optimizer.step()
print(f"loss {loss:.4f} -> {model(input_ids, labels=input_ids).loss:.4f}")
