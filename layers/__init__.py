"""Flax NNX modules: token mixers, norms, positions, feed-forward, blocks, decoder, classifier."""

from .activations import activation
from .attention_mixer import AttentionMixer, AttentionMixerConfig, AttentionState
from .base_conv import BaseConv, BaseConvConfig, ProjectedConv
from .bidirectional_gru import BidirectionalGRU
from .block import Block
from .centroids import Centroids, CentroidsConfig, ClusterSums
from .decoder import DecoderLM, DecoderState, Notes
from .embedders import FactoredEmbedding, ImageEmbedding
from .encoder_mixer import EncoderMixer
from .feed_forward import FeedForward, Gained, GatedLinearUnit, Identity
from .label_attention import LabelAttention
from .label_classifier import LabelClassifier
from .label_losses import binary_cross_entropy, label_margins, ldam_logits
from .lightning_mixer import LightningMixer, LightningMixerConfig, LightningState
from .losses import LossSums, chunked_cross_entropy
from .norms import LayerNorm, RMSNorm, ScaleNorm, SRMSNorm, srms_norm, standardise, unit
from .notes import Note
from .port_centroids import PortCentroids, lloyd
from .port_routed_mixer import PortRoutedMixer, PortRoutedMixerConfig
from .positions import LRPE, lrpe, rotary, sinusoids
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
  "BidirectionalGRU",
  "Block",
  "Centroids",
  "CentroidsConfig",
  "ClusterSums",
  "Constant",
  "DecoderLM",
  "DecoderState",
  "EncoderMixer",
  "FactoredEmbedding",
  "FeedForward",
  "Gained",
  "GatedLinearUnit",
  "Identity",
  "ImageEmbedding",
  "LRPE",
  "LabelAttention",
  "LabelClassifier",
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
  "binary_cross_entropy",
  "chunked_cross_entropy",
  "label_margins",
  "ldam_logits",
  "lloyd",
  "lrpe",
  "rotary",
  "sinusoids",
  "srms_norm",
  "standardise",
  "unit",
]
