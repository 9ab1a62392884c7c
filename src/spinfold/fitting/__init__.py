"""How maps are fitted: the loops, what they minimise, and the text and activations that they see."""
