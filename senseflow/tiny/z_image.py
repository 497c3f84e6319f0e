"""The embedded Z-Image teacher: flow matching with captions dropped, guided by CFG.

Its network is given prompts without their padding, is told 1 - sigma, and predicts x_0 - eps.
"""

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor
from transformers import Qwen3Model

from senseflow.teachers.z_image.family import SHIFT
from senseflow.teachers.z_image.prompts import CHAT
from senseflow.tiny.lesson import Learner, flow_at, without_dropped
from senseflow.tiny.text import WIDTH, ChatText, new_qwen3, new_qwen_tokenizer

SIDE = 8  # patches: 64 pixels


class ZImageLearner(Learner):
    """An untrained Z-Image transformer with its text encoder."""

    text: ChatText

    def __init__(self) -> None:
        super().__init__()
        tokenizer = new_qwen_tokenizer()
        # the states before the last of three layers are read
        self.text = ChatText(CHAT, tokenizer, new_qwen3(Qwen3Model, tokenizer, 3, WIDTH))
        self.network = ZImageTransformer2DModel(
            in_channels=8,
            dim=64,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[64, SIDE, SIDE],  # a caption of 32 tokens, and the frame behind it
        )
        # They are made empty, as of a network that is to be read from a file.
        torch.nn.init.normal_(self.network.x_pad_token, std=0.02)
        torch.nn.init.normal_(self.network.cap_pad_token, std=0.02)
        self.empty = self.text.tokenize([""])

    def loss(
        self, x_0: Tensor, eps: Tensor, u: Tensor, ids: list[Tensor], dropped: Tensor
    ) -> Tensor:
        """Flow matching, (eps - x_0) against the velocity."""
        sigma, x_t = flow_at(x_0, eps, u)
        ids = without_dropped(ids, self.empty, dropped)
        lengths = self.text.seen(ids).sum(1).tolist()
        prompts = zip(self.text(ids), lengths, strict=True)
        frames = self.network(
            list(x_t[:, :, None]),
            1 - sigma,
            [states[:length] for states, length in prompts],
            return_dict=False,
        )[0]
        return F.mse_loss(-torch.stack(frames)[:, :, 0], eps - x_0)

    def pipeline(self, vae: AutoencoderKL) -> ZImagePipeline:
        """With Z-Image's shift."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        return ZImagePipeline(
            scheduler=scheduler, vae=vae, transformer=self.network, **self.text.components()
        )
