"""Logits of transformers for prompts of text, images and videos, and the same prompts as our engine takes them."""

import torch
from oracle import Model, hf_logits
from paged_driver import Paged
from torch import Tensor

from services.engine.schedule.positions import positions
from shared.messages import MediaKind, MediaSpan

Piece = list[int] | tuple[MediaKind, tuple[int, int, int]]  # token ids, or media with its grid in patches


class Judge:
    def __init__(self, model: Model) -> None:
        config = model.config
        self.model = model
        self.placeholder: int = config.image_token_id
        self.markers: dict[MediaKind, tuple[int, int]] = {
            "image": (config.image_start_token_id, config.image_end_token_id),
            "video": (config.video_start_token_id, config.video_end_token_id),
        }

    @torch.no_grad()
    def prompt(self, *pieces: Piece, seed: int = 0) -> tuple[Paged, Tensor]:
        """The prompt with the reference's own embeddings of random pixels, and the logits of all its tokens."""
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        spans: list[MediaSpan] = []
        embeds: dict[int, Tensor] = {}
        patches: dict[MediaKind, list[Tensor]] = {"image": [], "video": []}
        for piece in pieces:
            if isinstance(piece, list):
                ids += piece
                continue
            kind, (frames, height, width) = piece
            patches[kind].append(torch.randn(frames * height * width, 588, generator=generator))
            rows = self._embed(kind, patches[kind][-1], piece[1])
            start, end = self.markers[kind]
            spans.append(MediaSpan(kind, "key", len(ids) + 1, len(rows), piece[1]))
            embeds |= dict(enumerate(rows, len(ids) + 1))
            ids += [start, *[self.placeholder] * len(rows), end]
        place, _ = positions(len(ids), spans, 2, 2)
        media = {
            f"{kind}s": (torch.cat(items), torch.tensor([span.grid for span in spans if span.kind == kind]))
            for kind, items in patches.items()
            if items
        }
        return Paged(ids, torch.from_numpy(place), embeds), hf_logits(self.model, ids, **media)

    def _embed(self, kind: MediaKind, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        features = self.model.get_image_features if kind == "image" else self.model.get_video_features
        return torch.cat(features(patches.to(self.model.dtype), torch.tensor([grid])).pooler_output)
