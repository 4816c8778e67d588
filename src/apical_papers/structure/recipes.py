"""No recipes for `apical compare`: the study has networks and loops of its own.

None of the papers' tables was found in a source that could be read, so their claims are tested at a small size. The marks
were written before the run; the learning rates, and gamma of the L1 term, were chosen after a look at one other seed.
The chains are measured for three seeds, the trained networks for all. In the |x| network of the flow backpropagation keeps
the length of one sample's gradient at any depth, so what another rule loses is its own.
"""
