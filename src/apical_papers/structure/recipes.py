"""No recipes for `apical compare`: the study has its own networks and loops.

No readable source with the papers' tables was found, so their claims are tested at a small size. The marks were written
before the run; the learning rates, and gamma of the L1 term, were chosen after inspecting one other seed. The chains are
measured for three seeds, the trained networks for all. In the |x| network of the flow, backpropagation preserves the length
of one sample's gradient at any depth, so any loss is due to the rule.
"""
