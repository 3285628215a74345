"""Group Relative Policy Optimization: the advantages and the loss, as pure tensors (paper, Section 2).

For one question the policy samples a group of G responses with rewards r_1..r_G:

    A_i   = r_i - mean(r)                                scale="mean", what the released weights used
    A_i   = (r_i - mean(r)) / std(r)                     scale="std", paper Eq. 2
    rho_t = exp(logp_t - logp_old_t)
    l_t   = -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)       per token, paper Eq. 1

No critic: the group's mean is the baseline. No KL term, no reference model, no entropy bonus. When
all rewards of a group are equal, every A_i is exactly 0 and the group teaches nothing: the paper's
*vanishing advantages*, which ssr.py answers.

What we do differently: the paper averages over each response's tokens, then over responses; the
released code over all tokens of a micro-batch, so that its gradient depends on how the batch is
cut. `token_weights` offers the paper's form ("sequence") and, by default, the mean over all
response tokens of the whole optimiser batch ("token"), which no cut into micro-batches or ranks can
change.

Next: ssr.py, what a batch trains on when many of its groups have no advantage.
"""

import torch


def group_advantages(rewards: torch.Tensor, scale: str = "mean") -> torch.Tensor:
    """rewards [N, G] -> advantages [N, G]: how much better than its siblings each response was.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if scale not in ("mean", "std"):
        raise ValueError(f"scale must be 'mean' or 'std', not {scale!r}")
    return advantages_against(rewards, rewards, scale)


def advantages_against(rewards: torch.Tensor, group: torch.Tensor, scale: str) -> torch.Tensor:
    """rewards [N, K] of any responses, against groups' rewards [N, G] -> advantages [N, K].

    >>> advantages_against(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]]), "std")
    tensor([[1., 0.]])
    """
    rewards, group = rewards.float(), group.float()
    equal = (group == group[:, :1]).all(-1, keepdim=True)
    # Equal rewards must give exactly 0, whatever the rounding of their mean; nor is there a deviation.
    mean = torch.where(equal, group[:, :1], group.mean(-1, keepdim=True))
    if scale == "mean":
        return rewards - mean
    # The population's deviation, so that one success in G does not depend on a correction for G.
    return (rewards - mean) / group.std(-1, correction=0, keepdim=True).masked_fill(equal, 1.0)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.35,
) -> torch.Tensor:
    """The clipped surrogate, per token: [B, R], 0 where mask is False.

    logprobs, old_logprobs  [B, R] under the policy being trained, and under the one that sampled
    advantages              [B] one per response, shared by its tokens
    mask                    [B, R] True where the token was sampled by the policy (EOS included, or
                            it never learns to stop; padding and forced tokens are not)

    >>> loss = policy_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -1.0]]),
    ...                    torch.tensor([1.0]), torch.tensor([[True, True]]))
    >>> loss  # the second ratio, e, is clipped to 1.35
    tensor([[-1.0000, -1.3500]])
    """
    # Masked first: a forced or padded position may hold any number, and 0 * inf is nan.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.where(mask, -torch.minimum(ratio * advantages, clipped * advantages), 0.0)


def is_clipped(logprobs, old_logprobs, advantages, mask, clip_low=0.2, clip_high=0.35):
    """Where the clip has stopped the gradient: bool [B, R], arguments as `policy_loss` takes them."""
    ratio = (logprobs - old_logprobs).exp()
    advantages = advantages[:, None]
    high = (ratio > 1 + clip_high) & (advantages > 0)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    return mask & (high | low)


def token_weights(mask: torch.Tensor, average: str, tokens: int, responses: int) -> torch.Tensor:
    """The weight of each token's loss in the mean over the optimiser batch: [B, R].

    mask                [B, R] of a micro-batch
    tokens, responses   counted over the whole optimiser batch, all micro-batches and ranks

    The weights of a whole batch sum to 1, so a sum of weighted losses is the mean.

    >>> token_weights(torch.tensor([[True, True], [True, False]]), "sequence", 3, 2)
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    if average == "token":
        return mask / tokens
    return mask / mask.sum(-1, keepdim=True).clamp(min=1) / responses
