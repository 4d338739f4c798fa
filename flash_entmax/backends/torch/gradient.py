"""Derivatives in plain PyTorch, over the reached keys: the gradient, and the output's derivative along tangents."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.call import Problem, Tangents
from ...core.tensors import empty_stored_as
from ...core.threshold import probability, support_weight
from .output import product_with
from .reach import reached_groups
from .score import by_head, distances, products, scores
from .tiles import TileVisibility, add_to_keys, keys_of, pad_rows, tiles_of, unpadded


class Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    parameters: Tensor


def attention_backward(
    problem: Problem, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor,
    maximum: Tensor, offset: Tensor, reached_keys: Tensor, reaching_queries: Tensor, needs_parameters: bool,
) -> Gradients:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_parameters); see backends.Backend. Sums run in one order."""
    grad_query, grad_key, grad_value = (empty_stored_as(tensor, tensor.shape[-1]) for tensor in (query, key, value))
    grad_key, grad_value = (torch.zeros_like(tensor, dtype=offset.dtype) for tensor in (grad_key, grad_value))
    grad_parameters = offset.new_empty(3 if needs_parameters else 0, *query.shape[:2])
    for part, own, shared in by_head(problem):
        own_rows = (tensor[:, own] for tensor in (grad_output, query, value_mean, maximum, offset, reached_keys))
        pieces = gradients_of_heads(part, key[:, shared], value[:, shared], *own_rows, needs_parameters)
        grad_query[:, own] = pieces.query
        grad_key[:, shared] += pieces.key
        grad_value[:, shared] += pieces.value
        grad_parameters[:, :, own] = pieces.parameters
    return Gradients(grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_parameters)


def gradients_of_heads(
    problem: Problem, key: Tensor, value: Tensor, grad_output: Tensor, query: Tensor, value_mean: Tensor,
    maximum: Tensor, offset: Tensor, reached_keys: Tensor, needs_parameters: bool,
) -> Gradients:  # fmt: skip
    """`attention_backward` with one alpha and scale, in the compute dtype: dS = u (dP - delta), delta = dO . O1."""
    alpha, scale = problem.score.alpha, problem.score.scale
    visibility = TileVisibility.of(problem, query.device)
    blind = maximum == torch.inf  # what comes in there, NaN included, goes nowhere
    if blind.any():
        grad_output = grad_output.masked_fill(blind.unsqueeze(-1), 0.0)
    q, k, v, do = (tiles_of(tensor) for tensor in (query, key, value, grad_output))
    delta = pad_rows((grad_output.to(offset.dtype) * value_mean.to(offset.dtype)).sum(-1), 0.0)
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_alpha, grad_slopes = torch.zeros_like(delta), torch.zeros_like(delta)
    for group in reached_groups(problem, reached_keys):
        rows = group.rows
        k_group, v_group = (keys_of(problem, tensor, group) for tensor in (k, v))
        product = products(problem, q[rows], k_group)
        softcap_slope = 1 - product * product if problem.score.softcap else None
        distance = distances(scores(problem, visibility, product, group)[0], maximum[rows], offset[rows])
        p, u = probability(distance, alpha), support_weight(distance, alpha)
        dp = torch.bmm(do[rows], v_group.mT).sub_(delta[rows].unsqueeze(-1))
        if needs_parameters:
            # sum u (dP - delta) = 0 up to the rounding of value_mean, which shares that sum to 0 do not see.
            share = p * (1 - torch.where(distance > 0, distance, 1.0).log_())
            excess = share.sum(-1, keepdim=True) / u.sum(-1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
            grad_alpha[rows] = (share - u * excess).mul_(dp).sum(-1)
        ds = dp.mul_(u)
        if needs_parameters and visibility.alibi_slopes is not None:
            grad_slopes[rows] = -(ds * visibility.separations(group)).sum(-1)
        if softcap_slope is not None:
            ds.mul_(softcap_slope)
        dq[rows] = ds @ k_group
        add_to_keys(problem, dk, group, ds.mT @ q[rows])
        add_to_keys(problem, dv, group, p.mT @ do[rows])
    by_row = torch.stack((grad_alpha / (alpha - 1.0) ** 2, (dq * q).sum(-1), grad_slopes))
    grad_parameters = by_row.sum((-2, -1)).unflatten(-1, query.shape[:2])[: 3 * needs_parameters]
    gradients = zip((dq * scale, dk * scale, dv), (query, key, value), strict=True)
    return Gradients(*(unpadded(tiles, like) for tiles, like in gradients), grad_parameters)


def attention_tangent(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor, maximum: Tensor, offset: Tensor,
    reached_keys: Tensor, reaching_queries: Tensor, tangents: Tangents,
) -> Tensor:  # fmt: skip
    """The output's derivative along the tangents; see backends.Backend."""

    def part_of(tensor: Tensor | None, heads: slice) -> Tensor | None:
        return None if tensor is None else tensor[:, heads]

    result = torch.empty_like(value_mean)
    for part, own, shared in by_head(problem):
        own_tangents = Tangents(
            part_of(tangents.query, own),
            part_of(tangents.key, shared),
            part_of(tangents.value, shared),
            *(None if number is None else number[own].item() for number in (tangents.alpha, tangents.scale)),
            part_of(tangents.alibi_slopes, own),
        )
        own_rows = (tensor[:, own] for tensor in (query, value_mean, maximum, offset, reached_keys))
        result[:, own] = tangent_of_heads(part, key[:, shared], value[:, shared], *own_rows, own_tangents)
    return result


def tangent_of_heads(
    problem: Problem, key: Tensor, value: Tensor, query: Tensor, value_mean: Tensor, maximum: Tensor, offset: Tensor,
    reached_keys: Tensor, tangents: Tangents,
) -> Tensor:  # fmt: skip
    """`attention_tangent` with one alpha and scale, whose tangents are numbers, in the compute dtype.

    dO = sum dp v + sum p dv with t = u ds + r^2 d alpha p (1 - ln d) and dp = t - u sum t / sum u: sum p stays 1.
    """
    alpha, scale = problem.score.alpha, problem.score.scale
    visibility = TileVisibility.of(problem, query.device)
    q, k, v, mean = (tiles_of(tensor) for tensor in (query, key, value, value_mean))
    dq, dk, dv = (None if t is None else tiles_of(t) for t in (tangents.query, tangents.key, tangents.value))
    slopes = None if tangents.alibi_slopes is None else tangents.alibi_slopes.to(q.dtype).flatten()
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    result = torch.zeros_like(mean)
    for group in reached_groups(problem, reached_keys):
        rows = group.rows
        k_group, v_group = (keys_of(problem, tensor, group) for tensor in (k, v))
        product = products(problem, q[rows], k_group)
        softcap_slope = 1 - product * product if problem.score.softcap else 1.0
        ds = torch.zeros_like(product)
        if dq is not None:
            ds.add_(torch.bmm(dq[rows], k_group.mT), alpha=scale)
        if dk is not None:
            ds.add_(torch.bmm(q[rows], keys_of(problem, dk, group).mT), alpha=scale)
        if tangents.scale:
            ds.add_(torch.bmm(q[rows], k_group.mT), alpha=tangents.scale)
        ds.mul_(softcap_slope)
        if slopes is not None:
            ds.sub_(visibility.separations(group).mul_(slopes[group.unit][:, None, None]))
        distance = distances(scores(problem, visibility, product, group)[0], maximum[rows], offset[rows])
        p, u = probability(distance, alpha), support_weight(distance, alpha)
        dp = torch.where(u == 0, 0.0, u * ds)
        if tangents.alpha:
            share = p * (1 - torch.where(distance > 0, distance, 1.0).log_())
            dp.add_(share, alpha=tangents.alpha / (alpha - 1.0) ** 2)
        total = u.sum(-1, keepdim=True)
        dp.sub_(u * (dp.sum(-1, keepdim=True) / torch.where(total == 0, 1.0, total)))
        result[rows] = product_with(dp, v_group)
        if dv is not None:
            result[rows] += product_with(p, keys_of(problem, dv, group))
    return unpadded(result, query)
