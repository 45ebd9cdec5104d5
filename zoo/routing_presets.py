"""Configurations of the Routing Transformer as plain records."""

from typing import Any

# What the released code has in common: the leaking membership, logits that are not scaled.
_OFFICIAL = dict(membership="official", routing_scale=1.0, initial_count=0.0)
_TEXT = dict(positions="shaw", block_size=256, max_distance=513, window_size=512, **_OFFICIAL)
_WIKITEXT: dict[str, Any] = dict(
  _TEXT, vocab_size=267738, features=1024, embedding_features=256, hidden=3072, heads=16,
  dropout=0.1, hidden_dropout=0.4, table_dropout=0.4, attention_dropout=0.4,
)  # fmt: skip
_ENWIK8: dict[str, Any] = dict(
  _TEXT, vocab_size=256, features=1024, hidden=3072, heads=8, dropout=0.1
)
_PG19: dict[str, Any] = dict(
  _TEXT, vocab_size=98302, features=1032, hidden=4096, heads=8, dropout=0.1, num_layers=22,
  routed_heads=2, clusters=16,
)  # fmt: skip
_IMAGE: dict[str, Any] = dict(
  vocab_size=256, positions="none", feed_forward="relu", block_size=256, hidden=2048, dropout=0.3,
  features=1024, **_OFFICIAL,
)  # fmt: skip
_IMAGENET = dict(_IMAGE, heads=16, num_layers=24, image_height=64, image_width=64, image_channels=3)
_CIFAR = dict(_IMAGE, heads=8, num_layers=12, image_height=32, image_width=32, image_channels=3)
_LOCAL = dict(routed_heads=0)


def _full(sizes: dict[str, Any], length: int) -> dict[str, Any]:
  """Every head sees everything before it: one block of the whole length."""
  return dict(sizes, block_size=length, look_back=0, **_LOCAL)


_BYTES = dict(vocab_size=257, features=128, heads=4, hidden=384, num_layers=4, block_size=32)
_DIGITS = dict(
  vocab_size=17, features=64, heads=4, hidden=128, num_layers=4, block_size=8, image_height=8,
  image_width=8, image_channels=1, positions="none", feed_forward="relu",
)  # fmt: skip

SIZES: dict[str, dict[str, Any]] = {
  # The sets of the released code, under its settings; they leak.
  "routing-wikitext103-4k": dict(
    _WIKITEXT, num_layers=14, routed_heads=8, clusters=8, token_dropout=0.25
  ),
  "routing-wikitext103-1k": dict(
    _WIKITEXT, num_layers=20, routed_heads=8, clusters=2, token_dropout=0.2
  ),
  "routing-enwik8-8k": dict(_ENWIK8, num_layers=12, routed_heads=4, clusters=16),
  "routing-enwik8-12k": dict(
    _ENWIK8,
    num_layers=12,
    routed_heads=4,
    clusters=48,
    window_size=256,
    block_size=128,
    max_distance=257,
  ),
  "routing-pg19-code": dict(_PG19, skip_first=21),  # as the code's function of that name says
  "routing-pg19": dict(_PG19, skip_first=20, feed_forward="relu"),  # the released checkpoint
  "routing-imagenet64": dict(_IMAGENET, routed_heads=4, clusters=8, window_size=2048),
  "routing-cifar10": dict(_CIFAR, routed_heads=4, clusters=6, window_size=512),
  "routing-mnist": dict(
    _IMAGE,
    features=512,
    heads=4,
    num_layers=12,
    routed_heads=2,
    clusters=7,
    window_size=112,
    block_size=56,
    image_height=28,
    image_width=28,
    image_channels=1,
  ),
  # As study notes give the paper's text; unlike the code.
  "routing-wikitext103-paper": dict(
    _WIKITEXT, num_layers=10, routed_heads=8, clusters=16, window_size=256, token_dropout=0.25
  ),
  "routing-enwik8-paper": dict(
    _ENWIK8, num_layers=12, routed_heads=4, clusters=32, window_size=256
  ),
  # The released code's baselines without routing.
  "routing-wikitext103-local-4k": dict(_WIKITEXT, num_layers=14, token_dropout=0.25, **_LOCAL),
  "routing-enwik8-local-8k": dict(
    _ENWIK8, num_layers=22, hidden_dropout=0.4, attention_dropout=0.4, **_LOCAL
  ),
  "routing-enwik8-local-12k": dict(
    _ENWIK8,
    num_layers=22,
    hidden_dropout=0.4,
    attention_dropout=0.4,
    block_size=128,
    max_distance=257,
    **_LOCAL,
  ),
  "routing-pg19-local-8k": dict(_PG19, num_layers=24, skip_first=21) | _LOCAL,
  "routing-imagenet64-local": dict(_IMAGENET, **_LOCAL),
  "routing-cifar10-local": dict(_CIFAR, **_LOCAL),
  "routing-wikitext103-full-4k": _full(dict(_WIKITEXT, num_layers=14, token_dropout=0.25), 4096),
  "routing-enwik8-full-8k": _full(dict(_ENWIK8, num_layers=22), 8192),
  "routing-imagenet64-full": _full(_IMAGENET, 12288),
  "routing-cifar10-full": _full(_CIFAR, 3072),
  # Laptop size; these do not leak.
  "routing-tiny": dict(
    _BYTES, routed_heads=1, skip_first=1, clusters=16, window_size=64, routed_keys="previous"
  ),
  "routing-tiny-local": dict(_BYTES, **_LOCAL),
  "routing-digits": dict(_DIGITS, routed_heads=2, clusters=4, window_size=16),
  "routing-digits-local": dict(_DIGITS, **_LOCAL),
}
