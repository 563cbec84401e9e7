"""Learning across clients that cannot share their data: a server's rule, clients that run the same `fit`, two engines."""
