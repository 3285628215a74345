"""Group Relative Policy Optimization: advantages, loss and log-probabilities, as pure tensors (Section 2).

For one question the policy samples a group of G responses with rewards r_1..r_G:

    A_i   = r_i - mean(r)                                scale="mean", what the released weights used
    A_i   = (r_i - mean(r)) / std(r)                     scale="std", paper Eq. 2
    rho_t = exp(logp_t - logp_old_t)
    l_t   = -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)       per token, paper Eq. 1

No critic: the group's mean is the baseline. No KL term, no reference model, no entropy bonus. When
all rewards of a group are equal, every A_i is exactly 0 and the group teaches nothing: the paper's
*vanishing advantages*, which ssr.py answers.

What we do differently: the released code averages over all tokens of a micro-batch, so that its gradient
depends on how the batch is cut. `token_weights` offers the paper's mean, over each response's tokens and
then over responses ("sequence"), and by default that over all response tokens of the optimiser batch
("token"); neither depends on a cut into micro-batches or ranks.

`token_logprobs` computes log pi without the largest tensor of such training, the logits [T, 151936]: only
where a response token is predicted, a chunk at a time, and again in the backward pass.

Next: ssr.py, what a batch trains on when many of its groups have no advantage.
"""

from functools import lru_cache

import torch


def group_advantages(rewards: torch.Tensor, scale: str = "mean", baseline=None) -> torch.Tensor:
    """rewards [N, G] -> advantages [N, G]: how much better than its siblings each response was.

    baseline  [N, K] the rewards to compare with, where they are not the same ones

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(torch.tensor([[1.0, 0.0]]), "std", torch.tensor([[0.0, 0.0, 0.0]]))
    tensor([[1., 0.]])
    """
    if scale not in ("mean", "std"):
        raise ValueError(f"scale must be 'mean' or 'std', not {scale!r}")
    rewards, group = rewards.float(), (rewards if baseline is None else baseline).float()
    equal = (group == group[:, :1]).all(-1, keepdim=True)
    # Equal rewards must give exactly 0, whatever the rounding of their mean; nor is there a deviation.
    mean = torch.where(equal, group[:, :1], group.mean(-1, keepdim=True))
    if scale == "mean":
        return rewards - mean
    # Divided by G, not by G - 1: one success among G then has an advantage of sqrt(G - 1).
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

    Times each response's draws, the weights of a whole batch sum to 1: a sum of weighted losses is the mean.

    >>> token_weights(torch.tensor([[True, True], [True, False]]), "sequence", 3, 2)
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    if average == "token":
        return mask / tokens
    return mask / mask.sum(-1, keepdim=True).clamp(min=1) / responses


# ---------------------------------------------------------------------------- log-probabilities

# Finite, so that 0 * NEVER is 0 and not nan in the entropy.
NEVER = -1e30
# Rows of the vocabulary projection computed at once: 512 x 151,936 floats are 311 MB.
CHUNK = 512


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [..., m, k] @ b [..., k, n], summed and kept in fp32 (float64 stays) where a and b are bf16.

    Qwen's keys carry biases of hundreds: scores rounded to bf16 lose what tells two keys apart. So do
    logits of 16 to 32, where neighbouring bf16 values are 1/8 apart.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if not a.is_cuda:  # no such kernel there
        return a.float() @ b.float()
    if b.dim() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    flat = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return flat.unflatten(0, a.shape[:-2])


class TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature) at the targets, a chunk of tokens at a time.

    Written out because torch has no derivative for a product of bf16 with an fp32 result, and because
    autograd would round the weight's gradient to bf16 at every chunk: here it is summed in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, banned_ids, temperature):
        """hidden [K, D], weight [V, D], targets [K] -> log-probability [K], entropy [K] in fp32."""
        logprobs, entropies, log_zs = [], [], []
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK)):
            logits = masked_logits(h, weight, banned_ids).div_(temperature)  # [up to CHUNK, V]
            log_z = logits.logsumexp(-1)
            logits.sub_(log_z[:, None])
            logprobs.append(logits.gather(-1, t[:, None])[:, 0])
            entropies.append(-(logits.exp() * logits).sum(-1))
            log_zs.append(log_z)
        logprob, entropy = torch.cat(logprobs), torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_zs))
        ctx.banned_ids, ctx.temperature = banned_ids, temperature
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, log_z = ctx.saved_tensors
        grad_hidden, grad_weight = [], None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        parts = (x.split(CHUNK) for x in (hidden, targets, log_z, grad / ctx.temperature))
        for h, t, z, g in zip(*parts):
            logits = masked_logits(h, weight, ctx.banned_ids).div_(ctx.temperature)
            d = logits.sub_(z[:, None]).exp_().mul_(-g[:, None])  # [up to CHUNK, V]: minus what is expected
            d = d.scatter_add_(1, t[:, None], g[:, None]).to(h.dtype)  # and plus what was said
            grad_hidden.append(d @ weight)
            if grad_weight is not None:
                # In slices: another [V, D] in fp32 is a gigabyte and more.
                for rows, columns in zip(grad_weight.chunk(8), d.chunk(8, dim=1)):
                    rows += product(columns.T, h)
        return torch.cat(grad_hidden), grad_weight, None, None, None


token_logprobs = TokenLogprobs.apply


def masked_logits(hidden, weight, banned_ids):
    """The vocabulary projection [K, V] in fp32, with NEVER at the banned ids."""
    logits = product(hidden, weight.T)
    return logits.index_fill_(-1, id_tensor(tuple(banned_ids), logits.device), NEVER)


@lru_cache
def id_tensor(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Made once: copied to a GPU at every token, it would make the host wait at every token."""
    return torch.tensor(ids, device=device)
