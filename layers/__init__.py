"""Flax NNX modules: token mixers, norms, positions, feed-forward, blocks, decoder."""

from .activations import activation
from .block import Block
from .decoder import DecoderLM, DecoderState
from .feed_forward import GatedLinearUnit
from .lightning_mixer import LightningMixer, LightningMixerConfig, LightningState
from .losses import LossSums, chunked_cross_entropy
from .norms import LayerNorm, RMSNorm, SRMSNorm, srms_norm
from .positions import LRPE, lrpe
from .variables import Constant

__all__ = [
  "LRPE",
  "Block",
  "Constant",
  "DecoderLM",
  "DecoderState",
  "GatedLinearUnit",
  "LayerNorm",
  "LightningMixer",
  "LightningMixerConfig",
  "LightningState",
  "LossSums",
  "RMSNorm",
  "SRMSNorm",
  "activation",
  "chunked_cross_entropy",
  "lrpe",
  "srms_norm",
]
