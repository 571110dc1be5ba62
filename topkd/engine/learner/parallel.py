"""Weights that the optimiser updates: the student's own on every rank, or a sharded copy of them (FSDP2).

Replicated weights do not use torch's DDP module: ranks have different numbers of micro-batches, and the head runs
outside the model's forward. Their gradients are summed over ranks once per step, which gives the same mean. With FSDP2
a sharded copy holds gradients, optimiser state and master weights. The student itself stays unsharded for sampling,
evaluation and saving, and receives the weights after each step.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from topkd.engine.learner.batching import MicroBatch
from topkd.engine.learner.distributed import Ranks, Strategy
from topkd.engine.models.lora import unwrap_adapter
from topkd.engine.models.student import Precision, Student, split_logprobs
from topkd.topk.errors import ConfigError


class ParallelModel:
    """The weights that train: in this class the student's own, complete on every rank."""

    loss_scale = 1.0

    def __init__(self, student: Student, ranks: Ranks, precision: Precision, *, checkpointing: bool) -> None:
        self.student, self.ranks, self.precision = student, ranks, precision
        self.named = student.trained()
        self._layers = prepare_checkpointed_layers(student) if checkpointing else []

    def score(self, batch: MicroBatch[Any], ids: Tensor) -> Tensor:
        """Compute student logprobs [N, M] at the batch's rows, differentiable."""
        return self.student.token_logprobs(batch.input_ids, batch.attention_mask, batch.rows, ids, self.precision)

    def count_rounds(self, batches: int) -> int:
        """Count the forward passes that this rank makes for its micro-batches; ranks may differ."""
        return batches

    def reduce_gradients(self) -> None:
        """Sum the gradients over all ranks."""
        self.ranks.sum_gradients(self.named.values())

    def copy_to_student(self) -> None:
        """Copy the updated weights to the student; here they are its own, so do nothing."""

    def load_from_student(self) -> None:
        """Load the student's weights after anything but a step has changed them; here, do nothing."""

    def enable_training(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which a step's forward and backward passes run."""
        return enable_recomputation(self._layers)


class _Split(nn.Module):
    """Backbone and head in one forward call, so that FSDP gathers the head's weights where the loss reads them."""

    def __init__(self, backbone: nn.Module, head: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.backbone, self.head, self.precision = backbone, head, precision

    def forward(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See ``Student.token_logprobs``."""
        return split_logprobs(self.backbone, self.head, input_ids, attention_mask, rows, ids, self.precision)


class ShardedModel(ParallelModel):
    """A copy of the student whose weights, gradients and optimiser state are sharded over the ranks."""

    def __init__(self, student: Student, ranks: Ranks, precision: Precision, *, checkpointing: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if student.lora:
            raise ConfigError(
                'strategy "fsdp2" cannot train a LoRA adapter', hint='use strategy "ddp": adapters are small'
            )
        super().__init__(student, ranks, precision, checkpointing=False)
        self.loss_scale = float(ranks.size)  # FSDP averages gradients over ranks; the loss is already a global mean
        twin = copy.deepcopy(student.model)
        inner = Student(twin, *_same_modules(student, twin), student.device)
        self._layers = prepare_checkpointed_layers(inner) if checkpointing else []
        self.split = _Split(inner.backbone, inner.head, precision)
        names = {id(parameter): name for name, parameter in twin.named_parameters()}
        paths = {path: names[id(parameter)] for path, parameter in self.split.named_parameters()}
        mesh = init_device_mesh(student.device.type, (ranks.size,))
        for layer in _blocks(inner.backbone):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.split, mesh=mesh)
        self.named = {paths[path]: parameter for path, parameter in self.split.named_parameters()}
        self._whole = dict(student.model.named_parameters())

    def score(self, batch: MicroBatch[Any], ids: Tensor) -> Tensor:
        """Run the sharded backbone and head."""
        logp: Tensor = self.split(batch.input_ids, batch.attention_mask, batch.rows, ids)
        return logp

    def count_rounds(self, batches: int) -> int:
        """Count the passes of the rank that has most: each one gathers weights, so all ranks make the same number."""
        return self.ranks.most(batches)

    def reduce_gradients(self) -> None:
        """Do nothing: FSDP has already reduced and sharded the gradients."""

    @torch.no_grad()
    def copy_to_student(self) -> None:
        """Gather each updated weight into the student's."""
        for name, parameter in self.named.items():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            self._whole[name].copy_(whole)

    @torch.no_grad()
    def load_from_student(self) -> None:
        """Split the student's weights into the shards."""
        for name, parameter in self.named.items():
            whole = self._whole[name].detach()
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.copy_(whole)


def make_parallel_model(
    student: Student, ranks: Ranks, strategy: Strategy, precision: Precision, *, checkpointing: bool
) -> ParallelModel:
    """Make the parallel model of a strategy."""
    kind = ShardedModel if strategy == "fsdp2" and ranks.size > 1 else ParallelModel
    return kind(student, ranks, precision, checkpointing=checkpointing)


def clip_gradients(parameters: list[nn.Parameter], most: float) -> float:
    """Clip the global norm of the gradients and return the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def prepare_checkpointed_layers(student: Student) -> list[nn.Module]:
    """Find the layers that support gradient checkpointing, and set it up in them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model = unwrap_adapter(student.model)
    layers = [module for module in student.backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            "learner.gradient_checkpointing: transformers does not support it for this architecture",
            got=type(model).__name__,
        )
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    return layers


@contextlib.contextmanager
def enable_recomputation(layers: list[nn.Module]) -> Iterator[None]:
    """Switch recomputation on, by setting ``training`` on the layers alone (transformers reads that flag).

    Their submodules stay in eval mode (no dropout). Outside a step a sampler's KV cache still works.
    """
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _same_modules(student: Student, twin: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Find the copy's backbone and head."""
    names = {id(module): name for name, module in student.model.named_modules()}
    return twin.get_submodule(names[id(student.backbone)]), twin.get_submodule(names[id(student.head)])


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """Find the backbone's repeated layers: its longest ModuleList."""
    longest: list[nn.Module] = []
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(longest):
            longest = list(module)
    return longest
