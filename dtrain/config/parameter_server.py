"""The keys of `parameter_server`."""

from typing import Literal

from msgspec.structs import fields

from dtrain.config.rules import Section, at_least, require


class ParameterServerConfig(Section, frozen=True, kw_only=True):
    """Parameter servers instead of a mesh: the last ranks serve the parameters, the others compute gradients."""

    servers: int = 0
    """Ranks that hold parameters, each a range of them; 0: none, the mesh of `parallel` is used."""
    mode: Literal["sync", "async", "ssp", "local_sgd"] = "sync"
    """sync: an update from the gradients of all workers (= one process); async: an update per gradient, nobody waits;
    ssp: so, but no worker is more than `staleness` gradients ahead of the slowest; local_sgd: workers update copies
    of their own, which are averaged every `period` steps."""
    staleness: int = 4
    """ssp: how many gradients the fastest worker may be ahead."""
    quorum: float = 1.0
    """sync, local_sgd: share of the workers that makes an update; the late ones' gradients are dropped, and counted."""
    period: int = 8
    """local_sgd: steps between two averages."""
    sparse: tuple[str, ...] = ()
    """Names of embeddings (such as embedding) whose rows are pulled and pushed only where a batch has their ids."""
    timeout: float = 60.0
    """Seconds of silence after which a worker that should compute is taken for dead. Longer than a microbatch takes."""
    transport: Literal["mpi", "sockets"] = "mpi"
    """What carries the messages. sockets: TCP beside MPI, which goes on when a worker is killed."""
    slow: tuple[float, ...] = ()
    """For experiments: worker i takes slow[i] times as long to compute as it needs."""

    def __post_init__(self) -> None:
        """Check the values."""
        at_least(0, "parameter_server", servers=self.servers, staleness=self.staleness)
        at_least(1, "parameter_server", period=self.period)
        require(0 < self.quorum <= 1, f"parameter_server.quorum: {self.quorum}; must be above 0, at most 1")
        require(self.timeout > 0, f"parameter_server.timeout: {self.timeout}; must be above 0")
        require(
            all(factor >= 1 for factor in self.slow),
            f"parameter_server.slow: {list(self.slow)}; every factor must be 1 or more",
        )
        given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        require(
            self.servers > 0 or not given,
            f"parameter_server.servers: 0; the other keys ({', '.join(given)}) need 1 or more",
        )
        require(
            self.quorum == 1 or self.mode in ("sync", "local_sgd"),
            f"parameter_server.quorum: {self.quorum}; mode {self.mode} waits for nobody: leave it out",
        )
        require(
            not self.sparse or self.mode != "local_sgd",
            f"parameter_server.sparse: {list(self.sparse)}; the workers of mode local_sgd update whole copies: "
            "leave it out",
        )
