# Masked diffusion of GPT-2's size on OpenWebText: 85 M parameters in the blocks, 127 M in all.
#
#     python prepare_openwebtext.py                                       # once: 18 GB in data/openwebtext
#     torchrun --nproc_per_node=3 train.py config/owt_masked.py
#     torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=HOST train.py config/owt_masked.py \
#         --gradient_accumulation_steps=48 --batch_size=10                # and node_rank 1 on the other one
#     data/ and out-owt-masked/ are on a disk that all nodes see
#
# A step is 480 sequences x 1,024 tokens = 491,520 tokens, in 30 micro-batches, which divide over 1, 2, 3, 5,
# 6 and 10 GPUs. The same 480 sequences on 4 or 8 GPUs: --batch_size=12 --gradient_accumulation_steps=40; with
# less memory: --batch_size=4 --gradient_accumulation_steps=120.
# Length: 200,000 steps = 98 G tokens = 11 epochs of 9.0 G tokens.
#
# By arithmetic, none of it measured yet (bench.py measures):
# - work: 739 MFLOP a token, 7.3e19 in all. At 40 % of the 989 TFLOP/s of an H100 or H200: 2.1 days on one,
#   0.7 on 3, 0.3 on 8. An A100 takes 3.2 times as long.
# - learning rates: those of the small models in results/history.md, not tuned at this size.
# - memory: weights, gradients and average 1.5 GB, momenta 0.7 GB, DDP's copy of the gradients 0.5 GB; about
#   0.6 GB of activations for each sequence of a micro-batch: 13 GB with micro-batches of 16, 5.4 with 4.
# - on a CPU, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 THP_MEM_ALLOC_ENABLE=1 in the environment
#   saves a third of a step's time.
out_dir = "out-owt-masked"
dataset = "openwebtext"
process = "masked"
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
