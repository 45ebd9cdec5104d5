"""Flax NNX modules: token mixers, norms, positions, feed-forward, blocks, decoder."""

from .activations import activation
from .attention_mixer import AttentionMixer, AttentionMixerConfig, AttentionState
from .base_conv import BaseConv, BaseConvConfig, ProjectedConv
from .block import Block
from .centroids import Centroids, CentroidsConfig, ClusterSums
from .decoder import DecoderLM, DecoderState, Notes
from .embedders import FactoredEmbedding, ImageEmbedding
from .feed_forward import FeedForward, Gained, GatedLinearUnit, Identity
from .lightning_mixer import LightningMixer, LightningMixerConfig, LightningState
from .losses import LossSums, chunked_cross_entropy
from .norms import LayerNorm, RMSNorm, ScaleNorm, SRMSNorm, srms_norm, standardise, unit
from .notes import Note
from .port_centroids import PortCentroids, lloyd
from .port_routed_mixer import PortRoutedMixer, PortRoutedMixerConfig
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
  "Gained",
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
  "PortCentroids",
  "PortRoutedMixer",
  "PortRoutedMixerConfig",
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
  "ScaleNorm",
  "TaylorMixer",
  "TaylorMixerConfig",
  "TaylorState",
  "Tracked",
  "activation",
  "chunked_cross_entropy",
  "lloyd",
  "lrpe",
  "rotary",
  "srms_norm",
  "standardise",
  "unit",
]
