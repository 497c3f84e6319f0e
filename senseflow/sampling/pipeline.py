"""The one way images are drawn: a base's pipeline with the network of one model at a time in it."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import nn

from senseflow.common.devices import find_device
from senseflow.common.fields import FieldError
from senseflow.common.quiet import quiet
from senseflow.sampling.cut import Cuts, find_cuts
from senseflow.sampling.drawing import Machine
from senseflow.sampling.lora import add_lora
from senseflow.sampling.model import Model
from senseflow.teachers.family import Plan


class Pipeline:
    """Draws with one model at a time; encoders and VAE are read once, for all models of a base.

    Nothing is read before the first model is put in. Raises FieldError, a ValueError, for a device
    that is not there.
    """

    def __init__(self, model: Model, machine: Machine) -> None:
        self.model = model  # whose network is in it
        self.device = find_device(machine.device, machine.dtype)
        on_cpu = self.device.type == "cpu"
        if machine.offload and on_cpu:
            raise FieldError("offload", "moves idle parts from a GPU to the host: it needs a GPU")
        self.dtype: torch.dtype = getattr(
            torch, machine.dtype or ("float32" if on_cpu else "bfloat16")
        )
        self.stock: DiffusionPipeline = None  # until the first model is put in
        self._own_scheduler: SchedulerMixin = None
        self._machine = machine
        self._ready = False  # its network is on the device, with the LoRA

    @property
    def network(self) -> nn.Module:
        """The network of its model."""
        network: nn.Module = getattr(self.stock, self.model.family.component)
        return network

    def put(self, model: Model, network: nn.Module | None = None) -> None:
        """Make a model the one that draws; network: its own, where it was read before."""
        if model is not self.model or self.stock is None:
            self.read(model, network)
        if not self._ready:
            self._prepare(model)
            self._ready = True

    @quiet()
    def read(self, model: Model, network: nn.Module | None = None) -> None:
        """A model's network in the place of what was there, on the CPU.

        A teacher's is read with the pipeline, so that it is the first of its base, or given.
        """
        component = model.family.component
        if self.stock is None:
            self.stock = model.family.open_pipeline(
                model.paths.base, self._reader(model, network), self.dtype
            )
            self._own_scheduler = self.stock.scheduler
        else:
            self.stock.remove_all_hooks()
            self.stock.register_modules(**{component: None})  # its memory is free before the next
            network = model.build(self.dtype) if network is None else network
            self.stock.register_modules(**{component: network})
        self.model, self._ready = model, False

    def _reader(self, model: Model, network: nn.Module | None) -> Callable[[], nn.Module] | None:
        """Reads the network that draws, after the base's other parts are found to be whole; None:
        it is the base's own, and read with them."""
        if network is not None:
            return lambda: network
        return partial(model.build, self.dtype) if model.student else None

    @quiet()
    def _prepare(self, model: Model) -> None:
        """Add the LoRA, compile, move to the device."""
        if model.lora:
            add_lora(self.stock, model.lora)
        if self._machine.compile:
            for module in self.network.modules():
                if type(module).__name__ in model.family.blocks:
                    module.compile()
        if self._machine.offload:
            self.stock.enable_model_cpu_offload(device=self.device)
        else:
            self.stock.to(self.device)

    @quiet()
    def cuts(self, prompts: list[str], plan: Plan) -> list[Cuts]:
        """What the text encoders leave out of each prompt."""
        return find_cuts(self.stock, self.model.family, plan, prompts)

    @quiet()
    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        plan: Plan,
        on_step: Callable[[int], None] | None = None,
    ) -> tuple[list[Image.Image], list[float]]:
        """One batch: the image of each prompt from its own seed, whatever else is in the batch.

        Returns the images and the sigmas or timesteps that were used. on_step is called with the
        number of forwards done, and may raise to stop.
        """
        family = self.model.family
        self.stock.scheduler = family.make_scheduler(self._own_scheduler, plan)
        # on the CPU: the same numbers on every device
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        numbers = itertools.count(1)
        hook = self.network.register_forward_hook(
            lambda *forward: on_step(next(numbers)) if on_step else None
        )
        try:
            images = family.sample(self.stock, prompts, generators, plan)
        finally:
            hook.remove()
            self.stock.maybe_free_model_hooks()  # offloading begins anew after a stop
        # one for each forward: Heun's are nearly twice as many as the steps
        forwards = len(self.stock.scheduler.timesteps)
        used = getattr(self.stock.scheduler, family.levels.name)[:forwards].tolist()
        return images, plan.levels or used
