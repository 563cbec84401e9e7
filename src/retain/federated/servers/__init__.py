"""One file per federated method; importing the package registers all of them."""

from retain.federated.servers import disco, fedavg, fedopt, fedprox, robust, scaffold, svd_avg

__all__ = ["disco", "fedavg", "fedopt", "fedprox", "robust", "scaffold", "svd_avg"]
