"""Who may connect and what they may do: the chain of backends, rules, caches."""
