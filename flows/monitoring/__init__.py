"""Re-evaluation of registered champions: the rule, the measurement, the round over all of them."""
