"""The memory that outlives workers: ring headers, host rings and the retained latents, owned by the daemon.

Knows slots and bytes, nothing of what they hold.
"""

from math import prod

from configs.rings import RingName, history_shape, ring_specs
from configs.schema import RuntimeConfig, StageName
from ipc.errors import ConfigError
from ipc.shared_memory import SharedMemory
from ipc.slot_ring import Owner, SlotRing, header_nbytes
from workers.spec import PassedFd, PassedRing


class RingHouse:
    """Creates all shared memory of a run, and mends headers after a worker's death.

    Raises:
        ConfigError: there is not that much memory.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self._specs = ring_specs(config)
        self._all: list[SharedMemory] = []
        self._headers: dict[RingName, SharedMemory] = {}
        self._memories: dict[RingName, SharedMemory] = {}
        self._owners: dict[RingName, Owner] = {}
        for name, spec in self._specs.items():
            self._headers[name] = self._create(f"longlive-{name}-header", header_nbytes(spec.slots))
            ring = SlotRing(self._headers[name], spec.slots)
            ring.initialise()
            self._owners[name] = Owner(ring)
            if not spec.on_device:
                self._memories[name] = self._create(f"longlive-{name}", spec.slots * spec.slot_nbytes)
        self._history = self._create("longlive-history", prod(history_shape(config)) * 4)

    def _create(self, name: str, nbytes: int) -> SharedMemory:
        try:
            memory = SharedMemory.create(name, nbytes)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"rings: {name} needs {nbytes} bytes of shared memory, found too little ({error.strerror}); free memory"
                " or make rings smaller"
            ) from error
        self._all.append(memory)
        return memory

    def passed(self) -> dict[RingName, PassedRing]:
        """What a worker needs of the rings."""
        return {name: self._passed(name) for name in self._specs}

    def _passed(self, name: RingName) -> PassedRing:
        memory = self._memories.get(name)
        return PassedRing(PassedFd(self._headers[name].fd), PassedFd(memory.fd) if memory else None)

    @property
    def history(self) -> PassedFd:
        return PassedFd(self._history.fd)

    def mend_after(self, stage: StageName) -> None:
        """Makes the rings usable for a stage's successor: half-filled slots are free, held ones ready again."""
        for name, spec in self._specs.items():
            owner = self._owners[name]
            if spec.producer == stage and spec.on_device:
                owner.raise_epoch()
            elif spec.producer == stage:
                owner.free_filling()
            elif spec.consumer == stage:
                owner.requeue_held()

    def close(self) -> None:
        for memory in self._all:
            memory.close()
