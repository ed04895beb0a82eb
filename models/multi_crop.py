"""Backbone and head together, computing only the logits that the loss uses.

Letters: B images, G global crops, L local crops, N patch tokens of a global crop, M masked patches, D width, K outputs.
"""
import torch
from torch import nn


class MultiCropWrapper(nn.Module):
    """A network of the reference's names, `backbone.*` and `head.*`, for student and teacher alike.

    Through the K-wide last layer go the [CLS] tokens and the masked patches of the global crops, nothing else. With batch
    norm in the head the MLP before it sees every token, for its statistics are over all of them in the reference.
    """

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, global_crops, mask_index, masks=None, local_crops=None, patch_mean=False):
        """Logits of the given crops.

        Args:
            global_crops: [G*B, 3, S, S].
            mask_index: int64 [M], the cells of the flattened [G*B*N] whose patch logits are wanted.
            masks: bool [G*B, h, w] of the cells hidden from the network, or None.
            local_crops: [L*B, 3, s, s] or None.
            patch_mean: also give the mean over all G*B*N patches of their logits, for the centre. The last layer is
                linear, so this is the last layer of the mean bottleneck, in float32.

        Returns:
            cls [(G+L)*B, K], patches [M, K'], patch mean [K'] or None.
        """
        tokens = self.backbone(global_crops, mask=masks, return_all_tokens=True)  # [G*B, 1+N, D]
        every_token = self.head.has_batch_norm or patch_mean
        locals_ = None
        if local_crops is not None:
            locals_ = self.backbone(local_crops, return_all_tokens=self.head.has_batch_norm)  # [L*B, D] or [L*B, 1+n, D]

        # Row of a masked cell among [CLS] and patch tokens: one class token comes before the N patches of each crop.
        rows = mask_index + mask_index // (tokens.shape[1] - 1) + 1
        if every_token:
            z = self.head.bottleneck(tokens)  # [G*B, 1+N, 256]
            cls, patches = z[:, 0], z.flatten(0, 1)[rows]
            if locals_ is not None:
                z_local = self.head.bottleneck(locals_)
                cls = torch.cat((cls, z_local[:, 0] if z_local.ndim == 3 else z_local))
        else:
            cls = tokens[:, 0] if locals_ is None else torch.cat((tokens[:, 0], locals_))
            cls, patches = self.head.bottleneck(torch.cat((cls, tokens.flatten(0, 1)[rows]))).split((len(cls), len(rows)))
        cls_logits, patch_logits = self.head.last_layers(cls, patches)
        mean_logits = None
        if patch_mean:
            with torch.autocast(tokens.device.type, enabled=False):
                mean_logits = self.head.last_layer2(z[:, 1:].mean(dim=(0, 1)))
        return cls_logits, patch_logits, mean_logits
