"""Time: fixed-step solvers, settling to equilibria, filters and noise, the controller."""
