"""Writes the frozen decoder fixtures beside this file: random weights, ids and the logits that transformers computes.

  python -m tests.golden.make_decoder   (needs torch and transformers; run it when a fixture must change)

Each folder: config.json and model.safetensors as transformers saves them, io.safetensors with ids, mask (1 = real
token; rows padded right, left and not at all) and logits [B, T, V].
"""

import pathlib

from safetensors.numpy import save_file
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SMALL = {'vocab_size': 40, 'bos_token_id': 0, 'eos_token_id': 0}
MODELS = {
    'gpt2': lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=16, n_embd=16, n_layer=2, n_head=4, n_inner=24, **SMALL)),
    'llama': lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=16, rope_parameters={'rope_type': 'default', 'rope_theta': 500.0},
        attention_bias=True, mlp_bias=True, **SMALL)),
}


def main() -> None:
  for name, make in MODELS.items():
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
      for p in model.parameters():
        p.add_(0.3 * torch.randn_like(p))  # biases and norms start at constants, which would hide mistakes
    ids = torch.randint(SMALL['vocab_size'], (3, 9))
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    mask[1, :4] = 0
    with torch.no_grad():
      logits = model.eval()(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    model.save_pretrained(HERE / name)
    (HERE / name / 'generation_config.json').unlink()
    save_file({'ids': ids.int().numpy(), 'mask': mask.int().numpy(), 'logits': logits.numpy()},
              HERE / name / 'io.safetensors')


if __name__ == '__main__':
  main()
