"""Flax NNX modules: token mixers, norms, positions, feed-forward, blocks, decoder."""

from .activations import activation
from .attention_mixer import AttentionMixer, AttentionMixerConfig, AttentionState
from .base_conv import BaseConv, BaseConvConfig, ProjectedConv
from .block import Block
from .decoder import DecoderLM, DecoderState
from .feed_forward import FeedForward, GatedLinearUnit, Identity
from .lightning_mixer import LightningMixer, LightningMixerConfig, LightningState
from .losses import LossSums, chunked_cross_entropy
from .norms import LayerNorm, RMSNorm, SRMSNorm, srms_norm
from .positions import LRPE, lrpe, rotary
from .rat_mixer import RatMixer, RatMixerConfig
from .recurrent_mixer import RecurrentMixer, RecurrentMixerConfig, RecurrentState
from .taylor_mixer import TaylorMixer, TaylorMixerConfig, TaylorState
from .variables import Constant

__all__ = [
  "LRPE",
  "AttentionMixer",
  "AttentionMixerConfig",
  "AttentionState",
  "BaseConv",
  "BaseConvConfig",
  "Block",
  "Constant",
  "DecoderLM",
  "DecoderState",
  "FeedForward",
  "GatedLinearUnit",
  "Identity",
  "LayerNorm",
  "LightningMixer",
  "LightningMixerConfig",
  "LightningState",
  "LossSums",
  "ProjectedConv",
  "RMSNorm",
  "RatMixer",
  "RatMixerConfig",
  "RecurrentMixer",
  "RecurrentMixerConfig",
  "RecurrentState",
  "SRMSNorm",
  "TaylorMixer",
  "TaylorMixerConfig",
  "TaylorState",
  "activation",
  "chunked_cross_entropy",
  "lrpe",
  "rotary",
  "srms_norm",
]
