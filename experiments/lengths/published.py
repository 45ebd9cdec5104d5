"""Speed and loss against length as published, to be listed beside what is measured here.

Read off the figures of "RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling"
(2025), first version, by eye.
"""

# One layer with its projections, width 2048, 16 heads, on a GH200 in bfloat16; milliseconds.
# Training and prefill of 262,144 tokens a call in rows of so many; decoding of 512 sequences by one
# token at that position. None: out of memory.
LATENCY_SETTING = "width 2048, 16 heads, 262,144 tokens a call, decoding 512 sequences; GH200, bf16"
LATENCY: dict[str, dict[int, dict[str, float | None]]] = {
  "train": {
    4096: {"attention": 120, "rat-16": 150, "rnn": 75},
    16384: {"attention": 275, "rat-16": 160, "rnn": 75},
    131072: {"attention": 1710, "rat-16": 250, "rnn": 130},
  },
  "prefill": {
    4096: {"attention": 37, "rat-16": 45, "rnn": 25},
    16384: {"attention": 80, "rat-16": 47, "rnn": 25},
    131072: {"attention": 495, "rat-16": 72, "rnn": 40},
  },
  "decode": {
    4096: {"attention": 6.6, "rat-16": 0.75, "rat-64": 0.6, "rnn": 0.4},
    16384: {"attention": 25.8, "rat-16": 2.4, "rat-64": 0.75, "rnn": 0.4},
    131072: {"attention": None, "rat-16": 13.1, "rat-64": 3.4, "rnn": 0.4},
  },
}

# Figure 6: loss at 4,096 and 16,384 tokens of models of 1.3 B weights that were trained in rows of
# 4,096. At 4,096 all but the recurrence lie between 2.58 and 2.60.
GENERALISATION_SETTING = "1.3 B weights, trained in rows of 4,096 tokens"
GENERALISATION: dict[str, tuple[str, str]] = {  # series -> (loss at 4,096, at 16,384)
  "rat-swa": ("2.58 to 2.60", "3.59"),
  "rat-swa-nope": ("2.58 to 2.60", "2.66"),
  "attention-swa": ("2.58 to 2.60", "above 3.8 from 7,000 on"),
  "attention-swa-nope": ("2.58 to 2.60", "3.03"),
  "rnn": ("2.69", "2.67"),
}

# "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models"
# (2025): validation loss by the length of the rows it is read in, from public notes on the version
# of 2026. The abstract speaks of 16 times the training length; no number for it is known to us.
EXTRAPOLATION_SETTING = "124 M weights, FineWeb-10B, trained in rows of 1,024 tokens"
EXTRAPOLATION_LENGTH = 1024
EXTRAPOLATION: dict[str, dict[int, float]] = {  # series -> tokens -> nats per token
  "softmax": {1024: 3.19, 2048: 4.17, 4096: 5.45, 8192: 6.28},
  "sigmoid": {1024: 3.19, 2048: 7.46, 4096: 11.84, 8192: 14.50},
  "relu": {1024: 3.21, 2048: 6.27, 4096: 8.50, 8192: 10.35},
  "lssa": {1024: 3.19, 2048: 4.13, 4096: 5.30, 8192: 5.94},
  "lssar-p3": {1024: 3.18, 2048: 4.24, 4096: 5.41, 8192: 6.30},
  "lssar-p15": {1024: 3.19, 2048: 3.19, 4096: 3.23, 8192: 3.32},
}
# Softmax with the re-weighting; whether it was trained with it is not known.
EXTRAPOLATION_REWEIGHTED_SOFTMAX = {8192: 7.02}
# Keys retrieved, without practice; wording, depths and number of trials are not known. LSSAR is
# said not to be at 0 at 8,192 tokens.
PASSKEY: dict[str, dict[int, float]] = {  # series -> tokens -> share
  "softmax": {1024: 0.64, 1536: 0.0, 4096: 0.0, 8192: 0.0},
  "lssar-p15": {1024: 0.86, 1536: 0.45, 4096: 0.20},
}
