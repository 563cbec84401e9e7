"""One file per federated method; importing the package registers all of them."""

from retain.federated.servers import disco, fedavg, fedprox

__all__ = ["disco", "fedavg", "fedprox"]
