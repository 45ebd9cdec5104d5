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
