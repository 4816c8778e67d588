"""The contract (`Credit`, `CreditRule`) and the two primitives every rule is built from: edges and cuts."""
