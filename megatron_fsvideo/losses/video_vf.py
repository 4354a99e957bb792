"""Video vision-foundation-model alignment: the latents keep DINOv2's similarities (paper section 2.2.2, eq. 2-4).

Dimension letters: b samples, c channels of the latents, e of the features, f frames, t latent frames, h w the features'
rows and columns, n = t h w tokens of one sample.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LatentProjection(nn.Module):
    """The learnable linear layer W from the latents' channels to the features' (VA-VAE: without bias)."""

    def __init__(self, latent_channels: int, feature_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(feature_channels, latent_channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """latents [b, c, t, h', w'] -> [b, e, t, h, w] with `size` (h, w): W, then bilinear; in fp32."""
        with torch.autocast(latents.device.type, enabled=False):
            projected = torch.einsum("ec,bcthw->btehw", self.weight.float(), latents.float())
        resized = F.interpolate(projected.flatten(0, 1), size, mode="bilinear", align_corners=False)
        return resized.unflatten(0, projected.shape[:2]).transpose(1, 2)


def pool_features(features: Tensor, factor: int = 4) -> Tensor:
    """[b, e, 4k+1, h, w] -> [b, e, k+1, h, w]: frame 0 stays alone, then means of 4, as the causal encoder groups them.

    Raises:
        ValueError: another number of frames.
    """
    if features.shape[2] % factor != 1:
        raise ValueError(f"features of {features.shape[2]} frames cannot be pooled: the count must be {factor}k+1")
    first, rest = features[:, :, :1], features[:, :, 1:]
    return torch.cat([first, rest.unflatten(2, (-1, factor)).mean(dim=3)], dim=2)


def video_vf_losses(
    latents: Tensor,
    features: Tensor,
    cosine_margin: float = 0.5,
    distance_margin: float = 0.25,
    rows_at_once: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(L_v-mcos, L_v-mdms) of equations 2 and 3, two scalars; computed in fp32, the mean over the samples.

    Pairs of tokens are those of one sample, never of two.

    Args:
        latents: projected and resized, [b, e, t, h, w].
        features: pooled, of the same shape.
        rows_at_once: rows of the n x n similarity matrices that exist at a time (they are recomputed for the backward
            pass); 0 takes all.

    Raises:
        ValueError: shapes differ.
    """
    if latents.shape != features.shape:
        raise ValueError(
            f"projected latents {list(latents.shape)} and pooled features {list(features.shape)} differ in shape; with "
            "4k+1 frames both have k+1"
        )
    with torch.autocast(latents.device.type, enabled=False):
        ours, theirs = (F.normalize(x.float().flatten(2).transpose(1, 2), dim=2) for x in (latents, features))
        cosine = (ours * theirs).sum(dim=2)  # (b, n)
        matching = F.relu(1 - cosine_margin - cosine).mean()
        num_tokens = ours.shape[1]
        if rows_at_once <= 0 or rows_at_once >= num_tokens:
            return matching, _distance_sum(ours, theirs, ours, theirs, distance_margin) / cosine.numel() / num_tokens
        total = torch.zeros((), device=latents.device)
        for our_rows, their_rows in zip(ours.split(rows_at_once, 1), theirs.split(rows_at_once, 1), strict=True):
            total = total + checkpoint(
                _distance_sum, our_rows, their_rows, ours, theirs, distance_margin, use_reentrant=False
            )
        return matching, total / cosine.numel() / num_tokens


def adaptive_weight(reconstruction_loss: Tensor, alignment_loss: Tensor, last_layer: Tensor) -> Tensor:
    """VA-VAE's factor on the alignment loss: the ratio of both losses' gradient norms at the encoder's last weight."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, alignment_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e8).detach()


def _distance_sum(our_rows: Tensor, their_rows: Tensor, ours: Tensor, theirs: Tensor, margin: float) -> Tensor:
    """Sum over pairs (row, token) of how far both similarities differ beyond the margin; unit vectors [b, n, e]."""
    difference = our_rows @ ours.transpose(1, 2) - their_rows @ theirs.transpose(1, 2)
    return F.relu(difference.abs() - margin).sum()
