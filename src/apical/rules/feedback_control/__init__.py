"""Deep feedback control: the rules, and the network, controller and solvers that they share."""
