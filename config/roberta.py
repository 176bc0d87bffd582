# From a pretrained RoBERTa to a masked diffusion model on OpenWebText, on one GPU.
#
#     python prepare_roberta.py roberta-base                    # once; or distilroberta-base, roberta-large
#     python prepare_openwebtext.py                             # once: 18 GB in data/openwebtext
#     python train.py config/roberta.py                         # or --init_from=out-roberta/model.pt alone
#     python train.py --init_from=resume --out_dir=out-roberta-diffusion
#     torchrun --nproc_per_node=4 train.py config/roberta.py    # layers and channels come from model.pt
#
# A step is 4 x 64 sequences x 512 tokens = 131,072 tokens; 10,000 steps = 1.3 G tokens = .15 epochs.
#
# All weights are trained by AdamW, at adam_lr, since Adam is what RoBERTa was trained with: to go on by Muon
# costs what was learned, the more the larger its steps (arXiv:2605.10468). 1e-4 is a sixth of the 6e-4 with
# which base was trained, whose steps had 32 times the tokens; for large, trained with 4e-4, --adam_lr=5e-5.
#
# Nothing of this is measured yet: no pretrained weights could be had where it was written. By arithmetic:
# - work: base has 85 M parameters in the layers, 39 M in the embeddings. 685 MFLOP a token, of which the head
#   at the [MASK]s, half of all places, takes 116: 9.0e17 in all. At 40 % of the 989 TFLOP/s of an H100 or
#   H200 that is 38 minutes; at 25 %, which is likelier where autocast keeps LayerNorms in float32, an hour.
#   An A100 takes 3.2 times as long; large 3.1 times, distil .6 times.
# - memory: weights, gradients, average and Adam's two momenta of 125 M parameters in float32, 2.5 GB; logits
#   of 64 x 256 [MASK]s in float32, their softmax and gradients, about 12 GB; activations, 34 C bytes for each
#   token and layer, 10 GB: 25 GB, or 8 GB with --batch_size=16 --gradient_accumulation_steps=16, which makes
#   steps of the same size.
out_dir = "out-roberta-diffusion"
init_from = "out-roberta/model.pt"
dataset = "openwebtext"
process = "masked"
batch_size = 64
gradient_accumulation_steps = 4
block_size = 512
dropout = 0.0               # RoBERTa's .1 was for many epochs
adam_lr = 1e-4
max_iters = 10_000
warmup_iters = 500
eval_interval = 1_000
eval_iters = 32
ema_decay = 0.999
