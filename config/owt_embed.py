# Diffusion on embeddings, of GPT-2's size, on OpenWebText: 85 M parameters in the blocks, 168 M in all.
#
#     python prepare_openwebtext.py                                       # once: 18 GB in data/openwebtext
#     torchrun --nproc_per_node=3 train.py config/owt_embed.py
#
# Steps, micro-batches and length as in config/owt_masked.py, so that the two bounds compare.
#
# embed_dim: 50,257 random embeddings, seen alone at the clean end, leave .037 nats in 8 dimensions and .0000
# in 16 or more; one nat of logsnr below it, .480 (8), .008 (16) and .0001 (32) (results/history.md). So 16
# is enough for the bound, and 32 leaves a margin for embeddings that training moves together.
#
# By arithmetic, none of it measured yet (bench.py measures):
# - work: 1,296 MFLOP a token (the head at every position, a second look at 3/4 of the rows), 1.3e20 in all.
#   At 40 % of the 989 TFLOP/s of an H100 or H200: 3.7 days on one, 1.2 on 3, 0.5 on 8.
# - memory: weights, gradients and average 2.0 GB, momenta 1.0 GB, DDP's copy of the gradients 0.7 GB; about
#   1.2 GB for each sequence of a micro-batch (logits, or probabilities, in float32 are 0.2): 22.9 GB with
#   micro-batches of 16, 8.5 with 4.
out_dir = "out-owt-embed"
dataset = "openwebtext"
process = "embed"
embed_dim = 32
batch_size = 16
gradient_accumulation_steps = 30
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
qk_norm = True
learning_rate = 0.01
adam_lr = 0.002
max_iters = 200_000
warmup_iters = 300
eval_interval = 2_000
eval_iters = 200
ema_decay = 0.9999
dtype = "bfloat16"
compile = True
