"""The paper's tables, each by one command, from runs over several seeds."""
