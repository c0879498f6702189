"""What others implement: the contracts of backends and the registry that finds them."""
