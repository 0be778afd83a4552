"""The vocabulary: configuration, machine types, parameters, run states, events."""
