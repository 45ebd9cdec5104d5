"""Recall against state size as published, to be drawn and listed beside what is measured here.

Read off the figures of "Simple linear attention language models balance the recall-throughput
tradeoff" (2024), figure 2, to about +-0.005 in recall. The sizes leave out the convolution's state.
Where a figure has several models of nearly one size, the best is listed. The task is `tasks.PAPER`,
the average over its seven kinds of test examples, best of four learning rates.
"""

# model -> ((bytes of state, recall), ...)
FIGURE_2: dict[str, tuple[tuple[int, float], ...]] = {
  "BASED": (
    (5_940, 0.539),
    (11_700, 0.711),
    (23_220, 0.818),
    (39_780, 0.892),
    (46_260, 0.853),
    (78_948, 0.976),
    (84_500, 0.956),
    (92_340, 0.871),
    (157_284, 0.992),
    (313_956, 0.992),
    (666_900, 0.998),
  ),
  "sliding window": tuple(
    (4 * 2 * 128 * window, recall)
    for window, recall in (
      (8, 0.07),
      (16, 0.14),
      (32, 0.31),
      (64, 0.51),
      (128, 0.66),
      (256, 0.80),
      (512, 0.94),
      (1024, 1.00),
    )
  ),
  "full attention": ((1 << 19, 1.00), (1 << 21, 1.00)),
  "Mamba": (
    (1 << 13, 0.57),
    (1 << 14, 0.61),
    (1 << 15, 0.77),
    (1 << 16, 0.80),
    (1 << 17, 0.90),
    (1 << 18, 0.91),
    (1 << 19, 0.86),
  ),
  "H3": ((1 << 13, 0.19), (1 << 15, 0.26), (1 << 17, 0.31), (1 << 19, 0.36)),
  "Hyena": ((1 << 19, 0.21), (1 << 20, 0.34), (1 << 21, 0.46), (1 << 22, 0.51)),
}
