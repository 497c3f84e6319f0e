"""What makes the rows of a cache: the encoders that a run would call, one sample at a time.

One at a time, so that the bits of a row depend on nothing but its sample: not on the batch, nor on
how many ranks share the work, nor on where it was interrupted. Each rank holds the encoders whole.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from senseflow.data.ahead import in_order
from senseflow.data.cache_index import Field, key_of
from senseflow.data.items import Item, Position, UnreadableItem
from senseflow.data.json_images import JsonImages
from senseflow.distill.vfm_features import PromptEncoder
from senseflow.engine.adversary import load_clip
from senseflow.engine.inputs import Inputs, Setup
from senseflow.teachers.encoded import Posterior
from senseflow.weights.filling import channels_last, whole

Row = dict[str, Tensor]  # on the host, without the dimension of the batch
Encode = Callable[[list[str]], Iterator[Row]]  # of these keys, in their order


# ------------------------------------------------------------------- the fields, without weights


def fields_of(name: str, setup: Setup) -> dict[str, Field]:
    """Shapes and dtypes of a part's rows."""
    settings = setup.settings
    if name == "prompts":
        adapter = setup.family.load_adapter(
            settings, torch.device("meta"), lambda source: source.network
        )
        cond = adapter.encode_prompts([""])
        return {key: Field.of(value[0]) for key, value in cond.tensors.items()}
    if name == "clip":
        paths = setup.config.paths
        with torch.device("meta"):
            clip = PromptEncoder(paths.clip, None, paths.clip_quick_gelu, random_seed=0)
        return {"text": Field((clip.dim,), "float32")}
    latent = Field(setup.family.posterior_shape(settings), "float32")
    return {"mean": latent, "std": latent, "readable": Field((), "float32")}


# ----------------------------------------------------------------------------------- with weights


def open_encoder(name: str, inputs: Inputs, device: torch.device) -> Encode:
    """Load what a part needs; raises ValueError or OSError when it cannot be read."""
    config, family, settings, data = inputs.config, inputs.family, inputs.settings, inputs.data
    if name == "latents":
        assert isinstance(data, JsonImages)
        kind = family.networks().adapter
        vae = channels_last(whole(family.vae(settings), device))
        pairs = enumerate(zip(data.paths, data.prompts, strict=True))
        # Backwards, so that of equal pairs the first one stands.
        items = {key_of(*pair): i for i, pair in reversed([*pairs])}

        def posterior(image: Tensor) -> Posterior:
            return kind.posterior_of(vae, image.to(device))

        threads = max(1, config.data.num_workers)
        return partial(encode_images, posterior, data, items, threads)
    null = family.null_prompt_of(settings.folder)
    known = data.all_prompts() if null is None else [null, *data.all_prompts()]
    prompts = {key_of(prompt): prompt for prompt in known}
    if name == "clip":
        clip = load_clip(config.paths).to(device)
        return partial(encode_prompts, lambda prompt: {"text": clip([prompt])}, prompts)
    adapter = family.load_adapter(settings, device, partial(whole, device=device))
    return partial(encode_prompts, lambda p: adapter.encode_prompts([p]).tensors, prompts)


def encode_prompts(
    encode: Callable[[str], dict[str, Tensor]], prompts: dict[str, str], keys: list[str]
) -> Iterator[Row]:
    """Rows of prompts; raises ValueError, naming the prompt, for numbers that are not finite."""
    for key in keys:
        row = {name: value[0].cpu() for name, value in encode(prompts[key]).items()}
        yield finite(row, f"the encoding of {prompts[key]!r}", "precision.compute=float32")


def encode_images(
    encode: Callable[[Tensor], Posterior],
    data: JsonImages,
    items: dict[str, int],
    num_threads: int,
    keys: list[str],
) -> Iterator[Row]:
    """Rows of images, which threads read while the VAE computes; one that cannot be read is marked.

    Raises ValueError, naming the file, for numbers that are not finite.
    """

    def read(key: str) -> Item | None:
        try:
            return data.sample(Position(1, 0, items[key]), items[key])
        except UnreadableItem:
            return None

    for item in in_order(read, keys, num_threads, 2 * num_threads):
        if item is None:
            yield {"readable": torch.zeros(())}
            continue
        assert item.image is not None and item.path is not None
        posterior = encode(item.image[None])
        row = {name: value[0].cpu() for name, value in vars(posterior).items()}
        finite(row, f"the VAE's posterior of {item.path}", "precision.vae=float32")
        yield {**row, "readable": torch.ones(())}


def finite(row: Row, what: str, instead: str) -> Row:
    """A row whose numbers are all finite; raises ValueError, naming `what` it is and what to try
    `instead`."""
    if not all(value.isfinite().all() for value in row.values()):
        raise ValueError(f"{what} is not finite; try {instead}")
    return row
