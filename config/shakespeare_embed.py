# nanoGPT's baby GPT as a diffusion model on embeddings: 11.6 M parameters on Tiny Shakespeare, for one GPU.
#
#     python train.py config/shakespeare_embed.py
#
# The settings of config/shakespeare_masked.py, so that the two bounds compare. Not yet run at this size.
out_dir = "out-shakespeare-embed"
dataset = "characters"
process = "embed"
embed_dim = 16
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
qk_norm = True
dropout = 0.1
adam_lr = 0.005
max_iters = 20_000
eval_interval = 1_000
ema_decay = 0.999
