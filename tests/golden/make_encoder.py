"""Writes the frozen encoder fixtures beside this file: random weights, inputs and what transformers computes.

  python -m tests.golden.make_encoder   (needs torch and transformers; run it when a fixture must change)

Each folder: config.json and model.safetensors as transformers saves them; io.safetensors with ids, mask (1 = real
token; rows padded right, left and not at all), types, positions, last hidden states [B, T, D] and the heads' outputs;
of BERT also grads.safetensors, the gradient of the mean negative log-likelihood of the targets whose weight is 1.
"""

import pathlib

from safetensors.numpy import save_file
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SMALL = {'vocab_size': 40, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 4,
         'intermediate_size': 24, 'max_position_embeddings': 16}
MODELS = {
    'bert': lambda: transformers.BertForPreTraining(transformers.BertConfig(hidden_act='gelu_new', **SMALL)),
    'roberta': lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        type_vocab_size=1, layer_norm_eps=1e-5, **SMALL)),
    'electra': lambda: transformers.ElectraForPreTraining(transformers.ElectraConfig(embedding_size=8, **SMALL)),
    'electra-generator': lambda: transformers.ElectraForMaskedLM(transformers.ElectraConfig(
        embedding_size=24, **SMALL)),
}


def main() -> None:
  for name, make in MODELS.items():
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
      for p in model.parameters():
        p.add_(0.3 * torch.randn_like(p))  # biases and norms start at constants, which would hide mistakes
    pad, types = model.config.pad_token_id, model.config.type_vocab_size
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    mask[1, :4] = 0
    ids = torch.where(mask == 1, torch.randint(2, SMALL['vocab_size'], (3, 9)), pad)
    batch = {'types': torch.randint(types, (3, 9)), 'positions': (mask.cumsum(-1) - 1).clamp(min=0)}
    inputs = {'input_ids': ids, 'attention_mask': mask, 'token_type_ids': batch['types']}
    if name != 'roberta':  # which counts positions itself
      inputs['position_ids'] = batch['positions']
    out = model(**inputs, output_hidden_states=True)
    outputs = {'hidden': out.hidden_states[-1], 'mlm': out.get('prediction_logits', out.get('logits'))}
    if name == 'bert':
      outputs['nsp'] = out.seq_relationship_logits
    if name == 'electra':
      outputs['rtd'] = outputs.pop('mlm')
    model.save_pretrained(HERE / name)
    if name == 'bert':
      batch['targets'], batch['weights'] = torch.randint(SMALL['vocab_size'], (3, 9)), mask * (torch.rand(3, 9) < 0.4)
      nll = -outputs['mlm'].log_softmax(-1).gather(-1, batch['targets'][..., None])[..., 0]
      ((nll * batch['weights']).sum() / batch['weights'].sum()).backward()
      grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
      save_file({key: g.numpy() for key, g in grads.items()}, HERE / name / 'grads.safetensors')
    batch |= {'ids': ids, 'mask': mask}
    save_file({key: x.int().numpy() for key, x in batch.items()}
              | {key: x.detach().numpy() for key, x in outputs.items()}, HERE / name / 'io.safetensors')


if __name__ == '__main__':
  main()
