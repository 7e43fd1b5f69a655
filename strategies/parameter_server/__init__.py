"""Parameter servers: some ranks hold the parameters, the others compute gradients. No strategy of the mesh.

                      ┌───────── server 0 (lead): keys 0 .. a, work, fences, the story of the run
    worker 0 ─ pull ──┤
    worker 1 ─ push ──┤          server 1: keys a .. b
    worker 2 …        └───────── …

    shards.py     which server has which range          messages.py   what they say, and how nobody waits in MPI
    ledger.py     who may do what: the four modes       server.py     pull, push, rows, update
    lead.py       the first server, which leads         worker.py     a trainer of one process whose updates are remote
    rows.py       embeddings that travel by rows

Invariant: mode sync = one process; in every mode, each sample of the steps is used once while nobody dies.
References: Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014; Dean et al., "Large
scale distributed deep networks" (asynchronous), NeurIPS 2012; Ho et al. (SSP), NeurIPS 2013; Chen et al. (backup
workers), arXiv:1604.00981; Stich, "Local SGD converges fast and communicates little", arXiv:1805.09767.
"""

from dtrain.strategies.parameter_server.lead import Lead
from dtrain.strategies.parameter_server.ledger import Ledger, WorkersLost
from dtrain.strategies.parameter_server.server import Server
from dtrain.strategies.parameter_server.shards import Serve, needs_whole
from dtrain.strategies.parameter_server.worker import ServerLost, Worker

__all__ = ["Lead", "Ledger", "Serve", "Server", "ServerLost", "Worker", "WorkersLost", "needs_whole"]
