"""Flax NNX modules: token mixers, norms, positions, feed-forward, blocks, decoder."""

from .activations import activation
from .attention_mixer import AttentionMixer, AttentionMixerConfig, AttentionState
from .base_conv import BaseConv, BaseConvConfig, ProjectedConv
from .block import Block
from .centroids import Centroids, CentroidsConfig, ClusterSums
from .decoder import DecoderLM, DecoderState, Notes
from .embedders import FactoredEmbedding, ImageEmbedding
from .feed_forward import FeedForward, GatedLinearUnit, Identity
from .lightning_mixer import LightningMixer, LightningMixerConfig, LightningState
from .losses import LossSums, chunked_cross_entropy
from .norms import LayerNorm, RMSNorm, SRMSNorm, srms_norm, standardise
from .notes import Note
from .positions import LRPE, lrpe, rotary
from .rat_mixer import RatMixer, RatMixerConfig
from .recurrent_mixer import RecurrentMixer, RecurrentMixerConfig, RecurrentState
from .routed_mixer import RoutedMixer, RoutedMixerConfig, RoutedMixerState
from .taylor_mixer import TaylorMixer, TaylorMixerConfig, TaylorState
from .variables import Constant, Tracked

__all__ = [
  "AttentionMixer",
  "AttentionMixerConfig",
  "AttentionState",
  "BaseConv",
  "BaseConvConfig",
  "Block",
  "Centroids",
  "CentroidsConfig",
  "ClusterSums",
  "Constant",
  "DecoderLM",
  "DecoderState",
  "FactoredEmbedding",
  "FeedForward",
  "GatedLinearUnit",
  "Identity",
  "ImageEmbedding",
  "LRPE",
  "LayerNorm",
  "LightningMixer",
  "LightningMixerConfig",
  "LightningState",
  "LossSums",
  "Note",
  "Notes",
  "ProjectedConv",
  "RMSNorm",
  "RatMixer",
  "RatMixerConfig",
  "RecurrentMixer",
  "RecurrentMixerConfig",
  "RecurrentState",
  "RoutedMixer",
  "RoutedMixerConfig",
  "RoutedMixerState",
  "SRMSNorm",
  "TaylorMixer",
  "TaylorMixerConfig",
  "TaylorState",
  "Tracked",
  "activation",
  "chunked_cross_entropy",
  "lrpe",
  "rotary",
  "srms_norm",
  "standardise",
]
