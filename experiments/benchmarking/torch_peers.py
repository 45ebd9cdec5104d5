"""What a PyTorch user would write for the same job. torch is imported when one of them is used."""

import numpy as np


def torch_tensors(inputs, device, dtype=None):
  import torch

  def tensor(array):
    wide = np.asarray(array, np.float32)  # numpy's bfloat16 is unknown to torch
    return torch.tensor(wide, dtype=dtype or getattr(torch, str(array.dtype)), device=device)

  return {name: tensor(array) for name, array in inputs.items()}


def torch_pass(function, tensors, cotangent, pass_name, device):
  """Runs `function(query, key, value)`, torch layout as it likes, with or without the backward.

  Without a key where the queries are the keys.
  """
  import torch

  leaves = {name: tensors[name] for name in ("query", "key", "value") if name in tensors}
  backward = pass_name == "forward_backward"
  for leaf in leaves.values():
    leaf.requires_grad_(backward)

  def run():
    with torch.set_grad_enabled(backward):
      output = function(**leaves)
      gradients = torch.autograd.grad(output, leaves.values(), cotangent) if backward else ()
    if device == "cuda":
      torch.cuda.synchronize()
    pairs = zip((f"d_{name}" for name in leaves), gradients, strict=False)
    return {"output": output, **dict(pairs)}

  return run


def torch_decayed_linear(inputs, cotangent, pass_name, device):
  """The masked formula ((Q K^T) * M) V, as a PyTorch user would write it; step: the recurrence."""
  import torch

  if pass_name == "step":
    return torch_decayed_linear_step(inputs, device)
  tensors = torch_tensors(inputs, device)
  (do,) = torch_tensors(dict(do=cotangent[0].astype(inputs["value"].dtype)), device).values()
  log_decay = tensors.get("log_decay", torch.zeros(inputs["query"].shape[2], device=device))

  def formula(query, key, value):
    position = torch.arange(query.shape[1], device=device)
    distance = position[:, None] - position
    decay = torch.exp(log_decay[:, None, None] * distance.clamp(min=0))  # [H, T, T]
    mask = torch.where(distance >= 0, decay, 0.0).to(query.dtype)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, H, T, D]
    return (((q @ k.transpose(-1, -2)) * mask) @ v).transpose(1, 2)

  return torch_pass(formula, tensors, do, pass_name, device)


def torch_decayed_linear_step(inputs, device):
  import torch

  names = ("query", "key", "value", "log_decay", "state")
  tensors = torch_tensors(dict(zip(names, inputs, strict=True)), device)

  def run():
    with torch.no_grad():
      q, k, v = (tensors[name].float() for name in names[:3])
      decay = torch.exp(tensors["log_decay"])[:, None, None]
      state = decay * tensors["state"] + k[..., :, None] * v[..., None, :]
      output = (q[..., None, :] @ state)[..., 0, :]
    if device == "cuda":
      torch.cuda.synchronize()
    return {"output": output, "state": state}

  return run


def torch_taylor(inputs, cotangent, pass_name, device):
  """tril(1 + s + s^2 / 2) V over its row sums, as a PyTorch user would write it."""
  import torch

  tensors = torch_tensors(inputs, device)
  (do,) = torch_tensors(dict(do=cotangent[0].astype(inputs["value"].dtype)), device).values()

  def formula(query, key, value):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, H, T, D]
    scores = (q @ k.transpose(-1, -2)) * query.shape[-1] ** -0.5
    weights = torch.tril(1 + scores + 0.5 * scores**2)
    return ((weights @ v) / weights.sum(-1, keepdim=True)).transpose(1, 2)

  return torch_pass(formula, tensors, do, pass_name, device)


def torch_labels(inputs, cotangent, pass_name, device):
  """softmax(q k^T) v over the real tokens, the map of all labels in memory."""
  import torch

  tensors = torch_tensors(inputs, device)
  (do,) = torch_tensors(dict(do=cotangent[0].astype(inputs["value"].dtype)), device).values()
  padding = ~tensors.pop("mask")[:, None, :]

  def formula(query, key, value):
    scores = query @ key.transpose(1, 2)
    # Not -inf, with which documents without tokens would give NaN.
    weights = scores.masked_fill(padding, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(padding, 0) @ value

  return torch_pass(formula, tensors, do, pass_name, device)


def torch_routed(inputs, cotangent, pass_name, device, options):
  """Routed attention of queries that are the keys, as a PyTorch user would write it."""
  tensors = torch_tensors(inputs, device)
  (do,) = torch_tensors(dict(do=cotangent[0].astype(inputs["value"].dtype)), device).values()
  scores = tensors["scores"].float().transpose(1, 2)  # [B, H, T, C]
  attend = torch_recent if options.membership == "causal_recent" else torch_clusters

  def formula(query, value):
    x, v = (x.transpose(1, 2) for x in (query, value))
    return attend(x, v, scores, options).transpose(1, 2)

  return torch_pass(formula, tensors, do, pass_name, device)


def torch_clusters(x, v, scores, options):
  """The members of every cluster are gathered, attended over and added up. All [B, H, T, .]."""
  import torch

  batch, heads, length, clusters = scores.shape
  window = min(options.window_size, length)
  members = scores.transpose(2, 3).topk(window).indices.sort(-1).values.flatten(2)  # [B, H, C W]

  def rows(x):
    return x.gather(2, members[..., None].expand(-1, -1, -1, x.shape[-1])).unflatten(
      2, (-1, window)
    )

  q, v = rows(x), rows(v)
  future = torch.ones(window, window, dtype=torch.bool, device=x.device).triu(1)
  logits = (options.scale * q @ q.transpose(-1, -2)).masked_fill(future, -torch.inf)
  output = (logits.softmax(-1) @ v).flatten(2, 3)  # [B, H, C W, V]
  total = output.new_zeros(batch, heads, length, v.shape[-1])
  total = total.scatter_add(2, members[..., None].expand_as(output), output)
  count = output.new_zeros(batch, heads, length)
  count = count.scatter_add(2, members, torch.ones_like(members, dtype=count.dtype))
  return total / (count + options.combine_eps)[..., None]


def torch_recent(x, v, scores, options):
  """Tokens sorted by centroid, blocks of w queries with 2 w keys. All [B, H, T, .]."""
  import torch

  length, window = x.shape[2], options.window_size
  own = scores.argmax(-1)
  order = own.sort(dim=-1, stable=True).indices  # [B, H, T]
  short, place = -length % window, torch.arange(window, device=x.device)

  def blocks(x, padding):  # [B, H, T, .] -> [B, H, N, W, .]
    x = x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))
    x = torch.nn.functional.pad(x, (0, 0, 0, short), value=padding)
    return x.unflatten(2, (-1, window))

  def with_previous(x, padding):  # [B, H, N, 2 W, .]
    previous = torch.nn.functional.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0), value=padding)
    return torch.cat([previous, x], 3)

  q, labels = blocks(x, 0.0), blocks(own[..., None], -1)
  k, v = with_previous(q, 0.0), with_previous(blocks(v, 0.0), 0.0)
  distance = place[:, None] + window - torch.arange(2 * window, device=x.device)
  seen = (distance >= 0) & (distance < window)
  seen = seen & (labels == with_previous(labels, -2).transpose(-1, -2))
  logits = (options.scale * q @ k.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
  output = (logits.softmax(-1) @ v).flatten(2, 3)[:, :, :length]
  back = order.argsort(-1)[..., None].expand_as(output)
  return output.gather(2, back)
