"""Networks that wait in host memory until they are used, or that processes hold parts of."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.parallel.mesh import Axis
from worldline.parallel.pinned import pin

ModuleType = TypeVar("ModuleType", bound=nn.Module)

_SLOTS = 2  # the block that computes, and the one that arrives
_BESIDE = 3_000_000_000  # bytes beside a module that could move whole: its activations, libraries
# tokens whose products take as long as a copy of their weights: 2 operations a weight and token at
# 790 TFLOP/s, 2 bytes a weight at 50 GB/s
_HIDING = 16_000


class Offloadable(Generic[ModuleType]):
    """A module that stays on its device, or waits in host memory until it is used.

    An offloaded module's weights have one home, the host. They are copied to the device for as long
    as `on_device` lasts and then dropped there: nothing is copied back, nothing is read from disk
    again. On a CPU nothing is offloaded.

    With a plan of its blocks an offloaded module is streamed: two blocks are on the device, and
    what belongs to none. Their home is pinned, so that the copy of a block runs beside the work of
    the one before: it costs no time where a block computes for longer than it travels. Where it
    does not, the module moves whole if the device has room for it.

    Attributes:
        whole: it moves whole, when it was last used or for want of a plan.
    """

    def __init__(
        self,
        module: ModuleType,
        device: torch.device | str,
        *,
        offload: bool,
        blocks: "BlockPlan | None" = None,
        prefer_whole: bool = False,
    ) -> None:
        """`prefer_whole` streams only where the device has no room for all."""
        self.module, self.blocks, self.prefer_whole = module, blocks, prefer_whole
        self.whole = prefer_whole or blocks is None
        self.device = torch.device(device)
        self.offload = offload and self.device.type != "cpu"
        self.pinned = False
        if self.offload and blocks is not None and self.device.type == "cuda":
            weights = [weight for block in blocks.split(module) for weight in block.values()]
            self.pinned = pin(weights, self.device, self)

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())

    @property
    def visiting_nbytes(self) -> int:
        """Bytes on the device at most while it is used."""
        sizes = {name: parameter.nbytes for name, parameter in self.module.named_parameters()}
        return self.blocks.count(sizes) if self.blocks and self.streamed else sum(sizes.values())

    @property
    def streamed(self) -> bool:
        """Whether blocks come to the device one after another."""
        return self.offload and not self.whole

    @contextmanager
    def on_device(self, tokens: int | None = None) -> Iterator[ModuleType]:
        """The module with its weights on the device; a streamed one can be called, not changed.

        `tokens` is how many a call computes, of a denoiser that is called again and again.
        """
        tensors = [*self.module.parameters(), *self.module.buffers()] if self.offload else []
        if self.offload and self.blocks:
            quick = tokens is not None and tokens < _HIDING
            self.whole = (self.prefer_whole or quick) and self._has_room()
        plan = self.blocks if self.streamed else None
        blocks = plan.split(self.module) if plan else []
        coming = {id(parameter) for block in blocks for parameter in block.values()}
        streaming = self._streaming(plan, blocks) if plan else nullcontext()
        with self._at_home_again(tensors), streaming:
            for tensor in tensors:
                if id(tensor) not in coming:
                    tensor.data = tensor.data.to(self.device, non_blocking=True)
            yield self.module

    def _has_room(self) -> bool:
        """Whether the device has room for all weights at once."""
        if self.device.type != "cuda":
            return True
        torch.cuda.empty_cache()
        return self.nbytes + _BESIDE <= torch.cuda.mem_get_info(self.device)[0]

    @contextmanager
    def _streaming(
        self, plan: "BlockPlan", blocks: list[dict[str, nn.Parameter]]
    ) -> Iterator[None]:
        stream = _BlockStream(blocks, self.device, early=self.pinned)
        with stream.hooks(self.module.get_submodule(plan.blocks).children()):
            yield

    @contextmanager
    def _at_home_again(self, tensors: list[Tensor]) -> Iterator[None]:
        """Bring tensors back to where they are now, and free what they had on the device."""
        home = [tensor.data for tensor in tensors]
        on_gpu = bool(tensors) and self.device.type == "cuda"
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.synchronize(self.device)
            for tensor, host in zip(tensors, home, strict=True):
                tensor.data = host
            if on_gpu:
                torch.cuda.empty_cache()  # so that the next part finds the room


@dataclass(frozen=True)
class BlockPlan:
    """How a network can run with few of its blocks on the device, or with rows of them."""

    blocks: str  # name of the list of blocks, which are called in order and are alike
    kept: tuple[str, ...] = ()  # ends of names of weights used outside of a block's call, too

    def split(self, module: nn.Module) -> list[dict[str, nn.Parameter]]:
        """Weights of each block that come and go, without those kept on the device, by name."""
        return [
            {name: p for name, p in block.named_parameters() if not name.endswith(self.kept)}
            for block in module.get_submodule(self.blocks).children()
        ]

    def count(self, sizes: Mapping[str, int]) -> int:
        """Number of weights, or of bytes, on the device at most, of those by all names of a module.

        A prefix may stand before names, as in files.
        """
        pattern = re.compile(rf"(?:^|\.){re.escape(self.blocks)}\.(\d+)\.")
        coming: Counter[str] = Counter()
        for name, size in sizes.items():
            if (block := pattern.search(name)) and not name.endswith(self.kept):
                coming[block[1]] += size
        return sum(sizes.values()) - coming.total() + _SLOTS * max(coming.values(), default=0)

    def cut(self, module: nn.Module, axis: Axis) -> dict[str, tuple[int, range]]:
        """Cut each matrix that comes and goes to the rows that this process holds.

        Matrices of too few rows stay whole.

        Args:
            module: on the meta device.
            axis: processes that hold parts.

        Returns:
            By name, the number of all rows, and those that are held.
        """
        held: dict[str, tuple[int, range]] = {}
        modules = [*module.get_submodule(self.blocks).children()]
        for number, (block, coming) in enumerate(zip(modules, self.split(module), strict=True)):
            for name, parameter in coming.items():
                size = -(-len(parameter) // axis.count)
                if parameter.dim() > 1 and (axis.count - 1) * size < len(parameter):
                    rows = range(len(parameter))[axis.rank * size : (axis.rank + 1) * size]
                    held[f"{self.blocks}.{number}.{name}"] = len(parameter), rows
                    owner, _, leaf = name.rpartition(".")
                    own = nn.Parameter(parameter.new_empty(len(rows), *parameter.shape[1:]))
                    setattr(block.get_submodule(owner), leaf, own)
        return held

    def count_shared(self, module: nn.Module, count: int) -> int:
        """Number of weights that one of `count` processes has on the device at most.

        Args:
            module: on the meta device; it is cut.
            count: of processes that hold parts.
        """
        held = self.cut(module, Axis(count=count))
        own = {name: parameter.numel() for name, parameter in module.named_parameters()}
        gathered = count * sum(own[name] for name in held) // max(1, len(self.split(module)))
        return sum(own.values()) + _SLOTS * gathered


class ShardedModule(Offloadable[ModuleType]):
    """A module of whose blocks each process holds some rows (ZeRO-3, arXiv 1910.02054, stage 3).

    Blocks are gathered one after another, each ahead of its use, beside the work of the one before.
    All processes call the module in step. The device holds the rows, two whole blocks while
    `on_device` lasts, and what belongs to no block; the rows wait in host memory where the module
    is offloaded.
    """

    def __init__(
        self,
        module: ModuleType,
        device: torch.device,
        rows: Mapping[str, tuple[int, range]],
        axis: Axis,
        *,
        offload: bool,
    ) -> None:
        """`rows` is what `BlockPlan.cut` returned, `axis` those that hold the others."""
        super().__init__(module, device, offload=offload)
        self.rows, self.axis = rows, axis

    @cached_property
    def apart(self) -> Axis:
        """Connections of their own: what blocks exchange does not wait for the next block.

        Made at the first use: one process alone may have failed to load its rows.
        """
        return self.axis.apart()

    @contextmanager
    def on_device(self, tokens: int | None = None) -> Iterator[ModuleType]:
        """The module; it can be called, not changed."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        with self._at_home_again(tensors):
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            with self._gathering():
                yield self.module

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        coming: dict[str, dict[str, nn.Parameter]] = {}
        for name in self.rows:
            blocks, number, inner = name.split(".", 2)
            coming.setdefault(f"{blocks}.{number}", {})[inner] = self.module.get_parameter(name)
        counts = {name.split(".", 2)[2]: count for name, (count, _) in self.rows.items()}
        stream = _GatheredBlocks([*coming.values()], self.device, self.apart, counts)
        with stream.hooks(map(self.module.get_submodule, coming)):
            yield


class _BlockStream:
    """Copies blocks into two slots on the device: one computes, the next arrives.

    Behind the last block the first is next, for a sampler calls the network again and again. Blocks
    that are in no slot lie at home, where their use on the device is an error.
    """

    def __init__(
        self,
        blocks: list[dict[str, nn.Parameter]],
        device: torch.device,
        gpu: Any = None,
        *,
        early: bool = True,
    ) -> None:
        """Make the slots.

        Args:
            blocks: weights that come and go, by name.
            device: where the slots are.
            gpu: streams and events as `torch.cuda` has them, which is the default of a GPU.
            early: the next block is sent for before one is computed; pageable memory would hold up
                the launch of its work.
        """
        self.blocks, self.device, self.early = blocks, device, early
        self.home = [{name: p.data for name, p in block.items()} for block in blocks]
        self.slots = [
            {name: self.new(name, t) for name, t in self.home[0].items()} for _ in range(_SLOTS)
        ]
        self.contents = [-1] * _SLOTS  # numbers of blocks
        self.computing = [False] * _SLOTS  # also of a block that an exception ended
        self.gpu = gpu or (torch.cuda if device.type == "cuda" else None)
        if self.gpu:
            self.copying = self.gpu.Stream(device)
            # what had the memory of the slots before may not have been used to its end
            self.copying.wait_stream(self.gpu.current_stream(device))
            self.arrived = [self.gpu.Event() for _ in self.slots]
            self.used = [self.gpu.Event() for _ in self.slots]

    def new(self, name: str, home: Tensor) -> Tensor:
        """Room for a weight of any block."""
        return torch.empty_like(home, device=self.device)

    def bring(self, name: str, home: Tensor, room: Tensor) -> Tensor:
        """A weight in its room on the device."""
        return room.copy_(home, non_blocking=True)

    @contextmanager
    def hooks(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """Let blocks bring their weights when they are called."""
        try:
            with ExitStack() as hooks:
                for number, block in enumerate(blocks):
                    before, after = partial(self.before, number), partial(self.after, number)
                    hooks.enter_context(block.register_forward_pre_hook(before))
                    hooks.enter_context(block.register_forward_hook(after))
                yield
        finally:
            for slot in range(_SLOTS):
                self.leave(slot)
            if self.gpu:  # what has their memory next waits for a block that still arrives
                self.gpu.current_stream(self.device).wait_stream(self.copying)
            self.slots.clear()

    def leave(self, slot: int) -> None:
        """Send a slot's block home; what is copied into the slot next waits for its work."""
        if self.computing[slot]:
            self.done(slot)
        if (number := self.contents[slot]) >= 0:
            for name, parameter in self.blocks[number].items():
                parameter.data = self.home[number][name]
        self.contents[slot] = -1

    def fetch(self, number: int, slot: int) -> None:
        """Begin to copy a block, unless it is there or on its way."""
        if number in self.contents:
            return
        self.leave(slot)
        self.contents[slot] = number
        with self.gpu.stream(self.copying) if self.gpu else nullcontext():
            if self.gpu:
                self.copying.wait_event(self.used[slot])
            for name, parameter in self.blocks[number].items():
                room = self.slots[slot][name]
                parameter.data = self.bring(name, self.home[number][name], room)
            if self.gpu:
                self.arrived[slot].record(self.copying)

    def before(self, number: int, *_: object) -> None:
        """Wait for block `number`, and send for the next."""
        self.fetch(number, 0)
        slot = self.contents.index(number)
        if self.gpu:
            self.gpu.current_stream(self.device).wait_event(self.arrived[slot])
        self.computing[slot] = True
        if self.early:
            self.fetch((number + 1) % len(self.blocks), 1 - slot)

    def after(self, number: int, *_: object) -> None:
        """Free the slot of block `number` once its work is done."""
        slot = self.contents.index(number)
        self.done(slot)
        if not self.early:
            self.fetch((number + 1) % len(self.blocks), 1 - slot)

    def done(self, slot: int) -> None:
        """Mark the end of a slot's work."""
        self.computing[slot] = False
        if self.gpu:
            self.used[slot].record(self.gpu.current_stream(self.device))


class _GatheredBlocks(_BlockStream):
    """Gathers blocks, of which each process holds some rows, into two slots on the device."""

    def __init__(
        self,
        blocks: list[dict[str, nn.Parameter]],
        device: torch.device,
        axis: Axis,
        rows: Mapping[str, int],
    ) -> None:
        """`rows` is the number of all rows of each weight of a block."""
        self.axis, self.rows = axis, rows
        super().__init__(blocks, device)

    def new(self, name: str, home: Tensor) -> Tensor:
        size = -(-self.rows[name] // self.axis.count)  # the last process may hold fewer
        return home.new_empty(self.axis.count * size, *home.shape[1:])

    def bring(self, name: str, home: Tensor, room: Tensor) -> Tensor:
        absent = len(room) // self.axis.count - len(home)
        own = F.pad(home, (0, 0, 0, absent)) if absent else home
        self.axis.gather_into(room, own)
        return room[: self.rows[name]]
