"""Writes the frozen DeBERTa fixtures beside this file: random weights, inputs and what transformers computes.

  python -m tests.golden.make_deberta   (needs torch and transformers; run it when a fixture must change)

Each folder: config.json and model.safetensors as transformers saves them; io.safetensors with ids, mask (1 = real
token; rows padded right, left and not at all), types, positions, last hidden states [B, T, D] and logits [B, T, V].
"""

import pathlib

from safetensors.numpy import save_file
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SMALL = {'vocab_size': 40, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 4,
         'intermediate_size': 24, 'max_position_embeddings': 16, 'relative_attention': True}
MODELS = {
    'deberta': lambda: transformers.DebertaForMaskedLM(transformers.DebertaConfig(
        pos_att_type='c2p|p2c', max_relative_positions=5, type_vocab_size=2, **SMALL)),
    'deberta-v2': lambda: transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(
        pos_att_type=['p2c', 'c2p'], share_att_key=True, position_buckets=4, max_relative_positions=-1,
        norm_rel_ebd='layer_norm', conv_kernel_size=3, conv_act='gelu', position_biased_input=False, embedding_size=8,
        **SMALL)),
}


def main() -> None:
  for name, make in MODELS.items():
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
      for p in model.parameters():
        p.add_(0.3 * torch.randn_like(p))  # biases and norms start at constants, which would hide mistakes
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    mask[1, :4] = 0
    batch = {'ids': torch.randint(SMALL['vocab_size'], (3, 9)), 'mask': mask, 'types': torch.randint(2, (3, 9)),
             'positions': (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
      out = model(input_ids=batch['ids'], attention_mask=mask, token_type_ids=batch['types'],
                  position_ids=batch['positions'], output_hidden_states=True)
    model.save_pretrained(HERE / name)
    save_file({key: x.int().numpy() for key, x in batch.items()}
              | {'hidden': out.hidden_states[-1].numpy(), 'mlm': out.logits.numpy()}, HERE / name / 'io.safetensors')


if __name__ == '__main__':
  main()
