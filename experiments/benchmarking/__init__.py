"""Parts of `attnzoo.experiments.benchmark`: peers, timing, reports."""
